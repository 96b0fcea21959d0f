//! A node that is well, to be broken.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use fabric_core::diff::diff;
use fabric_core::firewall;
use fabric_core::firewall::TableKind;
use fabric_core::model::{Family, Vni};
use fabric_core::plan::Desired;
use fabric_core::state::nft::{FoundTable, TableKey};
use fabric_core::state::{Routing, VxlanLink};
use fabric_tests::served::view;
use fabricd::config::StoreKind;
use fabricd::diagnosis::finding::Finding;
use fabricd::diagnosis::{Inspection, Places, Sections, checks};
use fabricd::host::underlay::HostLink;
use fabricd::kernel::Observed;
use fabricd::kernel::routing::fib::{Action, Fib, PolicyRule, Route};
use fabricd::mesh::Mesh;
use fabricd::policy::drops::DropLog;
use fabricd::policy::status::PolicyView;
use fabricd::reconcile::Snapshot;
use fabricd::status::section::SectionStatus;
use fabricd::status::view::View;
use tempfile::TempDir;
use tokio::sync::watch;

/// A node that is well, to be broken.
pub struct Node {
    pub root: TempDir,
    pub view: View,
    pub wanted: Routing,
    pub observed: Observed,
    pub fib: Fib,
    pub certificates: Vec<PathBuf>,
    pub sections: Sections,
    pub policy: Option<PolicyView>,
}

