//! A machine: QEMU with a kernel of Debian's, on the underlay of a [`Lab`](crate::lab::Lab), with a disk that lasts.
//!
//! QEMU is a process of the underlay's machine. So it ends with the lab, however that ends, and taps, sockets and disks go
//! with it. [`Vm::power_off`] is pulling the plug: what its kernel had not written by then is lost.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::agent::{self, Answer};
use super::debian;
use super::kernels::Kernel;
use super::monitor::Monitor;
use super::preflight::{self, Accelerator};
use super::record::{self, Seen};
use super::spec::{Spec, System};
use crate::lab::addresses::{self, Families};
use crate::lab::underlay::BRIDGE;
use crate::lab::{Machine, Underlay, wait_until};

/// How long a machine may take to boot: seconds, and more where others compile.
const BOOT: Duration = Duration::from_secs(600);
/// How long a script may run there.
const SCRIPT: Duration = Duration::from_secs(120);
/// How long fabricd may take to get ready: its modules are loaded meanwhile.
const READY: Duration = Duration::from_secs(600);
/// What `init.sh` says when all is done.
const IS_UP: &str = "machine is up";
/// Machines are numbered from here on, so that none has the address of a node of the Lab.
pub(super) const FIRST: u16 = 101;

/// A machine, on or off.
#[derive(Debug)]
pub struct Vm {
    /// Its name: `linux-6.1`.
    pub name: String,
    /// What it is to be.
    pub spec: Spec,
    /// Its number among all nodes of the lab, from which its addresses come.
    pub index: u16,
    underlay: Arc<Underlay>,
    families: Families,
    /// Exported before each script.
    env: Vec<(String, String)>,
    /// Its third disk: the programs of a machine without a system of its own, or what a Debian is given.
    image: PathBuf,
    agent: Mutex<()>,
}

impl Vm {
    pub(super) fn new(
        (name, spec, index): (String, Spec, u16),
        (underlay, families): (Arc<Underlay>, Families),
        env: Vec<(String, String)>,
        image: PathBuf,
    ) -> Self {
        Self { name, spec, index, underlay, families, env, image, agent: Mutex::new(()) }
    }

    /// Switches it on and waits until it is up.
    ///
    /// # Errors
    /// It is on, there is too little memory, or it doesn't boot: the error shows the console's end.
    pub fn boot(&self) -> Result<()> {
        self.switch_on()?;
        self.wait_up()
    }

    /// Switches it on, and doesn't wait.
    ///
    /// # Errors
    /// It is on, or there is too little memory.
    pub fn switch_on(&self) -> Result<()> {
        preflight::memory(&[self.spec.memory])?;
        let disk = self.host().path(&self.disk())?;
        if !disk.exists() {
            self.make_disk()?;
        }
        for nic in (0..self.spec.nics).filter(|&nic| !self.is_nat(nic)) {
            if self.host().exec(&["ip", "link", "show", &self.tap(nic)])?.success() {
                continue; // it has been on before
            }
            self.host().run(&["ip", "tuntap", "add", &self.tap(nic), "mode", "tap"])?;
            self.host().run(&["ip", "link", "set", &self.tap(nic), "master", BRIDGE, "up"])?;
        }
        let console = self.console_path();
        if console.exists() {
            fs::remove_file(&console)?;
        }
        let arguments = self.qemu(&Kernel::named(&self.spec.kernel)?)?;
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        self.host().start_service(&self.name, &[&["qemu-system-x86_64"], &arguments[..]].concat(), &[])?;
        Ok(())
    }

    fn make_disk(&self) -> Result<()> {
        match self.spec.system {
            System::Programs => {
                self.host().run(&["truncate", "-s", "256M", &self.disk()])?;
                self.host().run(&["mke2fs", "-q", "-t", "ext4", &self.disk()])?;
            }
            System::Debian => {
                let below = debian::image()?.display().to_string();
                self.host().run(&[
                    "qemu-img",
                    "create",
                    "-q",
                    "-f",
                    "qcow2",
                    "-F",
                    "raw",
                    "-b",
                    &below,
                    &self.disk(),
                ])?;
            }
        }
        Ok(())
    }

