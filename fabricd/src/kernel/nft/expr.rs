//! From a rule to the kernel's expressions: loads into registers, comparisons, look-ups, and a verdict.
//!
//! A condition becomes a load of its fields, side by side into the registers from the first one on, each begun at a
//! multiple of four bytes; maybe a mask; and one comparison or look-up. An expression whose load finds nothing (a
//! packet that is too short, a fragment without a UDP header) ends the rule: it doesn't apply.

use fabric_core::model::{Family, Subnet, to_bits};
use fabric_core::state::nft::{Field, Match, Rule, Test, Verdict};

use super::attributes::{Attributes, Nfnetlink as _};

/// `NFTA_LIST_ELEM`.
pub(super) const LIST_ELEMENT: u16 = 1;
/// `NFTA_DATA_VALUE`, `NFTA_DATA_VERDICT`.
pub(super) const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;

/// `NFT_REG_VERDICT`, `NFT_REG32_00`.
const VERDICT: u32 = 0;
const FIRST: u32 = 8;

/// `NFT_CMP_EQ`, `NFT_CMP_NEQ`.
const EQUAL: u32 = 0;
const DIFFERENT: u32 = 1;

/// `NFT_JUMP`, `NFT_RETURN`, `NF_ACCEPT`, `NF_DROP`.
const JUMP: i32 = -3;
const RETURN: i32 = -5;
const ACCEPT: i32 = 1;
const DROP: i32 = 0;

/// `NF_NAT_RANGE_PROTO_RANDOM_FULLY`.
const FULLY_RANDOM: u32 = 1 << 4;

/// `IPPROTO_FRAGMENT`, and `NFT_EXTHDR_F_PRESENT`: whether it is there, not what it says.
const FRAGMENT: u8 = 44;
const PRESENT: u32 = 1;

/// Adds the expressions of a rule.
pub(super) fn expressions(to: Attributes, rule: &Rule) -> Attributes {
    let mut list = List(to);
    for condition in &rule.matches {
        list.condition(condition);
    }
    if rule.counted {
        list.add("counter", |data| data);
    }
    match rule.verdict {
        Verdict::Accept => list.verdict(ACCEPT, None),
        Verdict::Drop => list.verdict(DROP, None),
        Verdict::Return => list.verdict(RETURN, None),
        Verdict::Jump(chain) => list.verdict(JUMP, Some(chain)),
        // NFTA_MASQ_FLAGS
        Verdict::Masquerade => list.add("masq", |data| data.number(1, FULLY_RANDOM)),
        Verdict::Notrack => list.add("notrack", |data| data),
    }
    list.0
}

/// Where a field comes from.
enum Load {
    /// `NFTA_META_KEY` (`NFT_META_*`).
    Meta(u32),
    /// `NFTA_PAYLOAD_BASE` (`NFT_PAYLOAD_*_HEADER`) and `NFTA_PAYLOAD_OFFSET`.
    Payload(u32, u32),
    /// An extension header of IPv6.
    FragmentHeader,
}

/// `NFT_PAYLOAD_LL_HEADER`, `NFT_PAYLOAD_NETWORK_HEADER`, `NFT_PAYLOAD_TRANSPORT_HEADER`.
const LINK: u32 = 0;
const NETWORK: u32 = 1;
const TRANSPORT: u32 = 2;

/// From the UDP header: 8 bytes of it, 8 of VXLAN, 14 of the inner Ethernet header.
const VNI: u32 = 8 + 4;
const INNER_TYPE: u32 = 8 + 8 + 12;
const INNER_IP: u32 = 8 + 8 + 14;

/// Where a field is, and how many bytes it has.
fn load(field: Field) -> (Load, usize) {
    use Load::{FragmentHeader, Meta, Payload};
    match field {
        Field::EtherType => (Meta(1), 2),
        Field::Mark => (Meta(3), 4),
        Field::InInterface => (Meta(6), 16),
        Field::NetworkFamily => (Meta(15), 1),
        Field::Protocol => (Meta(16), 1),
        Field::Fragment => (FragmentHeader, 1),
        Field::SourceMac => (Payload(LINK, 6), 6),
        Field::ArpSource => (Payload(NETWORK, 14), 4),
        Field::Source(Family::V4) => (Payload(NETWORK, 12), 4),
        Field::Target(Family::V4) => (Payload(NETWORK, 16), 4),
        Field::Source(Family::V6) => (Payload(NETWORK, 8), 16),
        Field::Target(Family::V6) => (Payload(NETWORK, 24), 16),
        Field::IcmpType => (Payload(TRANSPORT, 0), 1),
        Field::TargetPort => (Payload(TRANSPORT, 2), 2),
        Field::AdvertisedAddress => (Payload(TRANSPORT, 8), 16),
        Field::Vni => (Payload(TRANSPORT, VNI), 3),
        Field::InnerType => (Payload(TRANSPORT, INNER_TYPE), 2),
        Field::InnerSource(Family::V4) | Field::InnerSubnet(Family::V4, _) => (Payload(TRANSPORT, INNER_IP + 12), 4),
        Field::InnerSource(Family::V6) | Field::InnerSubnet(Family::V6, _) => (Payload(TRANSPORT, INNER_IP + 8), 16),
    }
}

/// A list of expressions being written.
struct List(Attributes);

