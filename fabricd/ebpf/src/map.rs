//! [`Map`]: a table that programs and processes share.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::OnceLock;

use crate::sys::{self, Command, MapBatch, MapCreate, MapElem, MapInfo, address, address_mut, bpf, bpf_fd, number};

/// How many bytes of an array's values are read in one call.
const AT_ONCE: usize = 64 * 1024;
/// What a kernel says whose kind of map knows no batches; libc has no name for it.
const ENOTSUPP: i32 = 524;

/// What kind of table (`enum bpf_map_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// By key, of any size. What is full refuses more.
    Hash,
    /// By number. All entries are there from the beginning, and zero.
    Array,
    /// An array that each processor has for itself.
    PerCpuArray,
    /// By key; what is full forgets what was not used for longest.
    LruHash,
}

impl Kind {
    const fn number(self) -> u32 {
        match self {
            Self::Hash => 1,
            Self::Array => 2,
            Self::PerCpuArray => 6,
            Self::LruHash => 9,
        }
    }

    const fn of(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::Hash),
            2 => Some(Self::Array),
            6 => Some(Self::PerCpuArray),
            9 => Some(Self::LruHash),
            _ => None,
        }
    }
}

/// What a map is like: what a program that uses it relies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// What kind of table.
    pub kind: Kind,
    /// Bytes of a key. Arrays have 4.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// The most entries.
    pub max_entries: u32,
    /// `BPF_F_*` of its making: 1 (`BPF_F_NO_PREALLOC`) takes memory for a hash entry by entry.
    pub flags: u32,
}

/// An open map.
#[derive(Debug)]
pub struct Map {
    fd: OwnedFd,
    shape: Shape,
}

impl Map {
    /// Makes a map. It goes with the last descriptor, pin and program that has it.
    ///
    /// # Errors
    /// The kernel's: `EPERM` without CAP_BPF, `ENOMEM`.
    pub fn create(name: &str, shape: Shape) -> io::Result<Self> {
        let mut attr = MapCreate {
            map_type: shape.kind.number(),
            key_size: shape.key_size,
            value_size: shape.value_size,
            max_entries: shape.max_entries,
            map_flags: shape.flags,
            map_name: sys::name(name),
            ..MapCreate::default()
        };
        Ok(Self { fd: bpf_fd(Command::MapCreate, &mut attr)?, shape })
    }

    /// Opens the map that is pinned at `path`. Whether it is the right one its [`Map::shape`] tells.
    ///
    /// # Errors
    /// `ENOENT` when nothing is there, [`io::ErrorKind::InvalidData`] when it is something else, with words that say what.
    pub fn open(path: &Path) -> io::Result<Self> {
        let fd = sys::open(path)?;
        let other = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        match kind_of(fd.as_fd())?.as_str() {
            "bpf-map" => {}
            kind => return Err(other(format!("it is not a map, but a {kind}"))),
        }
        let MapInfo { map_type, key_size, value_size, max_entries, map_flags, .. } = sys::info_by_fd(fd.as_fd())?;
        let kind = Kind::of(map_type).ok_or_else(|| other(format!("it is a map of the type {map_type}")))?;
        Ok(Self { fd, shape: Shape { kind, key_size, value_size, max_entries, flags: map_flags } })
    }

    /// Keeps it at `path`, which must be on bpffs and free.
    ///
    /// # Errors
    /// The kernel's: `EEXIST`, `EPERM` where `path` is on another file system.
    pub fn pin(&self, path: &Path) -> io::Result<()> {
        sys::pin(self.fd.as_fd(), path)
    }

