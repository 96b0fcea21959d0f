//! What the firewalls of others do to this node's packets: [`fabric_core::firewall`], asked about what the loop knows.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use fabric_core::diff::{Op, Plan, nft};
use fabric_core::firewall::packet::{Content, Flow};
use fabric_core::firewall::traffic::{BlockingChain, Node};
use fabric_core::firewall::{Connection, Evaluation, Firewall, Hook, Interface, Verdict, evaluate};
use fabric_core::leases::LeaseSet;
use fabric_core::model::{Family, IfName, Subnet};
use fabric_core::plan::filter::senders::has_notrack;
use fabric_core::state::docker_user;
use fabric_core::state::nft::TableKey;

use crate::kernel::Observed;
use crate::status::view::{View, VtepView};

/// Evaluates once, as long as nothing changes that decides.
#[derive(Debug, Default)]
pub struct Evaluator {
    /// Whether it is asked what packets between pods would pass by on the fast path.
    bypass: bool,
    known: Option<(EvaluatedFrom, Arc<Evaluation>)>,
}

/// What decides.
#[derive(Debug)]
struct EvaluatedFrom {
    firewall: Arc<Firewall>,
    nodes: Vec<Node>,
    leases: Option<Arc<LeaseSet>>,
    /// Some rule looks at the peers' addresses: only then the leases decide.
    by_peer: bool,
}

impl EvaluatedFrom {
    /// Whether what was found for this is what would be found for `now`.
    fn decides_as(&self, now: &Self) -> bool {
        let same_leases = match (&self.leases, &now.leases) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (None, None) => true,
            _ => false,
        };
        let same = Arc::ptr_eq(&self.firewall, &now.firewall) && self.nodes == now.nodes;
        same && (same_leases || !self.by_peer)
    }
}

impl Evaluator {
    /// One that also tells what the fast path would pass by, if `bypass`.
    #[must_use]
    pub fn new(bypass: bool) -> Self {
        Self { bypass, known: None }
    }

    /// What the chains that were just seen make of packets of ours.
    pub fn evaluate(&mut self, view: &View, observed: &Observed) -> Arc<Evaluation> {
        let mut given = EvaluatedFrom {
            firewall: Arc::clone(&observed.firewall),
            nodes: nodes(view, observed),
            leases: view.leases.clone(),
            by_peer: false,
        };
        if let Some((before, evaluation)) = &self.known
            && before.decides_as(&given)
        {
            return Arc::clone(evaluation);
        }
        let state_rule = given.nodes.iter().find_map(|node| node.needs_tracking(&given.firewall));
        let by_peer = Cell::new(false);
        let obstacles = |node: &Node| {
            let peers = || {
                by_peer.set(true);
                let endpoints = view.peers().filter_map(|peer| peer.record.endpoints().get(node.family()).copied());
                endpoints.map(|endpoint| endpoint.public_ip).collect()
            };
            // Where states decide, the rules that keep packets untracked are taken back in this very pass.
            let node = Node { untracked: node.untracked && state_rule.is_none(), ..node.clone() };
            node.obstacles(&given.firewall, peers)
        };
        let mut all: Vec<BlockingChain> = vec![];
        for obstacle in given.nodes.iter().flat_map(obstacles) {
            // What the underlay carries meets the same chains whatever the pods' bridge is.
            if !all.contains(&obstacle) {
                all.push(obstacle);
            }
        }
        let mut obstacles = all;
        obstacles.sort_by_key(|obstacle| !obstacle.is_sure());
        given.by_peer = by_peer.get();
        let unread = given.firewall.unread.iter().cloned().collect();
        let bypassed: BTreeSet<_> = match self.bypass {
            true => given.nodes.iter().flat_map(|node| node.bypassed(&given.firewall, &obstacles)).collect(),
            false => BTreeSet::new(),
        };
        let bypassed = bypassed.into_iter().collect();
        let evaluation = Arc::new(Evaluation { obstacles, state_rule, unread, bypassed });
        self.known = Some((given, Arc::clone(&evaluation)));
        evaluation
    }
}

