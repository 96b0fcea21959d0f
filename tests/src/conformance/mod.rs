//! Suites that a fake and the real thing must both pass: what keeps the fakes honest.

pub mod store;
