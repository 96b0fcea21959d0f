//! NetworkPolicies and ClusterNetworkPolicies on this node: what the API server tells of them, and the loop that enforces them.
//!
//! ```text
//! policies, Namespaces, Pods ── watch (a reflector each) ──► Sources: None until a whole list, then the latest
//!   attachments of fabric-cni ──────────────────────────────────┐      │
//!                                                               ▼      ▼
//!                                        reconcile: Cluster ─► plan ─► diff ─► the table fabric-policy
//!                                                               ├─► applied: fabric-cni may go on
//!                                                               ├─► connections: those that are open are evaluated again
//!                                                               └─► status: who is isolated, and by which rules
//!   packets that are dropped ── drops: while somebody listens ──► the API
//! ```

pub mod applied;
mod closed;
mod connections;
pub mod drops;
pub mod reconcile;
pub mod status;
mod trouble;
pub mod watch;
