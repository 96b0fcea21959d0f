//! The system call: one function, and the parts of `union bpf_attr` as the commands read them.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use crate::NAME_LENGTH;

/// `enum bpf_cmd`, as far as it is used.
#[derive(Clone, Copy, Debug)]
#[repr(i32)]
pub(crate) enum Command {
    MapCreate = 0,
    MapLookupElem = 1,
    MapUpdateElem = 2,
    MapDeleteElem = 3,
    MapGetNextKey = 4,
    ProgLoad = 5,
    ObjPin = 6,
    ObjGet = 7,
    ProgTestRun = 10,
    ProgGetFdById = 13,
    ObjGetInfoByFd = 15,
    ProgQuery = 16,
    MapLookupBatch = 24,
    LinkCreate = 28,
    LinkUpdate = 29,
    LinkDetach = 34,
}

#[derive(Default)]
#[repr(C)]
pub(crate) struct MapCreate {
    pub(crate) map_type: u32,
    pub(crate) key_size: u32,
    pub(crate) value_size: u32,
    pub(crate) max_entries: u32,
    pub(crate) map_flags: u32,
    pub(crate) inner_map_fd: u32,
    pub(crate) numa_node: u32,
    pub(crate) map_name: [u8; NAME_LENGTH + 1],
}

#[derive(Default)]
#[repr(C)]
pub(crate) struct MapElem {
    pub(crate) map_fd: u32,
    pub(crate) pad: u32,
    pub(crate) key: u64,
    /// Or `next_key`.
    pub(crate) value: u64,
    pub(crate) flags: u64,
}

#[derive(Default)]
#[repr(C)]
pub(crate) struct MapBatch {
    pub(crate) in_batch: u64,
    pub(crate) out_batch: u64,
    pub(crate) keys: u64,
    pub(crate) values: u64,
    pub(crate) count: u32,
    pub(crate) map_fd: u32,
    pub(crate) elem_flags: u64,
    pub(crate) flags: u64,
}

#[derive(Default)]
#[repr(C)]
pub(crate) struct ProgLoad {
    pub(crate) prog_type: u32,
    pub(crate) insn_cnt: u32,
    pub(crate) insns: u64,
    pub(crate) license: u64,
    pub(crate) log_level: u32,
    pub(crate) log_size: u32,
    pub(crate) log_buf: u64,
    pub(crate) kern_version: u32,
    pub(crate) prog_flags: u32,
    pub(crate) prog_name: [u8; NAME_LENGTH + 1],
}

#[derive(Default)]
#[repr(C)]
pub(crate) struct Obj {
    pub(crate) pathname: u64,
    pub(crate) bpf_fd: u32,
    pub(crate) file_flags: u32,
}

#[derive(Default)]
#[repr(C)]
pub(crate) struct TestRun {
    pub(crate) prog_fd: u32,
    pub(crate) retval: u32,
    pub(crate) data_size_in: u32,
    pub(crate) data_size_out: u32,
    pub(crate) data_in: u64,
    pub(crate) data_out: u64,
    pub(crate) repeat: u32,
    pub(crate) duration: u32,
    pub(crate) ctx_size_in: u32,
    pub(crate) ctx_size_out: u32,
    pub(crate) ctx_in: u64,
    pub(crate) ctx_out: u64,
}

#[derive(Default)]
#[repr(C)]
pub(crate) struct GetById {
    pub(crate) id: u32,
    pub(crate) next_id: u32,
    pub(crate) open_flags: u32,
}

#[derive(Default)]
#[repr(C)]
pub(crate) struct Info {
    pub(crate) bpf_fd: u32,
    pub(crate) info_len: u32,
    pub(crate) info: u64,
}

#[derive(Default)]
#[repr(C)]
pub(crate) struct Query {
    pub(crate) target: u32,
    pub(crate) attach_type: u32,
    pub(crate) query_flags: u32,
    pub(crate) attach_flags: u32,
    pub(crate) prog_ids: u64,
    pub(crate) prog_cnt: u32,
    pub(crate) pad: u32,
}

#[derive(Default)]
#[repr(C)]
pub(crate) struct LinkCreate {
    pub(crate) prog_fd: u32,
    pub(crate) target_ifindex: u32,
    pub(crate) attach_type: u32,
    pub(crate) flags: u32,
    pub(crate) relative: u32,
    pub(crate) pad: u32,
    pub(crate) expected_revision: u64,
}

#[derive(Default)]
#[repr(C)]
pub(crate) struct LinkUpdate {
    pub(crate) link_fd: u32,
    pub(crate) new_prog_fd: u32,
    pub(crate) flags: u32,
    pub(crate) old_prog_fd: u32,
}

