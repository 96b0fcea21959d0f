//! `fabricctl lease`: who has which subnet, and what a person may do about it.

use std::collections::BTreeSet;
use std::future::Future;
use std::path::Path;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use fabric_core::leases::Lease;
use fabric_core::model::{NodeName, Subnet};
use fabric_core::network::NetworkConfig;
use fabric_core::record::{Backend, LeaseKey};
use fabric_proto::v1::RenumberLeaseRequest;
use fabricd::config::EtcdArgs;
use fabricd::store::StoreError;
use fabricd::store::etcd::{Etcd, Overview};
use serde::Serialize;

use crate::network::{PATIENCE, unreached};
use crate::output::{OutputArg, Screen};
use crate::status::span;
use crate::table::{Cell, render};
use crate::{Answer, daemon};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// All leases, reservations, and subnets that rest after their lease has ended
    List(ListArgs),
    /// One node's
    Show {
        /// The node.
        node: NodeName,
        /// How, and where from.
        #[command(flatten)]
        list: ListArgs,
    },
    /// Keep a subnet for a node, while it is away too
    Reserve {
        /// The node.
        node: NodeName,
        /// Its subnet, as in 10.244.3.0/24; on dual stack one of each family, with a comma between.
        #[arg(value_delimiter = ',', required = true)]
        subnet: Vec<Subnet>,
        /// Where etcd is.
        #[command(flatten)]
        etcd: EtcdArgs,
    },
    /// End a node's reservations; it keeps what it holds
    Unreserve {
        /// The node.
        node: NodeName,
        /// Where etcd is.
        #[command(flatten)]
        etcd: EtcdArgs,
    },
    /// Take a node's lease away, for a node that is gone: one that lives takes it back
    Release {
        /// The node.
        node: NodeName,
        /// Where etcd is.
        #[command(flatten)]
        etcd: EtcdArgs,
    },
    /// Make this node take another subnet
    Renumber {
        /// Although pods have addresses in this one, which cuts them off
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Args)]
pub struct ListArgs {
    #[command(flatten)]
    form: OutputArg,
    /// Where etcd is.
    #[command(flatten)]
    etcd: EtcdArgs,
}

/// One subnet, or pair of subnets, that is not simply free.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Row {
    subnets: Vec<String>,
    /// Empty for flannel nodes.
    node: String,
    state: &'static str,
    public_addresses: Vec<String>,
    epoch: u64,
    /// Seconds; unset for a record that stays for ever, and where it was not asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_in_seconds: Option<u64>,
}

pub async fn run(command: Command, socket: &Path) -> anyhow::Result<Answer> {
    let said = match command {
        Command::List(args) => return list(args, None).await,
        Command::Show { node, list: args } => return list(args, Some(node)).await,
        Command::Reserve { node, subnet, etcd } => {
            let store = Etcd::start(etcd.options()?);
            let key = key_of(&subnet)?;
            let config = in_time(&etcd, store.read_config()).await?.context("there is no network config yet")?;
            check(&NetworkConfig::decode(&config.json)?, &key)?;
            in_time(&etcd, store.reserve(&node, &key)).await?;
            format!("{} is reserved for {node}\n", subnets_of(&key).join(" and "))
        }
        Command::Unreserve { node, etcd } => {
            let ended = in_time(&etcd, Etcd::start(etcd.options()?).unreserve(&node)).await?;
            tell("no longer reserved", "nothing is reserved for", &node, &ended)
        }
        Command::Release { node, etcd } => {
            let released = in_time(&etcd, Etcd::start(etcd.options()?).release_node(&node)).await?;
            tell("released", "there is no lease of", &node, &released)
        }
        Command::Renumber { force } => {
            let answer = daemon::connect(socket).await?.renumber_lease(RenumberLeaseRequest { force }).await;
            let left = answer.map_err(|status| daemon::told(&status))?.into_inner().left;
            format!("{} is being left; see the new one with: fabricctl status\n", left.join(" and "))
        }
    };
    Ok(Answer::fine(said))
}

async fn in_time<T>(etcd: &EtcdArgs, work: impl Future<Output = Result<T, StoreError>>) -> anyhow::Result<T> {
    Ok(tokio::time::timeout(PATIENCE, work).await.with_context(|| unreached(etcd))??)
}

