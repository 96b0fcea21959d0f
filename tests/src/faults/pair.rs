//! Two nodes with a pod each, a crowd of other peers, and what is asked of them in every trial.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::Trial;
use crate::lab::{Crowd, Lab, Node, Pod, Stream, Witness, crowd, stream, wait_until};

/// What an event tells is right again within this time.
pub const BY_EVENT: Duration = Duration::from_secs(2);
/// What no event tells: an audit more.
pub const BY_AUDIT: Duration = Duration::from_secs(12);
/// How long a busy machine may take for what has no limit of its own.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Two nodes with a pod each; faults happen on the first.
pub struct Pair {
    /// The lab.
    pub lab: Lab,
    /// Where faults happen.
    pub node: Arc<Node>,
    /// The other.
    pub other: Arc<Node>,
    /// A pod on the node.
    pub here: Pod,
    /// A pod on the other.
    pub there: Pod,
    /// The other peers.
    pub crowd: Crowd,
    slack: u32,
}

/// Traffic both ways.
pub struct Traffic([Stream; 2]);

impl Trial {
    /// Two nodes among a crowd of so many peers, ready, in a lab that goes with the value.
    ///
    /// # Errors
    /// It doesn't start.
    pub fn pair(&self, peers: u32) -> Result<Pair> {
        let lab = Lab::builder().name(&self.name).nodes(2).network(crowd::NETWORK).start()?;
        let (node, other) = (Arc::clone(lab.node("node-1")?), Arc::clone(lab.node("node-2")?));
        let (here, there) = (node.add_pod("a")?, other.add_pod("b")?);
        let mut crowd = lab.crowd()?;
        crowd.join(1..peers + 1)?;
        let pair = Pair { lab, node, other, here, there, crowd, slack: self.slack };
        pair.knows(peers + 1)?;
        Ok(pair)
    }
}

impl Pair {
    /// Waits until the node has routes to so many peers, the other node among them.
    ///
    /// # Errors
    /// It doesn't get them.
    pub fn knows(&self, peers: u32) -> Result<()> {
        wait_until(&format!("routes to {peers} peers"), PATIENCE, || self.has_routes(peers))
    }

    /// Whether the node has routes to so many peers now.
    ///
    /// # Errors
    /// It hasn't.
    pub fn has_routes(&self, peers: u32) -> Result<()> {
        let routes = self.node.run(&["ip", "route", "show", "proto", "250"])?;
        let found = routes.lines().count();
        ensure!(found == peers as usize, "{found} routes, not {peers}");
        Ok(())
    }

    /// Starts packets both ways, a thousand a second.
    ///
    /// # Errors
    /// They don't arrive.
    pub fn traffic(&self) -> Result<Traffic> {
        Traffic::between(&self.here, &self.there)
    }

    /// What fabricd keeps on the node, as iproute2 shows it.
    ///
    /// # Errors
    /// The node is off.
    pub fn shown(&self) -> Result<String> {
        let script = "
            ip -o -d link show dev fabric.1 | grep -oE 'mtu [0-9]+|link/ether [0-9a-f:]+|vxlan id .*' | sed 's/ageing.*//'
            ip -o -4 address show dev fabric.1 | grep -o 'inet [0-9./]*'
            bridge fdb show dev fabric.1 | sort
            ip neighbour show dev fabric.1 nud permanent | sort
            ip nexthop show protocol 250 | sort
            ip route show proto 250 | sort
            cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/fabric.1/accept_ra \
                /proc/sys/net/ipv4/conf/fabric.1/rp_filter";
        self.node.run(&["sh", "-ec", script])
    }

    /// Waits for something that has a limit.
    ///
    /// # Errors
    /// It doesn't come in time.
    pub fn within(&self, limit: Duration, what: &str, condition: impl FnMut() -> Result<()>) -> Result<()> {
        wait_until(what, limit * self.slack, condition)
    }

    /// Waits until the node shows what it did before.
    ///
    /// # Errors
    /// It doesn't in time: the error says in which lines.
    pub fn shows_again(&self, before: &str, limit: Duration) -> Result<()> {
        self.within(limit, "the node's tables are as before", || {
            let now = self.shown()?;
            // As sets, since to compare thousands of lines with each other takes longer than the limit.
            let [is, was] = [&now, before].map(|text| text.lines().collect::<BTreeSet<_>>());
            let (missing, more) = (was.difference(&is).next(), is.difference(&was).next());
            ensure!(now == before, "missing {missing:?}, too much {more:?}");
            Ok(())
        })
    }

    /// The value of one metric of the node's fabricd.
    ///
    /// # Errors
    /// It doesn't answer, or has no such metric.
    pub fn metric(&self, name: &str) -> Result<f64> {
        let numbers = self.node.http_get(9472, "/metrics")?.body;
        let line = numbers.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(line.with_context(|| format!("no {name} in\n{numbers}"))?.trim().parse()?)
    }

    /// What happens to what fabricd keeps on the node while `act` runs.
    ///
    /// # Errors
    /// That of `act`.
    pub fn witnessed(&self, act: impl FnOnce() -> Result<()>) -> Result<Vec<crate::lab::witness::Event>> {
        let device = crate::bench::changes::index_of(&self.node, "fabric.1")?;
        let witness = Witness::of(&self.node)?;
        act()?;
        Ok(witness.about_fabric(&[device]))
    }
}

impl Traffic {
    /// Starts packets both ways, a thousand a second.
    ///
    /// # Errors
    /// They don't arrive.
    pub fn between(here: &Pod, there: &Pod) -> Result<Self> {
        Ok(Self([Stream::start(here, there)?, Stream::start(there, here)?]))
    }

    /// Waits until so many packets more have come through, each way.
    ///
    /// # Errors
    /// They don't.
    pub fn goes_on(&self, packets: u64) -> Result<()> {
        self.0.iter().try_for_each(|stream| stream.wait_for(packets, PATIENCE))
    }

    /// Ends it: nothing may have been lost.
    ///
    /// # Errors
    /// Something was.
    pub fn lost_nothing(self) -> Result<()> {
        self.goes_on(300)?;
        for report in self.end()? {
            ensure!((report.lost, report.refused) == (0, 0), "{report:?}");
        }
        Ok(())
    }

    /// Ends it: it flows, whatever was lost.
    ///
    /// # Errors
    /// It doesn't.
    pub fn flows(self) -> Result<()> {
        self.goes_on(300)?;
        self.end().map(drop)
    }

    fn end(self) -> Result<Vec<stream::Report>> {
        self.0.into_iter().map(Stream::stop).collect()
    }
}
