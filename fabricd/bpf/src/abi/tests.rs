//! What the header in C says, line by line, and what bits and templates are.

use std::collections::BTreeSet;

use super::map::NAT_WORDS_OF_PROTOCOL;
use super::*;

const HEADER: &str = include_str!("../../c/fabric.h");
const MAPS: &str = include_str!("../../c/maps.h");

#[test]
fn header_and_rust_assert_the_same_sizes_and_offsets() {
    let mut ours = BTreeSet::new();
    for (name, size, fields) in ASSERTED {
        ours.insert(format!("SIZE({name}, {size});"));
        ours.extend(fields.iter().map(|(field, offset)| format!("FIELD({name}, {field}, {offset});")));
    }
    let theirs = HEADER.lines().filter(|line| line.starts_with("SIZE(") || line.starts_with("FIELD("));
    assert_eq!(theirs.map(str::to_owned).collect::<BTreeSet<_>>(), ours);
}

#[test]
fn header_and_rust_have_the_same_numbers() {
    let numbers = [
        ("CONFIG_IPV4", CONFIG_IPV4),
        ("CONFIG_IPV6", CONFIG_IPV6),
        ("CONFIG_GUARD", CONFIG_GUARD),
        ("PEER_DIRECT", PEER_DIRECT),
        ("PEER_NEXTHOP_IPV6", PEER_NEXTHOP_IPV6),
        ("POD_FAST", POD_FAST),
        ("TEMPLATE_IP", TEMPLATE_IP as u32),
        ("TEMPLATE_UDP", TEMPLATE_UDP as u32),
        ("TEMPLATE_VXLAN", TEMPLATE_VXLAN as u32),
        ("TEMPLATE_INNER", TEMPLATE_INNER as u32),
        ("TEMPLATE_SIZE", TEMPLATE_SIZE as u32),
        ("NAT_WORDS_OF_PROTOCOL", NAT_WORDS_OF_PROTOCOL),
        ("NAT_WORDS_OF_POD", NAT_WORDS_OF_POD),
        ("REASONS", Reason::ROOM),
    ];
    let ours = numbers.map(|(name, number)| format!("#define {name} {number}"));
    let theirs = HEADER.lines().filter(|line| {
        line.strip_prefix("#define ").is_some_and(|rest| rest.ends_with(|last: char| last.is_ascii_digit()))
    });
    assert_eq!(theirs.map(str::to_owned).collect::<BTreeSet<_>>(), BTreeSet::from(ours));
}

#[test]
fn header_and_rust_have_the_same_programs_and_reasons() {
    let all = Program::ALL.iter().map(|program| (program.name().to_owned(), *program as u32));
    let ours: Vec<_> = all.chain(Reason::ALL.iter().map(|reason| (format!("{reason:?}"), *reason as u32))).collect();
    let theirs: Vec<_> = HEADER
        .lines()
        .filter_map(|line| line.trim().strip_suffix(',')?.split_once(" = "))
        .map(|(name, number)| (name.to_owned(), number.parse().expect("a number")))
        .collect();
    assert_eq!(ours.len(), theirs.len());
    for ((ours, number), (theirs, there)) in ours.into_iter().zip(theirs) {
        let plain = |name: &str| name.replace('_', "").to_lowercase();
        assert_eq!((plain(ours.trim_start_matches("fabric_")), number), (plain(&theirs), there));
    }
    assert!(Reason::ALL.len() <= Reason::ROOM as usize);
}

#[test]
fn programs_use_the_maps_that_are_described() {
    let declared = MAPS.lines().filter_map(|line| line.strip_prefix("MAP(")?.strip_suffix(");"));
    assert!(declared.eq(Map::ALL.map(Map::name)));
    assert!(Map::ALL.iter().all(|map| map.name().len() <= 15), "the kernel keeps 15 bytes of a name");
}

#[test]
fn template_is_what_a_vxlan_device_sends() {
    let (local, underlay) = ([192, 0, 2, 1].into(), [192, 0, 2, 2].into());
    let template = template4(local, underlay, 8472, 0x01_0203, [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]]);
    let hex: String = template.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(
        hex,
        "0000000000000000000000000800\
         4500000000000000401100 00c0000201c0000202\
         00002118000000000800000001020300\
         0200000000020200000000010800"
            .replace(' ', "")
    );
    assert_eq!(template_sum(&template), 0x4500 + 0x4011 + 0xc000 + 0x0201 + 0xc000 + 0x0202);
}

#[test]
fn each_port_of_each_pod_has_a_bit_of_its_own() {
    assert_eq!(nat_bit(0, false, 0), (0, 1));
    assert_eq!(nat_bit(0, false, u16::MAX), (1023, 1 << 63));
    assert_eq!(nat_bit(0, true, 0), (1024, 1));
    assert_eq!(nat_bit(3, true, 53), (3 * 2048 + 1024, 1 << 53));
}

#[test]
fn subnets_are_counted_from_the_networks_first() {
    let bits = |text: &str| text.parse::<Ipv4Addr>().map(|ip| u128::from(ip.to_bits())).expect("an address");
    let network = bits("198.18.0.0");
    assert_eq!(subnet_number(network, bits("198.18.0.9"), 8), Some(0));
    assert_eq!(subnet_number(network, bits("198.19.255.9"), 8), Some(511));
    let bits = |text: &str| text.parse::<Ipv6Addr>().map(|ip| ip.to_bits()).expect("an address");
    assert_eq!(subnet_number(bits("2001:db8::"), bits("2001:db8:0:7::1"), 64), Some(7));
    assert_eq!(subnet_number(bits("2001:db8::"), bits("2001:db8:1::1"), 32), None, "48 bits are too many");
}