fn tell(done: &str, nothing: &str, node: &NodeName, keys: &[LeaseKey]) -> String {
    let subnets: Vec<String> = keys.iter().flat_map(subnets_of).collect();
    if subnets.is_empty() { format!("{nothing} {node}\n") } else { format!("{done}: {}\n", subnets.join(" ")) }
}

fn key_of(subnets: &[Subnet]) -> anyhow::Result<LeaseKey> {
    let families: BTreeSet<_> = subnets.iter().map(|subnet| subnet.family()).collect();
    if families.len() != subnets.len() {
        bail!("more than one subnet of a family; give one of each, as in 10.244.3.0/24,fd00:10:244:3::/64");
    }
    LeaseKey::new(subnets.iter().map(|subnet| (subnet.family(), *subnet)).collect()).context("no subnet given")
}

/// A reservation that no node could claim helps nobody.
fn check(config: &NetworkConfig, key: &LeaseKey) -> anyhow::Result<()> {
    for (family, space) in config.spaces.iter() {
        let len = space.subnet_len;
        let wanted = || format!("give one from {}/{len} to {}/{len}", space.min, space.max);
        let subnet =
            key.subnets().get(family).with_context(|| format!("an {family} subnet is missing; {}", wanted()))?;
        if !space.admits(*subnet) {
            bail!("{subnet} is no subnet of the network config; {}", wanted());
        }
    }
    if let Some(extra) = key.subnets().iter().find(|(family, _)| config.spaces.get(*family).is_none()) {
        bail!("{} can't be reserved: {} is off in the network config", extra.1, extra.0);
    }
    Ok(())
}

async fn list(ListArgs { form, etcd }: ListArgs, node: Option<NodeName>) -> anyhow::Result<Answer> {
    let store = Etcd::start(etcd.options()?);
    let overview = in_time(&etcd, store.overview()).await?;
    let mut rows = rows(&overview);
    if let Some(node) = node {
        rows.retain(|row| row.node == node.as_str());
        if rows.is_empty() {
            bail!("{node} has no lease and no reservation; see all with: fabricctl lease list");
        }
        for lease in overview.leases.iter().filter(|lease| lease.record.node() == Some(&node)) {
            let left = in_time(&etcd, store.time_left(lease)).await?;
            let row = rows.iter_mut().find(|row| row.subnets == subnets_of(&lease.key));
            row.into_iter().for_each(|row| row.expires_in_seconds = left.map(|left| left.as_secs()));
        }
    }
    Ok(Answer::fine(form.output.show(&rows, |screen| table(screen, &rows))?))
}

fn rows(Overview { leases, resting }: &Overview) -> Vec<Row> {
    let name = |node: Option<&NodeName>| node.map(ToString::to_string).unwrap_or_default();
    let leased = leases.iter().map(|lease| Row {
        subnets: subnets_of(&lease.key),
        node: name(lease.record.node()),
        state: state(lease, leases.reservations().contains_key(&lease.key)),
        public_addresses: lease.record.endpoints().values().map(|e| e.public_ip.to_string()).collect(),
        epoch: lease.record.owner.as_ref().map_or(0, |owner| owner.epoch),
        expires_in_seconds: None,
    });
    let without = |subnets, node, state| Row {
        subnets,
        node,
        state,
        public_addresses: vec![],
        epoch: 0,
        expires_in_seconds: None,
    };
    let unheld = leases.reservations().iter().filter(|(key, _)| leases.get(key).is_none());
    let unheld = unheld.map(|(key, node)| without(subnets_of(key), node.to_string(), "reserved, place not held"));
    let resting =
        resting.iter().map(|rest| without(vec![rest.subnet.to_string()], name(rest.node.as_ref()), "resting"));
    leased.chain(unheld).chain(resting).collect()
}

fn state(lease: &Lease, reserved: bool) -> &'static str {
    match (&lease.record.backend, lease.record.node(), reserved) {
        (Backend::Reserved(_), ..) => "reserved, node away",
        (_, None, _) => "flannel",
        (_, Some(_), true) => "held, reserved",
        (_, Some(_), false) => "held",
    }
}

