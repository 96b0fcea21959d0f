//! `fabricctl lease`: which node has which subnet, and what an operator may do about it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use fabric_core::leases::Lease;
use fabric_core::model::{NodeName, Subnet};
use fabric_core::network::NetworkConfig;
use fabric_core::record::{Backend, LeaseKey};
use fabric_proto::v1::{AddressUse, GetStatusRequest, ListPeersRequest, MeshCause, RenumberLeaseRequest};
use fabricd::store::etcd::Overview;
use serde::Serialize;

use crate::all::{self, AllArgs};
use crate::network_config::in_time;
use crate::output::{OutputArg, Screen};
use crate::settings::StoreArgs;
use crate::table::{Cell, render, span};
use crate::{Answer, daemon};

/// What to do where the Nodes of the cluster are the leases.
const IN_KUBERNETES: &str = "leases are the podCIDRs of its Nodes; see them with: fabricctl leases";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// All leases, reservations, and expired subnets in their grace period
    List(ListArgs),
    /// One node's
    Show {
        /// The node.
        node: NodeName,
        /// How, and where from.
        #[command(flatten)]
        list: ListArgs,
    },
    /// Reserve a subnet for a node, also while it is away
    Reserve {
        /// The node.
        node: NodeName,
        /// Its subnet, as in 10.244.3.0/24; on dual stack one of each family, with a comma between.
        #[arg(value_delimiter = ',', required = true)]
        subnet: Vec<Subnet>,
        /// How, and where.
        #[command(flatten)]
        list: ListArgs,
    },
    /// End a node's reservations; it keeps its lease
    Unreserve {
        /// The node.
        node: NodeName,
        /// How, and where.
        #[command(flatten)]
        list: ListArgs,
    },
    /// Delete the lease of a node that is gone; one that is alive takes it back
    Release {
        /// The node.
        node: NodeName,
        /// How, and where.
        #[command(flatten)]
        list: ListArgs,
    },
    /// Make this node take another subnet
    Renumber {
        /// Although pods have addresses in the old subnet, which cuts them off
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        form: OutputArg,
    },
}

#[derive(Debug, Args)]
pub struct ListArgs {
    #[command(flatten)]
    form: OutputArg,
    /// The datastore.
    #[command(flatten)]
    store: StoreArgs,
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
    /// Addresses that pods have in the first of the subnets; unset where the node wasn't asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    addresses_used: Option<u64>,
    /// Addresses that are left there.
    #[serde(skip_serializing_if = "Option::is_none")]
    addresses_free: Option<u64>,
}

/// How much of an address space is taken.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Capacity {
    network: String,
    subnets: u128,
    leased: usize,
    reserved: usize,
    in_grace: usize,
    left: u128,
}

/// All that is listed.
#[derive(Debug, Serialize)]
struct List {
    leases: Vec<Row>,
    capacity: Vec<Capacity>,
}

/// What was done to the subnets of a node.
#[derive(Debug, Serialize)]
struct Done {
    action: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<String>,
    subnets: Vec<String>,
}

pub async fn run(command: Command, socket: &Path) -> anyhow::Result<Answer> {
    let (form, done, text) = match command {
        Command::List(args) => return list(args, None, socket).await,
        Command::Show { node, list: args } => return list(args, Some(node), socket).await,
        Command::Reserve { node, subnet, list: ListArgs { form, store } } => {
            let store = store.find(socket).await?;
            let etcd = store.etcd("the controller manager assigns podCIDRs, and no subnet can be reserved")?;
            let key = key_of(&subnet)?;
            let none = "there is no network config yet; write it with: fabricctl network init --network 10.244.0.0/16";
            let config = in_time(&store, etcd.read_config()).await?.context(none)?;
            check(&NetworkConfig::decode(&config.json)?, &key)?;
            in_time(&store, etcd.reserve(&node, &key)).await?;
            let done = Done::new("reserved", Some(&node), &[key]);
            let text = format!("reserved for {node}: {}\n", done.subnets.join(" "));
            (form, done, text)
        }
        Command::Unreserve { node, list: ListArgs { form, store } } => {
            let store = store.find(socket).await?;
            let ended = in_time(&store, store.etcd(IN_KUBERNETES)?.unreserve(&node)).await?;
            let done = Done::new("unreserved", Some(&node), &ended);
            let text = done.tell("no longer reserved", &format!("nothing is reserved for {node}"));
            (form, done, text)
        }
        Command::Release { node, list: ListArgs { form, store } } => {
            let store = store.find(socket).await?;
            let etcd = store.etcd("delete the Node instead, if it is gone: kubectl delete node NAME")?;
            if let Some(sign) = sign_of_life(&node, socket).await {
                eprintln!(
                    "fabricctl: warning: {node} is alive, since {sign}: it takes its subnet back at once; for another \
                     subnet run on {node}: fabricctl lease renumber"
                );
            }
            let released = in_time(&store, etcd.release_node(&node)).await?;
            let done = Done::new("released", Some(&node), &released);
            let text = done.tell("released", &format!("{node} has no lease"));
            (form, done, text)
        }
        Command::Renumber { force, form } => {
            let answer = daemon::connect(socket).await?.renumber_lease(RenumberLeaseRequest { force }).await;
            let left = answer.map_err(|status| daemon::told(&status))?.into_inner().left;
            let text = format!("releasing {}; see the new subnet with: fabricctl status\n", left.join(" and "));
            (form, Done { action: "releasing", node: None, subnets: left }, text)
        }
    };
    Ok(Answer::fine(form.output.show(&done, |_| text)?))
}

