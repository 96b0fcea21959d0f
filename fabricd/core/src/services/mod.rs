//! Services of Kubernetes: what they are, where their connections go, and who decides it.
//!
//! ```text
//! Service ───────── objects ──► ServiceSet ─┐
//! EndpointSlice ─── objects ──► SliceSet ───┼─► backends() ─► choose() ─► Answer: to these endpoints, reject, drop
//! own Node ────────────────────► Here ──────┘
//! ```
//!
//! [`objects`] are the members of the API's objects that matter, [`model`] what they say once they are checked, [`sets`] all
//! of them together, [`slices`] what all slices of a Service amount to for one of its ports, and [`choose`] which of these
//! endpoints take a connection, [`balance`] how one of them is picked. [`plan`] says what the kernel should hold of all that. The sets are values: what they hold depends on the objects alone, never on the order in which
//! they came, and a copy costs a reference.

pub mod balance;
pub mod choose;
pub mod model;
pub mod objects;
pub mod plan;
pub mod sets;
pub mod slices;

#[cfg(test)]
mod choose_tests;
#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod sets_tests;

pub use self::choose::{Answer, Choice, Frontend, Here, Origin, choose};
pub use self::model::{Endpoint, ObjectName, Protocol, Service, ServicePort, Slice};
pub use self::sets::{ServiceSet, SliceSet};
pub use self::slices::{Backend, backends};
