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

/// What QEMU itself takes beside a machine's memory, in MiB: mostly code that it has translated.
const BESIDE: u64 = 320;

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

/// Checks that there is memory for machines with so many MiB each, all at once.
///
/// # Errors
/// There isn't.
pub fn memory(machines: &[u32]) -> Result<()> {
    let available = available(&fs::read_to_string("/proc/meminfo")?).context("no MemAvailable in /proc/meminfo")?;
    enough(machines, available)
}

fn enough(machines: &[u32], available: u64) -> Result<()> {
    let needed: u64 = machines.iter().map(|wanted| u64::from(*wanted) + BESIDE).sum();
    let sizes: Vec<String> = machines.iter().map(u32::to_string).collect();
    ensure!(
        available >= needed,
        "{} with {} MiB: this takes {needed} MiB of memory, of which {available} are available; take machines down, or give \
         them less: memory=128",
        if machines.len() == 1 { "a machine" } else { "machines" },
        sizes.join(" + ")
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

    /// What it means, and why it isn't the better one.
    #[must_use]
    pub fn in_words(self) -> &'static str {
        match self {
            Self::Kvm => "processors by KVM",
            Self::Tcg if Path::new("/dev/kvm").exists() => {
                "no KVM: no kernel boots by /dev/kvm here, as below some hypervisors; processors are emulated, some ten times \
                 slower"
            }
            Self::Tcg => {
                "no KVM: there is no /dev/kvm (where the processor can do it: modprobe kvm_intel or kvm_amd); processors are \
                 emulated, some ten times slower"
            }
        }
    }

    /// QEMU's option.
    #[must_use]
    pub fn option(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg,thread=multi,tb-size=512",
        }
    }

    /// QEMU's processor. What `max` has beyond the plain one costs a fifth of the time where it is emulated.
    #[must_use]
    pub fn processor(self) -> &'static str {
        match self {
            Self::Kvm => "max",
            Self::Tcg => "qemu64",
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
        qemu.args(["-accel", self.option(), "-cpu", self.processor(), "-m", "256", "-display", "none", "-kernel"]);
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
        let available = available("MemTotal:  999 kB\nMemAvailable:     409600 kB\n");
        assert_eq!(available, Some(400));
        assert!(enough(&[40], 400).is_ok());
        for (machines, needed) in [(&[256][..], "takes 576 MiB"), (&[20, 20], "takes 680 MiB")] {
            let told = enough(machines, 400).map_err(|error| error.to_string()).err().unwrap_or_default();
            assert!(told.contains(&format!("{needed} of memory, of which 400 are available")), "{told}");
        }
    }
}
