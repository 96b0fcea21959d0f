//! What fabricd keeps in the kernel, by section: [`routing`] is links, addresses, neighbours, FDB, nexthop objects, routes
//! and settings, [`nft`] our tables of the packet filter, [`docker_user`] our rules in a chain of Docker's, [`fast_path`] maps, programs
//! and links of eBPF. [`State`] is
//! what should be, [`Found`] what is there; [`diff`](crate::diff::diff) compares the two. Both only borrow: each section
//! lives with whoever plans it or reads it.
//!
//! docs/kernel-state.md says for every table how an entry is recognised as ours.

pub mod docker_user;
pub mod fast_path;
pub mod nft;
pub mod routing;

use std::borrow::Cow;
use std::collections::BTreeMap;

use self::docker_user::{DockerUser, DockerUserRules};
use self::fast_path::FastPath;
use self::nft::{FoundRuleset, Ruleset};
pub use self::routing::{
    Foreign, ForeignLink, NEXTHOP_ID_BASE, Nexthop, NexthopId, ROUTE_PROTOCOL, Routing, Sysctl, Via, VxlanLink,
};

/// What the kernel should hold, by section.
#[derive(Clone, Copy, Debug)]
pub struct State<'a> {
    /// What leads packets from pods to peers.
    pub routing: &'a Routing,
    /// The packet filter, but for Services and network policies.
    pub filter: &'a Ruleset,
    /// What Services are made of; `None` while it isn't known: then nothing is done about it.
    pub services: Option<&'a Ruleset>,
    /// What network policies are made of; `None` while it isn't known.
    pub policy: Option<&'a Ruleset>,
    /// Rules in Docker's chain for rules of others.
    pub docker_user: &'a DockerUserRules,
    /// The fast path.
    pub fast_path: &'a FastPath,
}

/// What the kernel holds of ours, by section.
#[derive(Clone, Debug)]
pub struct Found<'a> {
    /// Links, addresses, neighbours, FDB, nexthop objects, routes and settings.
    pub routing: Cow<'a, Routing>,
    /// Our tables of nftables.
    pub filter: &'a FoundRuleset,
    /// The chains that Docker has for rules of others.
    pub docker_user: &'a [DockerUser],
    /// The fast path.
    pub fast_path: &'a FastPath,
}

static NO_ROUTING: Routing = Routing::new();
static NO_RULESET: Ruleset = BTreeMap::new();
static NO_DOCKER_USER: DockerUserRules = BTreeMap::new();
static NO_FAST_PATH: FastPath = FastPath::new();
static NO_TABLES: FoundRuleset = BTreeMap::new();

impl Default for State<'_> {
    /// Nothing at all, as `--cleanup` wants it.
    fn default() -> Self {
        Self {
            routing: &NO_ROUTING,
            filter: &NO_RULESET,
            services: Some(&NO_RULESET),
            policy: Some(&NO_RULESET),
            docker_user: &NO_DOCKER_USER,
            fast_path: &NO_FAST_PATH,
        }
    }
}

impl Default for Found<'_> {
    fn default() -> Self {
        Self { routing: Cow::Borrowed(&NO_ROUTING), filter: &NO_TABLES, docker_user: &[], fast_path: &NO_FAST_PATH }
    }
}

impl<'a> From<&'a Routing> for State<'a> {
    /// The routing section alone.
    fn from(routing: &'a Routing) -> Self {
        Self { routing, ..Self::default() }
    }
}

impl<'a> From<&'a Routing> for Found<'a> {
    /// The routing section alone.
    fn from(routing: &'a Routing) -> Self {
        Self { routing: Cow::Borrowed(routing), ..Self::default() }
    }
}

impl<'a> From<&'a FastPath> for State<'a> {
    /// The fast path alone.
    fn from(fast_path: &'a FastPath) -> Self {
        Self { fast_path, ..Self::default() }
    }
}

impl<'a> From<&'a FastPath> for Found<'a> {
    /// The fast path alone.
    fn from(fast_path: &'a FastPath) -> Self {
        Self { fast_path, ..Self::default() }
    }
}

impl<'a> From<&'a Ruleset> for State<'a> {
    /// The packet filter alone, with the tables of all its sections.
    fn from(ruleset: &'a Ruleset) -> Self {
        Self { filter: ruleset, services: Some(ruleset), policy: Some(ruleset), ..Self::default() }
    }
}

impl<'a> From<&'a FoundRuleset> for Found<'a> {
    /// The packet filter alone.
    fn from(filter: &'a FoundRuleset) -> Self {
        Self { filter, ..Self::default() }
    }
}
