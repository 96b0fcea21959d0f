//! What every kernel must do with maps, verdict maps, ranges and sets that packets add to, as cases that run on both
//! kernels, like those of [`kernel`](super::kernel). The tables are small ones of the kind that Services and network
//! policies need; `kernel_nat.rs` sends packets through the same.

use std::net::IpAddr;

use fabric_core::diff::{Plan, diff};
use fabric_core::model::{Family, Subnet};
use fabric_core::state::State;
use fabric_core::state::nft::{
    Chain, ChainKind, CtField, Datatype, Direction, Element, Field, Fields, FoundRuleset, Match, Name, Order, Part,
    Place, Reject, Rule, Ruleset, SetKind, Step, Table, TableKey, Test, Update, Verdict, ct_state,
};
use fabricd::kernel::Kernel;

use super::kernel::{World, look, refusals, settle, v};

/// `IPPROTO_TCP`, `IPPROTO_UDP`.
pub const PROTOCOLS: [u8; 2] = [6, 17];
/// How long a client stays with a backend, in seconds.
const STICKY: u32 = 10_800;
/// Classes from here on are sticky.
const STICKY_CLASS: u32 = 1000;
/// Before whoever else translates destinations, and sources.
const BEFORE_DSTNAT: i32 = -101;
const BEFORE_SRCNAT: i32 = 98;

/// A Service: where it is reached, at the address [`vip`], and who answers.
#[derive(Clone, Debug)]
pub struct Service {
    /// Its port, which is its id too.
    pub port: u16,
    /// The pool of its backends: others get another number.
    pub pool: u32,
    /// Address and port of each backend.
    pub backends: Vec<(IpAddr, u16)>,
    /// Clients stay with their backend.
    pub sticky: bool,
    /// Clients get this host's address.
    pub masquerade: bool,
}

impl Service {
    /// One that any of its backends answers.
    #[must_use]
    pub fn new(port: u16, pool: u32, backends: &[(IpAddr, u16)]) -> Self {
        Self { port, pool, backends: backends.to_vec(), sticky: false, masquerade: false }
    }

    fn class(&self) -> u32 {
        let count = u32::try_from(self.backends.len()).expect("a few");
        if self.sticky { STICKY_CLASS + count } else { count }
    }
}

/// The address of all Services.
#[must_use]
pub fn vip(family: Family) -> IpAddr {
    v(match family {
        Family::V4 => "203.0.113.1",
        Family::V6 => "2001:db8:53::1",
    })
}

fn datatype(family: Family) -> Datatype {
    match family {
        Family::V4 => Datatype::V4,
        Family::V6 => Datatype::V6,
    }
}

/// What a packet is sent to.
fn frontend(family: Family) -> Vec<Field> {
    vec![Field::Target(family), Field::Protocol, Field::TargetPort]
}

/// The look-up of a Service: its id `$0`, pool `$1` and class `$2`.
fn service(family: Family) -> Step {
    Step::Lookup { key: frontend(family), map: "svc".into(), data: Fields::of(&[Datatype::Number; 3]) }
}

fn endpoint(family: Family) -> Fields {
    Fields::of(&[datatype(family), Datatype::Port])
}

fn rule(family: Family, steps: impl IntoIterator<Item = Step>, why: &'static str) -> Rule {
    Rule { steps: [Match::family(family).into()].into_iter().chain(steps).collect(), why: why.into() }
}

fn is_class(class: u32) -> Step {
    Match::is(Field::Value(2), class).into()
}

/// To the address `$3` and the port `$4`.
fn dnat(family: Family) -> Step {
    Step::Dnat { family, address: Field::Value(3), port: Some(Field::Value(4)) }
}

/// One of `count` backends, at random: `$3` and `$4`.
fn any_of(family: Family, count: u32) -> Step {
    Step::Lookup { key: vec![Field::Value(1), Field::Random(count)], map: "pool".into(), data: endpoint(family) }
}

fn pick(family: Family, class: u32) -> Vec<Rule> {
    let random = [service(family), is_class(class), any_of(family, class), dnat(family)];
    vec![rule(family, random, "any backend")]
}

