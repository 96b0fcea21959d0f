//! The host that the daemon runs on, as far as it isn't the daemon's to write: its underlay, its pods, and that no
//! second daemon is there.

pub mod addresses;
pub mod attachments;
pub mod lock;
pub mod underlay;
