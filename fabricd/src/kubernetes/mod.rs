//! The Kubernetes API, below all that is read from it.

pub mod client;
