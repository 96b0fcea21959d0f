//! `fabric-cni`, the CNI plugin of fabricd, and `fabric-bridge`, a plugin that does the work of `bridge` and `host-local`.
//!
//! A container runtime starts `fabric-cni` for every pod that comes or goes. It takes what the daemon left in
//! `node.json`, renders a configuration for another plugin, the delegate, and lets it do the work:
//!
//! ```text
//!  runtime ── env, stdin ──> request ──> verbs ──> delegate ─┬─ exec ──> bridge ──> host-local
//!     ^                                  │ │ │               └─ bridge ──> netlink, host_local
//!     │        node.json ──> ready ──────┘ │ └> sweep: what earlier pods left
//!     │        (from fabricd)              v
//!     └── stdout: result or error ◄──── state: one file for each attachment
//! ```
//!
//! | module         | what it knows                                                       |
//! |----------------|---------------------------------------------------------------------|
//! | [`process`]    | the process around a plugin: reads, has it answered, prints         |
//! | [`request`]    | environment and stdin become a checked value                        |
//! | [`spec`]       | the spec's words that all share: verbs, names, attachments          |
//! | [`conf`]       | the network configuration: the spec's keys and ours                 |
//! | [`ready`]      | whether pods may be added to this node, and waiting for it          |
//! | [`verbs`]      | ADD, DEL, CHECK, GC, STATUS, VERSION and what each leaves behind    |
//! | [`delegate`]   | what the delegate is told, in which version, and what it answers    |
//! | [`fast_path`]  | takes a pod's addresses out of the daemon's eBPF maps                |
//! | [`exec`]       | a process with a deadline, or a test's fake                         |
//! | [`state`]      | the saved attachments, their locks, and what a crash may leave      |
//! | [`sweep`]      | what earlier pods have left on the delegate's bridge                |
//! | [`veths`]      | which pods no longer exist                                          |
//! | [`node_ipam`]  | one IPAM state for the node's subnet, whatever networks there are   |
//! | [`bridge`]     | `fabric-bridge`: pods on a bridge, without any other process        |
//! | [`host_local`] | who has which address, in the files of the plugin host-local        |
//! | [`policy`]     | network policies: ADD waits for them, DEL closes the pod's addresses    |
//! | [`netlink`]    | rtnetlink over the crate `fabric_netlink`, told as `ip` commands     |
//! | [`version`]    | the spec's versions and the forms of a result                       |
//! | [`error`]      | the spec's error object and its codes                               |
//!
//! References are to the CNI spec, version 1.1.0 (containernetworking/cni, SPEC.md).

pub mod bridge;
pub mod conf;
pub mod delegate;
pub mod error;
pub mod exec;
pub mod fast_path;
pub mod flannel;
pub mod host_local;
pub mod netlink;
pub mod node_ipam;
pub mod policy;
pub mod process;
pub mod ready;
pub mod request;
pub mod spec;
pub mod state;
pub mod sweep;
pub mod verbs;
pub mod version;
pub mod veths;

#[cfg(test)]
mod testing;