fn table(screen: &Screen, rows: &[Row]) -> String {
    let cells = |row: &Row| -> [Cell; 6] {
        let node = if row.node.is_empty() { "(flannel)".into() } else { row.node.clone() };
        let ends = row.expires_in_seconds.map(|left| span(left.try_into().unwrap_or(i64::MAX))).unwrap_or_default();
        let cells = [
            row.subnets.join(" "),
            node,
            row.state.into(),
            row.public_addresses.join(" "),
            row.epoch.to_string(),
            ends,
        ];
        cells.map(Cell::from)
    };
    // The store is asked for the end of one node's lease, not of thousands.
    let ends = if rows.iter().any(|row| row.expires_in_seconds.is_some()) { "ENDS IN" } else { "" };
    let rows: Vec<[Cell; 6]> = rows.iter().map(cells).collect();
    render(screen, ["SUBNET", "NODE", "STATE", "UNDERLAY", "CLAIM", ends], &rows)
}

fn subnets_of(key: &LeaseKey) -> Vec<String> {
    key.subnets().values().map(ToString::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use fabric_core::leases::{Entry, LeaseSet};
    use fabric_core::record::Record;

    #[test]
    fn leases_reservations_and_resting_subnets_are_one_table() {
        let value = |fabric: &str| {
            format!(
                r#"{{"PublicIP":"192.0.2.1","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:42:c0:00:02:01"}}{fabric}}}"#
            )
        };
        let key = |text: &str| LeaseKey::decode(text).unwrap();
        let held = value(r#","Fabric":{"v":1,"node":"node-1","boot":"b","netns":1,"epoch":4}"#);
        let placeholder = Record::placeholder(&"node-3".parse().unwrap(), &key("10.244.3.0-24")).encode();
        let entries = [
            ("10.244.1.0-24", held.into_bytes()),
            ("10.244.2.0-24", value("").into_bytes()),
            ("10.244.3.0-24", placeholder),
        ];
        let entry =
            |(key, value): (&str, Vec<u8>)| Entry { key: key.into(), value, create_revision: 1, mod_revision: 1 };
        let mut leases = LeaseSet::snapshot(&LeaseSet::default(), entries.map(entry).into(), 9);
        leases.reserve("10.244.3.0-24", Some(b"node-3"), 9);
        let rest = fabric_core::holding::Resting {
            subnet: "10.244.4.0/24".parse().unwrap(),
            node: "node-4".parse().ok(),
            mod_revision: 3,
        };
        let want = "\
SUBNET         NODE       STATE                UNDERLAY   CLAIM
10.244.1.0/24  node-1     held                 192.0.2.1  4
10.244.2.0/24  (flannel)  flannel              192.0.2.1  0
10.244.3.0/24  node-3     reserved, node away             0
10.244.4.0/24  node-4     resting                         0
";
        assert_eq!(table(&Screen::default(), &rows(&Overview { leases: leases.into(), resting: vec![rest] })), want);
    }

    #[test]
    fn subnet_that_no_node_could_claim_is_refused_with_those_that_can() {
        let json = br#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
        let config = NetworkConfig::decode(json).unwrap();
        let told = |subnets: &[&str]| {
            let subnets: Vec<Subnet> = subnets.iter().map(|text| text.parse().unwrap()).collect();
            key_of(&subnets).and_then(|key| check(&config, &key)).map_err(|e| e.to_string())
        };
        assert_eq!(told(&["10.244.3.0/24"]), Ok(()));
        for subnets in [&["10.244.3.0/25"][..], &["10.9.3.0/24"], &["10.244.0.0/24"]] {
            assert!(
                told(subnets).unwrap_err().contains("give one from 10.244.1.0/24 to 10.244.255.0/24"),
                "{subnets:?}"
            );
        }
        assert!(told(&["fd00::/64"]).unwrap_err().contains("an IPv4 subnet is missing"));
        assert!(told(&["10.244.3.0/24", "fd00::/64"]).unwrap_err().contains("IPv6 is off"));
        assert!(told(&["10.244.3.0/24", "10.244.4.0/24"]).unwrap_err().contains("one of each"));
    }
}
