//! From a rule to the kernel's expressions: loads into registers, comparisons, look-ups, and what is done.
//!
//! Fields that are read together lie side by side in the registers, each begun at a multiple of four bytes, as they do in a
//! set's key. There are 16 registers of four bytes. What maps give stays in the first ones until the rule ends; the key of a
//! step is loaded behind, all keys to the same place:
//!
//! ```text
//! ip daddr . meta l4proto . th dport map @svc4 : $0 . $1 . $2     registers  12 13 14, then 0 1 2 are $0 $1 $2
//! $1 . numgen random mod 3 map @pool4 : $3 . $4                              12 13, then 3 4 are $3 $4
//! dnat ip to $3 : $4                                                         where they are
//! ```
//!
//! `nft` has no words for values of maps with several fields. To show a rule it goes after which expression has written
//! which register, takes what it remembers of a register for what a map gave, and ends by an assertion where the widths
//! don't fit (seen with 1.0.6: `nft list ruleset` fails, whoever's rules it is to show). A register of which it knows nothing
//! it reports, and goes on. So in a rule with values it is kept from recognising any key: see [`List::load_unseen`].
//!
//! An expression whose load finds nothing (a packet that is too short, a fragment without a UDP header, a packet without a
//! connection) ends the rule: it doesn't apply.

use fabric_core::model::{Family, Subnet, to_bits};
use fabric_core::state::nft::{CtField, Datatype, Field, Match, Reject, Rule, Step, Test, Update, Verdict};

use super::attributes::{Attributes, Nfnetlink as _};
use super::uapi::{DATA_VALUE, DATA_VERDICT, LIST_ELEMENT};

/// `NFT_REG_VERDICT`, `NFT_REG32_00`, and what is behind `NFT_REG32_15`.
const VERDICT: u32 = 0;
const FIRST: u32 = 8;
const END: u32 = FIRST + 16;

/// `NFT_CMP_EQ`, `NFT_CMP_NEQ`.
const EQUAL: u32 = 0;
const DIFFERENT: u32 = 1;

/// `NF_NAT_RANGE_PROTO_RANDOM_FULLY`.
const FULLY_RANDOM: u32 = 1 << 4;

/// `IPPROTO_FRAGMENT`, and `NFT_EXTHDR_F_PRESENT`: whether it is there, not what it says.
const FRAGMENT: u8 = 44;
const PRESENT: u32 = 1;

/// Adds the expressions of a rule.
pub(super) fn expressions(to: Attributes, rule: &Rule) -> Attributes {
    let mut list = List { to, values: vec![], found: 0, key: FIRST };
    list.place_values(rule);
    rule.steps.iter().for_each(|step| list.step(step));
    list.to
}

/// Adds a verdict as data: `NFTA_DATA_VERDICT` with `NFTA_VERDICT_CODE` and `NFTA_VERDICT_CHAIN`.
pub(super) fn verdict_data(to: Attributes, verdict: Verdict) -> Attributes {
    to.nested(DATA_VERDICT, |data| {
        let data = data.bytes(1, &verdict_code(verdict).to_be_bytes());
        data.maybe(verdict.chain(), |data, chain| data.text(2, chain.as_str()))
    })
}

/// `NF_DROP`, `NF_ACCEPT`, `NFT_RETURN`, `NFT_JUMP`, `NFT_GOTO`.
pub(super) const fn verdict_code(verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Drop => 0,
        Verdict::Accept => 1,
        Verdict::Return => -5,
        Verdict::Jump(_) => -3,
        Verdict::Goto(_) => -4,
    }
}

/// Where a field comes from.
enum Load {
    /// `NFTA_META_KEY` (`NFT_META_*`).
    Meta(u32),
    /// `NFTA_PAYLOAD_BASE` (`NFT_PAYLOAD_*_HEADER`) and `NFTA_PAYLOAD_OFFSET`.
    Payload(u32, u32),
    /// An extension header of IPv6.
    FragmentHeader,
    /// `NFTA_CT_KEY` (`NFT_CT_*`), and `NFTA_CT_DIRECTION` where it has one.
    Ct(u32, Option<u8>),
    /// `NFTA_FIB_FLAGS` (`NFTA_FIB_F_*`): the type of an address.
    AddressType(u32),
    /// `NFTA_NG_TYPE` (`NFT_NG_*`) and `NFTA_NG_MODULUS`.
    NumberGenerator(u32, u32),
    /// Hash of a source address: `NFTA_HASH_MODULUS`, `NFTA_HASH_SEED`.
    SourceHash(Family, u32, u32),
    /// A number of ours.
    Immediate(u32),
    /// What a look-up has found: its place among the values.
    Value(u8),
}

