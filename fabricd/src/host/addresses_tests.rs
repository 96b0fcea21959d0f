use super::*;

const NODE: &str = "10.244.3.0/24";

/// A node's folders and links.
struct Node {
    dir: tempfile::TempDir,
    links: HostLinks,
}

impl Node {
    /// With pods on ports of `cni0`, which has the gateway's address.
    fn with_ports(ports: &[&str]) -> Self {
        let name = |text: &str| text.parse::<IfName>().expect("a name");
        let mut links = HostLinks::default();
        links.addresses.insert(name("cni0"), vec![address("10.244.3.1", NODE)]);
        links.addresses.insert(name("fabric.1"), vec![address("10.244.3.0", "10.244.3.0/32")]);
        links.addresses.insert(name("eth0"), vec![address("192.0.2.1", "192.0.2.0/24")]);
        links.addresses.extend(ports.iter().map(|port| (name(port), vec![])));
        links.ports.insert(name("cni0"), ports.iter().map(|port| name(port)).collect());
        Self { dir: tempfile::tempdir().expect("a folder"), links }
    }

    fn dirs(&self) -> CniDirs {
        CniDirs { addresses: self.dir.path().join("networks"), attachments: self.dir.path().join("attachments") }
    }

    fn has(&self, file: &str, content: &str) -> PathBuf {
        let path = self.dir.path().join(file);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(&path, content).expect("written");
        path
    }

