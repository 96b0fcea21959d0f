//! flannel's rules in iptables, and ours that take their place, as lines of `iptables -S` and `iptables-restore`.

use std::fmt::Write as _;

use crate::model::{Family, Subnet};

/// The comment of our rules in the chain `FORWARD`.
pub const OUR_COMMENT: &str = "fabricd: forward";

/// flannel's chain of `filter`.
const FORWARDING: &str = "FLANNEL-FWD";

/// flannel's chain of `nat`.
const MASQUERADING: &str = "FLANNEL-POSTRTG";

/// The rules of one family: what `iptables -t TABLE -S` prints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Iptables {
    /// The table `nat`.
    pub nat: Vec<String>,
    /// The table `filter`.
    pub filter: Vec<String>,
}

/// The program of a family.
pub(super) fn program(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    }
}

/// flannel's table of nftables (`EnableNFTables`).
pub(super) fn table(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip flannel-ipv4",
        Family::V6 => "ip6 flannel-ipv6",
    }
}

impl Iptables {
    /// What takes flannel's rules away, each table in one transaction: first those of `filter`, where two rules of ours
    /// take their place if anything else there decides about forwarded packets.
    pub(super) fn without_flannels(&self, network: Subnet) -> Vec<String> {
        let filter = self.missing(network).unwrap_or_default() + &removal(&self.filter, "FORWARD", FORWARDING);
        let nat = removal(&self.nat, "POSTROUTING", MASQUERADING);
        [("filter", filter), ("nat", nat)].into_iter().filter_map(|(table, lines)| transaction(table, &lines)).collect()
    }

    /// What puts our rules beside flannel's jump before flanneld starts: it empties its chain then, and fills it in a
    /// second step.
    pub(super) fn with_ours(&self, network: Subnet) -> Option<String> {
        transaction("filter", &self.missing(network)?)
    }

    /// What takes our rules away once flannel's are there.
    pub(super) fn without_ours(&self) -> Option<String> {
        transaction("filter", &self.removal_of_ours())
    }

    /// What takes away what [`Iptables::with_ours`] adds.
    pub(super) fn without_added(network: Subnet) -> String {
        let lines = rules_of_ours(network).map(|rule| format!("-D FORWARD {rule}\n")).concat();
        format!("*filter\n{lines}COMMIT\n")
    }

    /// Whether flannel masquerades here.
    pub(super) fn has_flannels_masquerade(&self) -> bool {
        has_jump(&self.nat, "POSTROUTING", MASQUERADING)
            && rules(&self.nat, MASQUERADING).any(|rule| rule.contains("-j MASQUERADE"))
    }

    /// Whether flannel lets packets of pods and packets for pods through.
    pub(super) fn has_flannels_forward(&self) -> bool {
        has_jump(&self.filter, "FORWARD", FORWARDING)
            && rules(&self.filter, FORWARDING).filter(|rule| rule.ends_with("-j ACCEPT")).count() >= 2
    }

    fn of_ours(&self) -> impl Iterator<Item = &str> {
        rules(&self.filter, "FORWARD").filter(|rule| rule.contains(&format!("--comment \"{OUR_COMMENT}\"")))
    }

    fn removal_of_ours(&self) -> String {
        self.of_ours().map(|rule| format!("-D{}\n", rule.trim_start_matches("-A"))).collect()
    }

    /// What adds our two rules at the place of flannel's jump, if anything else in `FORWARD` decides and they aren't there.
    fn missing(&self, network: Subnet) -> Option<String> {
        let to_flannels = |rule: &str| jumps_to(rule, FORWARDING);
        let jump = rules(&self.filter, "FORWARD").position(to_flannels)?;
        let decides = self.filter.iter().any(|line| line == "-P FORWARD DROP")
            || rules(&self.filter, "FORWARD").any(|rule| !to_flannels(rule));
        let add = rules_of_ours(network).map(|rule| format!("-I FORWARD {} {rule}\n", jump + 1));
        (decides && self.of_ours().count() != add.len()).then(|| self.removal_of_ours() + &add.concat())
    }
}

/// Packets of pods, and packets for pods.
fn rules_of_ours(network: Subnet) -> [String; 2] {
    ["-s", "-d"].map(|from| format!("{from} {network} -m comment --comment \"{OUR_COMMENT}\" -j ACCEPT"))
}

/// The rules of a chain, in order.
fn rules<'a>(lines: &'a [String], chain: &str) -> impl Iterator<Item = &'a str> {
    let begins = format!("-A {chain} ");
    lines.iter().filter(move |line| line.starts_with(&begins)).map(String::as_str)
}

fn jumps_to(rule: &str, chain: &str) -> bool {
    rule.ends_with(&format!("-j {chain}"))
}

fn has_jump(lines: &[String], from: &str, chain: &str) -> bool {
    rules(lines, from).any(|rule| jumps_to(rule, chain))
}

/// What removes the jump from `from` to a chain of flannel's, and the chain.
fn removal(lines: &[String], from: &str, chain: &str) -> String {
    let mut removal = String::new();
    for jump in rules(lines, from).filter(|rule| jumps_to(rule, chain)) {
        let _ = writeln!(removal, "-D{}", jump.trim_start_matches("-A"));
    }
    if lines.iter().any(|line| *line == format!("-N {chain}")) {
        let _ = write!(removal, "-F {chain}\n-X {chain}\n");
    }
    removal
}

fn transaction(table: &str, lines: &str) -> Option<String> {
    (!lines.is_empty()).then(|| format!("*{table}\n{lines}COMMIT\n"))
}
