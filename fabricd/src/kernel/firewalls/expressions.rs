//! From the kernel's expressions (linux/netfilter/nf_tables.h) to [`Step`]s.

use fabric_core::firewall::{Comparison, Decision, Destination, Field, Register, Step};

use super::xt;
use crate::kernel::nft::Values;

/// `NFT_PAYLOAD_NETWORK_HEADER`, `NFT_PAYLOAD_TRANSPORT_HEADER`.
const NETWORK: u32 = 1;
const TRANSPORT: u32 = 2;
/// `NFTA_FIB_F_*`, `NFT_FIB_RESULT_*`.
const FIB_SOURCE: u32 = 1;
const FIB_IIF: u32 = 1 << 3;
const FIB_OIF: u32 = 1 << 4;
const FIB_PRESENT: u32 = 1 << 5;
const FIB_INDEX: u32 = 1;
const FIB_NAME: u32 = 2;
const FIB_TYPE: u32 = 3;

/// The steps of a rule: a list of expressions, each with a name and data.
pub(super) fn steps(list: &Values<'_>, v6: bool) -> Vec<Step> {
    list.list()
        .flat_map(|expression| match expression.text(1) {
            Some(name) => {
                let empty = Values::none();
                let known = one(name, expression.nested(2).as_ref().unwrap_or(&empty), v6);
                known.unwrap_or_else(|| vec![Step::Opaque(name.to_owned())])
            }
            None => vec![Step::Opaque("an expression without a name".to_owned())],
        })
        .collect()
}

/// `None` for an expression that isn't understood: it may end the rule or not.
fn one(name: &str, data: &Values<'_>, v6: bool) -> Option<Vec<Step>> {
    let step = match name {
        // What is only counted, told or remembered lets the rule go on.
        "counter" | "log" | "last" | "dup" | "flow_offload" => return Some(vec![]),
        "notrack" => Step::Notrack,
        "reject" => Step::Decide(Decision::Drop("reject")),
        "queue" => Step::Decide(Decision::Elsewhere("queue".to_owned())),
        "tproxy" => Step::Decide(Decision::Elsewhere("tproxy".to_owned())),
        "immediate" => match (data.number(1)?, data.nested(2)?) {
            (0, value) => Step::Decide(decision(&value.nested(2)?)?),
            (to, value) => Step::Constant { data: value.bytes(1)?.to_vec(), to: register(to)? },
        },
        "payload" => load(Some(payload(data)), data.number(1)?, data.number(4)?)?,
        // `meta … set` and `ct … set` have a source, and no destination.
        "meta" => match (data.number(1), data.number(3)) {
            (Some(to), _) => meta(data.number(2)?, to)?,
            (None, Some(from)) if data.number(2)? == 3 => Step::SetMark(register(from)?),
            (None, Some(_)) if data.number(2)? == 2 => Step::Change("meta priority set".to_owned()),
            (None, _) => return Some(vec![]),
        },
        "ct" => match data.number(1) {
            Some(to) => connection(data.number(2)?, to)?,
            None => return Some(vec![]),
        },
        "fib" => fib(data)?,
        "exthdr" => extension(data)?,
        "cmp" => Step::Compare {
            register: register(data.number(1)?)?,
            how: comparison(data.number(2)?)?,
            with: data.nested(3)?.bytes(1)?.to_vec(),
        },
        "range" => Step::Range {
            register: register(data.number(1)?)?,
            low: data.nested(3)?.bytes(1)?.to_vec(),
            high: data.nested(4)?.bytes(1)?.to_vec(),
            inverted: data.number(2)? == 1,
        },
        "bitwise" => bitwise(data)?,
        "byteorder" => Step::SwapBytes {
            from: register(data.number(1)?)?,
            to: register(data.number(2)?)?,
            len: u8::try_from(data.number(4)?).ok()?,
            size: u8::try_from(data.number(5)?).ok()?,
        },
        "lookup" => Step::Lookup {
            register: register(data.number(2)?)?,
            set: data.text(1)?.to_owned(),
            inverted: data.number(5).unwrap_or(0) & 1 != 0,
            to: match data.number(3) {
                None => Destination::Nowhere,
                Some(0) => Destination::Verdict,
                Some(to) => Destination::Register(register(to)?),
            },
        },
        // NFT_OBJECT_COUNTER, NFT_OBJECT_CT_HELPER
        "objref" if matches!(data.number(1), Some(1 | 3)) => return Some(vec![]),
        // A set that is added to, without a limit for each element.
        "dynset" if data.nested(7).is_none() && data.nested(10).is_none() => return Some(vec![]),
        "match" => return Some(xt::conditions(data.text(1)?, data.number(2)?, data.bytes(3)?, v6)),
        "target" => return Some(xt::target(data.text(1)?, data.number(2)?, data.bytes(3)?)),
        _ => return None,
    };
    Some(vec![step])
}

