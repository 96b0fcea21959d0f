//! Where programs are attached: by links of tcx, or, where the kernel has none, by [`filters`] of tc.
//!
//! Which of the two is found by trying, never by the kernel's version: distributions take things back to older ones. A place
//! has one of them. A daemon that finds the other kind there puts its own in, and takes the other away after that.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;

use fabric_bpf::abi;
use fabric_core::state::fast_path::{Hook, Place, Program};
use fabric_netlink::{Refusal, RequestSocket};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::pins::{self, Pins};
use super::{OBJECT, Refused, filters, is_denied};

/// What a kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Links,
    Filters,
}

/// The hooks of tc of this network namespace.
#[derive(Default)]
pub(super) struct Hooks {
    /// What was found by trying. Until then links are.
    kind: Option<Kind>,
    trouble: Option<&'static str>,
    socket: Option<RequestSocket>,
    /// Where filters of ours were when they were last looked for.
    filtered: BTreeSet<Place>,
}

impl Hooks {
    /// Finds out what the kernel can do. That rights are missing is told by the first write, and it is tried again.
    pub(super) fn try_out(&mut self) {
        if self.kind.is_some() || self.trouble.is_some() {
            return;
        }
        let mut codes = OBJECT.iter().flat_map(|object| &object.programs);
        let probe = codes.find(|code| code.name == fabric_bpf::PROBE);
        let Some(Ok(probe)) = probe.map(|code| fabric_ebpf::Program::load(code, abi::LICENSE, &[])) else { return };
        // An empty packet of IPv4 in Ethernet.
        let mut packet = [0; 64];
        packet[12..15].copy_from_slice(&[8, 0, 0x45]);
        match probe.test_run(&packet, &[], 1) {
            Ok(ran) if ran.returned.cast_signed() == fabric_bpf::NEXT => {}
            Ok(_) => {
                self.trouble =
                    Some("the kernel's programs can't encapsulate Ethernet: before Linux 5.13; see: uname -r");
                return;
            }
            Err(_) => return,
        }
        self.kind = match fabric_ebpf::Link::are_known(&probe) {
            Ok(true) => Some(Kind::Links),
            Ok(false) => {
                tracing::info!("the kernel has no tcx: programs of the fast path are attached as filters of tc");
                Some(Kind::Filters)
            }
            Err(_) => None,
        };
    }

    /// Why no program can be attached here.
    pub(super) fn trouble(&self) -> Option<&'static str> {
        self.trouble
    }

    /// Whether programs are filters of tc.
    pub(super) fn are_filters(&self) -> bool {
        self.kind == Some(Kind::Filters)
    }

    /// What is attached where. A link whose interface is gone, or whose program is no pinned one, has a program that nobody
    /// wants. So has a place that has both kinds.
    pub(super) fn found(
        &mut self,
        pins: &Pins,
        programs: &BTreeMap<u32, Program>,
    ) -> Result<BTreeMap<Place, Program>, Refused> {
        let mut found = BTreeMap::new();
        for place in pins.places()? {
            let link = pins::owned(&pins.link(place), fabric_ebpf::Link::open)?;
            let (program, ifindex) = link.program_and_interface()?;
            let known = programs.get(&program).filter(|_| ifindex == place.ifindex);
            found.insert(place, known.copied().unwrap_or_else(|| pins::unknown(place)));
        }
        for place in pins.former_places()? {
            found.entry(place).or_insert_with(|| pins::unknown(place));
        }
        let filters = self.filters()?;
        for (place, id) in &filters {
            let known = programs.get(id).copied().filter(|_| !found.contains_key(place));
            found.insert(*place, known.unwrap_or_else(|| pins::unknown(*place)));
        }
        Ok(found)
    }

    /// Where our filters are, as far as that can be read.
    pub(super) fn places_of_filters(&mut self) -> Vec<Place> {
        self.filters().map(|filters| filters.into_keys().collect()).unwrap_or_default()
    }

    fn filters(&mut self) -> io::Result<BTreeMap<Place, u32>> {
        let found = filters::ours(self.socket()?)?;
        self.filtered = found.keys().copied().collect();
        Ok(found)
    }

    fn socket(&mut self) -> io::Result<&mut RequestSocket> {
        match &mut self.socket {
            Some(socket) => Ok(socket),
            socket => Ok(socket.insert(RequestSocket::open(NETLINK_ROUTE)?)),
        }
    }

    /// Attaches a program behind those of others, or puts it in the place of ours.
    pub(super) fn attach(&mut self, pins: &Pins, place: Place, program: Program) -> Result<(), Refused> {
        let loaded = fabric_ebpf::Program::open(&pins.program(program)).map_err(|error| {
            let gone = error.kind() == io::ErrorKind::NotFound;
            let words = gone.then(|| "its program is not loaded; the next pass loads it".to_owned());
            Refusal { words, error }
        })?;
        if self.are_filters() {
            filters::put(self.socket()?, place, program, &loaded)?;
            self.filtered.insert(place);
            return Ok(unlink_all(pins, place)?);
        }
        let path = pins.link(place);
        // A link of another layout goes on as ours, with our program.
        let former = pins.former_links(place)?.into_iter().find(|former| fabric_ebpf::Link::open(former).is_ok());
        if let Some(former) = former.filter(|_| !path.exists()) {
            std::fs::rename(former, &path)?;
        }
        link(&path, place, &loaded)?;
        self.remove_filter(place)
    }

    /// Takes what is attached there away, at once: what is attached in its place next must not meet it there.
    pub(super) fn detach(&mut self, pins: &Pins, place: Place) -> Result<(), Refused> {
        unlink_all(pins, place)?;
        self.remove_filter(place)
    }

    fn remove_filter(&mut self, place: Place) -> Result<(), Refused> {
        if self.filtered.contains(&place) {
            filters::remove(self.socket()?, place)?;
            self.filtered.remove(&place);
        }
        Ok(())
    }
}

impl From<Refusal> for Refused {
    fn from(Refusal { error, words }: Refusal) -> Self {
        let refused = Self::from(error);
        Self { words: words.or(refused.words), error: refused.error }
    }
}

fn link(path: &Path, place: Place, program: &fabric_ebpf::Program) -> io::Result<()> {
    match fabric_ebpf::Link::open(path) {
        Ok(link) if link.program_and_interface()?.1 == place.ifindex => return link.replace(program),
        // Its interface is gone.
        Ok(_) => unlink(path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(pins::foreign(path, &error)),
    }
    let hook = match place.hook {
        Hook::Ingress => fabric_ebpf::Hook::Ingress,
        Hook::Egress => fabric_ebpf::Hook::Egress,
    };
    fabric_ebpf::Link::attach(program, place.ifindex, hook)?.pin(path)
}

fn unlink_all(pins: &Pins, place: Place) -> io::Result<()> {
    pins.former_links(place)?.iter().try_for_each(|former| unlink(former))?;
    unlink(&pins.link(place))
}

/// Takes a link away. One that may not be opened goes with its pin, as soon as the kernel gets to it.
fn unlink(path: &Path) -> io::Result<()> {
    match fabric_ebpf::Link::open(path) {
        // That its interface is gone is no error.
        Ok(link) => drop(link.detach()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) if is_denied(&error) => {}
        Err(error) => return Err(pins::foreign(path, &error)),
    }
    pins::remove(path)
}
