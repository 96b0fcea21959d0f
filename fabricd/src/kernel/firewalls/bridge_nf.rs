//! Whether the host lets its firewall see what passes between ports of a bridge, where kube-proxy needs that: a pod that
//! reaches a pod of its own node by a service's address is answered past the translation otherwise. The setting is the
//! host's, so it is reported.

use std::fs;
use std::path::Path;

use fabric_core::model::Family;

/// The settings below `/proc/sys/net` that are not as kube-proxy needs them, each in words with the way out.
pub(in crate::kernel) fn lacking(sysctl_root: &Path) -> Vec<(Family, String)> {
    let settings = [(Family::V4, "bridge-nf-call-iptables"), (Family::V6, "bridge-nf-call-ip6tables")];
    let said = |(family, name): (Family, &str)| {
        let value = fs::read_to_string(sysctl_root.join("bridge").join(name)).ok();
        let (is, load) = match value.as_deref().map(str::trim) {
            Some("1") => return None,
            Some(_) => ("is 0", ""),
            None => ("is missing", "modprobe br_netfilter; "),
        };
        Some((
            family,
            format!(
                "net.bridge.{name} {is}: a pod that reaches a pod of this node by a service's address gets answers from \
                 another address; set it with: {load}sysctl -w net.bridge.{name}=1"
            ),
        ))
    };
    settings.into_iter().filter_map(said).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn setting_that_is_missing_or_off_is_named_with_the_way_out() {
        let root = tempfile::tempdir().expect("a folder");
        fs::create_dir(root.path().join("bridge")).expect("a folder");
        fs::write(root.path().join("bridge/bridge-nf-call-iptables"), "0\n").expect("written");
        let said: Vec<String> = lacking(root.path()).into_iter().map(|(_, words)| words).collect();
        assert!(
            said[0].contains("call-iptables is 0")
                && said[0].ends_with("with: sysctl -w net.bridge.bridge-nf-call-iptables=1")
        );
        assert!(said[1].contains("call-ip6tables is missing") && said[1].contains("modprobe br_netfilter; sysctl"));
        for name in ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables"] {
            fs::write(root.path().join("bridge").join(name), "1\n").expect("written");
        }
        assert_eq!(lacking(root.path()), []);
    }
}
