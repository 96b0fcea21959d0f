//! Nodes whose leases end soon, a pod on each of the first two with traffic between them, and a witness that is shown
//! every revision of their etcd.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::Trial;
use super::pair::Traffic;
use crate::lab::builder::Builder;
use crate::lab::lease::key;
use crate::lab::{Connection, Lab, Node, crowd, wait_until};
use crate::revisions::Witness;

/// The shortest lease that fabricd takes: the time in which a node that is cut off loses its.
pub(super) const TTL: Duration = Duration::from_secs(5);

/// How long a subnet rests.
const SHORT_LEASE: [&str; 4] = ["--lease-ttl", "5s", "--lease-grace", "5s"];

/// What has no limit of its own may take so long on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// The lab of a trial about leases.
pub(super) struct Leased {
    pub(super) lab: Lab,
    pub(super) nodes: Vec<Arc<Node>>,
    traffic: Traffic,
    connection: Connection,
    witness: Option<Witness>,
    slack: u32,
}

impl Trial {
    /// So many nodes, ready, in a lab of one etcd with the crowd's network.
    pub(super) fn leased(&self, nodes: u16) -> Result<Leased> {
        self.leased_in(Lab::builder().network(crowd::NETWORK), nodes)
    }

    /// The same in another lab.
    pub(super) fn leased_in(&self, lab: Builder, nodes: u16) -> Result<Leased> {
        let mut lab = lab.name(&self.name).nodes(0).start()?;
        let nodes = (0..nodes).map(|_| lab.boot_node()).collect::<Result<Vec<_>>>()?;
        nodes.iter().try_for_each(|node| start(node))?;
        nodes.iter().try_for_each(|node| node.wait_ready())?;
        let pods = nodes.iter().take(2).map(|node| node.add_pod("a")).collect::<Result<Vec<_>>>()?;
        let traffic = Traffic::between(&pods[0], &pods[1])?;
        let connection = Connection::start(&pods[0], &pods[1])?;
        let witness = Some(witness(&lab)?);
        Ok(Leased { lab, nodes, traffic, connection, witness, slack: self.slack })
    }
}

/// Starts a node's daemon with a lease that ends soon.
pub(super) fn start(node: &Node) -> Result<()> {
    node.start_fabricd_with(&SHORT_LEASE, &[])
}

fn witness(lab: &Lab) -> Result<Witness> {
    let inside = lab.underlay().machine.network()?;
    Ok(Witness::start(inside, &lab.etcd().endpoints(), "/coreos.com/network"))
}

impl Leased {
    /// Waits for something that may take its time.
    pub(super) fn until(&self, what: &str, condition: impl FnMut() -> Result<()>) -> Result<()> {
        wait_until(what, PATIENCE * self.slack, condition)
    }

    /// Waits until a subnet has no record any more.
    pub(super) fn until_gone(&self, subnet: &str) -> Result<()> {
        self.until(&format!("the lease of {subnet} has ended in etcd"), || {
            let record = self.lab.record(subnet)?;
            ensure!(record.is_empty(), "{record}");
            Ok(())
        })
    }

    /// Waits until a node has routes to so many peers.
    pub(super) fn until_routes(&self, node: &Node, peers: usize) -> Result<()> {
        self.until(&format!("{} has routes to {peers} peers", node.name), || {
            let routes = node.routes()?;
            ensure!(routes == peers, "it has {routes}");
            Ok(())
        })
    }

    /// Waits until every node holds the subnet that it had.
    pub(super) fn until_all_hold(&self, subnets: &[String]) -> Result<()> {
        self.nodes.iter().zip(subnets).try_for_each(|(node, had)| {
            self.until(&format!("{} has its subnet again", node.name), || {
                let record = self.lab.record(had)?;
                ensure!(record.contains(&format!("\"node\":\"{}\"", node.name)), "{had}: {record}");
                let (trouble, has) = (node.trouble()?, node.subnet()?);
                ensure!(trouble.is_empty() && has == *had, "{} has {has}: {trouble}", node.name);
                Ok(())
            })
        })
    }

    /// The subnets of all nodes.
    pub(super) fn subnets(&self) -> Result<Vec<String>> {
        self.nodes.iter().map(|node| node.subnet()).collect()
    }

    /// Waits for so many packets more, each way.
    pub(super) fn traffic_goes_on(&self, time: Duration) -> Result<()> {
        // A thousand a second.
        self.traffic.goes_on(time.as_millis().try_into()?)
    }

    /// A person at etcd.
    pub(super) fn etcdctl(&self, args: &[&str]) -> Result<String> {
        self.lab.etcd().ctl(args)
    }

    /// A person puts a value too long for an argument.
    pub(super) fn put(&self, subnet: &str, value: &str) -> Result<()> {
        let endpoints = self.lab.etcd().endpoints();
        let put = ["etcdctl", "--endpoints", &endpoints, "put", &key(subnet)];
        self.lab.underlay().machine.command(&put)?.env("ETCDCTL_API", "3").stdin(value).run()?;
        Ok(())
    }

    /// Ends what has been seen of this store: it will be another.
    pub(super) fn store_ends(&mut self) -> Result<()> {
        self.witness.take().context("no store is followed")?.stop()?;
        Ok(())
    }

    /// The store is there again, with a history of its own.
    pub(super) fn store_begins(&mut self) -> Result<()> {
        self.witness = Some(witness(&self.lab)?);
        Ok(())
    }

    /// Ends it: no packet may have been lost, no connection broken, and at no revision two nodes have had one address.
    pub(super) fn lost_nothing(self) -> Result<()> {
        self.traffic.lost_nothing()?;
        let connection = self.connection.stop()?;
        ensure!(connection.broken.is_none(), "{connection:?}");
        let owners = self.witness.context("no store is followed")?.stop()?;
        ensure!(owners.changes > 0, "no revision was seen");
        Ok(())
    }
}
