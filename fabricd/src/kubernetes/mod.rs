//! The Kubernetes API, below all that is read from it: the connection, the [`reflector`] that keeps the objects of one
//! kind, and [`sets`] of them.

pub mod addresses;
pub mod client;
pub mod reflector;
pub mod sets;