#[derive(Default)]
#[repr(C)]
pub(crate) struct LinkDetach {
    pub(crate) link_fd: u32,
}

/// `struct bpf_link_info` of a tcx link.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct LinkInfo {
    pub(crate) link_type: u32,
    pub(crate) id: u32,
    pub(crate) prog_id: u32,
    pub(crate) pad: u32,
    pub(crate) ifindex: u32,
    pub(crate) attach_type: u32,
    pub(crate) rest: [u64; 8],
}

/// `struct bpf_map_info` up to the name.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct MapInfo {
    pub(crate) map_type: u32,
    pub(crate) id: u32,
    pub(crate) key_size: u32,
    pub(crate) value_size: u32,
    pub(crate) max_entries: u32,
    pub(crate) map_flags: u32,
    pub(crate) name: [u8; NAME_LENGTH + 1],
}

/// `struct bpf_prog_info` up to the name.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct ProgInfo {
    pub(crate) prog_type: u32,
    pub(crate) id: u32,
    pub(crate) tag: [u8; 8],
    pub(crate) jited_prog_len: u32,
    pub(crate) xlated_prog_len: u32,
    pub(crate) jited_prog_insns: u64,
    pub(crate) xlated_prog_insns: u64,
    pub(crate) load_time: u64,
    pub(crate) created_by_uid: u32,
    pub(crate) nr_map_ids: u32,
    pub(crate) map_ids: u64,
    pub(crate) name: [u8; NAME_LENGTH + 1],
}

/// What `info_by_fd` may fill: of no padding, and right whatever bytes it has.
pub(crate) trait KernelInfo: Default {}
impl KernelInfo for LinkInfo {}
impl KernelInfo for MapInfo {}
impl KernelInfo for ProgInfo {}

/// bpf(2). `attr` is the part of `union bpf_attr` that `command` reads; the kernel takes what lies behind it for zero.
/// Every address in it must be that of memory which the kernel may read or write as far as the sizes beside it say, until
/// this returns: who calls it borrows that memory.
#[expect(unsafe_code, reason = "no crate that is linked offers bpf(2)")]
pub(crate) fn bpf<T>(command: Command, attr: &mut T) -> io::Result<i32> {
    // SAFETY: `attr` is a whole value, of which the kernel reads and writes no more than its size; addresses in it are
    // right by what is said above, and this module's callers are all in this crate.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command as i32, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(i32::try_from(result).unwrap_or(i32::MAX)) }
}

/// The same for a command that answers with a descriptor.
#[expect(unsafe_code, reason = "the kernel hands the descriptor over as a number")]
pub(crate) fn bpf_fd<T>(command: Command, attr: &mut T) -> io::Result<OwnedFd> {
    let fd = bpf(command, attr)?;
    // SAFETY: the kernel has just opened it for us (with O_CLOEXEC), and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `BPF_OBJ_GET_INFO_BY_FD`.
pub(crate) fn info_by_fd<T: KernelInfo>(fd: BorrowedFd<'_>) -> io::Result<T> {
    let mut info = T::default();
    let mut attr = Info { bpf_fd: number(fd), info_len: size_of::<T>() as u32, info: address_mut(&mut info) };
    bpf(Command::ObjGetInfoByFd, &mut attr)?;
    Ok(info)
}

/// `BPF_OBJ_PIN`: keeps an object at a path of bpffs.
pub(crate) fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = Obj { pathname: path.as_ptr() as u64, bpf_fd: number(fd), file_flags: 0 };
    bpf(Command::ObjPin, &mut attr).map(drop)
}

/// `BPF_OBJ_GET`: opens what is pinned there, whatever it is.
pub(crate) fn open(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    bpf_fd(Command::ObjGet, &mut Obj { pathname: path.as_ptr() as u64, ..Obj::default() })
}

/// A descriptor as the kernel takes it.
pub(crate) fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// Where something is.
pub(crate) fn address(bytes: &[u8]) -> u64 {
    bytes.as_ptr() as u64
}

/// Where something is that the kernel writes to.
pub(crate) fn address_mut<T: ?Sized>(value: &mut T) -> u64 {
    std::ptr::from_mut(value).cast::<u8>() as u64
}

/// A name as the kernel takes it: letters, digits, `_` and `.`, cut to what fits.
pub(crate) fn name(text: &str) -> [u8; NAME_LENGTH + 1] {
    let mut name = [0; NAME_LENGTH + 1];
    for (to, from) in name.iter_mut().zip(text.bytes().take(NAME_LENGTH)) {
        *to = from;
    }
    name
}

/// A name as the kernel gives it.
pub(crate) fn text(name: &[u8]) -> String {
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    String::from_utf8_lossy(&name[..end]).into_owned()
}
