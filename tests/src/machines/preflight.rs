//! What machines need of this one: tools, memory, and whether the kernel's virtualisation works. Told before anything starts.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::kernels::{self, Kernel};
use crate::lab::preflight;

/// Every tool with the Debian package that has it.
const TOOLS: [(&str, &str); 17] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-img", "qemu-utils"),
    ("apt-get", "apt"),
    ("mmdebstrap", "mmdebstrap"),
    ("dpkg-scanpackages", "dpkg-dev"),
    ("dpkg-deb", "dpkg"),
    ("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring"),
    ("depmod", "kmod"),
    ("mke2fs", "e2fsprogs"),
    ("busybox", "busybox-static"),
    ("dash", "dash"),
    ("strip", "binutils"),
    ("unxz", "xz-utils"),
    ("zstd", "zstd"),
    ("ethtool", "ethtool"),
    ("tcpdump", "tcpdump"),
    ("conntrack", "conntrack"),
];

/// What QEMU itself takes beside a machine's memory, in MiB.
const BESIDE: u64 = 160;

/// Checks that all tools are there.
///
/// # Errors
/// Names everything that is missing and how to get it.
pub fn tools() -> Result<()> {
    ensure!(cfg!(target_arch = "x86_64"), "machines run kernels and programs for x86_64 only, as this machine is not");
    let missing = preflight::missing(&TOOLS);
    let names = missing.join(", ");
    ensure!(missing.is_empty(), "missing: {names}; `tests/deps machines` installs what machines need");
    Ok(())
}

/// Checks that there is memory for a machine with so many MiB.
///
/// # Errors
/// There isn't.
pub fn memory(wanted: u32) -> Result<()> {
    let available = available(&fs::read_to_string("/proc/meminfo")?).context("no MemAvailable in /proc/meminfo")?;
    enough(wanted, available)
}

fn enough(wanted: u32, available: u64) -> Result<()> {
    let needed = u64::from(wanted) + BESIDE;
    ensure!(
        available >= needed,
        "a machine with {wanted} MiB needs {needed} MiB of memory, of which {available} are available; take machines down, \
         or give it less: memory=128"
    );
    Ok(())
}

/// MemAvailable in MiB (proc(5)).
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib / 1024)
}

/// How QEMU runs the processor of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// By the kernel of this one.
    Kvm,
    /// By translation: some ten times slower, and everywhere.
    Tcg,
}

impl Accelerator {
    /// The better one that works here, tried with this kernel once in each boot of this machine.
    ///
    /// # Errors
    /// The cache can't be written.
    pub fn of_this_machine(kernel: &Kernel) -> Result<Self> {
        if !Path::new("/dev/kvm").exists() {
            return Ok(Self::Tcg);
        }
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let record = kernels::cache()?.join(format!("kvm-{}", boot.trim()));
        if let Ok(known) = fs::read_to_string(&record) {
            return Ok(if known == "works" { Self::Kvm } else { Self::Tcg });
        }
        let works = Self::Kvm.boots(kernel, Duration::from_secs(10))?;
        fs::write(record, if works { "works" } else { "does not work" })?;
        Ok(if works { Self::Kvm } else { Self::Tcg })
    }

    /// QEMU's option.
    #[must_use]
    pub fn option(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg,thread=multi,tb-size=128",
        }
    }

    /// Whether a kernel runs by it until it misses a root and ends the machine, within a limit. `/dev/kvm` alone doesn't
    /// tell: below another hypervisor it may open, run a few instructions, and then hang.
    ///
    /// # Errors
    /// There is no such kernel in the cache.
    pub fn boots(self, kernel: &Kernel, limit: Duration) -> Result<bool> {
        let console = tempfile::NamedTempFile::new()?;
        let mut qemu = Command::new("timeout");
        qemu.args(["--signal=KILL", &limit.as_secs().to_string(), "qemu-system-x86_64", "-nodefaults", "-no-reboot"]);
        qemu.args(["-accel", self.option(), "-cpu", "max", "-m", "256", "-display", "none", "-kernel"]);
        qemu.arg(kernel.file("vmlinuz")?).args(["-append", "console=ttyS0 panic=-1", "-serial"]);
        qemu.arg(format!("file:{}", console.path().display()));
        let output = qemu.output().context("timeout")?;
        let said = String::from_utf8_lossy(&fs::read(console.path())?).into_owned();
        Ok(output.status.success() && said.contains("Unable to mount root"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_memory_is_told_with_both_figures() {
        let available = available("MemTotal:  999 kB\nMemAvailable:     204800 kB\n");
        assert_eq!(available, Some(200));
        assert!(enough(40, 200).is_ok());
        let told = enough(256, 200).map_err(|error| error.to_string());
        assert!(told.is_err_and(|told| told.contains("needs 416 MiB of memory, of which 200 are available")));
    }
}
