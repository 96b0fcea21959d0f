//! What the kernel's refusals mean: every errno of every write gets words here, with a way out. A number alone would leave
//! the operator to guess.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io;

use fabric_core::diff::{Change, Op, fast_path, nft, routing};
use fabric_core::state::nft::{ChainKind, Field, Step, TableFamily};

use super::KernelError;

/// Missing rights, wherever it is told.
pub(super) const CAPABILITY: &str = "does fabricd have CAP_NET_ADMIN? See: grep CapEff /proc/$(pidof fabricd)/status";

/// What to look at when the kernel lets nothing of eBPF be made or opened.
pub(super) const BPF_CAPABILITIES: &str = "does fabricd have CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN, and before Linux 5.11 the memory? \
     See: grep CapEff /proc/$(pidof fabricd)/status; ulimit -l";

impl KernelError {
    /// A step that was refused. `words` are the kernel's own, or what else is known.
    #[must_use]
    pub fn of_op(op: &Op, source: io::Error, words: Option<String>) -> Self {
        match op {
            Op::Routing(op) => Self::of_routing(op, source, words),
            Op::Filter(op) => Self::of_filter(op, &[op], source, words, None),
            Op::FastPath(op) => Self::of_fast_path(op, source, words),
        }
    }

    /// A step in a sentence: its first line.
    #[must_use]
    pub fn step(op: &Op) -> String {
        without_sign(op)
    }

    /// A step of routing that was refused.
    #[must_use]
    pub fn of_routing(op: &routing::Op, source: io::Error, words: Option<String>) -> Self {
        let advice = advice_for(op, &source, words.is_some());
        Self::Refused { op: without_sign(op), detail: joined(words, advice), source }
    }

    /// A step of the fast path that was refused.
    #[must_use]
    pub fn of_fast_path(op: &fast_path::Op, source: io::Error, words: Option<String>) -> Self {
        let advice = match (op, source.raw_os_error().unwrap_or_default()) {
            (_, libc::EPERM | libc::EACCES) if words.is_none() => BPF_CAPABILITIES,
            (fast_path::Op::Link(..), libc::EINVAL) if words.is_none() => {
                "does the kernel take programs at the hooks of tc? See: uname -r; tc qdisc show"
            }
            (fast_path::Op::Program(_), libc::EINVAL) => "the kernel is too old for it (before 5.13); see: uname -r",
            (_, libc::EEXIST) => "something else is pinned there; see: ls -R /sys/fs/bpf/fabric",
            (_, libc::ENOMEM) => "the kernel has no memory for it; see: free -m; ulimit -l",
            _ if words.is_some() => return Self::Refused { op: without_sign(op), detail: joined(words, None), source },
            _ => general(&source),
        };
        Self::Refused { op: without_sign(op), detail: joined(words, Some(advice.to_owned())), source }
    }

    /// A step of the packet filter that was refused, be it for another of its `transaction`: the kernel doesn't say which, so
    /// a module that is missing may be that of any. `owner` says who owns the table, if it is another program.
    #[must_use]
    pub fn of_filter(
        op: &nft::Op,
        transaction: &[&nft::Op],
        source: io::Error,
        words: Option<String>,
        owner: Option<String>,
    ) -> Self {
        let advice = match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) if owner.is_some() => None,
            Some(libc::ENOENT | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT | libc::EAFNOSUPPORT) => {
                let mut modules: BTreeSet<_> = transaction.iter().flat_map(|op| modules(op)).collect();
                let counts = transaction.iter().any(|op| matches!(op, nft::Op::Chains(..)));
                modules.extend((counts && counters_are_a_module(&release())).then_some("nft_counter"));
                let modules = modules.into_iter().collect::<Vec<_>>().join(" ");
                Some(format!("does the kernel have all that it takes? Load it with: modprobe -a {modules}"))
            }
            Some(libc::EEXIST | libc::EBUSY) => {
                Some("another program changes the rules at this moment; it is tried again".to_owned())
            }
            _ => Some(general(&source).to_owned()),
        };
        let words = joined(words, owner);
        Self::Refused {
            op: without_sign(op),
            detail: joined(Some(words).filter(|words| !words.is_empty()), advice),
            source,
        }
    }
}

