//! Matches and targets of iptables (linux/netfilter/xt_*.h), which iptables-nft and iptables-legacy share. Numbers in
//! them are of this machine's byte order, addresses of the network's.

use fabric_core::firewall::state;
use fabric_core::firewall::{Comparison, Decision, End, Field, Step, Test};

/// `XT_CONNTRACK_STATE`, and the same by the name of `-m state`.
const BY_STATE: u16 = 1;
const BY_ALIAS: u16 = 1 << 13;
/// `XT_CONNTRACK_STATE_SNAT`, `_DNAT`, `_UNTRACKED`.
const TRANSLATED: u32 = 1 << 6 | 1 << 7;
const UNTRACKED: u32 = 1 << 8;

/// Targets behind which the next rule follows, and the packet is as it was.
const CONTINUING: [&str; 10] =
    ["AUDIT", "CONNSECMARK", "IDLETIMER", "LED", "LOG", "NFLOG", "RATEEST", "SET", "TEE", "TRACE"];
/// Those behind which it is another, or is queued in another way.
const CHANGING: [&str; 10] =
    ["CHECKSUM", "CLASSIFY", "DSCP", "ECN", "HL", "SECMARK", "TCPMSS", "TCPOPTSTRIP", "TOS", "TTL"];

/// The conditions of a match; one that can't be read may hold or not.
pub(super) fn conditions(name: &str, revision: u32, info: &[u8], v6: bool) -> Vec<Step> {
    let info = Info(info);
    known(name, revision, &info, v6).unwrap_or_else(|| vec![Step::Opaque(format!("-m {name}"))])
}

fn known(name: &str, revision: u32, info: &Info<'_>, v6: bool) -> Option<Vec<Step>> {
    let one = |test, inverted| Some(vec![Step::Test { test, inverted }]);
    match (name, revision) {
        ("comment", _) => one(Test::Always, false),
        ("udp", 0) => Some(ports(info, info.byte(8)?)?),
        ("tcp", 0) => tcp(info),
        ("multiport", _) => multiport(info, revision),
        ("state", 0) => {
            let states = info.long(0)?;
            one(Test::State { states, translated: false }, false)
        }
        ("conntrack" | "state", 1..=3) => connection(info, revision),
        ("mark", 1) => one(Test::Mark { mark: info.long(0)?, mask: info.long(4)? }, info.byte(8)? != 0),
        ("addrtype", _) => address_type(info, revision),
        ("pkttype", 0) => one(Test::PacketType(info.long(0)?), info.long(4)? != 0),
        ("iprange", 1) => address_range(info, v6),
        // No packet of ours has an extension header of IPv6.
        ("rt" | "frag" | "hbh" | "dst" | "mh", _) if v6 => one(Test::Fragment, false),
        ("rpfilter", 0) => one(Test::ReversePath, info.byte(0)? & 8 != 0),
        _ => None,
    }
}

/// Source and destination ports, which `struct xt_udp` and `struct xt_tcp` begin with.
fn ports(info: &Info<'_>, inverted: u8) -> Option<Vec<Step>> {
    let mut steps = vec![];
    for (end, at, bit) in [(End::Source, 0, 1), (End::Target, 4, 2)] {
        let (low, high) = (info.short(at)?, info.short(at + 2)?);
        let inverted = inverted & bit != 0;
        if (low, high) != (0, u16::MAX) || inverted {
            steps.push(Step::Test { test: Test::Ports { end, ranges: vec![(low, high)] }, inverted });
        }
    }
    Some(steps)
}

fn tcp(info: &Info<'_>) -> Option<Vec<Step>> {
    let (option, mask, flags, inverted) = (info.byte(8)?, info.byte(9)?, info.byte(10)?, info.byte(11)?);
    let mut steps = ports(info, inverted)?;
    if option != 0 {
        steps.push(Step::Opaque("--tcp-option".to_owned()));
    }
    if mask != 0 {
        let how = if inverted & 4 == 0 { Comparison::Equal } else { Comparison::Different };
        steps.extend([
            Step::Load { field: Field::Transport { offset: 13 }, len: 1, to: 0 },
            Step::Bitwise { from: 0, to: 0, mask: vec![mask], xor: vec![0] },
            Step::Compare { register: 0, how, with: vec![flags] },
        ]);
    }
    Some(steps)
}

fn multiport(info: &Info<'_>, revision: u32) -> Option<Vec<Step>> {
    let count = usize::from(info.byte(1)?);
    let begins_range = |at: usize| revision == 1 && info.byte(32 + at).is_some_and(|flag| flag != 0);
    let (mut ranges, mut at) = (vec![], 0);
    while at < count {
        let low = info.short(2 + 2 * at)?;
        if begins_range(at) && at + 1 < count {
            at += 1;
        }
        ranges.push((low, info.short(2 + 2 * at)?));
        at += 1;
    }
    let test = match info.byte(0)? {
        0 => Test::Ports { end: End::Source, ranges },
        1 => Test::Ports { end: End::Target, ranges },
        _ => Test::AnyPort(ranges),
    };
    let inverted = revision == 1 && info.byte(47)? != 0;
    Some(vec![Step::Test { test, inverted }])
}

