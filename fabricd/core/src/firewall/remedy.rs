//! The commands that let packets of ours through, in the words of the firewall that drops them.
//!
//! Each list of commands is complete and can be pasted. After it the base chain that dropped lets the packets pass.

use super::evaluate::Blocked;
use super::packet::Flow;
use super::{Decision, Firewall, Hook, Step, Table, TableKind};
use crate::model::{Family, Subnet};

/// Who keeps a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Firewalld,
    Ufw,
    Docker,
    Iptables(&'static str),
    Nft,
}

/// Tables of iptables-nft; of these chains it knows the built-in ones.
const IPTABLES: [&str; 4] = ["filter", "mangle", "raw", "security"];
/// Docker's chain for rules of others.
const DOCKER_USER: &str = "DOCKER-USER";

/// What to run so that `by` lets packets of `flow` through, for the family of `network`.
#[must_use]
pub fn remedy(firewall: &Firewall, by: &Blocked, flow: Flow, network: Subnet, port: u16) -> Vec<String> {
    let table = firewall.tables.iter().find(|table| (table.kind, &table.name) == (by.kind, &by.table));
    let owner = table.map_or(Owner::Nft, |table| owner(table, by));
    match owner {
        Owner::Firewalld if flow == Flow::Received => {
            let zone = by.chain.strip_prefix("filter_IN_").or_else(|| by.chain.strip_prefix("IN_"));
            let zone = zone.map_or_else(String::new, |zone| format!("--zone={zone} "));
            vec![format!("firewall-cmd --permanent {zone}--add-port={port}/udp"), "firewall-cmd --reload".to_owned()]
        }
        Owner::Firewalld => {
            let source = format!("firewall-cmd --permanent --zone=trusted --add-source={network}");
            vec![source, "firewall-cmd --reload".to_owned()]
        }
        Owner::Ufw if flow == Flow::Received => vec![format!("ufw allow {port}/udp")],
        Owner::Ufw if flow == Flow::Sent => vec![format!("ufw allow out {port}/udp")],
        Owner::Ufw => vec![format!("ufw route allow from {network}"), format!("ufw route allow to {network}")],
        Owner::Docker => in_iptables(iptables(by.kind), "", DOCKER_USER, flow, network, port),
        Owner::Iptables(command) => {
            let table = if by.table == "filter" { String::new() } else { format!("-t {} ", by.table) };
            in_iptables(command, &table, &by.base, flow, network, port)
        }
        Owner::Nft => in_nft(by, flow, network, port),
    }
}

fn owner(table: &Table, by: &Blocked) -> Owner {
    let has = |chain: &str| table.chains.contains_key(chain);
    // Of what firewalld does to packets that this host sends, none of these options takes anything back.
    let by_firewalld = table.name == "firewalld" || has("INPUT_ZONES") || has("FORWARD_IN_ZONES");
    let is_ufw = |chain: &str| chain.starts_with("ufw-") || chain.starts_with("ufw6-");
    match () {
        () if by_firewalld && !matches!(by.hook, Hook::Output | Hook::Postrouting) => Owner::Firewalld,
        () if table.chains.keys().any(|chain| is_ufw(chain)) && (by.rule.is_none() || is_ufw(&by.chain)) => Owner::Ufw,
        () if by.hook == Hook::Forward && docker_user_is_first(table, by) => Owner::Docker,
        () if table.kind.is_legacy() => Owner::Iptables(iptables(table.kind)),
        () if IPTABLES.contains(&table.name.as_str()) && is_built_in(by) => Owner::Iptables(iptables(table.kind)),
        () => Owner::Nft,
    }
}

/// Whether the chain in question begins with Docker's own call of its chain for rules of others.
fn docker_user_is_first(table: &Table, by: &Blocked) -> bool {
    let jump = Step::Decide(Decision::Jump(DOCKER_USER.to_owned()));
    let first = table.chains.get(&by.base).and_then(|chain| chain.rules.first());
    by.table == "filter" && first.is_some_and(|rule| rule.steps == [jump])
}

fn is_built_in(by: &Blocked) -> bool {
    by.kind != TableKind::Inet && by.base == by.hook.to_string().to_uppercase()
}

/// The command that keeps tables of a kind.
fn iptables(kind: TableKind) -> &'static str {
    match kind {
        TableKind::Ip | TableKind::Inet => "iptables-nft",
        TableKind::Ip6 => "ip6tables-nft",
        TableKind::Iptables => "iptables-legacy",
        TableKind::Ip6tables => "ip6tables-legacy",
    }
}

fn in_iptables(command: &str, table: &str, chain: &str, flow: Flow, network: Subnet, port: u16) -> Vec<String> {
    let insert = |condition: String| format!("{command} {table}-I {chain} {condition} -j ACCEPT");
    match flow {
        Flow::Received | Flow::Sent => vec![insert(format!("-p udp --dport {port}"))],
        Flow::Pods | Flow::Outside => ["-s", "-d"].map(|end| insert(format!("{end} {network}"))).to_vec(),
    }
}

fn in_nft(by: &Blocked, flow: Flow, network: Subnet, port: u16) -> Vec<String> {
    let Blocked { kind, table, base, .. } = by;
    let insert = |condition: String| format!("nft insert rule {kind} {table} {base} {condition} accept");
    let ip = match network.family() {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    };
    match flow {
        Flow::Received | Flow::Sent => vec![insert(format!("udp dport {port}"))],
        Flow::Pods | Flow::Outside => ["saddr", "daddr"].map(|end| insert(format!("{ip} {end} {network}"))).to_vec(),
    }
}
