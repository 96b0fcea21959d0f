//! fabricd, the node daemon.

pub mod kernel;
pub mod store;
pub mod underlay;
