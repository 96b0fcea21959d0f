use serde_json::json;

use super::*;

fn node(annotations: &[(&str, &str)], subnets: &[&str]) -> Node {
    let annotations: Map<String, Value> =
        annotations.iter().map(|(name, value)| (format!("{PREFIX}{name}"), json!(value))).collect();
    let node = json!({"metadata": {"name": "node-1", "annotations": annotations}, "spec": {"podCIDRs": subnets}});
    serde_json::from_value(node).expect("a Node")
}

/// As flannel 0.28 leaves them.
const FLANNELS: [(&str, &str); 6] = [
    ("kube-subnet-manager", "true"),
    ("backend-type", "vxlan"),
    ("backend-data", r#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}"#),
    ("public-ip", "192.0.2.1"),
    ("backend-v6-data", r#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:66"}"#),
    ("public-ipv6", "2001:db8::1"),
];

fn record(node: &Node) -> (String, Record) {
    let published = read(node).expect("annotated");
    (published.key.encode(), Record::decode(&published.key, &published.value).expect("readable"))
}

#[test]
fn flannels_annotations_are_read_and_written_byte_for_byte() {
    for (families, subnets, key) in [
        (4, &["10.244.1.0/24"][..], "10.244.1.0-24"),
        (6, &["10.244.1.0/24", "fd00:1::/64"][..], "10.244.1.0-24&fd00:1::-64"),
    ] {
        let node = node(&FLANNELS[..families], subnets);
        let (read_key, record) = record(&node);
        assert_eq!((read_key.as_str(), record.node().map(NodeName::as_str)), (key, Some("node-1")));
        let written: Vec<(String, String)> =
            write(&record).into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
        assert_eq!(written, node.metadata.annotations.expect("some").into_iter().collect::<Vec<_>>());
    }
}

#[test]
fn family_without_annotations_is_left_out_and_taken_back_when_ours_lacks_it() {
    let (key, record) = record(&node(&FLANNELS[..4], &["10.244.1.0/24", "fd00:1::/64"]));
    assert_eq!(key, "10.244.1.0-24");
    let written = write(&record);
    let gone: Vec<&str> = written.iter().filter(|(_, value)| value.is_none()).map(|(name, _)| name.as_str()).collect();
    assert_eq!(gone, ["flannel.alpha.coreos.com/backend-v6-data", "flannel.alpha.coreos.com/public-ipv6"]);
    assert_eq!(written.len(), all().count());
    assert!(all().all(|name| written.contains_key(&name)));
}

#[test]
fn only_the_older_podcidr_will_do_and_ipv6_alone() {
    let mut old = node(&FLANNELS[..4], &[]);
    old.spec.pod_cidr = Some("10.244.1.0/24".into());
    assert_eq!(record(&old).0, "10.244.1.0-24");
    let (key, six) = record(&node(&[FLANNELS[0], FLANNELS[1], FLANNELS[4], FLANNELS[5]], &["fd00:1::/64"]));
    assert_eq!(key, "0.0.0.0-0&fd00:1::-64");
    assert!(write(&six)["flannel.alpha.coreos.com/public-ip"].is_none());
}

#[test]
fn node_of_another_network_or_without_a_subnet_has_no_lease() {
    assert_eq!(read(&node(&FLANNELS[1..], &["10.244.1.0/24"])), None);
    assert_eq!(read(&node(&FLANNELS, &[])), None);
    assert_eq!(read(&node(&[("kube-subnet-manager", "false")], &["10.244.1.0/24"])), None);
}

#[test]
fn data_that_is_no_json_is_told_when_it_is_read() {
    let mut wrong = FLANNELS;
    wrong[2].1 = "{";
    let published = read(&node(&wrong, &["10.244.1.0/24"])).expect("annotated");
    assert!(Record::decode(&published.key, &published.value).is_err());
}

#[test]
fn published_address_may_be_overwritten_by_one_of_its_family() {
    let assigned = assigned(&node(
        &[("public-ip-overwrite", "203.0.113.1"), ("public-ipv6-overwrite", "203.0.113.1")],
        &["fd00:1::/64", "10.244.1.0/24"],
    ));
    assert_eq!(assigned.subnets.v4.map(|subnet| subnet.to_string()).as_deref(), Some("10.244.1.0/24"));
    assert_eq!((assigned.public_ips.v4, assigned.public_ips.v6), ("203.0.113.1".parse().ok(), None));
}