    /// Waits until it has booted.
    ///
    /// # Errors
    /// It doesn't boot: the error shows the console's end.
    pub fn wait_up(&self) -> Result<()> {
        let up = wait_until(&format!("{} is up", self.name), BOOT, || {
            if !self.is_on() {
                return Ok(false); // no use waiting
            }
            ensure!(self.console().contains(IS_UP), "it is not");
            Ok(true)
        });
        match up {
            Ok(true) => Ok(()),
            Ok(false) => bail!("QEMU has ended: {}\n{}", self.host().log_tail(&self.name), self.console_tail()),
            Err(error) => Err(error.context(self.console_tail())),
        }
    }

    /// The arguments of QEMU.
    fn qemu(&self, kernel: &Kernel) -> Result<Vec<String>> {
        let file = |name| Ok::<_, anyhow::Error>(kernel.file(name)?.display().to_string());
        let addresses = self.families.each().iter().map(|&family| addresses::node(family, self.index));
        let addresses: Vec<String> = addresses.map(addresses::with_prefix).collect();
        let gateways = self.families.each().iter().map(|&family| addresses::gateway(family).to_string());
        let gateways: Vec<String> = gateways.collect();
        // Old kernels name the interfaces ens3 otherwise, where udev runs.
        let append = format!(
            "console=ttyS0 quiet panic=-1 mitigations=off net.ifnames=0 machine.name={} machine.addresses={} \
             machine.gateways={}",
            self.spec.hostname.as_ref().unwrap_or(&self.name),
            addresses.join(","),
            gateways.join(",")
        );
        let (append, format) = match self.spec.system {
            System::Programs => (append, "raw"),
            System::Debian => (format!("{append} machine.root=disk"), "qcow2"),
        };
        let mut arguments: Vec<String> = vec![];
        let mut add = |name: &str, value: String| arguments.extend([format!("-{name}"), value]);
        add("accel", Accelerator::of_this_machine(kernel)?.option().to_owned());
        add("cpu", Accelerator::of_this_machine(kernel)?.processor().to_owned());
        add("m", self.spec.memory.to_string());
        add("kernel", file("vmlinuz")?);
        add("initrd", file("initramfs")?);
        add("append", append);
        add("display", "none".to_owned());
        add("serial", format!("file:/var/log/{}.console", self.name));
        add("qmp", format!("unix:/run/{}.qmp,server=on,wait=off", self.name));
        add("device", "virtio-serial-pci".to_owned());
        add("chardev", format!("socket,id=agent,path=/run/{}.agent,server=on,wait=off", self.name));
        add("device", "virtserialport,chardev=agent,name=agent".to_owned());
        // What the machine syncs is in this one's page cache, which no power-off of the machine takes away: no need to
        // wait for the disk below.
        let read_only = "format=raw,readonly=on,file.locking=off".to_owned();
        let disks = [
            (self.disk(), format!("format={format},cache=unsafe")),
            (file("modules.img")?, read_only.clone()),
            (self.image.display().to_string(), read_only),
        ];
        for (number, (image, options)) in disks.into_iter().enumerate() {
            add("drive", format!("file={image},if=none,id=disk{number},{options}"));
            add("device", format!("virtio-blk-pci,drive=disk{number}"));
        }
        add("object", "rng-random,filename=/dev/urandom,id=random".to_owned());
        add("device", "virtio-rng-pci,rng=random".to_owned());
        for nic in 0..self.spec.nics {
            // The NAT gives 10.0.2.15 by DHCP and answers as 10.0.2.2, as VirtualBox's does.
            let network = match self.is_nat(nic) {
                true => format!("user,id=net{nic},ipv6=off"),
                false => format!("tap,id=net{nic},ifname={},script=no,downscript=no", self.tap(nic)),
            };
            add("netdev", network);
            add("device", format!("virtio-net-pci,netdev=net{nic},id=nic{nic},mac={}", self.mac(nic)));
        }
        if self.spec.clock != 0 {
            let now = i64::try_from(UNIX_EPOCH.elapsed()?.as_secs())?;
            let date = self.host().run(&["date", "-u", "-d", &format!("@{}", now + self.spec.clock), "+%FT%T"])?;
            add("rtc", format!("base={}", date.trim()));
        }
        arguments.extend(["-nodefaults".to_owned(), "-no-reboot".to_owned()]);
        Ok(arguments)
    }

