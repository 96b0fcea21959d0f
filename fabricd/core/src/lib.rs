//! The pure half of fabricd.
//!
//! Nothing here reads a clock, draws a random number, opens a file or waits. The daemon hands in
//! what it knows (leases from the store, facts from the kernel) and gets back what the kernel
//! should hold and the steps that lead there:
//!
//! ```text
//! records ──> LeaseSet ──> desired() ──> State ──> diff() ──> Plan
//!                 facts ──────┘          observed state ───┘
//! ```

pub mod attachments;
pub mod cow_map;
pub mod derived;
pub mod device;
pub mod diff;
pub mod family;
pub mod firewall;
pub mod handoff;
pub mod inquiry;
pub mod interner;
pub mod lease;
pub mod leased_ranges;
pub mod leases;
pub mod model;
pub mod network;
pub mod plan;
pub mod policy;
pub mod record;
pub mod services;
pub mod state;
pub mod subnet;
pub mod takeover;
