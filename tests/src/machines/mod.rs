//! Machines: nodes of the [`Lab`] that have a kernel of their own, by QEMU.
//!
//! Namespaces share one kernel, one boot id, one clock and one set of loaded modules. What hangs on these is shown here:
//! other kernels, modules that are loaded on demand or missing, a power-off that loses what wasn't synced, a network
//! interface that is pulled. Both kinds of node are on one underlay, so a fabric can have both.
//!
//! ```text
//!        linux-6.1  (QEMU)              node-1  (namespaces)      underlay  (namespaces)
//!   pod a   pod b                   pod a   pod b
//!     └─cni0──┘                       └─cni0──┘
//!    fabric.1  fabricd               fabric.1  fabricd             etcd-1
//!        └─eth0─┘                        └─eth0─┘                     │
//!       vm101.0 (tap)─────────────────────┴────────── br0 ────────────┘
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`kernels`], `kernel.sh`, `kernels.txt` | Debian's kernels, fetched and packed |
//! | [`preflight`] | what is needed of this machine |
//! | [`spec`], [`vm`], `init.sh` | a machine, and its start |
//! | [`agent`], `agent.sh`, [`monitor`] | commands in it, and what hands do to its hardware |
//! | [`pods`] | pods on it |
//! | [`debian`], `debian.sh` | a machine with a Debian of its own |
//! | `root.sh` | the programs that all of them run |
//! | [`record`], `record.json` | what was shown on which kernel |

pub mod agent;
pub mod debian;
pub mod kernels;
pub mod monitor;
pub mod pods;
pub mod preflight;
pub mod record;
pub mod spec;
pub mod vm;

use std::collections::BTreeMap;
use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

pub use kernels::Kernel;
pub use pods::{Plugin, VmPod};
pub use spec::{Spec, System};
pub use vm::Vm;

use crate::lab::{Builder, Lab, binaries};

/// Programs of tests that machines get as well, by their paths, separated by spaces: `make test-machines` names them.
const TESTS: &str = "MACHINE_TESTS";

/// A lab with machines. All that a [`Lab`] can do it can do too.
#[derive(Debug)]
pub struct Machines {
    /// Underlay, etcd, and nodes that are namespaces.
    pub lab: Lab,
    vms: BTreeMap<String, Arc<Vm>>,
}

/// What is remembered of a machine in the lab's folder.
#[derive(Serialize, Deserialize)]
struct Record {
    index: u16,
    spec: Spec,
}

impl Machines {
    /// Starts a lab that machines can be added to. `builder` may have nodes of its own, or none.
    ///
    /// # Errors
    /// A tool is missing, programs aren't built, or the lab doesn't start.
    pub fn start(builder: Builder) -> Result<Self> {
        preflight::tools()?;
        root_image()?;
        Ok(Self { lab: builder.start()?, vms: BTreeMap::new() })
    }

