//! What `fabricd` does besides being the daemon: each a run that ends, or stays beside the daemon in a container of its own.

pub mod cleanup;
pub mod conflists;
pub mod install_cni;
pub mod leftovers;
pub mod stay;
