//! fabricd, the node daemon.
//!
//! ```text
//!   store ──watch──> LeaseSet ──┐
//!     ▲                         ▼
//!   lease <──wanted── reconcile ──plan──> kernel
//!   (keeper) ─holding─>   │   <──observed──┘
//!                         ├──> files (node.json, subnet.env)
//!                         └──> view ──> api (gRPC), events, health, metrics
//! ```
//!
//! Store and kernel never see each other. docs/architecture.md tells the whole story.

pub mod api;
pub mod api_server;
pub mod backoff;
pub mod config;
pub mod daemon;
pub mod diagnosis;
pub mod disk;
pub mod errno;
pub mod events;
pub mod files;
pub mod firewall;
pub mod health;
pub mod install_cni;
pub mod ipam;
pub mod kept;
pub mod kernel;
pub mod lease;
pub mod leftovers;
pub mod lock;
pub mod log_level;
pub mod mesh;
pub mod metrics;
pub mod page;
pub mod pending;
pub mod pki;
pub mod planned;
pub mod ports;
pub mod reconcile;
pub mod repairs;
pub mod rule_args;
pub mod rules;
mod settings_files;
pub mod stay;
pub mod store;
pub mod underlay;
pub mod view;