/// `struct xt_conntrack_mtinfo1` and its successors. Only states can be read.
fn connection(info: &Info<'_>, revision: u32) -> Option<Vec<Step>> {
    let (wanted, inverted) = (info.short(146)?, info.short(148)?);
    let states = if revision == 1 { u32::from(info.byte(150)?) } else { u32::from(info.short(150)?) };
    let mut steps = vec![];
    if wanted & BY_STATE != 0 {
        let untracked = if states & UNTRACKED == 0 { 0 } else { state::UNTRACKED };
        let known = states & (state::INVALID | state::ESTABLISHED | state::RELATED | state::NEW) | untracked;
        let test = Test::State { states: known, translated: states & TRANSLATED != 0 };
        steps.push(Step::Test { test, inverted: inverted & BY_STATE != 0 });
    }
    if wanted & !(BY_STATE | BY_ALIAS) != 0 {
        steps.push(Step::Opaque("-m conntrack".to_owned()));
    }
    Some(steps)
}

fn address_type(info: &Info<'_>, revision: u32) -> Option<Vec<Step>> {
    let inverted = match revision {
        0 => [info.long(4)? != 0, info.long(8)? != 0],
        _ => [info.long(4)? & 1 != 0, info.long(4)? & 2 != 0],
    };
    let ends = [(End::Source, info.short(0)?), (End::Target, info.short(2)?)];
    let asked = ends.into_iter().zip(inverted).filter(|((_, types), _)| *types != 0);
    Some(
        asked.map(|((end, types), inverted)| Step::Test { test: Test::AddressType { end, types }, inverted }).collect(),
    )
}

fn address_range(info: &Info<'_>, v6: bool) -> Option<Vec<Step>> {
    let len = if v6 { 16 } else { 4 };
    let flags = info.byte(64)?;
    let mut steps = vec![];
    for (end, at, bit, invert) in [(End::Source, 0, 1, 1 << 4), (End::Target, 32, 2, 1 << 5)] {
        if flags & bit != 0 {
            let (low, high) = (info.bytes(at, len)?.to_vec(), info.bytes(at + 16, len)?.to_vec());
            steps.push(Step::Test { test: Test::AddressRange { end, low, high }, inverted: flags & invert != 0 });
        }
    }
    Some(steps)
}

/// What a target does.
pub(super) fn target(name: &str, revision: u32, info: &[u8]) -> Vec<Step> {
    let info = Info(info);
    let elsewhere = || vec![Step::Decide(Decision::Elsewhere(name.to_owned()))];
    match (name, revision) {
        ("REJECT", _) => vec![Step::Decide(Decision::Drop("reject"))],
        ("MARK", 2) => match (info.long(0), info.long(4)) {
            (Some(xor), Some(clear)) => vec![Step::ChangeMark { clear, xor }],
            _ => elsewhere(),
        },
        // A mark by a hash of the packet.
        ("HMARK", _) => {
            vec![Step::Load { field: Field::Other("HMARK".to_owned()), len: 4, to: 0 }, Step::SetMark(0)]
        }
        ("NOTRACK", _) => vec![Step::Notrack],
        ("CT", _) if info.short(0).is_some_and(|flags| flags & 1 != 0) => vec![Step::Notrack],
        ("CT", _) => vec![],
        // XT_CONNMARK_RESTORE: the packet's mark becomes the connection's.
        ("CONNMARK", _) if info.byte(12) == Some(2) => {
            vec![Step::Load { field: Field::ConnectionMark, len: 4, to: 0 }, Step::SetMark(0)]
        }
        ("CONNMARK", _) => vec![],
        (name, _) if CONTINUING.contains(&name) => vec![],
        (name, _) if CHANGING.contains(&name) => vec![Step::Change(name.to_owned())],
        _ => elsewhere(),
    }
}

/// A structure of the kernel.
pub(in crate::kernel) struct Info<'a>(pub(in crate::kernel) &'a [u8]);

impl<'a> Info<'a> {
    pub(super) fn bytes(&self, at: usize, len: usize) -> Option<&'a [u8]> {
        self.0.get(at..at.checked_add(len)?)
    }

    pub(super) fn byte(&self, at: usize) -> Option<u8> {
        self.0.get(at).copied()
    }

    pub(super) fn short(&self, at: usize) -> Option<u16> {
        self.bytes(at, 2)?.first_chunk().map(|bytes| u16::from_ne_bytes(*bytes))
    }

    pub(in crate::kernel) fn long(&self, at: usize) -> Option<u32> {
        self.bytes(at, 4)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
    }

    /// A name that ends with a zero, or with the field.
    pub(in crate::kernel) fn text(&self, at: usize, len: usize) -> Option<&'a str> {
        let bytes = self.bytes(at, len)?;
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(len);
        std::str::from_utf8(&bytes[..end]).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_that_are_too_short_are_conditions_that_cannot_be_read() {
        for name in
            ["udp", "tcp", "multiport", "state", "conntrack", "mark", "addrtype", "pkttype", "iprange", "rpfilter"]
        {
            for revision in 0..4 {
                let steps = conditions(name, revision, &[], false);
                assert_eq!(steps, [Step::Opaque(format!("-m {name}"))], "revision {revision}");
            }
        }
        assert_eq!(target("MARK", 2, &[]), [Step::Decide(Decision::Elsewhere("MARK".to_owned()))]);
    }

    #[test]
    fn hash_mark_makes_the_packets_mark_open() {
        let open = Step::Load { field: Field::Other("HMARK".to_owned()), len: 4, to: 0 };
        assert_eq!(target("HMARK", 1, &[]), [open, Step::SetMark(0)]);
    }
}
