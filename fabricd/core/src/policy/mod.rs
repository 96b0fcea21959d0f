//! NetworkPolicy (networking.k8s.io/v1) and ClusterNetworkPolicy (policy.networking.k8s.io/v1alpha2): who may connect to
//! whom.
//!
//! ```text
//! policies of both kinds ───┐
//! Namespaces, Pods ─────────┼─► State ─► Cluster ─┬─► evaluate(conn): may it be, by which rule?   the truth
//! pods of this node ────────┘                     └─► effective ─► groups ─► plan: sets and chains   what the kernel does
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`model`], [`state`] | policies, rules, peers, ports, pods; all of them: the [`State`] |
//! | [`tiers`] | policies of the whole cluster, which come before those of namespaces, or after them |
//! | [`pods`] | all pods, by name and by address |
//! | [`objects`], [`sets`] | what the API server tells of them |
//! | [`labels`], [`selector`] | labels, kept once each, and what selects by them |
//! | [`decode`] | a NetworkPolicy's JSON, item by item: what can't be understood matches nothing |
//! | [`decode_cluster`] | a ClusterNetworkPolicy's, rule by rule: what can't be understood fails closed |
//! | [`evaluate`] | the rules of Kubernetes to the letter |
//! | [`effective`], [`groups`], [`cover`] | the same for many: what pods and rules have in common, by number |
//! | [`members`] | who is in each group, kept up to date pod by pod |
//! | [`plan`], [`chains`], [`drops`] | the table of the packet filter; what becomes there of what isn't allowed |
//! | [`separation`] | what holds between pods of one node where that table doesn't see them |
//! | [`reasons`] | what a person is told of it |
//!
//! Isolation is each direction's own: a pod that at least one policy selects for a direction may have only those
//! connections that a rule of at least one of these policies allows. Policies of the whole cluster decide before that, or where
//! no policy selects the pod. Both ends must agree. What is judged is connections,
//! as they are after translation of the destination, so a policy sees the endpoint of a Service and never its virtual
//! address. Answers pass.

pub mod chains;
pub mod cover;
pub mod decode;
pub mod decode_cluster;
pub mod drops;
pub mod effective;
pub mod evaluate;
pub mod groups;
mod json;
pub mod labels;
pub mod members;
pub mod model;
pub mod objects;
pub mod plan;
pub mod pods;
pub mod reasons;
pub mod selector;
pub mod separation;
pub mod sets;
pub mod state;
pub mod tiers;

pub use self::evaluate::{Cluster, Side, Verdict, Who};
pub use self::model::{Conn, Direction, ObjectName, Policy};
pub use self::state::State;