    /// What it is like.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Its number in the kernel, for `bpftool map show id`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn id(&self) -> io::Result<u32> {
        Ok(sys::info_by_fd::<MapInfo>(self.fd.as_fd())?.id)
    }

    /// The value of a key, `None` when there is none. Of a map per processor it is all of them, each rounded up to eight
    /// bytes.
    ///
    /// # Errors
    /// The kernel's.
    ///
    /// # Panics
    /// When `key` has not the map's size.
    pub fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        assert_eq!(key.len(), self.shape.key_size as usize, "a key of the map");
        let mut value = vec![0; self.value_length()?];
        let mut attr = MapElem {
            map_fd: self.number(),
            key: address(key),
            value: address_mut(&mut value[..]),
            ..MapElem::default()
        };
        match bpf(Command::MapLookupElem, &mut attr) {
            Ok(_) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sets the value of a key. Of an array entry of at most eight bytes that is one store, of a larger one it isn't: a
    /// program may see half of it.
    ///
    /// # Errors
    /// The kernel's: `E2BIG` where the map is full or has no such number.
    ///
    /// # Panics
    /// When key or value have not the map's size, or it is one per processor.
    pub fn set(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        assert_eq!(key.len(), self.shape.key_size as usize, "a key of the map");
        assert_eq!(value.len(), self.shape.value_size as usize, "a value of the map");
        assert_ne!(self.shape.kind, Kind::PerCpuArray, "programs alone count there");
        self.update(key, value)
    }

    /// Sets the value of a key to zeros; of a map per processor that of each.
    ///
    /// # Errors
    /// The kernel's, as of [`Map::set`].
    ///
    /// # Panics
    /// When `key` has not the map's size.
    pub fn zero(&self, key: &[u8]) -> io::Result<()> {
        assert_eq!(key.len(), self.shape.key_size as usize, "a key of the map");
        self.update(key, &vec![0; self.value_length()?])
    }

    fn update(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        let mut attr =
            MapElem { map_fd: self.number(), key: address(key), value: address(value), ..MapElem::default() };
        bpf(Command::MapUpdateElem, &mut attr).map(drop)
    }

    /// Takes a key out of a hash. True when it was there.
    ///
    /// # Errors
    /// The kernel's: `EINVAL` for an array.
    ///
    /// # Panics
    /// When `key` has not the map's size.
    pub fn remove(&self, key: &[u8]) -> io::Result<bool> {
        assert_eq!(key.len(), self.shape.key_size as usize, "a key of the map");
        let mut attr = MapElem { map_fd: self.number(), key: address(key), ..MapElem::default() };
        match bpf(Command::MapDeleteElem, &mut attr) {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Goes through all entries of an array, many in one call. Of a map per processor each has all of its values, as
    /// [`Map::get`] gives them. Kernels that can't do that (before 5.6; per processor before 5.13) are asked for one after the
    /// other.
    ///
    /// # Errors
    /// The kernel's.
    ///
    /// # Panics
    /// When it is no array.
    pub fn each_value(&self, mut take: impl FnMut(u32, &[u8])) -> io::Result<()> {
        let is_array = matches!(self.shape.kind, Kind::Array | Kind::PerCpuArray);
        assert!(is_array, "only an array has all of its values");
        match self.each_value_in_batches(&mut take) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | ENOTSUPP)) => {
                self.each_value_by_one(&mut take)
            }
            done => done,
        }
    }

    /// A kernel that can't has told so before anything was taken.
    fn each_value_in_batches(&self, take: &mut impl FnMut(u32, &[u8])) -> io::Result<()> {
        let size = self.value_length()?;
        let at_once = (AT_ONCE / size).max(1);
        let (mut keys, mut values) = (vec![0; at_once * 4], vec![0; at_once * size]);
        let (mut last, mut first) = ([0; 4], 0_u32);
        while first < self.shape.max_entries {
            let mut next = [0; 4];
            let mut attr = MapBatch {
                in_batch: if first == 0 { 0 } else { address(&last) },
                out_batch: address_mut(&mut next),
                keys: address_mut(&mut keys[..]),
                values: address_mut(&mut values[..]),
                count: at_once as u32,
                map_fd: self.number(),
                ..MapBatch::default()
            };
            match bpf(Command::MapLookupBatch, &mut attr) {
                Ok(_) => {}
                // The end has been reached.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) && attr.count > 0 => {}
                Err(error) => return Err(error),
            }
            let found = values.chunks_exact(size).take(attr.count as usize);
            found.zip(first..).for_each(|(value, index)| take(index, value));
            first += attr.count;
            last = next;
        }
        Ok(())
    }

    fn each_value_by_one(&self, take: &mut impl FnMut(u32, &[u8])) -> io::Result<()> {
        for index in 0..self.shape.max_entries {
            let value = self.get(&index.to_ne_bytes())?;
            take(index, &value.unwrap_or_default());
        }
        Ok(())
    }

    /// All keys of a hash. What changes meanwhile may be missing, or be there twice.
    ///
    /// # Errors
    /// The kernel's.
    pub fn keys(&self) -> io::Result<Vec<Vec<u8>>> {
        let mut keys: Vec<Vec<u8>> = vec![];
        // What is deleted meanwhile makes the kernel begin again: never more rounds than twice what fits.
        for _ in 0..u64::from(self.shape.max_entries) * 2 + 1 {
            let mut next = vec![0; self.shape.key_size as usize];
            let key = keys.last().map_or(0, |key| address(key));
            let mut attr =
                MapElem { map_fd: self.number(), key, value: address_mut(&mut next[..]), ..MapElem::default() };
            match bpf(Command::MapGetNextKey, &mut attr) {
                Ok(_) => keys.push(next),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(keys)
    }

    fn value_length(&self) -> io::Result<usize> {
        let size = self.shape.value_size as usize;
        match self.shape.kind {
            Kind::PerCpuArray => Ok(size.next_multiple_of(8) * possible_processors()?),
            _ => Ok(size),
        }
    }

    /// Its descriptor as a program's instructions name it.
    pub(crate) fn number(&self) -> u32 {
        number(self.fd.as_fd())
    }
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// How many processors the kernel has values for: one more than the last of `0-3,8`. It never changes.
fn possible_processors() -> io::Result<usize> {
    static FOUND: OnceLock<usize> = OnceLock::new();
    if let Some(found) = FOUND.get() {
        return Ok(*found);
    }
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let last = text.trim().rsplit([',', '-']).next().and_then(|last| last.parse::<usize>().ok());
    let wrong = || io::Error::new(io::ErrorKind::InvalidData, format!("processors {text:?}"));
    let found = last.map(|last| last + 1).ok_or_else(wrong)?;
    Ok(*FOUND.get_or_init(|| found))
}

/// What a descriptor of bpf(2) is: `bpf-map`, `bpf-prog`, `bpf_link`. `BPF_OBJ_GET_INFO_BY_FD` would take one for another.
pub(crate) fn kind_of(fd: BorrowedFd<'_>) -> io::Result<String> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    Ok(link.to_string_lossy().trim_start_matches("anon_inode:").trim_matches(['[', ']']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// It needs root.
    #[test]
    fn values_are_the_same_one_by_one_as_in_batches() {
        for (kind, value_size) in [(Kind::Array, 8), (Kind::Array, 12), (Kind::PerCpuArray, 8), (Kind::PerCpuArray, 32)]
        {
            // More than one batch has, and not a multiple of it.
            let shape = Shape { kind, key_size: 4, value_size, max_entries: 20_011, flags: 0 };
            let map = Map::create("fabric_batch", shape).expect("made; is this root?");
            let size = map.value_length().expect("known");
            for index in [0_u32, 7, 20_010] {
                map.update(&index.to_ne_bytes(), &vec![index as u8 + 1; size]).expect("written");
            }
            let (mut batches, mut by_one) = (vec![], vec![]);
            map.each_value_in_batches(&mut |index, value: &[u8]| batches.push((index, value.to_vec()))).expect("read");
            map.each_value_by_one(&mut |index, value: &[u8]| by_one.push((index, value.to_vec()))).expect("read");
            assert_eq!(batches.len(), 20_011);
            assert!(batches == by_one, "{shape:?}");
            let written = batches.iter().filter(|(_, value)| value.iter().any(|byte| *byte != 0));
            assert_eq!(written.map(|(index, _)| *index).collect::<Vec<_>>(), [0, 7, 20_010]);
        }
    }
}
