//! [`Link`]: a program at a hook of an interface (tcx, kernel 6.6).
//!
//! Programs of others at the same hook run as well: a link adds itself in front of or behind them, and goes with its last
//! pin and descriptor, or with its interface. Its program can be replaced in place.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use crate::map::kind_of;
use crate::program::{Program, ProgramInfo};
use crate::sys::{
    self, Command, LinkCreate, LinkDetach, LinkInfo, LinkUpdate, Query, address_mut, bpf, bpf_fd, number,
};

/// `BPF_LINK_TYPE_TCX`.
const TCX: u32 = 11;
/// How many programs of one hook are looked at (`BPF_MPROG_MAX`).
const MOST: usize = 64;
/// The index of an interface that nobody has: they are counted up from 1.
const NO_INTERFACE: u32 = i32::MAX.cast_unsigned();

/// Where at an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// What it has received, before anything else of the network stack (`BPF_TCX_INGRESS`).
    Ingress,
    /// What it is about to send (`BPF_TCX_EGRESS`).
    Egress,
}

impl Hook {
    const fn number(self) -> u32 {
        match self {
            Self::Ingress => 46,
            Self::Egress => 47,
        }
    }
}

/// An open link.
#[derive(Debug)]
pub struct Link {
    fd: OwnedFd,
}

impl Link {
    /// Adds `program` behind all that is at the hook. It goes again unless it is pinned.
    ///
    /// # Errors
    /// The kernel's: `EINVAL` before 6.6, `ENODEV` for an interface that is gone.
    pub fn attach(program: &Program, ifindex: u32, hook: Hook) -> io::Result<Self> {
        let mut attr = LinkCreate {
            prog_fd: number(program.as_fd()),
            target_ifindex: ifindex,
            attach_type: hook.number(),
            ..LinkCreate::default()
        };
        Ok(Self { fd: bpf_fd(Command::LinkCreate, &mut attr)? })
    }

    /// Whether the kernel has links of tcx: it is asked for one at an interface that isn't there.
    ///
    /// # Errors
    /// The kernel's: `EPERM` without CAP_BPF and CAP_NET_ADMIN.
    pub fn are_known(program: &Program) -> io::Result<bool> {
        match Self::attach(program, NO_INTERFACE, Hook::Ingress) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
            Err(error) if error.raw_os_error() != Some(libc::ENODEV) => Err(error),
            _ => Ok(true),
        }
    }

    /// Opens the link that is pinned at `path`.
    ///
    /// # Errors
    /// `ENOENT` when nothing is there, [`io::ErrorKind::InvalidData`] when it is something else.
    pub fn open(path: &Path) -> io::Result<Self> {
        let fd = sys::open(path)?;
        let kind = kind_of(fd.as_fd())?;
        // Both spellings have been in use.
        if !matches!(kind.as_str(), "bpf_link" | "bpf-link") || link_info(&fd)?.link_type != TCX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is not a link of tcx"));
        }
        Ok(Self { fd })
    }

    /// Keeps it at `path`, which must be on bpffs and free.
    ///
    /// # Errors
    /// The kernel's.
    pub fn pin(&self, path: &Path) -> io::Result<()> {
        sys::pin(self.fd.as_fd(), path)
    }

    /// Puts another program in the place of its own: each packet meets the one or the other.
    ///
    /// # Errors
    /// The kernel's: `ENOLINK` when its interface is gone.
    pub fn replace(&self, program: &Program) -> io::Result<()> {
        let (link_fd, new_prog_fd) = (number(self.fd.as_fd()), number(program.as_fd()));
        bpf(Command::LinkUpdate, &mut LinkUpdate { link_fd, new_prog_fd, ..LinkUpdate::default() }).map(drop)
    }

    /// Takes its program away from the hook now; without that it stays there a moment longer than its last pin.
    ///
    /// # Errors
    /// The kernel's.
    pub fn detach(&self) -> io::Result<()> {
        bpf(Command::LinkDetach, &mut LinkDetach { link_fd: number(self.fd.as_fd()) }).map(drop)
    }

    /// The number of its program, and the index of its interface: 0 when that is gone.
    ///
    /// # Errors
    /// The kernel's.
    pub fn program_and_interface(&self) -> io::Result<(u32, u32)> {
        let info = link_info(&self.fd)?;
        Ok((info.prog_id, info.ifindex))
    }
}

fn link_info(fd: &OwnedFd) -> io::Result<LinkInfo> {
    sys::info_by_fd(fd.as_fd())
}

/// The programs at a hook of an interface, in the order in which packets meet them. One that went meanwhile is left out.
///
/// # Errors
/// The kernel's: `EINVAL` before 6.6, `ENODEV`.
pub fn attached(ifindex: u32, hook: Hook) -> io::Result<Vec<ProgramInfo>> {
    let mut ids = [0_u32; MOST];
    let mut attr = Query {
        target: ifindex,
        attach_type: hook.number(),
        prog_ids: address_mut(&mut ids),
        prog_cnt: MOST as u32,
        ..Query::default()
    };
    match bpf(Command::ProgQuery, &mut attr) {
        Ok(_) => {}
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(vec![]),
        Err(error) => return Err(error),
    }
    let mut found = vec![];
    for id in ids.iter().take(attr.prog_cnt as usize) {
        match Program::with_id(*id) {
            Ok(program) => found.push(program.info()?),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}
