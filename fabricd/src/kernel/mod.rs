//! The kernel's side: what it holds, and writing to it.
//!
//! [`Kernel`] is what the reconcile loop sees. [`netlink::Netlink`] is the real one; the test crate has a fake that
//! behaves alike, and one conformance suite runs on both. Only this folder speaks netlink, by the crate `fabric_netlink`:
//!
//! ```text
//!             apply(ops)                         observe()                       changed()
//!                  │                                 │                               ▲
//!   {routing, nft}::encode ▸ Request    mirror: what is known  ◄── events ──  monitor: a socket of its own
//!                  │                                 ▲                               ▲
//!                  │                       routing, nft, firewalls, sysctl             │
//!                  ▼                                 │  (only what is stale)         │
//!            RequestSocket: one send per 64 KiB, or one dump of a table              │
//!                  ▼                                 │                               │
//!            ────────────────────────────────────  kernel  ──────────────────────────────────────
//! ```

mod audit;
pub mod bridged;
pub mod conntrack;
pub mod fast_path;
mod firewalls;
pub mod host;
pub mod kube_proxy;
pub mod links;
mod mirror;
mod monitor;
pub mod netlink;
pub mod nflog;
mod nft;
mod options;
mod refusal;
pub mod routing;
pub mod section;
pub mod services;
mod sysctl;
pub mod takeover;

pub use self::nft::drops::{Counted, Drops, counted, drops};
pub use self::nft::service::is_service;
pub use self::options::Options;
pub use self::routing::fib::fib;
pub use self::routing::{RouteLookup, route_of_packet, route_to};

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use fabric_core::derived::Dirty;
use fabric_core::diff::{Key, Op};
use fabric_core::firewall::Firewall;
use fabric_core::model::{Family, IfName};
use fabric_core::plan::bypass::Shaping;
use fabric_core::plan::fast_path::Port;
use fabric_core::state::docker_user::DockerUser;
use fabric_core::state::fast_path::{FastPath, UnderlayPath};
use fabric_core::state::nft::FoundRuleset;
use fabric_core::state::{Foreign, Found, Routing};

use crate::errors::errno;
use crate::kernel::host::Host;

/// What one look at the kernel found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// What is ours, by the marks of docs/kernel-state.md.
    pub ours: Routing,
    /// What is not ours, as far as plans must step around it.
    pub foreign: Foreign,
    /// The host's links, addresses and default routes: what the underlay is chosen from.
    pub host: Host,
    /// Whether the kernel knows nexthop objects (5.3 and later).
    pub nexthop_objects: bool,
    /// Chains of others that packets of ours meet, as [`fabric_core::firewall::evaluate`] takes them.
    pub firewall: Arc<Firewall>,
    /// Our tables of nftables.
    pub filter: FoundRuleset,
    /// What they have dropped, when they were last read.
    pub dropped: Dropped,
    /// The chains that Docker has for rules of others.
    pub docker_user: Vec<DockerUser>,
    /// Settings of the host that don't suit what runs on it, in words with the way out.
    pub hazards: Vec<(Family, String)>,
    /// The ports of every bridge.
    pub bridges: BTreeMap<IfName, BTreeSet<IfName>>,
    /// Whether connections are tracked here, or have been.
    pub tracked: bool,
    /// The fast path, and what it depends on.
    pub fast_path: FastPathFound,
}

impl Observed {
    /// What is ours, by section. Routes as flannel makes them count as ours where `want` has one, so that they are replaced
    /// in place.
    #[must_use]
    pub fn found<'a>(&'a self, want: &Routing) -> Found<'a> {
        let routing = self.foreign.lend(&self.ours, want);
        Found { routing, filter: &self.filter, docker_user: &self.docker_user, fast_path: &self.fast_path.state }
    }
}