    /// Checks all that such machines need when all of them are on, and fetches their kernels side by side.
    ///
    /// # Errors
    /// A tool is missing, a kernel can't be fetched, or there is too little memory.
    pub fn check(specs: &[Spec]) -> Result<()> {
        preflight::tools()?;
        preflight::memory(&specs.iter().map(|spec| spec.memory).collect::<Vec<_>>())?;
        let kernels = specs.iter().map(|spec| Ok((spec.kernel.as_str(), Kernel::named(&spec.kernel)?)));
        let kernels = kernels.collect::<Result<BTreeMap<_, _>>>()?;
        thread::scope(|scope| {
            let mut running: Vec<_> = kernels.values().map(|kernel| scope.spawn(|| kernel.fetch())).collect();
            if specs.iter().any(|spec| spec.system == System::Debian) {
                running.push(scope.spawn(debian::make));
            }
            running.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow!("a thread has panicked"))?)
        })
    }

    /// Those of a lab that another process has started.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn open(name: &str) -> Result<Self> {
        let mut machines = Self { lab: Lab::open(name)?, vms: BTreeMap::new() };
        for (name, record) in machines.records()? {
            machines.know(&name, record)?;
        }
        Ok(machines)
    }

    /// Adds machines and boots them side by side. They are named after what they run: `linux-6.1`, and `linux-6.1-2` the
    /// second, or `debian`.
    ///
    /// # Errors
    /// A kernel can't be fetched or there is too little memory, which is told before any starts; or one doesn't boot, which
    /// shows its console's end.
    pub fn add(&mut self, specs: &[Spec]) -> Result<Vec<Arc<Vm>>> {
        Self::check(specs)?;
        if specs.iter().any(|spec| spec.system == System::Debian) {
            supplies_image()?;
        }
        let mut added = vec![];
        for spec in specs {
            let count = self.vms.values().filter(|vm| vm.spec.name() == spec.name()).count();
            let number = if count == 0 { String::new() } else { format!("-{}", count + 1) };
            let name = format!("{}{number}", spec.name());
            let index = self.vms.values().map(|vm| vm.index + 1).max().unwrap_or(vm::FIRST);
            let record = Record { index, spec: spec.clone() };
            fs::create_dir_all(self.records_folder())?;
            fs::write(self.records_folder().join(&name), serde_json::to_string_pretty(&record)?)?;
            added.push(self.know(&name, record)?);
        }
        added.iter().try_for_each(|vm| vm.switch_on())?;
        added.iter().try_for_each(|vm| vm.wait_up())?;
        Ok(added)
    }

    /// All of them, by name.
    pub fn vms(&self) -> impl Iterator<Item = &Arc<Vm>> {
        self.vms.values()
    }

    /// The one of this name.
    ///
    /// # Errors
    /// There is none: the error lists those that there are.
    pub fn vm(&self, name: &str) -> Result<&Arc<Vm>> {
        let names: Vec<&str> = self.vms.keys().map(String::as_str).collect();
        self.vms.get(name).with_context(|| format!("no machine {name}; there are: {}", names.join(" ")))
    }

    /// Notes that the test of this thread has passed on all kernels that are here.
    ///
    /// # Errors
    /// It can't be written, or this is no thread of the test harness.
    pub fn have_passed(&self) -> Result<()> {
        let thread = thread::current();
        let test = thread.name().context("only the thread of a test has its name")?;
        let name = test.rsplit("::").next().unwrap_or(test);
        self.vms.values().try_for_each(|vm| vm.has_shown(name))
    }

    fn know(&mut self, name: &str, record: Record) -> Result<Arc<Vm>> {
        let (env, image) = match record.spec.system {
            System::Programs => (self.settings(), beside_programs("machines.img")?),
            System::Debian => (vec![], beside_programs("supplies.img")?),
        };
        let wires = (self.lab.shared_underlay(), self.lab.families());
        let vm = Arc::new(Vm::new((name.to_owned(), record.spec, record.index), wires, env, image));
        self.vms.insert(name.to_owned(), Arc::clone(&vm));
        Ok(vm)
    }

    /// What fabricd and etcdctl have to know, by their variables.
    fn settings(&self) -> Vec<(String, String)> {
        let endpoints = self.lab.etcd().endpoints();
        let env = [("FABRICD_ETCD_ENDPOINTS", endpoints.clone()), ("ETCDCTL_ENDPOINTS", endpoints)];
        let masquerade = ("FABRICD_IP_MASQ", self.lab.masquerades().to_string());
        env.into_iter().chain([masquerade]).map(|(name, value)| (name.to_owned(), value)).collect()
    }

    fn records(&self) -> Result<BTreeMap<String, Record>> {
        let mut records = BTreeMap::new();
        if self.records_folder().exists() {
            for entry in fs::read_dir(self.records_folder())? {
                let entry = entry?;
                let record = serde_json::from_slice(&fs::read(entry.path())?)?;
                records.insert(entry.file_name().to_string_lossy().into_owned(), record);
            }
        }
        Ok(records)
    }

    fn records_folder(&self) -> PathBuf {
        self.lab.dir().join("machines")
    }
}

/// The image of programs, of this build.
fn root_image() -> Result<PathBuf> {
    let tests = env::var(TESTS).unwrap_or_default();
    let tests: Vec<&str> = tests.split_whitespace().collect();
    let scripts = ["root.sh", "init.sh", "agent.sh", "../../../deploy/systemd/modules-load.conf"].map(kernels::script);
    let sources: Vec<PathBuf> = scripts.into_iter().chain(tests.iter().map(PathBuf::from)).collect();
    made("machines.img", sources, |image, programs| {
        let mut pack = Command::new(kernels::script("root.sh"));
        let output = pack.arg(image).arg(programs).args(&tests).output().context("root.sh")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "cannot pack the programs of machines: {}", said.trim());
        Ok(())
    })
}

/// The disk that Debians are given, of this build.
fn supplies_image() -> Result<PathBuf> {
    let mut sources = vec![kernels::script("debian.rs"), kernels::script("../lab/image.sh")];
    for folder in ["deb", "network", "systemd", "vagrant"] {
        for file in fs::read_dir(kernels::script("../../../deploy").join(folder))? {
            sources.push(file?.path());
        }
    }
    made("supplies.img", sources, |image, _| debian::pack_supplies(image))
}

/// A file beside our programs: made of these and of what else is named, when there is none, or when one of them is another.
fn made(name: &str, sources: Vec<PathBuf>, make: impl FnOnce(&Path, &Path) -> Result<()>) -> Result<PathBuf> {
    let (image, programs) = (beside_programs(name)?, binaries::folder()?);
    let ours = ["fabricd", "fabricctl", "fabric-cni", "fabric-bridge"].map(|name| programs.join(name));
    if let Some(missing) = ours.iter().find(|program| !program.is_file()) {
        bail!("no {}; `cargo build --workspace` makes it", missing.display());
    }
    let made_of = ours.iter().chain(&sources).map(|file| stamp(file)).collect::<Result<Vec<_>>>()?.join("\n");
    let lock = File::create(image.with_extension("lock"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    let record = image.with_extension("made-of");
    if !image.exists() || !fs::read_to_string(&record).is_ok_and(|was| was == made_of) {
        // Machines that are on go on with the old one.
        let new = image.with_extension("new");
        make(&new, &programs)?;
        fs::rename(new, &image)?;
        fs::write(record, made_of)?;
    }
    Ok(image)
}

fn beside_programs(name: &str) -> Result<PathBuf> {
    Ok(binaries::lab()?.with_file_name(name))
}

/// What changes when a file does.
fn stamp(file: &Path) -> Result<String> {
    let meta = fs::metadata(file).with_context(|| file.display().to_string())?;
    let modified = meta.modified()?.duration_since(std::time::UNIX_EPOCH)?.as_nanos();
    Ok(format!("{} {} {modified}", file.display(), meta.len()))
}