impl List {
    fn add(&mut self, name: &str, data: impl FnOnce(Attributes) -> Attributes) {
        // NFTA_EXPR_NAME, NFTA_EXPR_DATA
        let before = std::mem::take(&mut self.0);
        self.0 = before.nested(LIST_ELEMENT, |expression| expression.text(1, name).nested(2, data));
    }

    fn condition(&mut self, condition: &Match) {
        let mut register = FIRST;
        let mut length = 0;
        for field in &condition.fields {
            length = self.load(*field, register);
            register += u32::try_from(length.div_ceil(4)).expect("a key has at most 64 bytes");
        }
        match &condition.test {
            Test::Is(number) => self.compare(EQUAL, &spelled(*number, condition.fields.first().copied(), length)),
            Test::IsNot(number) => {
                self.compare(DIFFERENT, &spelled(*number, condition.fields.first().copied(), length));
            }
            Test::Named(name) => self.compare(EQUAL, &interface(name.as_str())),
            Test::Bits(bits) => {
                self.mask(FIRST, &bits.to_ne_bytes());
                self.compare(EQUAL, &bits.to_ne_bytes());
            }
            Test::Within(prefix) => self.compare_prefix(EQUAL, *prefix),
            Test::Outside(prefix) => self.compare_prefix(DIFFERENT, *prefix),
            // NFTA_LOOKUP_SET, NFTA_LOOKUP_SREG
            Test::In(set) => self.add("lookup", |data| data.text(1, set).number(2, FIRST)),
        }
    }

    fn load(&mut self, field: Field, register: u32) -> usize {
        let (from, length) = load(field);
        let bytes = u32::try_from(length).expect("a field has at most 16 bytes");
        match from {
            // NFTA_META_DREG, NFTA_META_KEY
            Load::Meta(key) => self.add("meta", |data| data.number(1, register).number(2, key)),
            // NFTA_PAYLOAD_DREG, _BASE, _OFFSET, _LEN
            Load::Payload(base, offset) => {
                self.add("payload", |data| data.number(1, register).number(2, base).number(3, offset).number(4, bytes));
            }
            // NFTA_EXTHDR_DREG, _TYPE, _OFFSET, _LEN, _FLAGS
            Load::FragmentHeader => {
                let to = |data: Attributes| data.number(1, register).bytes(2, &[FRAGMENT]);
                self.add("exthdr", |data| to(data).number(3, 0).number(4, bytes).number(5, PRESENT));
            }
        }
        if let Field::InnerSubnet(family, length) = field {
            self.mask(register, &prefix_mask(family, length));
        }
        length
    }

    fn compare_prefix(&mut self, how: u32, prefix: Subnet) {
        if prefix.prefix_len() < prefix.family().bits() {
            self.mask(FIRST, &prefix_mask(prefix.family(), prefix.prefix_len()));
        }
        self.compare(how, &address_bytes(prefix.family(), to_bits(prefix.base())));
    }

    /// What is in the register, but for the bits that are zero in `mask`.
    fn mask(&mut self, register: u32, mask: &[u8]) {
        let length = u32::try_from(mask.len()).expect("a mask has at most 16 bytes");
        let no_bits = vec![0; mask.len()];
        // NFTA_BITWISE_SREG, _DREG, _LEN, _MASK, _XOR
        self.add("bitwise", |data| {
            let data = data.number(1, register).number(2, register).number(3, length);
            data.nested(4, |value| value.bytes(DATA_VALUE, mask)).nested(5, |value| value.bytes(DATA_VALUE, &no_bits))
        });
    }

    fn compare(&mut self, how: u32, with: &[u8]) {
        // NFTA_CMP_SREG, _OP, _DATA
        let value = |value: Attributes| value.bytes(DATA_VALUE, with);
        self.add("cmp", |data| data.number(1, FIRST).number(2, how).nested(3, value));
    }

    fn verdict(&mut self, code: i32, chain: Option<&str>) {
        // NFTA_VERDICT_CODE, NFTA_VERDICT_CHAIN
        let verdict = |verdict: Attributes| {
            let verdict = verdict.bytes(1, &code.to_be_bytes());
            match chain {
                Some(chain) => verdict.text(2, chain),
                None => verdict,
            }
        };
        // NFTA_IMMEDIATE_DREG, NFTA_IMMEDIATE_DATA
        self.add("immediate", |data| data.number(1, VERDICT).nested(2, |value| value.nested(DATA_VERDICT, verdict)));
    }
}

/// A number as it stands in the register: what comes out of a packet is in network order, the rest is a single byte or
/// (the mark) a number of this machine.
fn spelled(number: u32, field: Option<Field>, length: usize) -> Vec<u8> {
    match field {
        Some(Field::Mark) => number.to_ne_bytes().to_vec(),
        _ => number.to_be_bytes()[4 - length.min(4)..].to_vec(),
    }
}

/// As many ones as the prefix is long, then zeros.
fn prefix_mask(family: Family, length: u8) -> Vec<u8> {
    let host = u128::MAX.checked_shr(length.into()).unwrap_or(0) >> (128 - family.bits());
    address_bytes(family, !host)
}

/// An address of a family, from its bits as [`to_bits`] gives them.
pub(super) fn address_bytes(family: Family, bits: u128) -> Vec<u8> {
    bits.to_be_bytes()[16 - usize::from(family.bits() / 8)..].to_vec()
}

/// The name of an interface, filled up with zeros (`IFNAMSIZ`).
pub(super) fn interface(name: &str) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    bytes
}
