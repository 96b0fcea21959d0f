//! flannel's rules in iptables, and ours that take their place, as lines of `iptables -S` and `iptables-restore`.

use std::fmt::Write as _;

use crate::model::{Family, Subnet};

/// The comment of our rules in the chain `FORWARD`.
pub const OUR_COMMENT: &str = "fabricd: forward";

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
        let mut filter = removal(&self.filter, "FORWARD", "FLANNEL-FWD");
        let jump = rules(&self.filter, "FORWARD").position(|rule| rule.ends_with("-j FLANNEL-FWD"));
        if let Some(jump) = jump {
            let decides = self.filter.iter().any(|line| line == "-P FORWARD DROP")
                || rules(&self.filter, "FORWARD").any(|rule| !rule.ends_with("-j FLANNEL-FWD"));
            if decides && !self.has_ours() {
                filter = format!("{}{filter}", self.ours(network, jump + 1));
            }
        }
        let nat = removal(&self.nat, "POSTROUTING", "FLANNEL-POSTRTG");
        [("filter", filter), ("nat", nat)].into_iter().filter_map(|(table, lines)| transaction(table, &lines)).collect()
    }

    /// What takes our rules away once flannel's are there.
    pub(super) fn without_ours(&self) -> Option<String> {
        let is_there = self.filter.iter().any(|line| line == "-N FLANNEL-FWD");
        let ours = self.filter.iter().filter(|line| line.starts_with("-A FORWARD") && is_ours(line));
        let lines: String = ours.map(|line| format!("-D{}\n", line.trim_start_matches("-A"))).collect();
        transaction("filter", &lines).filter(|_| is_there)
    }

    /// Whether flannel masquerades here.
    pub(super) fn has_flannels_masquerade(&self) -> bool {
        rules(&self.nat, "POSTROUTING").any(|rule| rule.ends_with("-j FLANNEL-POSTRTG"))
    }

    fn has_ours(&self) -> bool {
        rules(&self.filter, "FORWARD").filter(|rule| is_ours(rule)).count() == 2
    }

    /// Two rules at this place, counted from 1: packets of pods, and packets for pods.
    fn ours(&self, network: Subnet, place: usize) -> String {
        let mut lines = String::new();
        for old in self.filter.iter().filter(|line| line.starts_with("-A FORWARD") && is_ours(line)) {
            let _ = writeln!(lines, "-D{}", old.trim_start_matches("-A"));
        }
        for from in ["-s", "-d"] {
            let _ =
                writeln!(lines, "-I FORWARD {place} {from} {network} -m comment --comment \"{OUR_COMMENT}\" -j ACCEPT");
        }
        lines
    }
}

fn is_ours(line: &str) -> bool {
    line.contains(&format!("--comment \"{OUR_COMMENT}\""))
}

/// The rules of a chain, in order.
fn rules<'a>(lines: &'a [String], chain: &str) -> impl Iterator<Item = &'a str> {
    let begins = format!("-A {chain} ");
    lines.iter().filter(move |line| line.starts_with(&begins)).map(String::as_str)
}

/// What removes the jump from `from` to a chain of flannel's, and the chain.
fn removal(lines: &[String], from: &str, chain: &str) -> String {
    let mut removal = String::new();
    for jump in rules(lines, from).filter(|rule| rule.ends_with(&format!("-j {chain}"))) {
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