impl Node {
    pub fn well() -> Result<Self> {
        let view = view(&[2])?;
        let end = view.vteps[0].clone();
        let link = VxlanLink {
            vni: Vni::try_from(1)?,
            port: 8472,
            gbp: false,
            mac: end.vtep.mac,
            local: end.vtep.local,
            mtu: 1450,
            learning: false,
            up: true,
        };
        let wanted = Routing { links: [(end.device, link)].into(), ..Routing::default() };
        let bridge = ("127.1.1.1".parse()?, "127.1.1.0/24".parse()?);
        let host_link = |name: &str, mtu, addresses| -> Result<HostLink> {
            Ok(HostLink { index: 7, name: name.parse()?, mtu, up: true, loopback: false, addresses, passing: vec![] })
        };
        let mut observed = Observed { ours: wanted.clone(), nexthop_objects: true, ..Observed::default() };
        observed.host.links = vec![
            host_link("eth0", 1500, vec![])?,
            host_link("cni0", 1450, vec![bridge])?,
            host_link("veth1", 1450, vec![])?,
        ];
        observed.bridges = [("cni0".parse()?, ["veth1".parse()?].into())].into();
        observed.filter.insert(
            TableKey::Fabric,
            FoundTable { chains: [("postrouting".to_owned(), Arc::default())].into(), ..FoundTable::default() },
        );
        let fib = Fib { rules: vec![rule(32766, 254)], routes: vec![route("127.1.2.0/24", "fabric.1", true)] };
        let node = Self {
            root: tempfile::tempdir()?,
            view,
            wanted,
            observed,
            fib,
            certificates: vec![],
            sections: Sections::default(),
            policy: None,
        };
        for (file, content) in [
            ("proc/sys/kernel/osrelease", "6.1.0-amd64"),
            ("proc/sys/net/ipv4/ip_forward", "1"),
            ("proc/sys/net/bridge/bridge-nf-call-iptables", "1"),
            ("proc/sys/net/netfilter/nf_conntrack_count", "9"),
            ("proc/sys/net/netfilter/nf_conntrack_max", "1000"),
            ("sys/class/net/fabric.1/ifindex", "5"),
            ("run/systemd/netif/state", ""),
            ("run/systemd/netif/links/5", "ADMIN_STATE=unmanaged"),
            ("etc/systemd/networkd.conf.d/x.conf", "[Network]\nManageForeignRoutes=no\nManageForeignNextHops=no\n"),
            ("run/NetworkManager/devices/5", "[device]\nmanaged=false"),
            ("sys/class/net/cni0/ifindex", "6"),
            ("sys/class/net/veth1/ifindex", "7"),
            ("sys/class/net/veth1/carrier", "1"),
            ("etc/cni/net.d/10-fabric.conflist", r#"{"plugins":[{"type":"fabric-cni"}]}"#),
            ("etc/cni/net.d/99-loopback.conf", "{}"),
            ("var/lib/cni/networks/fabric/127.1.1.2", "c1\r\neth0"),
            (
                "var/lib/cni/fabric/fabric/c1@eth0.json",
                "{\"netns\":\"/run/netns/c1\"}\n{\"ports\":[\"veth1\"],\"bridge\":\"cni0\",\"ips\":[\"127.1.1.2\"]}\n",
            ),
        ] {
            node.has(file, content)?;
        }
        Ok(node)
    }

    /// A file of the host.
    pub fn has(&self, file: &str, content: &str) -> Result<()> {
        let path = self.root.path().join(file);
        fs::create_dir_all(path.parent().context("a folder")?)?;
        Ok(fs::write(path, content)?)
    }

    pub fn lacks(&self, file: &str) -> Result<()> {
        Ok(fs::remove_file(self.root.path().join(file))?)
    }

    /// It is switched on, and stands like this.
    pub fn section(status: SectionStatus) -> Option<watch::Receiver<Arc<SectionStatus>>> {
        Some(watch::channel(Arc::new(status)).1)
    }

    pub fn check(&self, id: &str) -> Result<Finding> {
        let wanted = Desired { state: self.wanted.clone(), ..Desired::default() };
        let places = Places {
            addresses: self.root.path().join("var/lib/cni/networks"),
            attachments: self.root.path().join("var/lib/cni/fabric"),
            root: self.root.path().into(),
            certificates: self.certificates.clone(),
            cni_conf: self.root.path().join("etc/cni/net.d"),
            kubernetes: false,
            store: StoreKind::Etcd,
        };
        let snapshot = Snapshot {
            wanted: Some(Arc::new(wanted)),
            observed: Some(Arc::new(self.observed.clone())),
            left: Some(Arc::new(diff(&self.wanted, &self.observed.ours))),
            last: None,
            blocked: String::new(),
        };
        let (view, mesh, fib) = (Arc::new(self.view.clone()), Arc::new(Mesh::default()), Arc::new(self.fib.clone()));
        let sections = self.sections.clone();
        let inspection = Inspection { view, snapshot, mesh, places, fib, sections, policy: self.policy.clone() };
        let (_, _, check) = checks::ALL.iter().find(|(name, ..)| *name == id).context("no such check")?;
        Ok(check(&inspection))
    }
}

/// Network policies that are enforced, as they stand.
pub fn policies(ready: Result<(), String>, warnings: &[&str]) -> PolicyView {
    let warnings = warnings.iter().map(|warning| (*warning).to_owned()).collect();
    let status = watch::channel(Arc::new(SectionStatus { ready, warnings })).1;
    PolicyView { status, applied: watch::channel(None).1, drops: DropLog::default() }
}

/// The chains that kube-router makes with iptables.
pub fn kube_router() -> firewall::Firewall {
    let chains = ["FORWARD", "KUBE-ROUTER-FORWARD"].map(|name| (name.to_owned(), firewall::Chain::default())).into();
    let (kind, name) = (TableKind::Iptables, "filter".to_owned());
    let table = firewall::Table { kind, name, chains, sets: Default::default() };
    firewall::Firewall { tables: vec![table], ..firewall::Firewall::default() }
}

pub fn rule(priority: u32, table: u32) -> PolicyRule {
    PolicyRule::of_all(Family::V4, priority, Action::Table(table))
}

pub fn route(dst: &str, device: &str, ours: bool) -> Route {
    Route {
        dst: dst.parse().expect("a prefix"),
        table: 254,
        kind: if device.is_empty() { "blackhole" } else { "unicast" }.into(),
        metric: 0,
        device: Some(device.to_owned()).filter(|device| !device.is_empty()),
        gateway: None,
        protocol: if ours { "250" } else { "bird" }.into(),
        ours,
    }
}