fn stick(family: Family, class: u32) -> Vec<Rule> {
    let client = vec![Field::Source(family), Field::Value(0)];
    let backend = vec![Field::Value(3), Field::Value(4)];
    let known = Step::Lookup { key: client.clone(), map: "stick".into(), data: endpoint(family) };
    let is_live = Match::all_in(&[Field::Value(1), Field::Value(3), Field::Value(4)], "live").into();
    let update = |how| {
        let timeout = (how != Update::Delete).then_some(STICKY);
        Step::Update { how, set: "stick".into(), key: client.clone(), data: backend.clone(), timeout }
    };
    let found = || [service(family), is_class(class), known.clone()];
    let random = [service(family), is_class(class), any_of(family, class - STICKY_CLASS)];
    vec![
        rule(family, found().into_iter().chain([is_live, update(Update::Refresh), dnat(family)]), "its backend"),
        rule(family, found().into_iter().chain([update(Update::Delete)]), "its backend is gone"),
        rule(family, random.into_iter().chain([update(Update::Refresh), dnat(family)]), "a backend to stay with"),
    ]
}

/// The table of Services, in one family.
#[must_use]
pub fn services(family: Family, services: &[Service]) -> Table {
    use Datatype::{Number, Port, Protocol};
    let address = datatype(family);
    let mut table = Table::default();
    let key = |service: &Service, protocol| [Part::Ip(vip(family)), Part::Protocol(protocol), Part::Port(service.port)];
    let each = || services.iter().flat_map(|service| PROTOCOLS.map(|protocol| (service, protocol)));
    let frontends = SetKind::of(&[address, Protocol, Port]);
    let live = each().filter(|(service, _)| !service.backends.is_empty());
    let entries = live.map(|(service, protocol)| {
        let to = [u32::from(service.port), service.pool, service.class()];
        Element::from(key(service, protocol)).to(to.map(Part::Number))
    });
    table.set("svc", frontends.to(&[Number; 3]), Order::AfterChains, entries);
    let slots = services.iter().flat_map(|service| {
        let backends = service.backends.iter().zip(0..);
        backends.map(|((ip, port), slot)| {
            Element::from([service.pool, slot].map(Part::Number)).to([Part::Ip(*ip), Part::Port(*port)])
        })
    });
    table.set("pool", SetKind::of(&[Number; 2]).to(&[address, Port]), Order::AroundChains, slots);
    let alive = services.iter().filter(|service| service.sticky).flat_map(|service| {
        let backends = service.backends.iter();
        backends.map(|(ip, port)| Element::from([Part::Number(service.pool), Part::Ip(*ip), Part::Port(*port)]))
    });
    table.set("live", SetKind::of(&[Number, address, Port]), Order::AroundChains, alive);
    let stuck = SetKind::of(&[address, Number]).to(&[address, Port]).dynamic(65_536);
    table.set("stick", stuck, Order::BeforeChains, []);
    let classes: std::collections::BTreeSet<u32> =
        services.iter().map(Service::class).filter(|class| *class % STICKY_CLASS > 0).collect();
    let chain = |class: u32| match class > STICKY_CLASS {
        true => Name::numbered("stick", &[class - STICKY_CLASS, STICKY]),
        false => Name::numbered("pick", &[class]),
    };
    let jumps =
        classes.iter().map(|class| Element::from([Part::Number(*class)]).to_verdict(Verdict::Jump(chain(*class))));
    table.set("pick", SetKind::of(&[Number]).to_verdicts(), Order::AfterChains, jumps);
    for class in &classes {
        let rules = if *class > STICKY_CLASS { stick(family, *class) } else { pick(family, *class) };
        table.chains.insert(chain(*class), Chain::new(None, rules));
    }
    let nobody = each().filter(|(service, _)| service.backends.is_empty());
    let refused = nobody.map(|(service, protocol)| key(service, protocol).into());
    table.set("none", frontends, Order::AroundChains, refused);
    let masked = each().filter(|(service, _)| service.masquerade);
    let masked = masked.map(|(service, protocol)| key(service, protocol).into());
    table.set("front", frontends, Order::AroundChains, masked);
    let look_up = || Step::VerdictMap { key: vec![Field::Value(2)], map: "pick".into() };
    let twice =
        [rule(family, [service(family), look_up()], "a Service"), rule(family, [service(family), look_up()], "again")];
    table.called("services").extend(twice);
    for (name, place) in [("prerouting", Place::Prerouting), ("output", Place::Output)] {
        let to_services = rule(family, [Verdict::Jump("services".into()).into()], "to a Service");
        table.at(name, ChainKind::Nat, place, BEFORE_DSTNAT).push(to_services);
    }
    for (name, place) in [("refuse-forward", Place::Forward), ("refuse-output", Place::Output)] {
        let refused = [
            Match::new(Field::CtState, Test::AnyBit(ct_state::NEW)).into(),
            Match::all_in(&frontend(family), "none").into(),
            Step::Count,
            Step::Reject(Reject::PortUnreachable),
        ];
        table.at(name, ChainKind::Filter, place, 0).push(rule(family, refused, "no endpoints"));
    }
    let original = [
        Field::Ct(Direction::Original, CtField::Target(family)),
        Field::Protocol,
        Field::Ct(Direction::Original, CtField::TargetPort),
    ];
    let masquerade = [Match::all_in(&original, "front").into(), Step::Masquerade];
    let postrouting = table.at("postrouting", ChainKind::Nat, Place::Postrouting, BEFORE_SRCNAT);
    postrouting.push(rule(family, masquerade, "answers come back"));
    table
}

