//! One suite for every lease store: the one in memory, the one in a real etcd, and the one in Kubernetes, before a fake API
//! server and a real one.

use fabric_core::record::LeaseKey;
use fabric_tests::conformance::store::{self as suite, Harness, assigned, choosing};
use fabric_tests::etcd::EtcdServer;
use fabric_tests::kubernetes::{Cluster, Nodes};
use fabric_tests::memory_store::{MemoryCluster, MemoryStore};
use fabric_tests::real_api::RealApi;
use fabricd::store::etcd::{Etcd, Options};
use fabricd::store::kubernetes::Kubernetes;

struct Memory(MemoryCluster);

impl Harness for Memory {
    type Store = MemoryStore;

    fn node(&self, _number: u8) -> MemoryStore {
        self.0.node()
    }

    async fn assign(&self, _number: u8, _subnets: &LeaseKey) {}

    async fn put(&self, key: &str, value: &str) {
        self.0.put(key, value.as_bytes());
    }

    async fn delete(&self, key: &str) {
        self.0.delete(key);
    }

    async fn revision(&self) -> i64 {
        self.0.revision()
    }
}

impl choosing::Harness for Memory {
    async fn put_elsewhere(&self, _key: &str, _value: &str) {}

    async fn get(&self, key: &str) -> Option<String> {
        self.0.get(key).map(|value| String::from_utf8(value).expect("text"))
    }

    async fn revoke(&self, lease_id: i64) {
        self.0.revoke(lease_id);
    }
}

/// Everything by hand goes through etcdctl.
struct RealEtcd(EtcdServer);

impl RealEtcd {
    async fn start() -> Self {
        Self(EtcdServer::start().await.expect("a real etcd"))
    }

    fn key(key: &str) -> String {
        format!("{}/{key}", Options::DEFAULT_PREFIX)
    }
}

impl Harness for RealEtcd {
    type Store = Etcd;

    fn node(&self, _number: u8) -> Etcd {
        Etcd::start(Options::new(vec![self.0.endpoint().to_owned()]))
    }

    async fn assign(&self, _number: u8, _subnets: &LeaseKey) {}

    async fn put(&self, key: &str, value: &str) {
        self.0.ctl(&["put", &Self::key(key), value]).await;
    }

    async fn delete(&self, key: &str) {
        self.0.ctl(&["del", &Self::key(key)]).await;
    }

    async fn revision(&self) -> i64 {
        let printed = self.0.ctl(&["get", "-w", "json", "nothing"]).await;
        let answer: serde_json::Value = serde_json::from_str(&printed).expect("JSON");
        answer["header"]["revision"].as_i64().expect("a number")
    }
}

impl choosing::Harness for RealEtcd {
    async fn put_elsewhere(&self, key: &str, value: &str) {
        self.0.ctl(&["put", &format!("/elsewhere/{key}"), value]).await;
    }

    async fn get(&self, key: &str) -> Option<String> {
        let printed = self.0.ctl(&["get", "--print-value-only", &Self::key(key)]).await;
        printed.strip_suffix('\n').map(str::to_owned)
    }

    async fn revoke(&self, lease_id: i64) {
        self.0.ctl(&["lease", "revoke", &format!("{lease_id:x}")]).await;
    }
}

/// What is a key in etcd is a Node here, and the network config a file.
struct BeforeNodes<A>(Cluster<A>);

impl<A: Nodes + Sync> Harness for BeforeNodes<A> {
    type Store = Kubernetes;

    fn node(&self, number: u8) -> Kubernetes {
        self.0.store(number)
    }

    async fn assign(&self, number: u8, subnets: &LeaseKey) {
        self.0.give(&format!("node-{number}"), subnets);
    }

    async fn put(&self, key: &str, value: &str) {
        match key.strip_prefix("subnets/") {
            Some(subnets) => self.0.flannel_says(&suite::key(subnets), value),
            None => self.0.write_config(value),
        }
    }

