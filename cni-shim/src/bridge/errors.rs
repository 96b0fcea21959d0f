//! What the runtime is told when something fails: the spec's codes, and the way out.

use rustix::io::Errno;

use crate::error::{CniError, Code};
use crate::host_local::AllocateError;
use crate::netlink::Refused;

/// Why wiring failed.
pub(super) struct Failure {
    pub(super) told: CniError,
    /// The veth was never made: what has its name isn't ours to remove.
    pub(super) unmade: bool,
}

impl From<CniError> for Failure {
    fn from(told: CniError) -> Self {
        Self { told, unmade: false }
    }
}

/// The kernel's refusal.
pub(super) fn refused(e: &Refused) -> CniError {
    let way_out = if e.errno() == Some(Errno::PERM) { "; it takes CAP_NET_ADMIN and CAP_SYS_ADMIN" } else { "" };
    CniError::new(Code::Kernel, format!("{e}{way_out}"))
}

/// Why an address can't be given.
pub(super) fn ungiven(e: &AllocateError) -> CniError {
    let code = match e {
        AllocateError::Exhausted(_) => Code::TryAgainLater,
        AllocateError::Duplicate(..) => Code::AlreadyAttached,
        AllocateError::Taken(..) | AllocateError::Gateway(_) | AllocateError::Senseless(_) => Code::InvalidConfig,
        AllocateError::Io { .. } => Code::Io,
    };
    CniError::new(code, e.to_string())
}
