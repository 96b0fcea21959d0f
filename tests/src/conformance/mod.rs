//! Suites that a fake and the real thing must both pass: what keeps the fakes honest.

pub mod fast_path;
pub mod filter;
pub mod kernel;
pub mod maps;
pub mod real_world;
pub mod store;
