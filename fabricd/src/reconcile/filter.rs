//! [`Filter`]: what the reconcile loop knows of the packet filter. What it should hold is decided by
//! [`fabric_core::plan::filter::ruleset`]; here is the clock, for peers that change their address, and what the CNI plugin tells
//! of the pods.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use fabric_core::derived::Turned;
use fabric_core::firewall::{Firewall, Hook, TableKind};
use fabric_core::leases::{Lease, LeaseSet};
use fabric_core::model::{Family, IfName, Subnet};
use fabric_core::network::NetworkConfig;
use fabric_core::plan::Refusal;
use fabric_core::plan::filter::docker_user::rules as docker_user_rules;
use fabric_core::plan::filter::senders::{follow, has_notrack};
use fabric_core::plan::filter::{FilterInputs, FilterOptions, Member, ruleset};
use fabric_core::record::LeaseKey;
use fabric_core::state::docker_user::{self, DockerUser, DockerUserRules};
use fabric_core::state::nft::{Ruleset, TableKey};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::host::attachments::AttachedPods;
use crate::kernel::Observed;
use crate::lease::Own;

/// How long the address that a peer had before may go on sending: its packets are still under way, and its kernel may
/// follow its lease a little later.
const GRACE: Duration = Duration::from_secs(30);

/// The packet filter of one node, as it should be.
#[derive(Debug)]
pub struct Filter {
    options: FilterOptions,
    members: BTreeSet<Member>,
    /// Members that have moved, and until when they count.
    moved: BTreeMap<Member, Instant>,
    /// The pods' bridges, and whose their ports are.
    pods: watch::Receiver<Arc<AttachedPods>>,
    /// What was last found to be wanted, and from what: at thousands of peers that is far from nothing, and mostly the
    /// loop comes by with nothing new.
    known: Option<(PlannedFrom, Ruleset)>,
    /// True when the last pass wanted what the one before it had.
    unchanged: bool,
}

/// What decides.
#[derive(Debug)]
struct PlannedFrom {
    network: NetworkConfig,
    own: LeaseKey,
    ports: BTreeSet<IfName>,
    pods: Arc<AttachedPods>,
    pod_subnets: BTreeSet<Subnet>,
    tracked: bool,
    /// A chain of others judges encapsulated packets by their connection's state.
    states_decide: bool,
    moved: BTreeSet<Member>,
}

impl Filter {
    /// A filter with these options.
    #[must_use]
    pub fn new(options: FilterOptions) -> Self {
        let (_, pods) = watch::channel(Arc::default());
        Self { options, members: BTreeSet::new(), moved: BTreeMap::new(), pods, known: None, unchanged: false }
    }

    /// Lets the pods of these ports use no addresses but their own.
    pub fn guard_ports(&mut self, pods: watch::Receiver<Arc<AttachedPods>>) {
        self.pods = pods;
    }

