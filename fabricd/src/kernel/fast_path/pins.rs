//! Where the parts of the fast path are pinned.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use fabric_bpf::abi;
use fabric_core::state::fast_path::{FastPath, Hook, MapSizes, Place, Program, Role};
use fabric_ebpf::Map;
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

/// The folder of this layout.
pub(super) struct Pins {
    bpffs: PathBuf,
    root: PathBuf,
}

impl Pins {
    pub(super) fn below(bpffs: &Path) -> Self {
        Self { bpffs: bpffs.to_owned(), root: bpffs.join("fabric").join(abi::LAYOUT.to_string()) }
    }

    /// What to do where there is no bpffs.
    pub(super) fn lacks_bpffs(&self) -> Option<String> {
        let bpffs = self.bpffs.display();
        match statfs(&self.bpffs) {
            Ok(found) if found.filesystem_type() == BPF_FS_MAGIC => None,
            _ => Some(format!("there is no bpffs at {bpffs}; mount it with: mount -t bpf bpf {bpffs}")),
        }
    }

    pub(super) fn map(&self, map: abi::Map) -> PathBuf {
        self.root.join("maps").join(map.name())
    }

    pub(super) fn program(&self, program: Program) -> PathBuf {
        self.root.join("programs").join(program.to_string())
    }

    pub(super) fn link(&self, place: Place) -> PathBuf {
        self.root.join("links").join(place.to_string())
    }

    /// The links of other layouts at a place.
    pub(super) fn former_links(&self, place: Place) -> io::Result<Vec<PathBuf>> {
        let path = |layout: PathBuf| layout.join("links").join(place.to_string());
        Ok(self.other_layouts()?.into_iter().map(path).filter(|path| path.exists()).collect())
    }

    /// Where other layouts have something attached.
    pub(super) fn former_places(&self) -> io::Result<Vec<Place>> {
        let mut places = vec![];
        for layout in self.other_layouts()? {
            places.extend(entries(&layout.join("links"))?.iter().filter_map(|path| place_of(path)));
        }
        Ok(places)
    }

    /// Makes the folders.
    pub(super) fn prepare(&self) -> io::Result<()> {
        for folder in ["maps", "programs", "links"] {
            fs::create_dir_all(self.root.join(folder))?;
        }
        Ok(())
    }

    /// The folders of other layouts.
    pub(super) fn other_layouts(&self) -> io::Result<Vec<PathBuf>> {
        let all = self.root.parent().map_or_else(|| Ok(vec![]), entries)?;
        Ok(all.into_iter().filter(|folder| *folder != self.root && layout_of(folder).is_some()).collect())
    }

    /// Takes away what they have: links first, so that packets take the kernel's path.
    pub(super) fn remove_other_layouts(&self) -> io::Result<()> {
        for other in self.other_layouts()? {
            for folder in ["links", "programs", "maps"] {
                entries(&other.join(folder))?.iter().try_for_each(|pin| remove(pin))?;
                remove_empty(&other.join(folder))?;
            }
            remove_empty(&other)?;
        }
        self.root.parent().map_or(Ok(()), remove_empty)
    }

    /// Takes the maps away, those of other layouts too, and the folders when nothing else is left in them. What is at the
    /// place of one and is none stays.
    pub(super) fn remove_maps(&self) -> io::Result<()> {
        self.remove_other_layouts()?;
        let mut ours = abi::Map::ALL.map(|map| self.map(map)).into_iter().filter(|path| is_ours(path, Map::open));
        ours.try_for_each(|path| remove(&path))?;
        for folder in ["maps", "programs", "links"] {
            remove_empty(&self.root.join(folder))?;
        }
        remove_empty(&self.root)?;
        self.root.parent().map_or(Ok(()), remove_empty)
    }

    /// The programs that are pinned, by their number in the kernel. What has another name than ours is passed over.
    pub(super) fn programs(&self) -> io::Result<BTreeMap<u32, Program>> {
        let mut found = BTreeMap::new();
        for path in entries(&self.root.join("programs"))? {
            if let Some(program) = program_of(&path) {
                found.insert(owned(&path, fabric_ebpf::Program::open)?.info()?.id, program);
            }
        }
        Ok(found)
    }

    /// All that is pinned, as far as names tell: what maps hold, and which program is attached where, does not show. What is
    /// seen to be something else is left out.
    pub(super) fn by_name(&self) -> io::Result<FastPath> {
        let programs = entries(&self.root.join("programs"))?;
        let programs = programs.iter().filter(|path| is_ours(path, fabric_ebpf::Program::open));
        let programs = programs.filter_map(|path| program_of(path)).collect();
        let links = self.places()?.into_iter().filter(|place| is_ours(&self.link(*place), fabric_ebpf::Link::open));
        let links = links.chain(self.former_places()?).map(|place| (place, unknown(place))).collect();
        let former = !self.other_layouts()?.is_empty();
        let maps = abi::Map::ALL.iter().any(|map| is_ours(&self.map(*map), Map::open));
        let maps = maps.then(MapSizes::default);
        Ok(FastPath { maps, programs, links, former, ..FastPath::new() })
    }

    /// Where something is attached.
    pub(super) fn places(&self) -> io::Result<Vec<Place>> {
        Ok(entries(&self.root.join("links"))?.iter().filter_map(|path| place_of(path)).collect())
    }
}

fn layout_of(folder: &Path) -> Option<u32> {
    folder.file_name()?.to_str()?.parse().ok()
}

fn program_of(path: &Path) -> Option<Program> {
    let (role, fingerprint) = path.file_name()?.to_str()?.rsplit_once('_')?;
    let role = Role::ALL.into_iter().find(|known| known.as_str() == role)?;
    Some(Program { role, fingerprint: u64::from_str_radix(fingerprint, 16).ok()? })
}

fn place_of(path: &Path) -> Option<Place> {
    let (ifindex, hook) = path.file_name()?.to_str()?.split_once('_')?;
    let hook = [Hook::Ingress, Hook::Egress].into_iter().find(|known| known.as_str() == hook)?;
    Some(Place { ifindex: ifindex.parse().ok()?, hook })
}

/// A program that nobody wants at this place.
pub(super) fn unknown(place: Place) -> Program {
    Program { role: if place.hook == Hook::Egress { Role::PodIn } else { Role::PodOut }, fingerprint: 0 }
}

/// Opens a pin of ours. What lies there and is something else is not touched, and named.
pub(super) fn owned<T>(path: &Path, open: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    open(path).map_err(|error| if error.kind() == ErrorKind::InvalidData { foreign(path, &error) } else { error })
}

/// Whether something is pinned there and is what it is called, as far as it may be opened.
fn is_ours<T>(path: &Path, open: impl FnOnce(&Path) -> io::Result<T>) -> bool {
    match open(path) {
        Ok(_) => true,
        Err(error) => !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::InvalidData),
    }
}

/// The error for what is at a place of ours and is something else.
pub(super) fn foreign(path: &Path, what: &io::Error) -> io::Error {
    let path = path.display();
    io::Error::new(ErrorKind::InvalidData, format!("{path} is not ours: {what}; remove it with: rm {path}"))
}

/// What is in a folder; nothing when there is none.
fn entries(folder: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(folder) {
        Ok(found) => found.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(vec![]),
        Err(error) => Err(error),
    }
}

/// Takes a pin away, if it is there.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn remove_empty(folder: &Path) -> io::Result<()> {
    match fs::remove_dir(folder) {
        Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::DirectoryNotEmpty) => Err(error),
        _ => Ok(()),
    }
}