impl Done {
    fn new(action: &'static str, node: Option<&NodeName>, keys: &[LeaseKey]) -> Self {
        let subnets = keys.iter().flat_map(subnets_of).collect();
        Self { action, node: node.map(ToString::to_string), subnets }
    }

    fn tell(&self, done: &str, nothing: &str) -> String {
        if self.subnets.is_empty() { format!("{nothing}\n") } else { format!("{done}: {}\n", self.subnets.join(" ")) }
    }
}

/// By what this node's daemon, if there is one, knows that a node is alive.
async fn sign_of_life(node: &NodeName, socket: &Path) -> Option<String> {
    let mut client = daemon::connect(socket).await.ok()?;
    if client.get_status(GetStatusRequest {}).await.ok()?.get_ref().node == node.as_str() {
        return Some("it is this node, and its fabricd runs".into());
    }
    let peers = client.list_peers(ListPeersRequest {}).await.ok()?.into_inner().peers;
    let peer = peers.into_iter().find(|peer| peer.node == node.as_str())?;
    (peer.mesh() == MeshCause::Fine).then(|| "its fabricd answers the probes of this node".into())
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

async fn list(ListArgs { form, store }: ListArgs, node: Option<NodeName>, socket: &Path) -> anyhow::Result<Answer> {
    let store = store.find(socket).await?;
    let etcd = store.etcd(IN_KUBERNETES)?;
    let overview = in_time(&store, etcd.overview()).await?;
    let mut rows = rows(&overview);
    let capacity = match in_time(&store, etcd.read_config()).await?.map(|config| NetworkConfig::decode(&config.json)) {
        Some(Ok(config)) => capacity(&config, &overview),
        // Whoever sees to that is told by the nodes.
        Some(Err(_)) | None => vec![],
    };
    if let Some(node) = &node {
        rows.retain(|row| row.node == node.as_str());
        if rows.is_empty() {
            bail!("{node} has no lease and no reservation; see all with: fabricctl lease list");
        }
        for lease in overview.leases.iter().filter(|lease| lease.record.node() == Some(node)) {
            let left = in_time(&store, etcd.time_left(lease)).await?;
            let row = rows.iter_mut().find(|row| row.subnets == subnets_of(&lease.key));
            row.into_iter().for_each(|row| row.expires_in_seconds = left.map(|left| left.as_secs()));
        }
    }
    let uses = address_uses(socket, node.as_ref()).await;
    for row in &mut rows {
        let first = row.subnets.first().and_then(|subnet| uses.get(subnet));
        (row.addresses_used, row.addresses_free) = first.map(|addresses| (addresses.used, addresses.free)).unzip();
    }
    let list = List { leases: rows, capacity: if node.is_some() { vec![] } else { capacity } };
    Ok(Answer::fine(form.output.show(&list, |screen| describe(screen, &list))?))
}

/// How many addresses pods have, by subnet: of all nodes where they may be asked, else of this one, if its daemon runs.
async fn address_uses(socket: &Path, node: Option<&NodeName>) -> BTreeMap<String, AddressUse> {
    let nodes = node.map(ToString::to_string).into_iter().collect();
    let statuses = match all::statuses(socket, AllArgs::of(nodes)).await {
        Ok(statuses) => statuses,
        Err(_) => match daemon::connect(socket).await {
            Ok(mut client) => {
                client.get_status(GetStatusRequest {}).await.into_iter().map(tonic::Response::into_inner).collect()
            }
            Err(_) => vec![],
        },
    };
    let uses = statuses.into_iter().flat_map(|status| status.addresses);
    uses.map(|addresses| (addresses.subnet.clone(), addresses)).collect()
}

fn capacity(config: &NetworkConfig, Overview { leases, expired }: &Overview) -> Vec<Capacity> {
    let spaces = config.spaces.iter().map(|(family, space)| {
        let inside = |key: &LeaseKey| key.subnets().get(family).is_some_and(|subnet| space.admits(*subnet));
        let leased = leases.iter().filter(|lease| !lease.record.is_placeholder() && inside(&lease.key)).count();
        let is_free = |key: &LeaseKey| leases.get(key).is_none_or(|lease| lease.record.is_placeholder());
        let reserved = leases.reservations().keys().filter(|key| is_free(key) && inside(key)).count();
        let in_grace = expired.iter().filter(|rest| space.admits(rest.subnet)).count();
        let taken = u128::try_from(leased + reserved + in_grace).unwrap_or(u128::MAX);
        let (network, subnets) = (space.network.to_string(), space.capacity());
        Capacity { network, subnets, leased, reserved, in_grace, left: subnets.saturating_sub(taken) }
    });
    spaces.collect()
}

fn rows(Overview { leases, expired }: &Overview) -> Vec<Row> {
    let name = |node: Option<&NodeName>| node.map(ToString::to_string).unwrap_or_default();
    let row = |subnets, node, state| Row {
        subnets,
        node,
        state,
        public_addresses: vec![],
        epoch: 0,
        expires_in_seconds: None,
        addresses_used: None,
        addresses_free: None,
    };
    let leased = leases.iter().map(|lease| Row {
        public_addresses: lease.record.endpoints().values().map(|e| e.public_ip.to_string()).collect(),
        epoch: lease.record.owner.as_ref().map_or(0, |owner| owner.epoch),
        ..row(
            subnets_of(&lease.key),
            name(lease.record.node()),
            state(lease, leases.reservations().contains_key(&lease.key)),
        )
    });
    let unheld = leases.reservations().iter().filter(|(key, _)| leases.get(key).is_none());
    let unheld = unheld.map(|(key, node)| row(subnets_of(key), node.to_string(), "reserved, no placeholder yet"));
    let expired = expired
        .iter()
        .map(|rest| row(vec![rest.subnet.to_string()], name(rest.node.as_ref()), "expired, in grace period"));
    leased.chain(unheld).chain(expired).collect()
}

fn state(lease: &Lease, reserved: bool) -> &'static str {
    match (&lease.record.backend, lease.record.node(), reserved) {
        (Backend::Reserved(_), ..) => "reserved, node away",
        (_, None, _) => "flannel",
        (_, Some(_), true) => "held, reserved",
        (_, Some(_), false) => "held",
    }
}