/// `NFT_PAYLOAD_LL_HEADER`, `NFT_PAYLOAD_NETWORK_HEADER`, `NFT_PAYLOAD_TRANSPORT_HEADER`.
const LINK: u32 = 0;
const NETWORK: u32 = 1;
const TRANSPORT: u32 = 2;

/// From the UDP header: 8 bytes of it, 8 of VXLAN, 14 of the inner Ethernet header.
const VNI: u32 = 8 + 4;
const INNER_TYPE: u32 = 8 + 8 + 12;
const INNER_IP: u32 = 8 + 8 + 14;

/// `NFT_CT_MARK`, `NFT_CT_LABELS`.
const CT_MARK: u32 = 3;
const CT_LABELS: u32 = 13;
/// Bytes of all labels of a connection.
const LABELS: usize = 16;

/// Where a field is, and how many bytes it has; of a value the bytes are what its map holds.
fn load(field: Field) -> (Load, usize) {
    use Load::{AddressType, Ct, FragmentHeader, Immediate, Meta, NumberGenerator, Payload, SourceHash, Value};
    match field {
        Field::EtherType => (Meta(1), 2),
        Field::Mark => (Meta(3), 4),
        Field::InInterface => (Meta(6), 16),
        Field::OutInterface => (Meta(7), 16),
        Field::NetworkFamily => (Meta(15), 1),
        Field::Protocol => (Meta(16), 1),
        Field::Fragment => (FragmentHeader, 1),
        Field::SourceMac => (Payload(LINK, 6), 6),
        // A tag that the interface has taken off counts too (nft_payload_copy_vlan).
        Field::FrameType => (Payload(LINK, 12), 2),
        Field::ArpSource => (Payload(NETWORK, 14), 4),
        Field::Source(Family::V4) => (Payload(NETWORK, 12), 4),
        Field::Target(Family::V4) => (Payload(NETWORK, 16), 4),
        Field::Source(Family::V6) => (Payload(NETWORK, 8), 16),
        Field::Target(Family::V6) => (Payload(NETWORK, 24), 16),
        Field::HopLimit => (Payload(NETWORK, 7), 1),
        Field::IcmpType => (Payload(TRANSPORT, 0), 1),
        Field::SourcePort => (Payload(TRANSPORT, 0), 2),
        Field::TargetPort => (Payload(TRANSPORT, 2), 2),
        Field::AdvertisedAddress => (Payload(TRANSPORT, 8), 16),
        Field::Vni => (Payload(TRANSPORT, VNI), 3),
        Field::InnerType => (Payload(TRANSPORT, INNER_TYPE), 2),
        Field::InnerSource(Family::V4) | Field::InnerSubnet(Family::V4, _) => (Payload(TRANSPORT, INNER_IP + 12), 4),
        Field::InnerSource(Family::V6) | Field::InnerSubnet(Family::V6, _) => (Payload(TRANSPORT, INNER_IP + 8), 16),
        Field::SourceType => (AddressType(1), 4),
        Field::TargetType => (AddressType(2), 4),
        Field::CtState => (Ct(0, None), 4),
        Field::CtDirection => (Ct(1, None), 1),
        Field::CtStatus => (Ct(2, None), 4),
        Field::CtMark => (Ct(CT_MARK, None), 4),
        Field::CtLabels => (Ct(CT_LABELS, None), LABELS),
        Field::Ct(direction, part) => {
            let (key, length) = match part {
                CtField::Source(Family::V4) => (19, 4),
                CtField::Target(Family::V4) => (20, 4),
                CtField::Source(Family::V6) => (21, 16),
                CtField::Target(Family::V6) => (22, 16),
                CtField::SourcePort => (11, 2),
                CtField::TargetPort => (12, 2),
            };
            (Ct(key, Some(direction as u8)), length)
        }
        Field::Random(below) => (NumberGenerator(1, below), 4),
        Field::Increment(below) => (NumberGenerator(0, below), 4),
        Field::SourceHash { family, slots, seed } => (SourceHash(family, slots, seed), 4),
        Field::Number(number) => (Immediate(number), 4),
        Field::Value(value) => (Value(value), 0),
    }
}

