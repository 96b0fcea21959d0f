//! The Lab, the fakes and the suites that run on them.

pub mod certificates;
pub mod conformance;
pub mod etcd;
pub mod memory_store;
pub mod tcp_proxy;