/// What a pod may be reached by: from these prefixes, at these ports.
#[derive(Clone, Debug)]
pub struct Allowed {
    /// The pod.
    pub pod: IpAddr,
    /// Its chain's number; equal pods share one.
    pub chain: u32,
    /// Sources.
    pub from: Vec<Subnet>,
    /// Ports, from the first to the last.
    pub ports: (u16, u16),
}

/// The group of nflog that shows what is dropped.
pub const DROPS: u16 = 107;

/// The table of network policies, in one family.
#[must_use]
pub fn policy(family: Family, allowed: &[Allowed]) -> Table {
    use Datatype::{Number, Port, Protocol};
    let address = datatype(family);
    let mut table = Table::default();
    let jump = |of: &Allowed| Verdict::Jump(Name::numbered("c", &[of.chain]));
    let pods = allowed.iter().map(|of| Element::from([Part::Ip(of.pod)]).to_verdict(jump(of)));
    table.set("in", SetKind::of(&[address]).to_verdicts(), Order::AfterChains, pods);
    let blocks = allowed.iter().flat_map(|of| {
        let from = of.from.iter();
        from.map(|from| Element::range(&[Part::Number(of.chain), Part::Net(*from)]))
    });
    table.set("block", SetKind::of(&[Number, address]).of_ranges(), Order::AroundChains, blocks);
    let ports = allowed.iter().flat_map(|of| {
        let range = |protocol| [Part::Number(of.chain), Part::Protocol(protocol), Part::Ports(of.ports.0, of.ports.1)];
        PROTOCOLS.map(|protocol| Element::range(&range(protocol)))
    });
    table.set("ports", SetKind::of(&[Number, Protocol, Port]).of_ranges(), Order::AroundChains, ports);
    let spaces = allowed.iter().map(|of| Element::range(&[Part::Net(Subnet::host(of.pod))]));
    table.set("known", SetKind::of(&[address]).of_ranges(), Order::AroundChains, spaces);
    for of in allowed {
        let group = Field::Number(of.chain);
        let from = Match::all_in(&[group, Field::Ct(Direction::Original, CtField::Source(family))], "block");
        let port = Field::Ct(Direction::Reply, CtField::SourcePort);
        let to = Match::all_in(&[group, Field::Protocol, port], "ports");
        let log = [Step::Limit { per_second: 10, burst: 5 }, Step::Log { group: DROPS, prefix: "policy".into() }];
        let rules = [
            rule(family, [from.into(), to.into(), Step::Count, Verdict::Return.into()], "documentation/allow"),
            rule(family, log, "shown"),
            Rule::drop([], "no policy allows it"),
        ];
        table.chains.insert(Name::numbered("c", &[of.chain]), Chain::new(None, rules));
    }
    let forward = table.at("forward", ChainKind::Filter, Place::Forward, 0);
    let known = Match::new(Field::CtState, Test::AnyBit(ct_state::ESTABLISHED | ct_state::RELATED));
    forward.push(Rule::new([known], Verdict::Accept, "established"));
    let invalid = Match::new(Field::CtState, Test::AnyBit(ct_state::INVALID | ct_state::UNTRACKED));
    let untracked = Match { fields: vec![Field::Target(family)], test: Test::In("known".into()) };
    forward.push(Rule::drop([Match::family(family), invalid, untracked], "of no connection"));
    let judge = Step::VerdictMap { key: vec![Field::Ct(Direction::Reply, CtField::Source(family))], map: "in".into() };
    forward.push(rule(family, [judge], "to a pod"));
    table
}

