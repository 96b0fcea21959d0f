//! What the tests stand on: the Lab, the fakes and the suites that run on them.

pub mod lab;
