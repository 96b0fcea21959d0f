//! The names by which kube-proxy's chains and sets are known.

/// What its chains of iptables and its sets of `ipset` begin with.
pub(super) const ITS: &str = "KUBE-";
/// Those of kubelet, which stay (kubernetes/pkg/kubelet/kubelet_network_linux.go).
const OF_KUBELET: [&str; 4] = ["KUBE-FIREWALL", "KUBE-KUBELET-CANARY", "KUBE-IPTABLES-HINT", "KUBE-MARK-DROP"];

/// Tables of iptables in which it has chains.
pub(in crate::kernel) const IPTABLES: [&str; 4] = ["mangle", "nat", "filter", "raw"];
/// The chain of the table `nat` that it has in each of its modes by iptables.
pub(in crate::kernel) const SERVICES: &str = "KUBE-SERVICES";

/// Whether a chain of iptables is kube-proxy's.
pub(in crate::kernel) fn is_its_chain(name: &str) -> bool {
    name.starts_with(ITS) && !OF_KUBELET.contains(&name)
}
