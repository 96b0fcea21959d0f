//! Suites that a fake and the real thing must both pass.

pub mod kernel;

pub mod real_world;
