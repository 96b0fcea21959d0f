//! The codec of a Node's annotations: those of flannel's kube subnet manager, to the letter, so that nodes of both kinds
//! read each other.
//!
//! They say what flannel's record in etcd says, one annotation for each member of it, and the Node's podCIDRs are that
//! record's key. So they are turned into a record and back, and what holds for one holds for the other.

use std::collections::BTreeMap;
use std::net::IpAddr;

use fabric_core::lease::Assigned;
use fabric_core::model::{Family, NodeName, PerFamily, Subnet};
use fabric_core::record::{LeaseKey, Owner, Record};
use serde_json::{Map, Value, json};

use super::node::Node;

const PREFIX: &str = "flannel.alpha.coreos.com/";

/// Marks a Node whose annotations are kept by flannel or by us.
const MANAGED: (&str, &str) = ("kube-subnet-manager", "true");

/// What is one for both families.
const BACKEND_TYPE: (&str, &str) = ("backend-type", "BackendType");

/// An annotation, and the member of the record that has its value.
struct Names {
    public_ip: (&'static str, &'static str),
    backend_data: (&'static str, &'static str),
    /// Set by people: publish this instead.
    overwrite: &'static str,
}

static NAMES: PerFamily<Names> = PerFamily {
    v4: Some(Names {
        public_ip: ("public-ip", "PublicIP"),
        backend_data: ("backend-data", "BackendData"),
        overwrite: "public-ip-overwrite",
    }),
    v6: Some(Names {
        public_ip: ("public-ipv6", "PublicIPv6"),
        backend_data: ("backend-v6-data", "BackendV6Data"),
        overwrite: "public-ipv6-overwrite",
    }),
};

/// What a Node says about its lease, as it would lie in etcd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Published {
    /// Its subnets.
    pub(super) key: LeaseKey,
    /// The value.
    pub(super) value: Vec<u8>,
}

fn annotation<'a>(node: &'a Node, name: &str) -> Option<&'a str> {
    node.annotation(&format!("{PREFIX}{name}"))
}

/// Whether a node has given its lease back: without a mark a Node has merely lost its annotations, and its peers wait for
/// them.
pub(super) fn is_given_back(node: &Node) -> bool {
    annotation(node, MANAGED.0).is_some_and(|managed| managed != MANAGED.1)
}

/// The annotations of a lease that is given back: first the mark, for those who watch, then nothing.
pub(super) fn given_back() -> [BTreeMap<String, Option<String>>; 2] {
    let nothing: BTreeMap<_, _> = all().map(|name| (name, None)).collect();
    let mut marked = nothing.clone();
    marked.insert(format!("{PREFIX}{}", MANAGED.0), Some("false".to_owned()));
    [marked, nothing]
}

/// What a Node says about its lease; `None` when it is none of this network's. A family without annotations is left
/// out: a flannel of one family alone runs in clusters with both.
pub(super) fn read(node: &Node) -> Option<Published> {
    let is_managed = annotation(node, MANAGED.0) == Some(MANAGED.1);
    let name: NodeName = node.name().parse().ok().filter(|_| is_managed)?;
    let is_served = |names: &Names| {
        annotation(node, names.public_ip.0).or_else(|| annotation(node, names.backend_data.0)).is_some()
    };
    let subnets = node.subnets();
    let served = NAMES.iter().filter(|(_, names)| is_served(names));
    let key = LeaseKey::new(served.filter_map(|(family, _)| Some((family, *subnets.get(family)?))).collect())?;

    let mut record = Map::new();
    record.insert(BACKEND_TYPE.1.into(), json!(annotation(node, BACKEND_TYPE.0).unwrap_or_default()));
    for names in NAMES.values() {
        record.insert(names.public_ip.1.into(), json!(annotation(node, names.public_ip.0)));
        if let Some(data) = annotation(node, names.backend_data.0) {
            // What is no JSON is told when the record is read.
            let data = serde_json::from_str(data).unwrap_or_else(|_| json!(data));
            record.insert(names.backend_data.1.into(), data);
        }
    }
    // Whoever wrote it: in Kubernetes a lease has its node's name.
    record.insert("Fabric".into(), json!(Owner::of(name)));
    Some(Published { key, value: Value::Object(record).to_string().into_bytes() })
}

/// The annotations that say what a record says, by their full names; `None` for those that have nothing to say.
pub(super) fn write(record: &Record) -> BTreeMap<String, Option<String>> {
    let endpoints = record.endpoints();
    let members: Value = serde_json::from_slice(&record.encode()).expect("just encoded");
    let text = |member: &str| match &members[member] {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let mut annotations = BTreeMap::new();
    let mut set = |name: &str, value| annotations.insert(format!("{PREFIX}{name}"), value);
    set(MANAGED.0, Some(MANAGED.1.to_owned()));
    set(BACKEND_TYPE.0, Some(text(BACKEND_TYPE.1)));
    for (family, names) in NAMES.iter() {
        let is_served = endpoints.get(family).is_some();
        for (name, member) in [names.public_ip, names.backend_data] {
            set(name, is_served.then(|| text(member)));
        }
    }
    annotations
}

/// The names of all that [`write()`] sets.
fn all() -> impl Iterator<Item = String> {
    let of_families = NAMES.values().flat_map(|names| [names.public_ip.0, names.backend_data.0]).collect::<Vec<_>>();
    [MANAGED.0, BACKEND_TYPE.0].into_iter().chain(of_families).map(|name| format!("{PREFIX}{name}"))
}

/// What the cluster, and people by their annotations, say about a Node.
pub(super) fn assigned(node: &Node) -> Assigned {
    let overwrite = |(family, names): (Family, &Names)| {
        let ip: IpAddr = annotation(node, names.overwrite)?.parse().ok()?;
        (Family::of(ip) == family).then_some((family, ip))
    };
    let subnets: PerFamily<Subnet> = node.subnets();
    let info = node.status.node_info.as_ref();
    let boot = info.map(|info| info.boot_id.clone()).filter(|boot| !boot.is_empty());
    Assigned { subnets, public_ips: NAMES.iter().filter_map(overwrite).collect(), boot }
}

#[cfg(test)]
#[path = "annotations_tests.rs"]
mod tests;
