//! The fast path in the kernel: maps, programs and links of eBPF, kept by pins below bpffs.
//!
//! ```text
//!   /sys/fs/bpf/fabric/<layout>/maps/…       one for each map of fabric_bpf::abi
//!                               programs/…   pod_out_<fingerprint>: what is loaded, by a hash of its code
//!                               links/…      <interface index>_ingress: what is attached where
//! ```
//!
//! What is ours is what is pinned there, and, where the kernel has no links of tcx, the [`filters`] of tc that have our
//! priority, handle and name. Programs go on without the daemon, and a restarted one finds by these names what
//! there is to do: mostly nothing. Programs of others at the same hooks are never touched.

mod encode;
mod filters;
mod guard;
mod hooks;
mod maps;
mod pins;
pub(super) mod shaping;

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use fabric_bpf::abi;
use fabric_core::diff::Change;
use fabric_core::diff::fast_path::Op;
use fabric_core::state::fast_path::{FastPath, MapSizes, Program, Role};
use fabric_ebpf::Object;

use self::hooks::Hooks;
use self::maps::Maps;
pub use self::maps::{Counts, Traffic};
use self::pins::Pins;
use super::refusal::BPF_CAPABILITIES;

/// How long a mark of the NAT guard lasts at least, and at most twice that: the tables of connections may be long.
const RENEWAL: Duration = Duration::from_secs(300);

/// What the object file has.
static OBJECT: LazyLock<Result<Object, fabric_ebpf::ObjectError>> = LazyLock::new(|| Object::parse(fabric_bpf::OBJECT));

/// The programs of this release.
#[must_use]
pub fn programs() -> BTreeSet<Program> {
    let codes = OBJECT.iter().flat_map(|object| &object.programs);
    codes.filter_map(|code| Some(Program { role: role_of(&code.name)?, fingerprint: code.fingerprint() })).collect()
}

fn role_of(function: &str) -> Option<Role> {
    let role = function.strip_prefix("fabric_")?;
    Role::ALL.into_iter().find(|known| known.as_str() == role)
}

/// Why something could not be read or written: the errno, and words that say more.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) error: io::Error,
    pub(super) words: Option<String>,
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        // Words of ours come without an errno.
        match error.raw_os_error() {
            Some(_) => Self { error, words: None },
            None => Self { words: Some(error.to_string()), error: io::Error::from_raw_os_error(libc::EINVAL) },
        }
    }
}

/// The fast path of this network namespace.
pub(super) struct Bpf {
    pins: Pins,
    hooks: Hooks,
    /// It is asked for: then it is found out what the kernel can do.
    asked: bool,
    maps: Option<Maps>,
    found: Arc<FastPath>,
    trouble: Option<String>,
    stale: bool,
    /// What another layout has could not be replaced: it goes before ours is made.
    gives_way_first: bool,
    /// When the NAT guard was last renewed.
    renewed: Instant,
}

impl Bpf {
    /// What is pinned below `bpffs`, once it is looked at.
    pub(super) fn new(bpffs: &Path, asked: bool) -> Self {
        Self {
            pins: Pins::below(bpffs),
            hooks: Hooks::default(),
            asked,
            maps: None,
            found: Arc::default(),
            trouble: None,
            stale: true,
            gives_way_first: false,
            renewed: Instant::now(),
        }
    }

    /// What is there, read anew if that may have changed in silence.
    pub(super) fn look(&mut self) -> Arc<FastPath> {
        if std::mem::take(&mut self.stale) {
            self.trouble = None;
            if self.asked {
                self.hooks.try_out();
            }
            match self.read() {
                Ok(found) if found == *self.found => {}
                Ok(found) => self.found = Arc::new(found),
                // A short cut that can't be read is none: the kernel's path is there. Nor may it stay as it is, since
                // nobody could change it: what is ours is known by its name, and that is enough to take it away.
                Err(refused) => {
                    let mut found = self.pins.by_name().unwrap_or_default();
                    let filters = self.hooks.places_of_filters();
                    found.links.extend(filters.into_iter().map(|place| (place, pins::unknown(place))));
                    self.trouble = Some(match refused.words {
                        Some(words) => words,
                        None if is_denied(&refused.error) => {
                            format!("cannot open what is pinned: {}; {BPF_CAPABILITIES}", refused.error)
                        }
                        None => refused.error.to_string(),
                    });
                    (self.found, self.maps) = (Arc::new(found), None);
                }
            }
        }
        Arc::clone(&self.found)
    }

    /// Why there can be no fast path here, with the way out.
    pub(super) fn trouble(&self) -> Option<String> {
        self.trouble
            .clone()
            .or_else(|| self.pins.lacks_bpffs())
            .or_else(|| self.hooks.trouble().map(str::to_owned))
            .or_else(|| OBJECT.as_ref().err().map(ToString::to_string))
    }

    /// Whether programs are attached as filters of tc.
    pub(super) fn by_filters(&self) -> bool {
        self.hooks.are_filters()
    }

    /// Has the next look read everything anew.
    pub(super) fn distrust(&mut self) {
        self.stale = true;
    }

    /// What the programs have counted.
    pub(super) fn counts(&self) -> io::Result<Counts> {
        self.maps.as_ref().map_or_else(|| Ok(Counts::default()), Maps::counts)
    }

