//! Services of Kubernetes on this node: what the API server tells of them.
//!
//! ```text
//! Services, EndpointSlices, own Node ── watch (a reflector each) ──► Sources: None until a whole list, then the latest
//! ```

pub mod watch;