/// Two backends of a family.
fn backends(family: Family) -> [(IpAddr, u16); 3] {
    match family {
        Family::V4 => [(v("10.64.1.2"), 8080), (v("10.64.1.3"), 8081), (v("10.64.1.4"), 8082)],
        Family::V6 => [(v("2001:db8:1::2"), 8080), (v("2001:db8:1::3"), 8081), (v("2001:db8:1::4"), 8082)],
    }
}

fn three(family: Family) -> Vec<Service> {
    let [first, second, third] = backends(family);
    let sticky = Service { sticky: true, masquerade: true, ..Service::new(443, 2, &[second, third]) };
    vec![Service::new(80, 1, &[first]), sticky, Service::new(53, 3, &[])]
}

fn pods(family: Family) -> Vec<Allowed> {
    let from = match family {
        Family::V4 => vec![v("198.51.100.0/24"), v("192.0.2.7/32")],
        Family::V6 => vec![v("2001:db8:c::/48"), v("2001:db8:d::7/128")],
    };
    let [first, second, _] = backends(family);
    let of = |pod, chain, ports| Allowed { pod, chain, from: from.clone(), ports };
    vec![of(first.0, 1, (80, 80)), of(second.0, 2, (8000, 8999))]
}

fn both(family: Family) -> Ruleset {
    [(TableKey::Services, services(family, &three(family))), (TableKey::Policy, policy(family, &pods(family)))].into()
}

fn of_services(table: Table) -> Ruleset {
    [(TableKey::Services, table)].into()
}

fn of_policies(table: Table) -> Ruleset {
    [(TableKey::Policy, table)].into()
}

fn made(want: &Ruleset) -> FoundRuleset {
    want.iter().map(|(key, table)| (*key, Table::found(table))).collect()
}

async fn settles(kernel: &mut impl Kernel, want: &Ruleset) -> Vec<String> {
    let steps = settle(kernel, want).await;
    assert_eq!(look(kernel).await.filter, made(want));
    assert_eq!(settle(kernel, want).await, "", "a second pass writes nothing");
    steps.lines().map(str::to_owned).collect()
}

/// What is found is what was wanted, elements with what they lead to included; and all of it goes.
pub async fn maps_ranges_and_verdicts_are_made_seen_and_go_again(world: &mut impl World, family: Family) {
    let want = both(family);
    let steps = settles(world.kernel(), &want).await;
    let made = |step: &String| step.starts_with("+ nft add set") || step.starts_with("+ nft add map");
    assert_eq!(steps.iter().filter(|step| made(step)).count(), 11, "{steps:#?}");
    let steps = settles(world.kernel(), &Ruleset::new()).await;
    assert_eq!(steps, ["- nft delete table inet fabric-services", "- nft delete table inet fabric-policy"]);
}

/// Other backends are another pool: it comes first, then each frontend changes in one step, then the old pool goes.
pub async fn frontends_change_between_the_pool_that_comes_and_the_one_that_goes(
    world: &mut impl World,
    family: Family,
) {
    let mut all = three(family);
    settles(world.kernel(), &of_services(services(family, &all))).await;
    let [first, ..] = backends(family);
    all[0] = Service::new(80, 9, &[first, (first.0, 9999)]);
    let steps = settles(world.kernel(), &of_services(services(family, &all))).await;
    let (vip, backend) = (vip(family), first.0);
    let of = "inet fabric-services";
    assert_eq!(
        steps,
        [
            format!("+ nft add element {of} pool {{ 9 . 0 : {backend} . 8080, 9 . 1 : {backend} . 9999 }}"),
            format!("~ nft replace chains of table {of}: pick-2"),
            format!("+ nft add element {of} pick {{ 2 : jump pick-2 }}"),
            format!("- nft delete element {of} svc {{ {vip} . 6 . 80 : 80 . 1 . 1, {vip} . 17 . 80 : 80 . 1 . 1 }}"),
            format!("+ nft add element {of} svc {{ {vip} . 6 . 80 : 80 . 9 . 2, {vip} . 17 . 80 : 80 . 9 . 2 }}"),
            format!("- nft delete element {of} pick {{ 1 : jump pick-1 }}"),
            format!("- nft delete element {of} pool {{ 1 . 0 : {backend} . 8080 }}"),
            format!("- nft delete of table {of}: chain pick-1"),
        ]
    );
}

