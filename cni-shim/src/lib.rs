//! `fabric-cni`, the CNI plugin of fabricd: a thin shim over the standard plugins.
//!
//! A container runtime starts it for every pod that comes or goes. It takes what the daemon left in
//! `node.json`, renders a configuration for `bridge` and `host-local`, and lets them do the work:
//!
//! ```text
//!  runtime ── env, stdin ──> request ──> verbs ──> delegate ── exec ──> bridge ──> host-local
//!     ^                                  │   │         │
//!     │                 node.json ───────┘   │         └ which versions of the spec does it speak?
//!     │                 (from fabricd)       v
//!     └── stdout: result or error ◄──────  state: one file for each attachment
//! ```
//!
//! | module       | what it knows                                                       |
//! |--------------|---------------------------------------------------------------------|
//! | [`request`]  | environment and stdin become a checked value                        |
//! | [`conf`]     | the network configuration: the spec's keys and ours                 |
//! | [`verbs`]    | ADD, DEL, CHECK, GC, STATUS, VERSION and what each leaves behind    |
//! | [`delegate`] | what the delegate is told, in which version, and what it answers    |
//! | [`exec`]     | a process with a deadline, or a test's fake                         |
//! | [`state`]    | the saved attachments, their locks, and what a crash may leave      |
//! | [`version`]  | the spec's versions and the forms of a result                       |
//! | [`error`]    | the spec's error object and its codes                               |
//!
//! References are to the CNI spec, version 1.1.0 (containernetworking/cni, SPEC.md).

pub mod conf;
pub mod delegate;
pub mod error;
pub mod exec;
pub mod request;
pub mod state;
pub mod verbs;
pub mod version;

#[cfg(test)]
mod testing;