/// What an operator has to know, each with the commands; without what rules of ours in `plan` are about to let through.
#[must_use]
pub fn warnings_beside(evaluation: &Evaluation, plan: &Plan) -> Vec<String> {
    let is_opened = |obstacle: &BlockingChain| {
        let is_docker = obstacle.by.table == docker_user::TABLE && obstacle.by.hook == Hook::Forward;
        let opened = |op: &Op| match op {
            Op::Filter(nft::Op::DockerUser(change)) => change.family == obstacle.family && !change.added.is_empty(),
            _ => false,
        };
        is_docker && !obstacle.by.kind.is_legacy() && plan.ops().iter().any(opened)
    };
    let sure = evaluation.obstacles.iter().filter(|obstacle| obstacle.is_sure() && !is_opened(obstacle));
    sure.map(|obstacle| format!("{obstacle}; let them pass with: {}", obstacle.remedy.join("; "))).collect()
}

/// Where packets pass on this node, in each family and by each bridge of pods.
#[must_use]
pub fn nodes(view: &View, observed: &Observed) -> Vec<Node> {
    let (Some(network), Some(own)) = (&view.network, &view.holding.own) else { return vec![] };
    let untracked = observed.filter.get(&TableKey::Fabric).is_some_and(has_notrack);
    let interface = |name: IfName, kind| {
        let link = observed.host.links.iter().find(|link| link.name == name);
        Interface { name, index: link.map(|link| link.index), kind }
    };
    let node = |end: &VtepView, bridge: IfName| {
        let family = Family::of(end.vtep.local);
        Some(Node {
            network: network.spaces.get(family)?.network,
            own: *own.key.subnets().get(family)?,
            bridge: interface(bridge, Some("bridge")),
            tunnel: interface(end.device, Some("vxlan")),
            underlay: interface(end.underlay, None),
            local: end.vtep.local,
            port: network.vxlan.port,
            vni: network.vxlan.vni,
            untracked,
            direct: network.vxlan.direct_routing,
        })
    };
    let ends = view.vteps.iter().flat_map(|end| view.pod_bridges.iter().map(move |bridge| (end, *bridge)));
    ends.filter_map(|(end, bridge)| node(end, bridge)).collect()
}

/// A packet that foreign chains on this node are asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// From a pod's address or to it.
    Between {
        /// Where it comes from.
        source: IpAddr,
        /// Where it goes to.
        target: IpAddr,
        /// The bridge of that one of them that is a pod of this node.
        bridge: IfName,
    },
    /// Encapsulated, from this peer.
    From(IpAddr),
    /// Encapsulated, to this peer.
    To(IpAddr),
}

/// What foreign chains make of that packet, with the commands that let it pass; `None` where nothing is known of the
/// node yet.
#[must_use]
pub fn ask(view: &View, observed: &Observed, asked: Asked) -> Option<(Verdict, Vec<String>)> {
    let (ip, bridge) = match asked {
        Asked::Between { source, bridge, .. } => (source, Some(bridge)),
        // What the underlay carries meets the same chains whatever the pods' bridge is.
        Asked::From(peer) | Asked::To(peer) => (peer, None),
    };
    let passes = |node: &Node| node.family() == Family::of(ip) && bridge.is_none_or(|name| node.bridge.name == name);
    let node = nodes(view, observed).into_iter().find(passes)?;
    let (flow, packet) = match asked {
        Asked::From(peer) => (Flow::Received, node.received(Some(peer))),
        Asked::To(peer) => (Flow::Sent, node.sent(Some(peer))),
        Asked::Between { source, target, .. } => {
            let (source, target) = (Subnet::host(source), Subnet::host(target));
            let flow =
                if [source, target].iter().all(|ip| node.network.covers(*ip)) { Flow::Pods } else { Flow::Outside };
            (flow, node.forwarded(source, target, Content::Icmp { reply: false }, Connection::New))
        }
    };
    let verdict = evaluate(&observed.firewall, &packet);
    let mut commands: Vec<String> = vec![];
    if let Verdict::Dropped(by) = &verdict {
        for command in by.iter().flat_map(|by| node.remedy(&observed.firewall, by, flow)) {
            if !commands.contains(&command) {
                commands.push(command);
            }
        }
    }
    Some((verdict, commands))
}
