//! The host that the daemon runs on, as far as it isn't the daemon's to write: its underlay, its pods, the firewalls of
//! others on it, and that no second daemon is there.

pub mod addresses;
pub mod attachments;
pub mod errno;
pub mod firewall;
pub mod lock;
pub mod underlay;