    /// Waits until something changes that the loop doesn't learn from the kernel or the leases. Cancel-safe.
    pub async fn changed(&mut self) {
        if self.pods.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// What should be in Docker's chain for rules of others: where Docker drops what is forwarded, the network is let
    /// through.
    #[must_use]
    pub fn docker_user(&self, network: &NetworkConfig, observed: &Observed) -> DockerUserRules {
        let wanted = |chain: &DockerUser| {
            let space = network.spaces.get(chain.family).filter(|_| drops_by_policy(&observed.firewall, chain))?;
            Some((chain.family, docker_user_rules(chain.family, space.network).into()))
        };
        observed.docker_user.iter().filter(|_| self.options.docker_user_rules).filter_map(wanted).collect()
    }

    /// The bridges that pods are attached to.
    #[must_use]
    pub fn pod_bridges(&self) -> BTreeSet<IfName> {
        self.pods.borrow().bridges.clone()
    }

    /// Ports whose pods are not known.
    #[must_use]
    pub fn unguarded_ports(&self, observed: &Observed) -> BTreeSet<IfName> {
        let pods = self.pods.borrow();
        let open = pods.ports_of(observed).into_iter().filter(|port| !pods.ports.contains_key(port));
        open.filter(|_| self.options.check_pods).collect()
    }

    /// What the filter should hold now, given the leases and which of them are refused. `turned` are those that have come
    /// into force or gone since this was asked last, if that is known.
    #[expect(clippy::too_many_arguments, reason = "each decides")]
    pub fn wanted(
        &mut self,
        network: &NetworkConfig,
        own: &Own,
        observed: &Observed,
        leases: &Arc<LeaseSet>,
        refused: &BTreeMap<LeaseKey, Refusal>,
        turned: Option<&Turned<Lease>>,
        states_decide: bool,
    ) -> &Ruleset {
        let now = Instant::now();
        self.moved.retain(|_, until| *until > now);
        let pods = Arc::clone(&self.pods.borrow_and_update());
        let mut given = PlannedFrom {
            network: *network,
            own: own.key,
            ports: pods.ports_of(observed),
            pod_subnets: pod_subnets(&pods, network, own, observed),
            pods,
            tracked: observed.tracked || observed.filter.get(&TableKey::Fabric).is_some_and(has_notrack),
            states_decide,
            moved: self.moved.keys().copied().collect(),
        };
        self.unchanged = false;
        let mut had = None;
        let known = self.known.take().and_then(|(before, mut ruleset)| match turned {
            Some(turned) if before.decides_as(&given) => {
                self.unchanged = turned.is_empty();
                self.turn(&given, turned, &mut ruleset, now);
                Some(ruleset)
            }
            _ => {
                had = Some(ruleset);
                None
            }
        });
        let ruleset = known.unwrap_or_else(|| {
            let accepted = leases.iter().filter(|lease| lease.key != own.key && !refused.contains_key(&lease.key));
            let members = self.with_moved(accepted.flat_map(|lease| members_of(lease)).collect(), now);
            let notrack = self.options.notrack && !states_decide;
            let options = FilterOptions { notrack, ..self.options.clone() };
            let mut wanted = ruleset(&FilterInputs {
                network,
                own: own.key.subnets(),
                members: &members,
                bridges: &given.pods.bridges,
                ports: &given.ports,
                pods: &given.pods.ports,
                pod_subnets: &given.pod_subnets,
                tracked: given.tracked,
                options: &options,
            });
            for (family, table) in &mut wanted {
                observed.filter.get(family).into_iter().for_each(|there| table.share(there));
            }
            wanted
        });
        self.unchanged |= had.is_some_and(|had| had == ruleset);
        given.moved = self.moved.keys().copied().collect();
        &self.known.insert((given, ruleset)).1
    }

    /// Whether the last pass wanted what the one before it had: then what is to be written somebody else has changed.
    #[must_use]
    pub fn unchanged(&self) -> bool {
        self.unchanged
    }

    /// What was last wanted.
    #[must_use]
    pub fn last(&self) -> Option<&Ruleset> {
        self.known.as_ref().map(|(_, ruleset)| ruleset)
    }

    /// Takes over which leases have come into force or gone, for the price of these.
    fn turn(&mut self, given: &PlannedFrom, turned: &Turned<Lease>, ruleset: &mut Ruleset, now: Instant) {
        let mut gone: Vec<Member> = turned.went.iter().flat_map(|lease| members_of(lease)).collect();
        let come: Vec<Member> = turned.came.iter().flat_map(|lease| members_of(lease)).collect();
        for member in &gone {
            self.members.remove(member);
        }
        self.members.extend(&come);
        gone.retain(|member| !self.members.contains(member));
        // What had moved before goes with its subnet, unless that only moves on.
        let has_gone = |subnet: Subnet| gone.iter().any(|member| member.subnet == subnet);
        let comes = |subnet: Subnet| come.iter().any(|member| member.subnet == subnet);
        let over = self.moved.keys().filter(|moved| has_gone(moved.subnet) && !comes(moved.subnet));
        let over: Vec<Member> = over.copied().collect();
        self.moved.retain(|moved, _| !over.contains(moved) && !come.contains(moved));
        let (moving, gone): (Vec<Member>, Vec<Member>) = gone.into_iter().partition(|member| comes(member.subnet));
        self.moved.extend(moving.into_iter().map(|member| (member, now + GRACE)));
        let gone = [gone, over].concat();
        let remains = |underlay| {
            let members = self.members.range(Member::first_of(underlay)..).next();
            let moved = self.moved.range(Member::first_of(underlay)..).map(|(member, _)| member).next();
            [members, moved].into_iter().flatten().any(|member| member.underlay == underlay)
        };
        follow(ruleset, given.own.subnets(), &gone, &come, remains);
    }

    /// The members, and those that have moved not long ago: their subnet is another address's now.
    fn with_moved(&mut self, members: BTreeSet<Member>, now: Instant) -> BTreeSet<Member> {
        let subnets: BTreeSet<Subnet> = members.iter().map(|member| member.subnet).collect();
        for left in self.members.difference(&members) {
            self.moved.insert(*left, now + GRACE);
        }
        self.moved
            .retain(|member, until| *until > now && subnets.contains(&member.subnet) && !members.contains(member));
        let all = members.iter().chain(self.moved.keys()).copied().collect();
        self.members = members;
        all
    }
}

/// Where the pods have their addresses from: after this node has moved to another subnet, those of before too.
fn pod_subnets(pods: &AttachedPods, network: &NetworkConfig, own: &Own, observed: &Observed) -> BTreeSet<Subnet> {
    let bridges = observed.host.links.iter().filter(|link| pods.bridges.contains(&link.name));
    let there = bridges.flat_map(|link| link.addresses.iter().map(|(_, prefix)| *prefix));
    let of_the_network =
        |prefix: &Subnet| network.spaces.get(prefix.family()).is_some_and(|space| space.network.covers(*prefix));
    there.filter(of_the_network).chain(own.key.subnets().values().copied()).collect()
}

/// Whether the chain that calls `chain`, Docker's own, drops what no rule accepts.
fn drops_by_policy(firewall: &Firewall, chain: &DockerUser) -> bool {
    let kind = match chain.family {
        Family::V4 => TableKind::Ip,
        Family::V6 => TableKind::Ip6,
    };
    let tables = firewall.tables.iter().filter(|table| table.kind == kind && table.name == docker_user::TABLE);
    tables
        .filter_map(|table| table.chains.get("FORWARD"))
        .any(|chain| chain.base.is_some_and(|base| base.hook == Hook::Forward && base.drops))
}

impl PlannedFrom {
    /// Whether it is the same, but for the leases.
    fn decides_as(&self, other: &Self) -> bool {
        let rest = |given: &Self| (given.network, given.own);
        rest(self) == rest(other)
            && self.ports == other.ports
            && self.pods == other.pods
            && self.pod_subnets == other.pod_subnets
            && (self.tracked, self.states_decide) == (other.tracked, other.states_decide)
            && self.moved == other.moved
    }
}

/// What the lease of a peer makes members.
fn members_of(lease: &Lease) -> impl Iterator<Item = Member> + use<'_> {
    let endpoints = lease.record.endpoints();
    let member = move |(family, subnet): (Family, &Subnet)| {
        Some(Member { underlay: endpoints.get(family)?.public_ip, subnet: *subnet })
    };
    lease.key.subnets().iter().filter_map(member)
}

