//! fabricd, the node daemon.
//!
//! ```text
//!   store ──watch──> LeaseSet ──┐
//!     ▲                         ▼
//!   lease <──wanted── reconcile ──plan──> kernel
//!   (keeper) ─holding─>   │   <──observed──┘
//!                         ├──> files (node.json, subnet.env)
//!                         └──> status (view, events) ──> api (gRPC), http (probes, page), metrics
//! ```
//!
//! Store and kernel never see each other. docs/architecture.md tells the whole story.

pub mod api;
pub mod atomic_file;
pub mod command_line;
pub mod commands;
pub mod config;
pub mod daemon;
pub mod diagnosis;
pub mod errors;
pub mod files;
pub mod host;
pub mod http;
pub mod kernel;
pub mod kubernetes;
pub mod lease;
pub mod mesh;
pub mod metrics;
pub mod pki;
pub mod policy;
pub mod reconcile;
pub mod retry;
pub mod services;
pub mod status;
pub mod store;
pub mod takeover;