/// What a step takes from the kernel, where that is modules: for each expression of its rules the one that has it.
fn modules(op: &nft::Op) -> BTreeSet<&'static str> {
    let mut modules = BTreeSet::from(["nf_tables"]);
    let nft::Op::Chains(table, change) = op else { return modules };
    modules.extend((table.family() == TableFamily::Bridge).then_some("nft_meta_bridge"));
    for chain in change.chains.values() {
        modules.extend(chain.hook().filter(|hook| hook.kind == ChainKind::Nat).map(|_| "nft_chain_nat"));
        for step in chain.rules().iter().flat_map(|rule| &rule.steps) {
            modules.extend(match step {
                Step::Masquerade => Some("nft_masq"),
                Step::Dnat { .. } => Some("nft_nat"),
                Step::Reject(_) => Some("nft_reject_inet"),
                Step::Log { .. } => Some("nft_log"),
                Step::Limit { .. } => Some("nft_limit"),
                Step::Notrack | Step::SetCtMark { .. } | Step::SetCtLabel(_) => Some("nft_ct"),
                _ => None,
            });
            modules.extend(step.fields().filter_map(|field| match field {
                Field::Random(_) | Field::Increment(_) => Some("nft_numgen"),
                Field::SourceHash { .. } => Some("nft_hash"),
                Field::SourceType | Field::TargetType => Some("nft_fib_inet"),
                Field::CtState | Field::CtDirection | Field::CtStatus | Field::CtMark | Field::CtLabels => {
                    Some("nft_ct")
                }
                Field::Ct(..) => Some("nft_ct"),
                _ => None,
            }));
        }
    }
    modules
}

/// The version of the kernel that runs; empty if it isn't told.
fn release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default()
}

/// Whether counters are a module of their own, as before Linux 5.18.
fn counters_are_a_module(release: &str) -> bool {
    let mut numbers = release.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    version > (0, 0) && version < (5, 18)
}

fn without_sign(op: &impl std::fmt::Display) -> String {
    let lines = op.to_string();
    lines.lines().next().unwrap_or_default().trim_start_matches(['+', '~', '-', ' ']).to_owned()
}

fn joined(words: Option<String>, advice: Option<String>) -> String {
    [words, advice].into_iter().flatten().collect::<Vec<_>>().join("; ")
}

/// The way out of a step's refusal; `None` where the words have it.
fn advice_for(op: &routing::Op, source: &io::Error, has_words: bool) -> Option<String> {
    let errno = source.raw_os_error().unwrap_or_default();
    let specific = match (op, errno) {
        // The setting's file was written, and that says why.
        (routing::Op::Sysctl(..), libc::EPERM | libc::EACCES | libc::EROFS | libc::ENOENT) if has_words => return None,
        (routing::Op::Link(_, Change::Create(_)), libc::EOPNOTSUPP | libc::EPROTONOSUPPORT) => {
            "does the kernel have the vxlan module? Load it with: modprobe vxlan"
        }
        (routing::Op::Link(_, Change::Create(_)), libc::EAFNOSUPPORT) => "is IPv6 turned off on this host?",
        (routing::Op::Link(_, Change::Create(_)), libc::EEXIST) => {
            "an interface with this name, or with this VNI and port, is there: see ip -d link show type vxlan"
        }
        // Who has the port is told by `port_holder`.
        (routing::Op::Link(..), libc::EADDRINUSE) if has_words => return None,
        (routing::Op::Route(..), libc::EEXIST) => "a route of somebody else leads there: see ip route",
        (routing::Op::Nexthop(..), libc::EEXIST) => "somebody else took the id meanwhile: the next pass takes another",
        (routing::Op::Neighbour(..), libc::ENOMEM | libc::ENOBUFS) => {
            "the kernel has no room for more neighbours; see: sysctl -a | grep gc_thresh; free -m"
        }
        _ => general(source),
    };
    Some(specific.to_owned())
}

