//! A cluster in a few words.

use std::net::IpAddr;
use std::sync::Arc;

use fabric_core::interner::Interner;
use fabric_core::policy::State;
use fabric_core::policy::labels::Labels;
use fabric_core::policy::model::{LocalPod, NamedPort, Pod, PodIdentity, Protocol, Template};
use fabric_core::policy::tiers::ClusterPolicy;
use fabric_core::policy::{Cluster, Conn, ObjectName, Policy, Side, Verdict};
use serde_json::Value;

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;
pub const ICMP: u8 = 1;

/// Addresses of three pods and of a host outside of the cluster.
pub const WEB: &str = "192.0.2.1";
pub const DB: &str = "192.0.2.2";
pub const OTHER: &str = "192.0.2.3";
pub const OUTSIDE: &str = "198.51.100.1";

/// A state that is being made.
#[derive(Clone, Debug, Default)]
pub struct World {
    pub state: State,
    names: Interner<str>,
    labels: Interner<Labels>,
}

/// `namespace/name`.
pub fn name(text: &str) -> ObjectName {
    let (namespace, name) = text.split_once('/').expect("namespace/name");
    ObjectName::new(namespace, name)
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

impl World {
    /// Two namespaces with a label of their own, and three pods.
    pub fn shop_and_lab(labels_of_other: &str) -> Self {
        Self::default()
            .namespace("shop", "team=shop")
            .namespace("lab", "team=lab")
            .pod("shop/web", WEB, "app=web")
            .pod("shop/db", DB, "app=db")
            .pod("lab/other", OTHER, labels_of_other)
    }

    /// Labels as `app=web,tier=front`.
    fn labels(&mut self, text: &str) -> Arc<Labels> {
        let pairs =
            text.split(',').filter(|pair| !pair.is_empty()).map(|pair| pair.split_once('=').expect("key=value"));
        let labels: Labels = pairs.map(|(key, value)| (self.names.share(key), self.names.share(value))).collect();
        self.labels.share(labels)
    }

    pub fn namespace(mut self, name: &str, labels: &str) -> Self {
        let labels = self.labels(labels);
        self.state.namespaces.insert(name.into(), labels);
        self
    }

    /// A pod of another node, with one address or two.
    pub fn pod(mut self, who: &str, ips: &str, labels: &str) -> Self {
        let uid = u64::try_from(self.state.pods.len()).expect("a few") + 1;
        let template = Template { labels: (*self.labels(labels)).clone(), ports: [].into() };
        let mut pod = Pod { uid, template: Arc::new(template), ..Pod::named(name(who)) };
        for text in ips.split(' ').filter(|ip| !ip.is_empty()) {
            match ip(text) {
                IpAddr::V4(ip) => pod.v4 = Some(ip),
                IpAddr::V6(ip) => pod.v6 = Some(ip),
            }
        }
        self.state.pods.insert(pod);
        self
    }

    /// `fabric-cni` has attached it here.
    pub fn attached(mut self, who: &str, ips: &str) -> Self {
        let uid = self.state.pods.get(&name(who)).map(|pod| pod.uid);
        let identity = PodIdentity { name: name(who), uid };
        for text in ips.split(' ') {
            self.state.local.pods.insert(ip(text), LocalPod { identity: Some(identity.clone()) });
        }
        self
    }

    /// Changes a pod.
    pub fn with(mut self, who: &str, change: impl FnOnce(&mut Pod)) -> Self {
        let mut pod = (**self.state.pods.get(&name(who)).expect("a pod")).clone();
        change(&mut pod);
        self.state.pods.insert(pod);
        self
    }

    /// Names ports of a pod: `http=TCP:8080 dns=UDP:53`.
    pub fn ports(self, who: &str, ports: &str) -> Self {
        let named = ports.split(' ').map(|text| {
            let (name, port) = text.split_once('=').expect("name=…");
            let (protocol, port) = port.split_once(':').expect("protocol:port");
            let protocol = match protocol {
                "TCP" => Protocol::Tcp,
                "UDP" => Protocol::Udp,
                other => panic!("{other} is no protocol"),
            };
            NamedPort { name: name.into(), protocol, port: port.parse().expect("a port") }
        });
        let ports = named.collect();
        self.with(who, |pod| pod.template = Arc::new(Template { ports, ..(*pod.template).clone() }))
    }

    pub fn policy(mut self, who: &str, spec: &Value) -> Self {
        let name = name(who);
        let policy = Policy::decode(name.namespace(), spec).expect("readable");
        self.state.policies.insert(name, Arc::new(policy));
        self
    }

    /// A policy of the whole cluster.
    pub fn cluster_policy(mut self, name: &str, spec: &Value) -> Self {
        let policy = ClusterPolicy::decode(spec).expect("readable");
        self.state.cluster_policies.insert(ObjectName::of_cluster(name), Arc::new(policy));
        self
    }

    pub fn verdict(&self, src: &str, dst: &str, protocol: u8, port: u16) -> Verdict {
        Cluster::new(&self.state).evaluate(&Conn { src: ip(src), dst: ip(dst), protocol, port })
    }

    pub fn may(&self, src: &str, dst: &str, protocol: u8, port: u16) -> bool {
        self.verdict(src, dst, protocol, port).is_allowed()
    }

    pub fn ingress(&self, src: &str, dst: &str, port: u16) -> Side {
        self.verdict(src, dst, TCP, port).ingress
    }
}
