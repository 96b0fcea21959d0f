//! NetworkPolicies on this node: what the API server tells of them.
//!
//! ```text
//! NetworkPolicies, Namespaces, Pods ── watch (a reflector each) ──► Sources: None until a whole list, then the latest
//! ```

pub mod watch;