/// A verdict: its code and, of a jump, the chain.
pub(super) fn decision(verdict: &Values<'_>) -> Option<Decision> {
    let chain = || verdict.text(2).map(str::to_owned);
    Some(match verdict.number(1)?.cast_signed() {
        -1 => Decision::Continue,
        -3 => Decision::Jump(chain()?),
        -4 => Decision::Goto(chain()?),
        -5 => Decision::Return,
        code => match code & 0xff {
            0 => Decision::Drop("drop"),
            1 => Decision::Accept,
            _ => Decision::Elsewhere("queue".to_owned()),
        },
    })
}

/// `NFT_REG_1` to `NFT_REG_4` have 16 bytes each, `NFT_REG32_00` and so on are the same bytes by fours.
fn register(number: u32) -> Option<Register> {
    match number {
        1..=4 => u8::try_from((number - 1) * 16).ok(),
        8..=23 => u8::try_from((number - 8) * 4).ok(),
        _ => None,
    }
}

fn load(field: Option<Field>, to: u32, len: u32) -> Option<Step> {
    Some(Step::Load { field: field?, len: u8::try_from(len).ok()?, to: register(to)? })
}

fn payload(data: &Values<'_>) -> Field {
    match (data.number(2), data.number(3)) {
        (Some(NETWORK), Some(offset)) => Field::Network { offset },
        (Some(TRANSPORT), Some(offset)) => Field::Transport { offset },
        _ => Field::Other("a field of the link layer".to_owned()),
    }
}

fn meta(key: u32, to: u32) -> Option<Step> {
    let (field, len) = match key {
        1 => (Field::EtherType, 2),
        3 => (Field::Mark, 4),
        4 => (Field::InIndex, 4),
        5 => (Field::OutIndex, 4),
        6 => (Field::InName, 16),
        7 => (Field::OutName, 16),
        8 => (Field::InType, 2),
        9 => (Field::OutType, 2),
        10 | 11 => (Field::SocketOwner, 4),
        15 => (Field::NetworkFamily, 1),
        16 => (Field::Protocol, 1),
        19 => (Field::PacketType, 1),
        26 => (Field::InKind, 16),
        27 => (Field::OutKind, 16),
        0 => (Field::Other("meta length".to_owned()), 4),
        other => (Field::Other(format!("meta key {other}")), 16),
    };
    load(Some(field), to, len)
}

fn connection(key: u32, to: u32) -> Option<Step> {
    let (field, len) = match key {
        0 => (Field::ConnectionState, 4),
        1 => (Field::ConnectionDirection, 1),
        2 => (Field::ConnectionStatus, 4),
        3 => (Field::ConnectionMark, 4),
        6 => (Field::ConnectionHelper, 16),
        other => (Field::Other(format!("ct key {other}")), 16),
    };
    load(Some(field), to, len)
}

fn fib(data: &Values<'_>) -> Option<Step> {
    let (to, result, flags) = (data.number(1)?, data.number(2)?, data.number(3)?);
    let source = flags & FIB_SOURCE != 0;
    let other = || Field::Other("fib".to_owned());
    let presence = flags & FIB_PRESENT != 0;
    let (field, len) = match result {
        FIB_TYPE => (Field::AddressType { source }, 4),
        FIB_INDEX | FIB_NAME if source && flags & FIB_IIF != 0 && flags & FIB_OIF == 0 => {
            let name = result == FIB_NAME;
            (
                Field::ReversePath { presence, name },
                if presence {
                    1
                } else if name {
                    16
                } else {
                    4
                },
            )
        }
        FIB_NAME => (other(), 16),
        _ => (other(), 4),
    };
    load(Some(field), to, len)
}

fn extension(data: &Values<'_>) -> Option<Step> {
    // NFTA_EXTHDR_OP: 0 is IPv6; options of TCP and IPv4 can't be known, and writes have no destination.
    let (to, kind) = (data.number(1)?, *data.bytes(2)?.first()?);
    let field = match data.number(6).unwrap_or(0) {
        0 => Field::ExtensionHeader { kind, presence: data.number(5).unwrap_or(0) & 1 != 0 },
        _ => return None,
    };
    load(Some(field), to, data.number(4)?)
}

fn bitwise(data: &Values<'_>) -> Option<Step> {
    // NFTA_BITWISE_OP: only mask and xor are understood.
    (data.number(6).unwrap_or(0) == 0).then_some(())?;
    Some(Step::Bitwise {
        from: register(data.number(1)?)?,
        to: register(data.number(2)?)?,
        mask: data.nested(4)?.bytes(1)?.to_vec(),
        xor: data.nested(5)?.bytes(1)?.to_vec(),
    })
}

fn comparison(code: u32) -> Option<Comparison> {
    use Comparison::{Different, Equal, Greater, GreaterOrEqual, Less, LessOrEqual};
    [Equal, Different, Less, LessOrEqual, Greater, GreaterOrEqual].get(usize::try_from(code).ok()?).copied()
}