/// What an errno means where nothing more is known.
#[must_use]
pub(super) fn general(source: &io::Error) -> &'static str {
    match source.raw_os_error().unwrap_or_default() {
        libc::EPERM | libc::EACCES => CAPABILITY,
        libc::ENOENT | libc::ESRCH => "what it needs is gone; the next pass looks again",
        libc::EINTR | libc::EAGAIN => "the kernel was busy; it is tried again",
        libc::ENXIO | libc::ENODEV => "the interface is gone, or another has its name; the next pass looks again",
        libc::E2BIG | libc::EMSGSIZE => "it is too long for the kernel, which is a fault of fabricd: please report it",
        libc::ENOMEM | libc::ENOBUFS => "the kernel has no memory for it; see: free -m; dmesg | tail",
        libc::EBUSY => "another program is using it at this moment; it is tried again",
        libc::EEXIST => "another program made it a moment ago; the next pass looks again",
        libc::EINVAL => "the kernel does not take it; is it too old for this? See: uname -r; dmesg | tail",
        libc::ENOSPC => "a table of the kernel is full; see: dmesg | tail",
        libc::EROFS => "it is mounted read-only here",
        libc::EOPNOTSUPP | libc::EPROTONOSUPPORT | libc::EAFNOSUPPORT => {
            "the kernel lacks a module or is too old; see: uname -r; lsmod"
        }
        libc::EADDRINUSE => "another program uses the address or port",
        libc::EADDRNOTAVAIL => "the address is not on this host",
        libc::ENETDOWN => "the interface is down; the next pass looks again",
        libc::ENETUNREACH | libc::EHOSTUNREACH => {
            "the gateway is not on that interface's link; the next pass looks again"
        }
        _ => "the kernel says no more; see: dmesg | tail",
    }
}