    async fn delete(&self, key: &str) {
        match key.strip_prefix("subnets/") {
            Some(subnets) => self.0.remove(&suite::key(subnets)),
            None => self.0.remove_config(),
        }
    }

    async fn revision(&self) -> i64 {
        self.0.revision()
    }
}

/// Promises of a suite as tests: how each is run, and before what.
macro_rules! promises {
    ($suite:ident, #[$test:meta], $harness:expr, $($promise:ident,)*) => {
        $(
            #[$test]
            async fn $promise() {
                $suite::$promise(&$harness).await;
            }
        )*
    };
}

/// The same one after another, before an API server that takes long to start.
macro_rules! one_by_one {
    ($suite:ident, $harness:expr, $($promise:ident,)*) => {
        $(
            println!("{}", stringify!($promise));
            $harness.0.clear();
            $suite::$promise(&$harness).await;
        )*
    };
}

macro_rules! of_every_store {
    ($run:ident, $($how:tt)*) => {
        $run! {
            suite, $($how)*,
            leases_are_unknown_until_the_snapshot,
            network_config_is_followed,
            unchanged_network_config_is_not_announced,
            claim_on_an_older_set_stands,
            keep_alive_extends_and_writes_nothing,
            release_removes_ours_alone,
            unreadable_record_keeps_the_last_good_one,
            flannel_record_appears,
        }
    };
}

macro_rules! where_subnets_are_assigned {
    ($run:ident, $($how:tt)*) => {
        $run! {
            assigned, $($how)*,
            only_what_is_assigned_can_be_claimed,
            second_claim_writes_nothing,
            nothing_rests_and_nothing_is_kept_for_anybody,
        }
    };
}

macro_rules! where_nodes_choose {
    ($($how:tt)*) => {
        promises! {
            choosing, $($how)*,
            nothing_is_assigned,
            one_of_many_claimers_wins,
            claim_asked_again_is_the_same,
            overlapping_pairs_are_refused,
            claim_decided_under_another_config_is_lost,
            claims_under_two_configs_never_overlap,
            record_is_stored_as_flannel_writes_it,
            rewrite_compares_the_revision,
            own_record_is_taken_over_by_its_revision,
            foreign_write_over_a_record_is_noticed,
            guard_outlives_its_record_for_its_owner,
            taking_over_a_flannel_record_creates_the_guards,
            unkept_lease_expires,
            revoked_lease_is_gone,
            freed_subnet_rests_for_a_grace,
            claim_ends_the_rest,
            place_of_a_reserved_subnet_is_held,
            release_removes_the_guards,
            release_leaves_a_foreign_record,
            key_that_is_no_subnet_is_reported,
            other_keys_are_ignored,
            question_about_a_name_is_heard_and_answered,
            renamed_node_takes_its_record_and_guards_over,
        }
    };
}

mod in_memory {
    use super::*;
    of_every_store! { promises, #[tokio::test(start_paused = true)], Memory(MemoryCluster::default()) }
    where_nodes_choose! { #[tokio::test(start_paused = true)], Memory(MemoryCluster::default()) }
}

mod in_etcd {
    use super::*;
    of_every_store! { promises, #[tokio::test], RealEtcd::start().await }
    where_nodes_choose! { #[tokio::test], RealEtcd::start().await }
}

mod in_kubernetes {
    use super::*;
    of_every_store! { promises, #[tokio::test], BeforeNodes(Cluster::start()) }
    where_subnets_are_assigned! { promises, #[tokio::test], BeforeNodes(Cluster::start()) }

    #[tokio::test]
    #[ignore = "needs a kube-apiserver, named by KUBE_APISERVER: make api-server builds one"]
    async fn before_a_real_api_server() {
        let program = std::env::var_os("KUBE_APISERVER").expect("KUBE_APISERVER names a kube-apiserver");
        let harness = BeforeNodes(Cluster::before(RealApi::start(program.as_ref()).await.expect("an API server")));
        of_every_store! { one_by_one, harness }
        where_subnets_are_assigned! { one_by_one, harness }
    }
}