#[cfg(test)]
mod tests {
    use fabric_core::leases::Entry;
    use fabric_core::model::PerFamily;

    use super::*;

    fn member(underlay: &str) -> Member {
        Member { underlay: underlay.parse().expect("valid"), subnet: "10.244.7.0/24".parse().expect("valid") }
    }

    fn leases(peers: &[(&str, &str)]) -> Arc<LeaseSet> {
        let entry = |(underlay, subnet): &(&str, &str)| {
            Entry {
            key: subnet.replace('/', "-"),
            value: format!(
                r#"{{"PublicIP":"{underlay}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:42:c0:00:02:07"}}}}"#
            )
            .into(),
            create_revision: 1,
            mod_revision: 1,
        }
        };
        Arc::new(LeaseSet::snapshot(&LeaseSet::default(), peers.iter().map(entry).collect(), 1))
    }

    /// Who may send when these are the peers, after those of `before`.
    fn senders(rules: &mut Filter, before: &mut Arc<LeaseSet>, peers: &[(&str, &str)]) -> Vec<String> {
        let network =
            NetworkConfig::decode(br#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#).expect("valid");
        let key = LeaseKey::decode("10.244.1.0-24").expect("valid");
        let own = Own { key, endpoints: PerFamily::default(), epoch: 1 };
        let now = leases(peers);
        let (went, came): (Vec<_>, Vec<_>) = now.changes(before).unzip();
        let [went, came] = [went, came].map(|some| some.into_iter().flatten().cloned().collect());
        let (turned, observed) = (Turned { went, came }, Observed::default());
        let ruleset = rules.wanted(&network, &own, &observed, &now, &BTreeMap::new(), Some(&turned), false);
        let set = &ruleset[&TableKey::Fabric].sets["members4"];
        let senders = set.elements.keys().map(|element| element.shown(set.kind).to_string()).collect();
        *before = now;
        senders
    }

    #[tokio::test(start_paused = true)]
    async fn lease_that_changes_is_taken_over_and_after_the_grace_all_is_found_anew() {
        let (mut rules, mut known) = (Filter::new(FilterOptions::default()), Arc::default());
        let mut senders = |peers: &[(&str, &str)]| senders(&mut rules, &mut known, peers);
        let node = |underlay: &str| [format!("{underlay} . 10.244.7.0"), format!("{underlay} . {underlay}")];
        assert_eq!(senders(&[("192.0.2.7", "10.244.7.0/24")]), node("192.0.2.7"));
        let both = [node("192.0.2.7"), node("192.0.2.8")].concat();
        assert_eq!(senders(&[("192.0.2.8", "10.244.7.0/24")]), both, "it has moved");
        assert_eq!(senders(&[("192.0.2.7", "10.244.7.0/24")]), both, "and back");
        tokio::time::advance(GRACE).await;
        assert_eq!(senders(&[("192.0.2.7", "10.244.7.0/24")]), node("192.0.2.7"));
        assert_eq!(senders(&[("192.0.2.9", "10.244.7.0/24")]).len(), 4);
        assert_eq!(senders(&[]), [""; 0], "gone is gone at once, with what has moved");
    }

    #[tokio::test(start_paused = true)]
    async fn peer_that_moves_is_a_member_under_both_addresses_for_a_while() {
        let mut rules = Filter::new(FilterOptions::default());
        let (before, after) = (member("192.0.2.7"), member("192.0.2.8"));
        assert_eq!(rules.with_moved([before].into(), Instant::now()), [before].into());
        assert_eq!(rules.with_moved([after].into(), Instant::now()), [before, after].into());
        tokio::time::advance(GRACE).await;
        assert_eq!(rules.with_moved([after].into(), Instant::now()), [after].into());
        assert_eq!(rules.with_moved(BTreeSet::new(), Instant::now()), BTreeSet::new(), "gone is gone at once");
    }
}
