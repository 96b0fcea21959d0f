//! What has to be known before the kernel can be looked at.

use std::net::IpAddr;
use std::path::PathBuf;

/// What [`Netlink`](super::netlink::Netlink) has to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// Addresses for which the kernel is asked how it would reach them (`--iface-can-reach`).
    pub can_reach: Vec<IpAddr>,
    /// Where the settings are: `/proc/sys/net`.
    pub sysctl_root: PathBuf,
    /// Somebody else in this process reads and writes the table of Services: [`SectionTable`](super::section::SectionTable).
    pub services_apart: bool,
    /// Where eBPF's file system is: `/sys/fs/bpf`.
    pub bpffs: PathBuf,
    /// What the fast path has to know is asked for: the way to each peer.
    pub fast_path: bool,
}

impl Default for Options {
    fn default() -> Self {
        let (sysctl_root, bpffs) = ("/proc/sys/net".into(), "/sys/fs/bpf".into());
        Self { can_reach: vec![], sysctl_root, services_apart: false, bpffs, fast_path: false }
    }
}
