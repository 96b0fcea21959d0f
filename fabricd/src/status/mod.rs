//! What the daemon says of itself: the loop writes it, the API, probes, page and metrics read it.

pub mod counters;
pub mod events;
pub mod fast_path;
pub mod section;
pub mod view;