/// Who has the UDP port that a VXLAN device needs: the tunnel interfaces on it, each with its kind, or how to find the
/// program.
pub(super) fn port_holder(port: u16, interfaces: &[(String, String)]) -> String {
    let another = "or choose another Port in the network config";
    match interfaces {
        [] => {
            format!("UDP port {port} is taken by another program: see ss -ulpn 'sport = :{port}' and end it, {another}")
        }
        _ => {
            let mut names = String::new();
            let mut removal = String::new();
            for (position, (name, kind)) in interfaces.iter().enumerate() {
                let _ = write!(names, "{}{name} ({kind})", if position == 0 { "" } else { ", " });
                let _ = write!(removal, "{}ip link del {name}", if position == 0 { "" } else { "; " });
            }
            format!(
                "UDP port {port} is taken by the interface {names}; if nothing uses it any more remove it with: {removal}, {another}"
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use fabric_core::cow_map::CowSet;
    use fabric_core::diff::nft::{ChainsChange, ElementChange};
    use fabric_core::diff::{Stage, diff};
    use fabric_core::model::{IfName, Subnet};
    use fabric_core::state::nft::{
        Chain, Datatype, Element, Hook, LOCAL, Match, Part, Place, Reject, Rule, SetKind, TableKey, Test,
    };
    use fabric_core::state::{Nexthop, NexthopId, Routing, Sysctl, Via, VxlanLink};

    use super::*;
    use crate::errors::errno::named;

    /// A state with a row in each table.
    fn rows() -> Routing {
        let (dev, subnet): (IfName, Subnet) = ("fabric.1".parse().unwrap(), "10.244.2.0/24".parse().unwrap());
        let (mac, ip) = ("02:42:c0:00:02:02".parse().unwrap(), "192.0.2.2".parse().unwrap());
        let link = VxlanLink {
            vni: 1_u32.try_into().unwrap(),
            port: 8472,
            gbp: false,
            mac,
            local: ip,
            mtu: 1450,
            learning: false,
            up: true,
        };
        Routing {
            links: [(dev, link)].into(),
            addresses: [(dev, subnet)].into(),
            fdb: [((dev, mac), ip)].into(),
            neighbours: [((dev, ip), mac)].into(),
            nexthops: [(NexthopId(4_194_304_000), Nexthop { gateway: ip, dev })].into(),
            routes: [(subnet, Via::Nexthop(NexthopId(4_194_304_000)))].into(),
            sysctls: [(Sysctl::Ipv4Forward, 1), (Sysctl::AcceptRa(dev), 0)].into(),
        }
    }

    fn elements(count: u32) -> nft::Op {
        let element = |n: u32| Element::from([Part::Ip(std::net::Ipv4Addr::from_bits(n).into())]);
        let added = (1..=count).map(element).collect();
        let kind = SetKind::of(&[Datatype::V4]);
        let then = CowSet::default();
        nft::Op::Elements(ElementChange {
            table: TableKey::Fabric,
            set: "members4".into(),
            kind,
            stage: Stage::Sets,
            after: vec![],
            removed: vec![],
            added,
            then,
        })
    }

    #[test]
    fn every_errno_of_every_write_has_words_beside_its_number() {
        let plans = [diff(&rows(), &Routing::default()), diff(&Routing::default(), &rows())];
        let mut ops: Vec<Op> = plans.iter().flat_map(|plan| plan.ops().to_vec()).collect();
        assert_eq!(ops.len(), 14);
        ops.extend([elements(3).into(), nft::Op::Chains(TableKey::Fabric, ChainsChange::default()).into()]);
        for errno in 1..=133 {
            let source = || io::Error::from_raw_os_error(errno);
            let dump = KernelError::Dump { table: "links", source: source() };
            let ops = ops.iter().map(|op| KernelError::of_op(op, source(), None));
            for told in ops.chain([dump]).map(|error| error.to_string()) {
                assert!(!told.contains("os error"), "{told}");
                let (_, advice) = told.split_once(&format!("{}: ", named(&source()))).expect(&told);
                assert!(advice.split_whitespace().count() > 3, "{told}");
            }
        }
    }

    #[test]
    fn refused_filter_change_is_told_in_a_line() {
        let refused = |errno, owner: Option<&str>| {
            let source = io::Error::from_raw_os_error(errno);
            let op = elements(2000);
            KernelError::of_filter(&op, &[&op], source, None, owner.map(str::to_owned)).to_string()
        };
        assert_eq!(
            refused(libc::ENOMEM, None),
            "nft add element inet fabric members4 { 0.0.0.1, 0.0.0.2, 0.0.0.3, 0.0.0.4, 0.0.0.5, 0.0.0.6, 0.0.0.7, 0.0.0.8 } \
             (and 1992 more): Cannot allocate memory (ENOMEM): the kernel has no memory for it; see: free -m; dmesg | tail"
        );
        let owned = refused(libc::EPERM, Some("the table inet fabric is owned by another program"));
        assert!(owned.ends_with("(EPERM): the table inet fabric is owned by another program"), "{owned}");
        assert!(refused(libc::EPERM, None).contains(CAPABILITY));
        assert!(refused(libc::EOPNOTSUPP, None).contains("modprobe -a nf_tables"));
    }

    #[test]
    fn expressions_that_the_kernel_lacks_are_named_by_their_modules() {
        let refused = |table: TableKey, chain: Chain| {
            let change = ChainsChange { chains: [("forward".into(), chain)].into(), ..ChainsChange::default() };
            let source = io::Error::from_raw_os_error(libc::ENOENT);
            let (first, chains) = (elements(1), nft::Op::Chains(table, change));
            let told = KernelError::of_filter(&first, &[&first, &chains], source, None, None).to_string();
            told.rsplit_once("modprobe -a ").expect("the way out").1.to_owned()
        };
        let hook = |kind| Some(Hook { kind, place: Place::Forward, priority: 0 });
        let random = Match { fields: vec![Field::Number(1), Field::Random(2)], test: Test::In("pool".into()) };
        let chosen = Rule::new([random], Step::Reject(Reject::PortUnreachable), "chosen");
        assert_eq!(
            refused(TableKey::Services, Chain::new(hook(ChainKind::Nat), [chosen])),
            "nf_tables nft_chain_nat nft_numgen nft_reject_inet"
        );
        let local = Match::is(Field::TargetType, LOCAL);
        let log = Step::Log { group: 1, prefix: "drop".into() };
        assert_eq!(
            refused(TableKey::Bridge, Chain::new(hook(ChainKind::Filter), [Rule::new([local], log, "shown")])),
            "nf_tables nft_fib_inet nft_log nft_meta_bridge"
        );
    }

    #[test]
    fn counters_are_a_module_of_old_kernels() {
        for (release, is_module) in
            [("5.10.0-32-cloud-amd64", true), ("5.18.0", false), ("6.1.0-50", false), ("", false)]
        {
            assert_eq!(counters_are_a_module(release), is_module, "{release}");
        }
    }

    #[test]
    fn holder_of_the_port_is_named_with_its_remedy() {
        let interface = [("cilium_vxlan".to_owned(), "vxlan, external".to_owned())];
        assert_eq!(
            port_holder(8472, &interface),
            "UDP port 8472 is taken by the interface cilium_vxlan (vxlan, external); if nothing uses it any more remove it \
             with: ip link del cilium_vxlan, or choose another Port in the network config"
        );
        assert!(port_holder(8472, &[]).contains("ss -ulpn 'sport = :8472'"));
    }
}
