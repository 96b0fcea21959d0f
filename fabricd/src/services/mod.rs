//! Services of Kubernetes on this node, in the place of kube-proxy.
//!
//! ```text
//! Services, EndpointSlices, own Node ── watch (a reflector each) ──► Sources
//!                                                                       ▼
//! own subnets, pods' bridges, host's addresses ──► reconcile ──► core::services::plan ──► diff ──► table fabric-services
//!                                                      │                                          └─► connections
//!                                                      ├──► status: readiness, warnings, metrics; handle: questions
//!                                                      └──► health: load balancers; Events on Services
//! ```

mod cidrs;
mod connections;
pub mod handle;
pub mod health;
pub mod reconcile;
pub mod status;
pub mod watch;
