//! What the tests stand on: the Lab, the fakes and the suites that run on them.

pub mod bench;
pub mod browser;
pub mod certificates;
pub mod conformance;
pub mod deb;
pub mod etcd;
pub mod fake_api;
pub mod fake_kernel;
pub mod faults;
pub mod handover;
pub mod hosts;
pub mod keepers;
pub mod kubernetes;
pub mod lab;
pub mod machines;
pub mod memory_store;
pub mod netns;
pub mod plain_host;
pub mod policies;
mod process;
pub mod real_api;
pub mod revisions;
pub mod served;
pub mod services;
pub mod tcp_proxy;
