//! The Lab, the fakes and the suites that run on them.

pub mod conformance;
pub mod fake_kernel;
pub mod netns;
