//! The Kubernetes API, below all that is read from it: the connection, and the [`reflector`] that keeps the objects of one
//! kind.

pub mod client;
pub mod reflector;
