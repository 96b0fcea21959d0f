//! The Kubernetes API, below all that is read from it: the connection, the [`reflector`] that keeps the objects of one
//! kind, and [`sets`] of them; [`event_recorder`] tells what is wrong with one.

pub mod addresses;
pub mod client;
pub mod event_recorder;
pub mod reflector;
pub mod sets;