    /// A pod with all that is saved of it.
    fn pod(&self, network: &str, container: &str, port: &str, ip: &str) {
        let netns = self.dir.path().join("netns/gone");
        let first = format!(
            r#"{{"netns":"{}","config":{{"bridge":"cni0","ipam":{{"ranges":[[{{"subnet":"{NODE}"}}]]}}}}}}"#,
            netns.display()
        );
        let second = format!(r#"{{"ports":["{port}"],"ips":["{ip}"]}}"#);
        self.has(&format!("attachments/{network}/{container}@eth0.json"), &format!("{first}\n{second}"));
        let told = fabric_core::attachments::told_container(network, container);
        self.has(&format!("networks/fabric/{ip}"), &format!("{told}\r\neth0"));
    }

    fn read(&self) -> Addresses {
        Addresses::read(&self.dirs(), &self.links, &[NODE.parse().expect("valid")]).expect("read")
    }
}

fn address(ip: &str, prefix: &str) -> (IpAddr, Subnet) {
    (ip.parse().expect("valid"), prefix.parse().expect("valid"))
}

fn ips(entries: &[Entry]) -> Vec<String> {
    entries.iter().map(|entry| entry.ip.to_string()).collect()
}

fn key(text: &str) -> LeaseKey {
    LeaseKey::decode(text).expect("valid")
}

#[test]
fn attached_leaked_and_foreign_addresses_are_told_apart() {
    let node = Node::with_ports(&["veth1", "veth2"]);
    node.pod("fabric", "c1", "veth1", "10.244.3.2");
    node.pod("net2", "c1", "veth2", "10.244.3.3");
    node.pod("fabric", "dead", "veth9", "10.244.3.4");
    for (file, content) in [
        ("networks/fabric/10.244.3.5", "gone\r\neth0"),
        ("networks/fabric/10.244.3.6", ""),
        ("networks/cbr0/10.244.3.7", "flannels\r\neth0"),
        ("networks/other/192.0.2.7", "c9\r\neth0"),
        ("networks/fabric/last_reserved_ip.0", "10.244.3.5"),
        ("networks/fabric/lock", ""),
        ("networks/10.244.3.9", ""),
    ] {
        node.has(file, content);
    }
    let found = node.read();
    assert_eq!(ips(&found.attached), ["10.244.3.2", "10.244.3.3"]);
    assert_eq!(found.attached[1].network(), "net2");
    assert_eq!(ips(&found.leaked), ["10.244.3.4", "10.244.3.5", "10.244.3.6", "10.244.3.7"]);
    assert_eq!(ips(&found.foreign), ["192.0.2.7"]);
    assert_eq!((found.attached_in(&key("10.244.3.0-24")), found.leaked_in(&key("10.244.3.0-24"))), (2, 4));
    assert_eq!((found.attached_in(&key("10.244.5.0-24")), found.leaked_in(&key("10.244.5.0-24"))), (0, 0));
    assert_eq!(found.pod_subnets(), [NODE.parse().expect("valid")].into());
}

#[test]
fn port_that_no_attachment_names_may_be_that_of_any_address_that_none_accounts_for() {
    let node = Node::with_ports(&["veth1", "veth7"]);
    node.pod("fabric", "c1", "veth1", "10.244.3.2");
    node.pod("fabric", "dead", "veth9", "10.244.3.4");
    node.has("networks/cbr0/10.244.3.7", "flannels\r\neth0");
    let found = node.read();
    assert_eq!(
        (ips(&found.attached), ips(&found.leaked)),
        (vec!["10.244.3.2".into(), "10.244.3.7".into()], vec!["10.244.3.4".into()])
    );
    assert_eq!(found.unknown_ports.iter().map(IfName::as_str).collect::<Vec<_>>(), ["veth7"]);
}

#[test]
fn addresses_of_another_plugin_with_a_gateway_of_its_own_in_our_subnet_are_foreign() {
    let mut node = Node::with_ports(&[]);
    node.links.addresses.insert("br-other".parse().expect("a name"), vec![address("10.244.3.1", NODE)]);
    node.has("networks/other/10.244.3.7", "c9\r\neth0");
    assert_eq!(ips(&node.read().foreign), ["10.244.3.7"]);
}

#[test]
fn pod_is_attached_by_its_namespace_or_its_port_and_where_neither_can_be_seen_it_is_not_given_up() {
    let namespace = format!("/proc/{}/ns/mnt", std::process::id());
    let this_boot = fs::read_to_string(BOOT_ID).expect("an ID");
    let of_boot =
        |boot: &str, ports: &str| format!(r#"{{"ports":[{ports}],"ips":["10.244.3.2"],"boot":"{}"}}"#, boot.trim());
    let cases: [(&str, &str, bool); 10] = [
        (&namespace, &of_boot(&this_boot, r#""veth9""#), true),
        // Its path names another's namespace since the machine was booted.
        (&namespace, &of_boot("another", r#""veth9""#), false),
        (&namespace, &of_boot("another", r#""veth1""#), true),
        (&namespace, &of_boot("another", ""), true),
        // Any namespace but our own network's counts, as long as it is one.
        (&namespace, r#"{"ports":["veth9"],"ips":["10.244.3.2"]}"#, true),
        ("/proc/self/ns/net", r#"{"ports":["veth9"],"ips":["10.244.3.2"]}"#, false),
        ("/tmp/no-such-namespace", r#"{"ports":["veth9"],"ips":["10.244.3.2"]}"#, false),
        ("/tmp/no-such-namespace", r#"{"ports":["veth1"],"ips":["10.244.3.2"]}"#, true),
        ("/no-such-folder/namespace", r#"{"ports":[],"ips":["10.244.3.2"]}"#, true),
        ("/tmp/no-such-namespace", "", false),
    ];
    for (netns, second, attached) in cases {
        let mut node = Node::with_ports(&["veth1"]);
        node.has("attachments/fabric/c1@eth0.json", &format!("{{\"netns\":\"{netns}\"}}\n{second}"));
        node.has("networks/fabric/10.244.3.2", "c1\r\neth0");
        if !second.contains("veth1") {
            node.links.ports.clear();
        }
        let found = node.read();
        assert_eq!(
            (found.attached.len(), found.pods.len()),
            (usize::from(attached), usize::from(attached)),
            "{netns} {second}"
        );
    }
}

#[test]
fn address_of_two_pods_and_one_that_is_not_kept_are_found() {
    let node = Node::with_ports(&["veth1", "veth2", "veth3"]);
    node.pod("fabric", "c1", "veth1", "10.244.3.2");
    node.pod("net2", "c2", "veth2", "10.244.3.2");
    node.pod("fabric", "c3", "veth3", "10.244.3.3");
    fs::remove_file(node.dir.path().join("networks/fabric/10.244.3.3")).expect("removed");
    let found = node.read();
    let twice: Vec<_> = found.duplicates().into_iter().map(|(ip, owners)| (ip.to_string(), owners.len())).collect();
    assert_eq!(twice, [("10.244.3.2".to_owned(), 2)]);
    let free: Vec<_> = found.unreserved().map(|(ip, owner)| format!("{ip} {}", owner.container)).collect();
    assert_eq!(free, ["10.244.3.3 c3"]);
}

#[test]
fn bridges_are_those_of_the_attachments_and_cni0_when_there_are_none() {
    let node = Node::with_ports(&[]);
    assert_eq!(node.read().bridges, ["cni0".parse().expect("a name")].into());
    node.has("attachments/fabric/c1@eth0.json", r#"{"config":{"bridge":"br-pods"}}"#);
    assert_eq!(node.read().bridges, ["br-pods".parse().expect("a name")].into());
}

#[test]
fn what_cannot_be_read_counts_as_a_pod_and_what_is_missing_as_none() {
    let nothing: fn() -> Result<HostLinks, KernelError> = || Ok(HostLinks::default());
    let broken: fn() -> Result<HostLinks, KernelError> = || Err(KernelError::Disconnected("by the test".into()));
    let node = Node::with_ports(&[]);
    assert_eq!(NodePods::with_links(node.dirs(), nothing).in_subnets(&key("10.244.3.0-24")), (0, 0));
    assert_eq!(NodePods::with_links(node.dirs(), broken).in_subnets(&key("10.244.3.0-24")), (1, 0));
}

#[test]
fn use_of_a_subnet_counts_what_is_taken_in_it_and_what_is_left_for_pods() {
    let dir = tempfile::tempdir().unwrap();
    for file in ["fabric/10.244.3.7", "other/10.244.3.7", "fabric/10.244.3.8", "fabric/fd00:3::7", "other/10.244.4.1"] {
        let file = dir.path().join(file);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, "container\r\neth0").unwrap();
    }
    let counted = |dir: &Path, key: &str| {
        let uses = uses(dir, &LeaseKey::decode(key).unwrap()).unwrap();
        uses.iter().map(|one| (one.used, one.free)).collect::<Vec<_>>()
    };
    assert_eq!(counted(dir.path(), "10.244.3.0-24&fd00:3::-64"), [(2, 251), (1, u64::MAX - 3)]);
    assert_eq!(counted(dir.path(), "10.244.5.0-30"), [(0, 1)]);
    assert_eq!(counted(Path::new("/nowhere"), "10.244.3.0-24"), [(0, 253)]);
}
