//! fabricd, the node daemon.

pub mod config;
pub mod kernel;
pub mod store;
pub mod underlay;
