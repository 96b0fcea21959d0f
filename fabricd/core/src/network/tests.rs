use super::*;

fn decode(json: &str) -> Result<NetworkConfig, ConfigError> {
    NetworkConfig::decode(json.as_bytes())
}

#[test]
fn document_says_what_the_config_says() {
    for json in [
        r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#,
        r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan","VNI":7,"MTU":1400}}"#,
        r#"{"EnableIPv6":true,"Network":"10.0.0.0/8","SubnetLen":20,"SubnetMin":"10.1.0.0","SubnetMax":"10.9.0.0","IPv6Network":"fd00::/40","Backend":{"Type":"vxlan","Port":4789,"DirectRouting":true}}"#,
    ] {
        let config = NetworkConfig::decode(json.as_bytes()).expect(json);
        assert_eq!(config.document().validate().as_ref(), Ok(&config), "{json}");
    }
}

#[test]
fn what_cannot_change_under_running_pods_is_told_apart() {
    let config = |json: &str| NetworkConfig::decode(json.as_bytes()).expect(json);
    let now = config(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#);
    let live = r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.9.0","Backend":{"Type":"vxlan","MTU":1400,"DirectRouting":true}}"#;
    assert_eq!(now.lasting_differences(&config(live)), Vec::<String>::new());
    let other = r#"{"Network":"10.96.0.0/16","SubnetLen":26,"EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"vxlan","VNI":2}}"#;
    let told = ["IPv4: 10.244.0.0/16 in /24 → 10.96.0.0/16 in /26", "IPv6: off → fd00::/48 in /64", "VNI: 1 → 2"];
    assert_eq!(now.lasting_differences(&config(other)), told);
}

#[test]
fn config_is_read_as_flannel_reads_it() {
    let plain = |network: &str| decode(&format!(r#"{{"Network":"{network}","Backend":{{"Type":"vxlan"}}}}"#));
    let want = NetworkConfig { written: PerFamily::default(), ..plain("10.10.0.0/16").expect("valid") };
    for (json, why) in [
        (r#"{"network":"10.10.0.0/16","BACKEND":{"type":"vxlan"}}"#, "case of members"),
        (r#"{"Network":"10.10.0.0/16","Backend":{"Type":"VXLAN"}}"#, "case of the backend"),
        (r#"{"Network":"10.10.0.0/16","Backend":{"Type":"vxlan","vni":1,"port":8472,"directRouting":false}}"#, "vni"),
        (r#"{"Network":"10.10.0.0/16","Backend":{"Type":"vxlan"},"Comment":[{"any":1}]}"#, "unknown members"),
        (r#"{"Network":"10.0.0.0/8","Network":"10.10.0.0/16","Backend":{"Type":"vxlan"}}"#, "twice"),
        (r#"{"network":"10.0.0.0/8","Network":"10.10.0.0/16","Backend":{"Type":"vxlan"}}"#, "twice, by case"),
        (r#"{"Network":"10.10.0.0/16","SubnetLen":null,"Backend":{"Type":"vxlan","VNI":null}}"#, "null"),
        (r#"{"Network":"10.10.0.0/16","SubnetLen":0,"SubnetMin":"0.0.0.0","Backend":{"Type":"vxlan"}}"#, "zero"),
        (r#"{"Network":"10.10.10.0/16","Backend":{"Type":"vxlan"}}"#, "host bits"),
    ] {
        let config = decode(json).expect(json);
        assert_eq!(NetworkConfig { written: PerFamily::default(), ..config }, want, "{why}: {json}");
    }

    let json = r#"{"Network": "10.10.10.0/16", "SubnetMin": "10.10.10.0", "SubnetMax": "10.10.99.0", "EnableIPv6": true,
        "IPv6Network": "2001:db8::7/48", "Backend": {"Type": "vxlan", "VNI": 1}}"#;
    let config = decode(json).expect("flannel runs on it");
    let v4 = config.spaces.v4.expect("IPv4");
    assert_eq!((v4.network.to_string(), v4.min.to_string()), ("10.10.0.0/16".into(), "10.10.10.0".into()));
    let [v4, v6]: [String; 2] = config.warnings().try_into().expect("one for each family");
    assert!(v4.contains(r#""Network": "10.10.10.0/16""#) && v4.ends_with(r#"write "Network": "10.10.0.0/16" there"#));
    assert!(v6.ends_with(r#"write "IPv6Network": "2001:db8::/48" there"#), "{v6}");
    assert_eq!(decode(&serde_json::to_string(&config.document()).expect("JSON")).expect("valid").warnings(), [""; 0]);
}

#[test]
fn defaults_are_flannels() {
    let config = decode(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#).expect("valid");
    let v4 = config.spaces.v4.expect("IPv4");
    assert_eq!(
        (v4.subnet_len, v4.min.to_string(), v4.max.to_string()),
        (24, "10.244.1.0".into(), "10.244.255.0".into())
    );
    assert_eq!((config.vxlan.vni, config.vxlan.port), (Vni::DEFAULT, 8472));
    assert_eq!(v4.capacity(), 255);
    assert!(config.spaces.v6.is_none());
}

#[test]
fn subnet_length_follows_the_network_in_both_families() {
    for (network, len) in [("10.0.0.0/22", 24), ("10.0.0.0/23", 25), ("10.0.0.0/28", 30)] {
        let config = decode(&format!(r#"{{"Network":"{network}","Backend":{{"Type":"vxlan"}}}}"#)).expect(network);
        assert_eq!(config.spaces.v4.expect("IPv4").subnet_len, len, "{network}");
    }
    for (network, len) in [("fd00::/48", 64), ("fd00::/62", 64), ("fd00::/63", 65), ("fd00::/124", 126)] {
        let json = format!(
            r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"{network}","Backend":{{"Type":"vxlan"}}}}"#
        );
        assert_eq!(decode(&json).expect(network).spaces.v6.expect("IPv6").subnet_len, len, "{network}");
    }
}

#[test]
fn whole_address_space_of_ipv6_can_be_counted() {
    let json =
        r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"::/0","IPv6SubnetLen":126,"Backend":{"Type":"vxlan"}}"#;
    let space = decode(json).expect("valid").spaces.v6.expect("IPv6");
    assert_eq!(space.capacity(), (1 << 126) - 1);
    assert!(space.subnet(space.capacity() - 1).is_some() && space.subnet(space.capacity()).is_none());
}

#[test]
fn config_that_cannot_work_is_refused_with_the_way_out() {
    for (json, told) in [
        (r#"{"Network":"10.244.0.0/16"}"#, r#"add "Backend": {"Type": "vxlan"}"#),
        (r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}"#, r#"use "Backend": {"Type": "vxlan"}"#),
        (r#"{"Backend":{"Type":"vxlan"}}"#, r#"add a line such as "Network": "10.244.0.0/16""#),
        (
            r#"{"Network":"10.10.0.0","Backend":{"Type":"vxlan"}}"#,
            r#"Network is "10.10.0.0": it must be an address and a prefix length, as in "Network": "10.10.0.0/16""#,
        ),
        (r#"{"Network":"10.10.0.0/33","Backend":{"Type":"vxlan"}}"#, r#"as in "Network": "10.10.0.0/16""#),
        (r#"{"Network":"10.10.0.0/+16","Backend":{"Type":"vxlan"}}"#, r#"as in "Network": "10.10.0.0/16""#),
        (r#"{"Network":["10.10.0.0/16"],"Backend":{"Type":"vxlan"}}"#, "Network is a list: it must be an address"),
        (
            r#"{"EnableIPv6":true,"Network":"10.10.0.0/16","IPv6Network":"2001:db8::","Backend":{"Type":"vxlan"}}"#,
            r#"as in "IPv6Network": "2001:db8::/48""#,
        ),
        (
            r#"{"Network":"10.10.0.0/16","SubnetLen":"26","Backend":{"Type":"vxlan"}}"#,
            r#"SubnetLen is "26": it must be a whole number without quotes, as in "SubnetLen": 26"#,
        ),
        (r#"{"Network":"10.10.0.0/16","SubnetLen":26.0,"Backend":{"Type":"vxlan"}}"#, r#"as in "SubnetLen": 26"#),
        (r#"{"Network":"10.10.0.0/16","SubnetLen":-1,"Backend":{"Type":"vxlan"}}"#, r#"as in "SubnetLen": 24"#),
        (
            r#"{"Network":"10.10.0.0/16","SubnetLen":300,"Backend":{"Type":"vxlan"}}"#,
            "SubnetLen is 300: it is too large",
        ),
        (
            r#"{"Network":"10.10.0.0/16","Backend":{"Type":"vxlan","VNI":"7"}}"#,
            r#"Backend.VNI is "7": it must be a whole number without quotes, as in "VNI": 7"#,
        ),
        (
            r#"{"Network":"10.10.0.0/16","Backend":{"Type":"vxlan","DirectRouting":"true"}}"#,
            r#"Backend.DirectRouting is "true": it must be true or false without quotes, as in "DirectRouting": true"#,
        ),
        (
            r#"{"Network":"10.10.0.0/16","SubnetMin":"x","Backend":{"Type":"vxlan"}}"#,
            r#"SubnetMin is "x": it must be an address of the network, as in "SubnetMin": "10.10.0.1""#,
        ),
        (r#"{"Network":"10.10.0.0/16","Backend":"vxlan"}"#, r#"Backend is "vxlan": it must be an object"#),
        (r#"{"Network":"10.10.0.0/16","Backend":null}"#, r#"add "Backend": {"Type": "vxlan"}"#),
        (r#"["10.10.0.0/16"]"#, "not a JSON object such as"),
        (r#"{"Network":"10.0.0.0/29","Backend":{"Type":"vxlan"}}"#, "use /28 or larger"),
        (r#"{"Network":"10.0.0.0/16","SubnetLen":17,"Backend":{"Type":"vxlan"}}"#, "it must be 18 to 30"),
        (
            r#"{"Network":"10.0.0.0/16","SubnetMin":"10.1.0.0","Backend":{"Type":"vxlan"}}"#,
            "use 10.0.1.0 to 10.0.255.0",
        ),
        (r#"{"Network":"10.0.0.0/16","SubnetMin":"10.0.0.7","Backend":{"Type":"vxlan"}}"#, "use 10.0.0.0"),
        (
            r#"{"Network":"10.0.0.0/16","SubnetMin":"10.0.9.0","SubnetMax":"10.0.8.0","Backend":{"Type":"vxlan"}}"#,
            "swap them",
        ),
        (r#"{"Network":"fd00::/48","Backend":{"Type":"vxlan"}}"#, "it must be IPv4"),
        (r#"{"Network":"224.0.0.0/16","Backend":{"Type":"vxlan"}}"#, "unicast"),
        (r#"{"Network":"10.0.0.0/16","Backend":{"Type":"vxlan","VNI":16777216}}"#, "1 to 16777215"),
        (r#"{"Network":"10.0.0.0/16","Backend":{"Type":"vxlan","MTU":60}}"#, "1350 to 65535"),
        (r#"{"EnableIPv4":false,"Backend":{"Type":"vxlan"}}"#, "both false"),
        (
            r#"{"EnableIPv6":true,"Network":"10.0.0.0/16","Backend":{"Type":"vxlan"}}"#,
            r#""IPv6Network": "fd00:10:244::/48""#,
        ),
        ("", "not valid JSON"),
    ] {
        let error = decode(json).expect_err(json).to_string();
        assert!(error.contains(told), "{json}\n{error}");
    }
}

#[test]
fn overlap_with_a_link_is_found() {
    let config = decode(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#).expect("valid");
    let links: Vec<Subnet> = ["192.0.2.0/24", "10.244.7.0/24"].map(|s| s.parse().expect("valid")).into();
    assert_eq!(config.overlap(&links).map(|(_, link)| link), Some(links[1]));
    assert_eq!(config.overlap(&links[..1]), None);
}