/// Registers that so many bytes take.
fn registers(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(4)).expect("a key has at most 64 bytes")
}

fn number_of_bytes(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("a field has at most 16 bytes")
}

/// A list of expressions being written.
struct List {
    to: Attributes,
    /// What the look-ups of the rule find: each with its first register.
    values: Vec<(u32, Datatype)>,
    /// How many of them were looked up so far.
    found: usize,
    /// Where keys are loaded.
    key: u32,
}

/// Fields side by side.
struct Loaded {
    register: u32,
    /// Bytes of the last one.
    length: usize,
}

impl List {
    fn add(&mut self, name: &str, data: impl FnOnce(Attributes) -> Attributes) {
        // NFTA_EXPR_NAME, NFTA_EXPR_DATA
        let before = std::mem::take(&mut self.to);
        self.to = before.nested(LIST_ELEMENT, |expression| expression.text(1, name).nested(2, data));
    }

    /// Gives each value its registers, and all keys theirs.
    fn place_values(&mut self, rule: &Rule) {
        let mut next = FIRST;
        for step in &rule.steps {
            let Step::Lookup { data, .. } = step else { continue };
            for field in data.as_slice() {
                self.values.push((next, *field));
                next += registers(field.padded());
            }
        }
        let keys = rule.steps.iter().map(|step| match step {
            Step::Match(Match { fields: key, .. })
            | Step::Lookup { key, .. }
            | Step::VerdictMap { key, .. }
            | Step::Update { key, .. } => self.size(key),
            _ => 0,
        });
        // One field alone is loaded last, so that where keys begin nothing is that `nft` knows.
        let longest = keys.max().unwrap_or(0).max(2);
        self.key = if self.values.is_empty() { FIRST } else { END - longest - 1 };
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Match(condition) => self.condition(condition),
            Step::Lookup { key, map, data } => {
                // One field too is not to be known.
                let from = self.in_place(key).unwrap_or_else(|| {
                    self.load_unseen(key);
                    self.key
                });
                let to = self.values.get(self.found).map_or(FIRST, |(register, _)| *register);
                // NFTA_LOOKUP_SET, NFTA_LOOKUP_SREG, NFTA_LOOKUP_DREG
                self.add("lookup", |data| data.text(1, map.as_str()).number(2, from).number(3, to));
                self.found += data.as_slice().len();
            }
            Step::VerdictMap { key, map } => {
                let from = self.load_all(key).register;
                self.add("lookup", |data| data.text(1, map.as_str()).number(2, from).number(3, VERDICT));
            }
            Step::Update { how, set, key, data, timeout } => {
                let key = self.load_all(key).register;
                // In a map what a packet adds is what was found, and that stays where it is.
                let data = (!data.is_empty()).then(|| self.load_all(data).register);
                let how = match how {
                    Update::Add => 0,
                    Update::Refresh => 1,
                    Update::Delete => 2,
                };
                // NFTA_DYNSET_SET_NAME, _OP, _SREG_KEY, _SREG_DATA, _TIMEOUT (in milliseconds)
                self.add("dynset", |to| {
                    let to = to.text(1, set.as_str()).number(3, how).number(4, key);
                    let to = to.maybe(data, |to, register| to.number(5, register));
                    to.maybe(*timeout, |to, seconds| to.bytes(6, &(u64::from(seconds) * 1000).to_be_bytes()))
                });
            }
            Step::Count => self.add("counter", |data| data),
            // NFTA_LIMIT_RATE, _UNIT (in seconds), _BURST, _TYPE (packets)
            Step::Limit { per_second, burst } => self.add("limit", |data| {
                let data = data.bytes(1, &u64::from(*per_second).to_be_bytes()).bytes(2, &1_u64.to_be_bytes());
                data.number(3, *burst).number(4, 0)
            }),
            // NFTA_LOG_GROUP, NFTA_LOG_PREFIX
            Step::Log { group, prefix } => {
                self.add("log", |data| data.bytes(1, &group.to_be_bytes()).text(2, prefix));
            }
            Step::SetCtMark { mask, value } => {
                let register = self.load_all(&[Field::CtMark]).register;
                self.bitwise(register, register, &(!mask).to_ne_bytes(), &(value & mask).to_ne_bytes());
                self.set_ct(CT_MARK, register);
            }
            Step::SetCtLabel(label) => {
                let mut labels = [0; LABELS];
                let word = usize::from(label / 32 % 4) * 4;
                labels[word..word + 4].copy_from_slice(&(1_u32 << (label % 32)).to_ne_bytes());
                let register = self.alone(LABELS);
                self.immediate(register, &labels);
                self.set_ct(CT_LABELS, register);
            }
            Step::Notrack => self.add("notrack", |data| data),
            Step::Dnat { family, address, port } => {
                let from = self.load_all(&[*address]).register;
                let port = port.map(|port| self.load_all(&[port]).register);
                let family = if *family == Family::V4 { libc::NFPROTO_IPV4 } else { libc::NFPROTO_IPV6 };
                // NFTA_NAT_TYPE (NFT_NAT_DNAT), _FAMILY, _REG_ADDR_MIN, _REG_PROTO_MIN
                self.add("nat", |data| {
                    let data = data.number(1, 1).number(2, family.cast_unsigned()).number(3, from);
                    data.maybe(port, |data, port| data.number(5, port))
                });
            }
            // NFTA_MASQ_FLAGS
            Step::Masquerade => self.add("masq", |data| data.number(1, FULLY_RANDOM)),
            // NFTA_REJECT_TYPE (NFT_REJECT_*), NFTA_REJECT_ICMP_CODE (NFT_REJECT_ICMPX_*)
            Step::Reject(how) => self.add("reject", |data| match how {
                Reject::TcpReset => data.number(1, 1),
                Reject::PortUnreachable => data.number(1, 2).bytes(2, &[1]),
                Reject::Prohibited => data.number(1, 2).bytes(2, &[3]),
            }),
            // NFTA_IMMEDIATE_DREG, NFTA_IMMEDIATE_DATA
            Step::Verdict(verdict) => {
                self.add("immediate", |data| data.number(1, VERDICT).nested(2, |data| verdict_data(data, *verdict)));
            }
        }
    }

    fn condition(&mut self, condition: &Match) {
        let first = condition.fields.first().copied();
        let Loaded { register, length } = self.load_all(&condition.fields);
        let spelled = |number: u32| match self.is_of_this_machine(first) {
            true => number.to_ne_bytes().to_vec(),
            false => number.to_be_bytes()[4 - length.min(4)..].to_vec(),
        };
        match &condition.test {
            Test::Is(number) => self.compare(register, EQUAL, &spelled(*number)),
            Test::IsNot(number) => self.compare(register, DIFFERENT, &spelled(*number)),
            Test::Named(name) => self.compare(register, EQUAL, &name.bytes()),
            Test::Bits(bits) => self.compare_masked(register, *bits, EQUAL, *bits),
            Test::AnyBit(bits) => self.compare_masked(register, *bits, DIFFERENT, 0),
            Test::NoBit(bits) => self.compare_masked(register, *bits, EQUAL, 0),
            Test::Within(prefix) => self.compare_prefix(register, EQUAL, *prefix),
            Test::Outside(prefix) => self.compare_prefix(register, DIFFERENT, *prefix),
            // NFTA_LOOKUP_SET, NFTA_LOOKUP_SREG, NFTA_LOOKUP_FLAGS (NFT_LOOKUP_F_INV)
            Test::In(set) => self.add("lookup", |data| data.text(1, set.as_str()).number(2, register)),
            Test::NotIn(set) => {
                self.add("lookup", |data| data.text(1, set.as_str()).number(2, register).number(5, 1));
            }
        }
    }

    /// Whether a number stands in the register as this machine has it. What comes out of a packet is in network order.
    fn is_of_this_machine(&self, field: Option<Field>) -> bool {
        match field.map(load) {
            Some((Load::Value(value), _)) => self.value(value).1 == Datatype::Number,
            Some((Load::Ct(_, Some(_)) | Load::Payload(..) | Load::FragmentHeader, _)) | None => false,
            Some((Load::Meta(_) | Load::Ct(..), length)) => length == 4,
            Some(_) => true,
        }
    }

    fn value(&self, value: u8) -> (u32, Datatype) {
        *self.values.get(usize::from(value)).expect("a rule reads values that it has looked up")
    }

    /// Bytes of a field.
    fn length(&self, field: Field) -> usize {
        match load(field) {
            (Load::Value(value), _) => self.value(value).1.width(),
            (_, length) => length,
        }
    }

    /// Registers that these fields take.
    fn size(&self, fields: &[Field]) -> u32 {
        fields.iter().map(|field| registers(self.length(*field))).sum()
    }

    /// Where one field alone is loaded, of so many bytes.
    fn alone(&self, bytes: usize) -> u32 {
        if self.values.is_empty() { self.key } else { END - registers(bytes) }
    }

    /// Loads fields side by side. Values that lie so already stay where they are.
    fn load_all(&mut self, fields: &[Field]) -> Loaded {
        let length = fields.last().map_or(0, |field| self.length(*field));
        let register = match (self.in_place(fields), fields) {
            (Some(register), _) => register,
            (None, [field]) => {
                let register = self.alone(length);
                self.load(*field, register);
                register
            }
            (None, _) => {
                if self.values.is_empty() {
                    self.load_from(fields, self.key);
                } else {
                    self.load_unseen(fields);
                }
                self.key
            }
        };
        Loaded { register, length }
    }

    fn load_from(&mut self, fields: &[Field], start: u32) {
        let mut register = start;
        for field in fields {
            self.load(*field, register);
            register += registers(self.length(*field));
        }
    }

    /// Loads fields side by side, so that `nft` doesn't know what is in the first of them and so leaves what is done with
    /// them alone. It only remembers the register where a load begins: an address is loaded with the four bytes before it,
    /// anything else copied behind four bytes of no meaning. Of a copied value it knows nothing.
    fn load_unseen(&mut self, fields: &[Field]) {
        let Some((first, rest)) = fields.split_first() else { return };
        match load(*first) {
            (Load::Value(_), _) => self.load(*first, self.key),
            (Load::Payload(base, offset), length) if offset >= 4 => {
                self.payload(self.key - 1, base, offset - 4, number_of_bytes(length + 4));
            }
            (_, length) => {
                // A copy goes from lower to higher registers, so it may begin in what it is made of.
                let at = END - registers(length);
                self.immediate(at - 1, &[0; 4]);
                self.load(*first, at);
                self.bitwise(at - 1, self.key - 1, &[0xff; 8], &[0; 8]);
                if let Some(behind) = length.checked_sub(4).filter(|bytes| *bytes > 0) {
                    self.bitwise(at + 1, self.key + 1, &vec![0xff; behind], &vec![0; behind]);
                }
            }
        }
        self.load_from(rest, self.key + registers(self.length(*first)));
    }

    /// The register where these fields are side by side, if all are values and are.
    fn in_place(&self, fields: &[Field]) -> Option<u32> {
        let mut next = None;
        let mut first = None;
        for field in fields {
            let Field::Value(value) = field else { return None };
            let (register, datatype) = self.value(*value);
            if next.is_some_and(|next| next != register) {
                return None;
            }
            first = first.or(Some(register));
            next = Some(register + registers(datatype.padded()));
        }
        first
    }

    fn load(&mut self, field: Field, register: u32) {
        let (from, length) = load(field);
        let bytes = number_of_bytes(length);
        match from {
            // NFTA_META_DREG, NFTA_META_KEY
            Load::Meta(key) => self.add("meta", |data| data.number(1, register).number(2, key)),
            Load::Payload(base, offset) => self.payload(register, base, offset, bytes),
            // NFTA_EXTHDR_DREG, _TYPE, _OFFSET, _LEN, _FLAGS
            Load::FragmentHeader => {
                let to = |data: Attributes| data.number(1, register).bytes(2, &[FRAGMENT]);
                self.add("exthdr", |data| to(data).number(3, 0).number(4, bytes).number(5, PRESENT));
            }
            // NFTA_CT_DREG, _KEY, _DIRECTION
            Load::Ct(key, direction) => self.add("ct", |data| {
                let data = data.number(1, register).number(2, key);
                data.maybe(direction, |data, direction| data.bytes(3, &[direction]))
            }),
            // NFTA_FIB_DREG, _RESULT (NFT_FIB_RESULT_ADDRTYPE), _FLAGS
            Load::AddressType(flags) => {
                self.add("fib", |data| data.number(1, register).number(2, 3).number(3, flags));
            }
            // NFTA_NG_DREG, _MODULUS, _TYPE, _OFFSET
            Load::NumberGenerator(kind, modulus) => {
                self.add("numgen", |data| data.number(1, register).number(2, modulus).number(3, kind).number(4, 0));
            }
            Load::SourceHash(family, slots, seed) => {
                let address = Field::Source(family);
                self.load(address, register);
                let bytes = number_of_bytes(load(address).1);
                // NFTA_HASH_SREG, _DREG, _LEN, _MODULUS, _SEED, _OFFSET, _TYPE (NFT_HASH_JENKINS)
                self.add("hash", |data| {
                    let data = data.number(1, register).number(2, register).number(3, bytes).number(4, slots);
                    data.number(5, seed).number(6, 0).number(7, 0)
                });
            }
            Load::Immediate(number) => self.immediate(register, &number.to_ne_bytes()),
            // No expression copies a register, but one that changes no bit does.
            Load::Value(value) => {
                let (from, datatype) = self.value(value);
                self.bitwise(from, register, &vec![0xff; datatype.padded()], &vec![0; datatype.padded()]);
            }
        }
        if let Field::InnerSubnet(family, length) = field {
            let mask = prefix_mask(family, length);
            self.bitwise(register, register, &mask, &vec![0; mask.len()]);
        }
    }

    fn payload(&mut self, register: u32, base: u32, offset: u32, bytes: u32) {
        // NFTA_PAYLOAD_DREG, _BASE, _OFFSET, _LEN
        self.add("payload", |data| data.number(1, register).number(2, base).number(3, offset).number(4, bytes));
    }

    fn immediate(&mut self, register: u32, bytes: &[u8]) {
        self.add("immediate", |data| data.number(1, register).nested(2, |data| data.bytes(DATA_VALUE, bytes)));
    }

    fn set_ct(&mut self, key: u32, register: u32) {
        // NFTA_CT_KEY, NFTA_CT_SREG
        self.add("ct", |data| data.number(2, key).number(4, register));
    }

    /// `to = from & mask ^ flip`
    fn bitwise(&mut self, from: u32, to: u32, mask: &[u8], flip: &[u8]) {
        let length = number_of_bytes(mask.len());
        // NFTA_BITWISE_SREG, _DREG, _LEN, _MASK, _XOR
        self.add("bitwise", |data| {
            let data = data.number(1, from).number(2, to).number(3, length);
            data.nested(4, |value| value.bytes(DATA_VALUE, mask)).nested(5, |value| value.bytes(DATA_VALUE, flip))
        });
    }

    /// Compares these bits of a number. A value may be where it is needed once more, so they are cut out beside it.
    fn compare_masked(&mut self, register: u32, mask: u32, how: u32, with: u32) {
        let room = self.alone(4);
        self.bitwise(register, room, &mask.to_ne_bytes(), &[0; 4]);
        self.compare(room, how, &with.to_ne_bytes());
    }

    fn compare_prefix(&mut self, register: u32, how: u32, prefix: Subnet) {
        let room = self.alone(usize::from(prefix.family().bits() / 8));
        let base = address_bytes(prefix.family(), to_bits(prefix.base()));
        if prefix.prefix_len() == prefix.family().bits() {
            return self.compare(register, how, &base);
        }
        self.bitwise(register, room, &prefix_mask(prefix.family(), prefix.prefix_len()), &vec![0; base.len()]);
        self.compare(room, how, &base);
    }

    fn compare(&mut self, register: u32, how: u32, with: &[u8]) {
        // NFTA_CMP_SREG, _OP, _DATA
        let value = |value: Attributes| value.bytes(DATA_VALUE, with);
        self.add("cmp", |data| data.number(1, register).number(2, how).nested(3, value));
    }
}

/// As many ones as the prefix is long, then zeros.
fn prefix_mask(family: Family, length: u8) -> Vec<u8> {
    let host = u128::MAX.checked_shr(length.into()).unwrap_or(0) >> (128 - family.bits());
    address_bytes(family, !host)
}

/// An address of a family, from its bits as [`to_bits`] gives them.
fn address_bytes(family: Family, bits: u128) -> Vec<u8> {
    bits.to_be_bytes()[16 - usize::from(family.bits() / 8)..].to_vec()
}
