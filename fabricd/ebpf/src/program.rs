//! [`Program`]: code that the kernel has verified.

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use crate::map::{Map, kind_of};
use crate::object::{Code, MapUse};
use crate::sys::{self, Command, GetById, ProgInfo, ProgLoad, address, address_mut, bpf, bpf_fd, number};

/// `BPF_PROG_TYPE_SCHED_CLS`.
const SCHED_CLS: u32 = 3;
/// How much of the verifier's words is kept: its last lines tell why.
const LOG: usize = 64 * 1024;

/// Why the kernel does not take a program.
#[derive(Debug)]
pub struct LoadError {
    /// Its errno.
    pub error: io::Error,
    /// The last lines of the verifier, if it came to look.
    pub verifier: String,
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.verifier.is_empty() {
            true => self.error.fmt(f),
            false => write!(f, "{}: {}", self.error, self.verifier),
        }
    }
}

impl std::error::Error for LoadError {}

/// An open program for tc hooks (`BPF_PROG_TYPE_SCHED_CLS`).
#[derive(Debug)]
pub struct Program {
    fd: OwnedFd,
}

/// What the kernel tells of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramInfo {
    /// Its number, for `bpftool prog show id`.
    pub id: u32,
    /// Its name.
    pub name: String,
    /// A hash of its instructions, map descriptors left out.
    pub tag: [u8; 8],
}

/// What a program did with a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestRun {
    /// What it returned.
    pub returned: u32,
    /// The packet afterwards.
    pub packet: Vec<u8>,
}

impl Program {
    /// Has the kernel verify and compile `code`, with the maps that it names. Under a licence that isn't the GPL's (see
    /// `include/linux/license.h`) some helpers are refused.
    ///
    /// # Errors
    /// The kernel's, with the verifier's last lines: `EPERM` without CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON. A map that
    /// isn't among `maps` is `ENOENT`.
    pub fn load(code: &Code, license: &CStr, maps: &[(&str, &Map)]) -> Result<Self, LoadError> {
        let mut instructions = code.instructions.clone();
        for MapUse { at, map } in &code.maps {
            let Some((_, found)) = maps.iter().find(|(name, _)| name == map) else {
                let error = io::Error::new(
                    io::ErrorKind::NotFound,
                    format!("{} uses a map {map}, which isn't there", code.name),
                );
                return Err(LoadError { error, verifier: String::new() });
            };
            // `BPF_PSEUDO_MAP_FD` in the upper half of the registers' byte, the descriptor as the value.
            instructions[*at + 1] = instructions[*at + 1] & 0x0f | 0x10;
            instructions[*at + 4..*at + 8].copy_from_slice(&found.number().to_le_bytes());
        }
        let mut attr = ProgLoad {
            prog_type: SCHED_CLS,
            insn_cnt: u32::try_from(instructions.len() / 8).unwrap_or(u32::MAX),
            insns: address(&instructions),
            license: license.as_ptr() as u64,
            prog_name: sys::name(&code.name),
            ..ProgLoad::default()
        };
        let error = match bpf_fd(Command::ProgLoad, &mut attr) {
            Ok(fd) => return Ok(Self { fd }),
            Err(error) => error,
        };
        // Once more, for the reason: the words cost time, and mostly nobody needs them.
        let mut log = vec![0; LOG];
        (attr.log_level, attr.log_size, attr.log_buf) = (1, LOG as u32, address_mut(&mut log[..]));
        match bpf_fd(Command::ProgLoad, &mut attr) {
            Ok(fd) => Ok(Self { fd }),
            Err(_) => Err(LoadError { error, verifier: last_lines(&sys::text(&log)) }),
        }
    }

    /// Opens the program that is pinned at `path`.
    ///
    /// # Errors
    /// `ENOENT` when nothing is there, [`io::ErrorKind::InvalidData`] when it is no program.
    pub fn open(path: &Path) -> io::Result<Self> {
        let fd = sys::open(path)?;
        match kind_of(fd.as_fd())?.as_str() {
            "bpf-prog" => Ok(Self { fd }),
            other => Err(io::Error::new(io::ErrorKind::InvalidData, format!("it is not a program, but a {other}"))),
        }
    }

    /// Opens a program by its number.
    ///
    /// # Errors
    /// The kernel's: `ENOENT`, `EPERM` without CAP_SYS_ADMIN.
    pub fn with_id(id: u32) -> io::Result<Self> {
        let fd = bpf_fd(Command::ProgGetFdById, &mut GetById { id, ..GetById::default() })?;
        Ok(Self { fd })
    }

    /// Keeps it at `path`, which must be on bpffs and free.
    ///
    /// # Errors
    /// The kernel's.
    pub fn pin(&self, path: &Path) -> io::Result<()> {
        sys::pin(self.fd.as_fd(), path)
    }

    /// What the kernel tells of it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn info(&self) -> io::Result<ProgramInfo> {
        let info: ProgInfo = sys::info_by_fd(self.fd.as_fd())?;
        Ok(ProgramInfo { id: info.id, name: sys::text(&info.name), tag: info.tag })
    }

    /// Runs it on a packet (`BPF_PROG_TEST_RUN`), `repeat` times. `context` is a `struct __sk_buff`, or nothing.
    ///
    /// # Errors
    /// The kernel's.
    pub fn test_run(&self, packet: &[u8], context: &[u8], repeat: u32) -> io::Result<TestRun> {
        // A program may make it longer, by less than that.
        let mut out = vec![0; packet.len() + 512];
        let mut attr = sys::TestRun {
            prog_fd: number(self.fd.as_fd()),
            data_size_in: u32::try_from(packet.len()).unwrap_or(u32::MAX),
            data_size_out: u32::try_from(out.len()).unwrap_or(u32::MAX),
            data_in: address(packet),
            data_out: address_mut(&mut out[..]),
            repeat,
            ctx_size_in: u32::try_from(context.len()).unwrap_or(u32::MAX),
            ctx_in: if context.is_empty() { 0 } else { address(context) },
            ..sys::TestRun::default()
        };
        bpf(Command::ProgTestRun, &mut attr)?;
        out.truncate(attr.data_size_out as usize);
        Ok(TestRun { returned: attr.retval, packet: out })
    }
}

impl AsFd for Program {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn last_lines(log: &str) -> String {
    let lines: Vec<&str> = log.lines().filter(|line| !line.starts_with("processed ")).collect();
    lines[lines.len().saturating_sub(3)..].join("; ")
}