    /// Pulls the plug. The disk stays as it is.
    ///
    /// # Errors
    /// It is off already.
    pub fn power_off(&self) -> Result<()> {
        self.host().end(&self.name, Signal::SIGKILL)
    }

    /// Waits until it has switched itself off: `systemctl poweroff`, and `systemctl reboot` as well, come to that here.
    ///
    /// # Errors
    /// It is still on after ten minutes.
    pub fn wait_off(&self) -> Result<()> {
        wait_until(&format!("{} is off", self.name), BOOT, || {
            ensure!(!self.is_on(), "it is on\n{}", self.console_tail());
            Ok(())
        })
    }

    /// True while it is on.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.host().service(&self.name).is_some()
    }

    /// Its own address on the underlay.
    #[must_use]
    pub fn underlay_ip(&self, family: fabric_core::model::Family) -> std::net::IpAddr {
        addresses::node(family, self.index)
    }

    /// Runs a script of sh, which ends at its first command that fails, and returns how it went.
    ///
    /// # Errors
    /// The machine is off, or the script doesn't end within two minutes.
    pub fn exec(&self, script: &str) -> Result<Answer> {
        self.exec_within(script, SCRIPT)
    }

    /// As [`Vm::exec`], with another limit.
    ///
    /// # Errors
    /// As [`Vm::exec`].
    pub fn exec_within(&self, script: &str, limit: Duration) -> Result<Answer> {
        let exports: String = self.env.iter().map(|(name, value)| format!("export {name}='{value}'\n")).collect();
        // The agent does one thing after another.
        let _turn = self.agent.lock().unwrap_or_else(PoisonError::into_inner);
        let socket = self.host().path(&format!("/run/{}.agent", self.name))?;
        agent::run(&socket, &format!("{exports}{script}"), limit)
            .with_context(|| format!("`{script}` on {}\n{}", self.name, self.console_tail()))
    }

    /// Runs a script that has to succeed, and returns what it printed.
    ///
    /// # Errors
    /// As [`Vm::exec`], or the script failed: the error shows all that it said.
    pub fn run(&self, script: &str) -> Result<String> {
        let Answer { code, stdout, stderr } = self.exec(script)?;
        ensure!(code == 0, "`{script}` on {}: exit code {code}\n{stdout}{stderr}", self.name);
        Ok(stdout)
    }

    /// QEMU's monitor.
    ///
    /// # Errors
    /// The machine is off.
    pub fn monitor(&self) -> Result<Monitor> {
        Monitor::connect(&self.host().path(&format!("/run/{}.qmp", self.name))?)
    }

    /// Takes a network interface out of the machine, as a hand would, and waits until its kernel has let go of it.
    ///
    /// # Errors
    /// There is none of this number.
    pub fn unplug_nic(&self, nic: u8) -> Result<()> {
        let mut monitor = self.monitor()?;
        monitor.execute("device_del", &json!({ "id": format!("nic{nic}") }))?;
        monitor.wait_for("DEVICE_DELETED")
    }

    /// Puts another one with the same address into its place.
    ///
    /// # Errors
    /// There is one.
    pub fn plug_nic(&self, nic: u8) -> Result<()> {
        let (device, net) = (format!("nic{nic}"), format!("net{nic}"));
        let wanted = json!({ "driver": "virtio-net-pci", "netdev": net, "id": device, "mac": self.mac(nic) });
        self.monitor()?.execute("device_add", &wanted)?;
        Ok(())
    }

    /// Lays or pulls the cable of a network interface at the switch: the machine sees no carrier meanwhile.
    ///
    /// # Errors
    /// There is none of this number.
    pub fn set_cable(&self, nic: u8, up: bool) -> Result<()> {
        self.monitor()?.execute("set_link", &json!({ "name": format!("nic{nic}"), "up": up }))?;
        Ok(())
    }

    /// Starts fabricd with more arguments than what the environment says. Its log is `/var/log/fabricd.log`.
    ///
    /// # Errors
    /// The machine is off.
    pub fn start_fabricd(&self, arguments: &str) -> Result<()> {
        let log = "/var/log/fabricd.log";
        self.run(&format!("setsid fabricd {arguments} >>{log} 2>&1 </dev/null &\necho $! >/run/fabricd.pid"))?;
        Ok(())
    }

    /// Ends fabricd by a signal (`TERM`, `KILL`) and waits for its end.
    ///
    /// # Errors
    /// It doesn't run, or doesn't end.
    pub fn end_fabricd(&self, signal: &str) -> Result<()> {
        let wait = "while kill -0 $pid 2>/dev/null; do sleep 0.1; done";
        self.run(&format!("pid=$(cat /run/fabricd.pid)\nkill -{signal} $pid\n{wait}"))?;
        Ok(())
    }

    /// Waits until fabricd says that it is ready.
    ///
    /// # Errors
    /// It isn't after ten minutes, or has ended: the error shows why, and the end of its log.
    pub fn wait_ready(&self) -> Result<()> {
        let ask = "wget -q -O /run/readyz http://127.0.0.1:9472/readyz 2>/dev/null";
        let give_up = "kill -0 $(cat /run/fabricd.pid) && [ $(date +%s) -lt $end ]";
        let wait = format!("end=$(($(date +%s) + {}))\nuntil {ask}; do {give_up}; sleep 0.3; done", READY.as_secs());
        if self.exec_within(&wait, READY + SCRIPT)?.code != 0 {
            let told = self.exec("fabricctl status || true\ntail -n 25 /var/log/fabricd.log")?;
            bail!("fabricd is not ready on {}:\n{}{}", self.name, told.stdout, told.stderr);
        }
        Ok(())
    }

    /// What `fabricctl status -o json` prints, whatever it finds.
    ///
    /// # Errors
    /// fabricd doesn't answer.
    pub fn status(&self) -> Result<Value> {
        let shown = self.exec("fabricctl status -o json")?;
        serde_json::from_str(&shown.stdout).with_context(|| format!("fabricctl status on {}: {shown:?}", self.name))
    }

    /// Notes what was seen on its kernel.
    ///
    /// # Errors
    /// It can't be written.
    pub fn note(&self, change: impl FnOnce(&mut Seen)) -> Result<()> {
        record::note(&Kernel::named(&self.spec.kernel)?, change)
    }

    /// Notes that the function of this name has shown on its kernel what the name says.
    ///
    /// # Errors
    /// It can't be written.
    pub fn has_shown(&self, function: &str) -> Result<()> {
        self.note(|seen| {
            seen.shown.insert(function.to_owned());
        })
    }

    /// All that its kernel and `init.sh` have said since it was switched on.
    #[must_use]
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.console_path()).unwrap_or_default()).into_owned()
    }

    fn console_tail(&self) -> String {
        let console = self.console();
        let lines: Vec<&str> = console.lines().collect();
        let tail = lines[lines.len().saturating_sub(20)..].join("\n");
        format!("--- the end of the console of {} ({})\n{tail}", self.name, self.console_path().display())
    }

    fn console_path(&self) -> PathBuf {
        self.host().log_path(&self.name).with_file_name(format!("{}.console", self.name))
    }

    /// In the underlay's machine, whose `/var/lib` goes when the lab is stopped.
    fn disk(&self) -> String {
        format!("/var/lib/{}.img", self.name)
    }

    fn is_nat(&self, nic: u8) -> bool {
        self.spec.system == System::Debian && nic == 0
    }

    fn tap(&self, nic: u8) -> String {
        format!("vm{}.{nic}", self.index)
    }

    fn mac(&self, nic: u8) -> String {
        let [high, low] = self.index.to_be_bytes();
        format!("02:99:00:{nic:02x}:{high:02x}:{low:02x}")
    }

    /// Where QEMU runs.
    fn host(&self) -> &Machine {
        &self.underlay.machine
    }
}