/// The price of a policy that changes is its own chain.
pub async fn chain_that_changes_leaves_all_others(world: &mut impl World, family: Family) {
    let mut all = pods(family);
    settles(world.kernel(), &of_policies(policy(family, &all))).await;
    // Both pods have the first chain now, and nothing leads to the second.
    all[1].chain = 1;
    all[1].ports = all[0].ports;
    let steps = settles(world.kernel(), &of_policies(policy(family, &all))).await;
    let pod = all[1].pod;
    let gone: Vec<&str> = steps.iter().filter_map(|step| step.strip_prefix("- nft delete of table ")).collect();
    assert_eq!(gone, ["inet fabric-policy: chain c-2"]);
    assert!(!steps.iter().any(|step| step.starts_with("~ nft replace chains")), "{steps:#?}");
    let verdict = |step: &String| step.contains(" in {");
    let changed: Vec<&String> = steps.iter().filter(|step| verdict(step)).collect();
    assert_eq!(
        changed,
        [
            &format!("- nft delete element inet fabric-policy in {{ {pod} : jump c-2 }}"),
            &format!("+ nft add element inet fabric-policy in {{ {pod} : jump c-1 }}"),
        ]
    );
}

/// A map that is declared in another way is made anew, with all elements, and all rules that look into it with it.
pub async fn map_that_is_declared_in_another_way_is_replaced_with_its_rules(world: &mut impl World, family: Family) {
    let mut other = services(family, &three(family));
    let kind = SetKind::of(&[Datatype::Number; 3]).to(&[datatype(family), Datatype::Port]);
    let slot = Element::from([1, 0, 7].map(Part::Number));
    let [first, ..] = backends(family);
    other.set("pool", kind, Order::AroundChains, [slot.to([Part::Ip(first.0), Part::Port(first.1)])]);
    for chain in other.chains.values_mut() {
        let without = chain.rules().iter().filter(|rule| !rule.sets().any(|set| set == "pool".into())).cloned();
        *chain = Chain::new(chain.hook(), without.collect::<Vec<_>>());
    }
    settles(world.kernel(), &of_services(other)).await;
    let steps = settles(world.kernel(), &of_services(services(family, &three(family)))).await;
    assert_eq!(
        steps,
        ["~ nft replace chains of table inet fabric-services: pick-1, stick-2-10800, set pool"],
        "all in one step"
    );
}

/// A section of which nothing is known is left as it is, whatever happens to others.
pub async fn section_that_is_not_known_is_left_alone(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    let want = both(family);
    settles(kernel, &want).await;
    let nothing = Ruleset::new();
    let unknown = State { services: None, policy: Some(&nothing), ..State::default() };
    assert_eq!(settle(kernel, unknown).await, "- nft delete table inet fabric-policy\n");
    assert_eq!(look(kernel).await.filter.keys().collect::<Vec<_>>(), [&TableKey::Services]);
    assert_eq!(settle(kernel, State { services: None, ..State::default() }).await, "");
}

/// A chain that a verdict map leads to doesn't go, and frontends don't come before what they lead to.
pub async fn what_leads_nowhere_is_refused(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    let want = of_services(services(family, &three(family)));
    let steps = |plan: &Plan, text: &str| {
        let ops = plan.ops().iter().filter(|op| op.to_string().contains(text));
        ops.cloned().collect::<Vec<_>>()
    };
    let plan = diff(&want, &FoundRuleset::new());
    let sets = steps(&plan, "+ nft add map inet fabric-services pick");
    assert_eq!(refusals(&kernel.apply(&sets).await), []);
    let verdicts = steps(&plan, "+ nft add element inet fabric-services pick");
    assert_eq!(refusals(&kernel.apply(&verdicts).await), [(0, libc::ENOENT)]);
    settles(kernel, &want).await;
    let none = of_services(services(family, &[]));
    let removal = steps(&diff(&none, &look(kernel).await.filter), "- nft delete of table");
    assert_eq!(refusals(&kernel.apply(&removal).await), [(0, libc::EBUSY)]);
    settles(kernel, &none).await;
}

/// Thousands of elements come and go, in several transactions.
pub async fn thousands_of_frontends_come_change_and_go(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    let [first, second, _] = backends(family);
    let all = |pools: u32| -> Vec<Service> {
        (1..=1_500).map(|port| Service::new(port, pools + u32::from(port), &[first, second])).collect()
    };
    for pools in [0, 10_000] {
        settles(kernel, &of_services(services(family, &all(pools)))).await;
    }
    let steps = settles(kernel, &of_services(services(family, &all(0)[..3]))).await;
    assert!(steps.iter().any(|step| step.ends_with("(and 2992 more)")), "{steps:#?}");
}
