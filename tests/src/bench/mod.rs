//! Benchmarks in the Lab: fabricd beside what it is compared with, in one run.
//!
//! | module | question |
//! |---|---|
//! | [`cold_start`] | how long from process start to N peers programmed, beside iproute2 and flanneld |
//! | [`change`] | how long one lease takes that comes or goes, and its CPU, beside another build |
//! | [`changes`] | how long one lease or a thousand take, what a restart costs |
//! | [`rest`] | what rest costs |
//! | [`datapath`] | what pods get of the network with the fast path and without, beside a VXLAN made by hand, plain routes and the bare underlay |
//! | [`filter`] | what the packet filter takes of that |
//! | [`firewalls`] | what reading and judging the firewalls of others takes, beside thousands of their chains |
//! | [`services`] | what Services cost: memory, a start, one change among many, beside kube-proxy's layout of nftables |
//! | [`policy`] | what network policies of a large cluster take of memory, and one label that changes |
//! | [`cni`] | how long a pod's ADD and DEL take, beside `bridge` and `host-local` |
//!
//! [`report`] prints and keeps the figures, [`usage`] reads what a process used, [`traffic`] makes traffic, [`crowded`] a
//! node beside thousands of peers. Nothing here fails because a figure is bad: a benchmark measures, it doesn't test. But what is
//! measured has to be what it is called: `datapath` fails when packets don't take the fast path.

pub mod change;
pub mod changes;
pub mod cni;
pub mod cold_start;
pub mod crowded;
pub mod datapath;
mod fast_path;
pub mod filter;
pub mod firewalls;
pub mod policy;
pub mod report;
pub mod rest;
pub mod services;
pub mod traffic;
pub mod usage;

pub use report::Report;