fn describe(screen: &Screen, List { leases, capacity }: &List) -> String {
    let mut text = table(screen, leases);
    if !capacity.is_empty() {
        text.push('\n');
    }
    for Capacity { network, subnets, leased, reserved, in_grace, left } in capacity {
        text += &format!(
            "{network}: {left} of {subnets} subnets left, {leased} leased, {reserved} reserved for nodes that are away, \
             {in_grace} in grace period\n"
        );
    }
    text
}

fn table(screen: &Screen, rows: &[Row]) -> String {
    let cells = |row: &Row| -> [Cell; 8] {
        let number = |number: Option<u64>| number.map(|number| number.to_string()).unwrap_or_default();
        let cells = [
            if row.node.is_empty() { "(flannel)".into() } else { row.node.clone() },
            row.state.into(),
            row.subnets.join(" "),
            row.public_addresses.join(" "),
            row.epoch.to_string(),
            number(row.addresses_used),
            number(row.addresses_free),
            row.expires_in_seconds.map(|left| span(left.try_into().unwrap_or(i64::MAX))).unwrap_or_default(),
        ];
        cells.map(Cell::from)
    };
    let header = ["NODE", "STATE", "SUBNET", "UNDERLAY", "EPOCH", "USED", "FREE", "ENDS IN"];
    let rows: Vec<[Cell; 8]> = rows.iter().map(cells).collect();
    render(screen, header, &rows)
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
    fn leases_reservations_and_expired_subnets_are_one_table() {
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
        let rest = fabric_core::lease::ExpiredLease {
            subnet: "10.244.4.0/24".parse().unwrap(),
            node: "node-4".parse().ok(),
            mod_revision: 3,
        };
        let overview = Overview { leases: leases.into(), expired: vec![rest] };
        let config = NetworkConfig::decode(br#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#).unwrap();
        let mut rows = rows(&overview);
        (rows[0].addresses_used, rows[0].addresses_free) = (Some(3), Some(250));
        let list = List { leases: rows, capacity: capacity(&config, &overview) };
        let want = "\
NODE       STATE                     SUBNET         UNDERLAY   EPOCH  USED  FREE
node-1     held                      10.244.1.0/24  192.0.2.1  4      3     250
(flannel)  flannel                   10.244.2.0/24  192.0.2.1  0
node-3     reserved, node away       10.244.3.0/24             0
node-4     expired, in grace period  10.244.4.0/24             0

10.244.0.0/16: 251 of 255 subnets left, 2 leased, 1 reserved for nodes that are away, 1 in grace period
";
        assert_eq!(describe(&Screen::default(), &list), want);
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