    /// What they have counted for each peer.
    pub(super) fn traffic(&self) -> io::Result<Traffic> {
        self.maps.as_ref().map_or_else(|| Ok(Traffic::default()), |maps| maps.traffic(&self.found.index))
    }

    /// Forgets marks of the NAT guard that no connection needs any more, once in a while.
    pub(super) fn renew_guard(&mut self) -> io::Result<()> {
        if self.renewed.elapsed() < RENEWAL {
            return Ok(());
        }
        self.renewed = Instant::now();
        match &self.maps {
            Some(maps) if self.found.node.is_some_and(|node| node.guard) => guard::renew(maps, &self.found.addresses),
            _ => Ok(()),
        }
    }

    /// Takes a step.
    pub(super) fn write(&mut self, op: &Op) -> Result<(), Refused> {
        let result = self.take(op);
        match result.is_ok() {
            true => op.apply_to(Arc::make_mut(&mut self.found)),
            // What is known may be why.
            false => {
                self.stale = true;
                self.gives_way_first |= self.found.former;
            }
        }
        result
    }

    fn read(&mut self) -> Result<FastPath, Refused> {
        self.maps = None;
        let mut found = FastPath::new();
        let programs = self.pins.programs()?;
        found.programs = programs.values().copied().collect();
        found.links = self.hooks.found(&self.pins, &programs)?;
        found.former = !self.pins.other_layouts()?.is_empty();
        self.gives_way_first &= found.former;
        if let Some(maps) = Maps::open(&self.pins)? {
            maps.read_into(&mut found)?;
            self.maps = Some(maps);
            return Ok(found);
        }
        // Of another layout all links are: that is a place to be taken over, unless that was tried in vain.
        let ours = !found.programs.is_empty() || !self.pins.places()?.is_empty();
        if ours || self.gives_way_first || !found.former && !found.links.is_empty() {
            // Maps as nobody wants them: they go before ours are made, and when none are wanted. Programs that are there
            // have maps that nobody else can open any more.
            found.maps = Some(MapSizes::default());
        }
        Ok(found)
    }

    fn take(&mut self, op: &Op) -> Result<(), Refused> {
        match op {
            Op::Maps(Change::Delete(_)) => {
                self.maps = None;
                return Ok(self.pins.remove_maps()?);
            }
            Op::Maps(Change::Create(sizes) | Change::Replace { now: sizes, .. }) => {
                if let Some(lacks) = self.pins.lacks_bpffs() {
                    return Err(Refused { error: io::Error::from_raw_os_error(libc::ENOENT), words: Some(lacks) });
                }
                self.pins.prepare()?;
                self.maps = Some(Maps::create(&self.pins, *sizes)?);
                return Ok(());
            }
            Op::Former => return Ok(self.pins.remove_other_layouts()?),
            Op::Program(Change::Delete(program)) => return Ok(pins::remove(&self.pins.program(*program))?),
            Op::Link(place, Change::Delete(_)) => return self.hooks.detach(&self.pins, *place),
            Op::Link(place, Change::Create(program) | Change::Replace { now: program, .. }) => {
                return self.hooks.attach(&self.pins, *place, *program);
            }
            _ => {}
        }
        let gone = || io::Error::other("its maps are gone; the next pass recreates them");
        let maps = self.maps.as_ref().ok_or_else(gone)?;
        let node = self.found.node.as_ref();
        match op {
            Op::Node(change) => maps.set_node(change.wanted())?,
            Op::Peer(slot, change) => maps.set_peer(*slot, change.wanted(), node)?,
            Op::Index(subnet, change) => maps.set_index(*subnet, change.wanted().copied(), node)?,
            Op::Pod(slot, change) => maps.set_pod(*slot, change.wanted())?,
            Op::Address(ip, change) => maps.set_address(*ip, change.wanted().copied(), node)?,
            Op::Seed(addresses) => {
                if let Some(node) = node.filter(|node| node.guard) {
                    guard::seed(maps, addresses, node)?;
                }
            }
            Op::Program(Change::Create(program) | Change::Replace { now: program, .. }) => self.load(maps, *program)?,
            Op::Maps(_) | Op::Program(_) | Op::Link(..) | Op::Former => {}
        }
        Ok(())
    }

    fn load(&self, maps: &Maps, program: Program) -> Result<(), Refused> {
        let codes = OBJECT.iter().flat_map(|object| &object.programs);
        let mut codes = codes.filter(|code| code.fingerprint() == program.fingerprint);
        let code = codes.next().ok_or_else(|| io::Error::other("this release has no such program"))?;
        let loaded = fabric_ebpf::Program::load(code, abi::LICENSE, &maps.by_name());
        let loaded = loaded.map_err(|refused| {
            let words = Some(refused.verifier).filter(|words| !words.is_empty());
            Refused { words: words.map(|words| format!("the verifier says: {words}")), ..Refused::from(refused.error) }
        })?;
        Ok(loaded.pin(&self.pins.program(program))?)
    }
}

/// Whether rights are missing: CAP_BPF, or a seccomp filter without bpf(2), as runtimes have it for those without CAP_BPF.
fn is_denied(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied
}