/// What was found of the fast path, and of what it depends on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FastPathFound {
    /// Maps, programs and links of ours.
    pub state: Arc<FastPath>,
    /// Why there can be none here, with the way out.
    pub trouble: Option<String>,
    /// Programs are attached as filters of tc, since the kernel has no tcx.
    pub by_filters: bool,
    /// The way to each underlay address that the FDB names, over interfaces that programs can send by.
    pub paths: BTreeMap<IpAddr, UnderlayPath>,
    /// The ports of bridges.
    pub ports: BTreeMap<IfName, Port>,
    /// Indexes of our VXLAN devices.
    pub devices: BTreeMap<IfName, u32>,
    /// What of others shapes or encrypts packets on the kernel's path.
    pub shaping: Shaping,
    /// What the programs have counted, not older than an audit.
    pub counts: fast_path::Counts,
    /// What they have counted for each peer, not older either.
    pub traffic: Arc<fast_path::Traffic>,
}

/// What the packet filter has dropped since its rules were written, by the rules' reasons.
pub type Dropped = BTreeMap<String, Count>;

/// Packets that a rule was applied to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// How many.
    pub packets: u64,
    /// How many bytes they had, those of their IP headers included.
    pub bytes: u64,
}

/// What has changed in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touched {
    /// Something that [`Observed`] shows may have changed.
    State,
    /// Notifications were lost: anything may have changed.
    Everything,
}

/// Why the kernel could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The kernel refused a write.
    #[error("{op}: {}: {detail}", errno::named(source))]
    Refused {
        /// The write, as iproute2 would put it.
        op: String,
        /// Its errno.
        source: io::Error,
        /// The kernel's own words (`NLMSGERR_ATTR_MSG`), or what else is known, and the way out. Never empty.
        detail: String,
    },
    /// A table could not be read.
    #[error("cannot read the kernel's {table}: {}: {}", errno::named(source), refusal::general(source))]
    Dump {
        /// Which table.
        table: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The connection to the kernel is gone.
    #[error("the netlink connection is gone: {0}")]
    Disconnected(String),
    /// The kernel takes longer than that many seconds over one call. The call goes on.
    #[error(
        "the kernel has not answered for {0} s and is still at it; does it load modules, or is the machine overloaded? See: \
         ps -eo pid,etime,args | grep [m]odprobe; uptime"
    )]
    Busy(u64),
}

impl KernelError {
    /// The errno, where there is one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { source, .. } | Self::Dump { source, .. } => source.raw_os_error(),
            Self::Disconnected(_) | Self::Busy(_) => None,
        }
    }
}

/// So many audits read every table anew.
pub const AUDITS: usize = audit::TURNS.len();

/// A kernel that fabricd can look at and write to.
pub trait Kernel: Send {
    /// What the kernel holds now. Cheap when nothing was touched since the last look.
    ///
    /// # Errors
    /// When a table can't be read; nothing is known then.
    fn observe(&mut self) -> impl Future<Output = Result<Arc<Observed>, KernelError>> + Send;

    /// What of [`Observed::ours`] may differ in what was observed last from what was observed when this was asked last.
    fn touched(&mut self) -> Dirty<Key>;

    /// Takes steps that don't depend on each other: one result for each, in their order.
    ///
    /// What is already as wanted is no error: deleting what is gone, adding an address, an FDB entry or a neighbour
    /// that is there. Creating a device, a nexthop object or a route where there is one is an error (`EEXIST`): it may
    /// be somebody else's. Steps of one [`Transaction`](fabric_core::diff::nft::Transaction) of the packet filter are taken
    /// all or not at all, and refused for one reason.
    fn apply(&mut self, ops: &[Op]) -> impl Future<Output = Vec<Result<(), KernelError>>> + Send;

    /// Waits until something that [`Kernel::observe`] shows may have changed since the last observe began, be it by
    /// [`Kernel::apply`]; that observe failed wakes nobody. Cancel-safe.
    fn changed(&mut self) -> impl Future<Output = Touched> + Send;

    /// Makes the next observe look at what the kernel announces to nobody (a chain of iptables-legacy, `accept_ra`) and
    /// read every table anew that is small. The tables of thousands, whose every change is announced, are read in turns:
    /// each once in [`AUDITS`] calls.
    fn audit(&mut self);
}
