//! One suite for every lease store: the one in memory and the one in a real etcd.

use fabric_tests::conformance::store::{self as suite, Harness};
use fabric_tests::etcd::EtcdServer;
use fabric_tests::memory_store::{MemoryCluster, MemoryStore};
use fabricd::store::etcd::{Etcd, Options};

struct Memory(MemoryCluster);

impl Harness for Memory {
    type Store = MemoryStore;

    fn node(&self) -> MemoryStore {
        self.0.node()
    }

    async fn put(&self, key: &str, value: &str) {
        self.0.put(key, value.as_bytes());
    }

    async fn put_elsewhere(&self, _key: &str, _value: &str) {}

    async fn delete(&self, key: &str) {
        self.0.delete(key);
    }

    async fn get(&self, key: &str) -> Option<String> {
        self.0.get(key).map(|value| String::from_utf8(value).expect("text"))
    }

    async fn revision(&self) -> i64 {
        self.0.revision()
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

    fn node(&self) -> Etcd {
        Etcd::start(Options::new(vec![self.0.endpoint().to_owned()]))
    }

    async fn put(&self, key: &str, value: &str) {
        self.0.ctl(&["put", &Self::key(key), value]).await;
    }

    async fn put_elsewhere(&self, key: &str, value: &str) {
        self.0.ctl(&["put", &format!("/elsewhere/{key}"), value]).await;
    }

    async fn delete(&self, key: &str) {
        self.0.ctl(&["del", &Self::key(key)]).await;
    }

    async fn get(&self, key: &str) -> Option<String> {
        let printed = self.0.ctl(&["get", "--print-value-only", &Self::key(key)]).await;
        printed.strip_suffix('\n').map(str::to_owned)
    }

    async fn revision(&self) -> i64 {
        let printed = self.0.ctl(&["get", "-w", "json", "nothing"]).await;
        let answer: serde_json::Value = serde_json::from_str(&printed).expect("JSON");
        answer["header"]["revision"].as_i64().expect("a number")
    }

    async fn revoke(&self, lease_id: i64) {
        self.0.ctl(&["lease", "revoke", &format!("{lease_id:x}")]).await;
    }
}

macro_rules! conformance {
    ($($promise:ident,)*) => {
        mod in_memory {
            use super::*;
            $(
                #[tokio::test(start_paused = true)]
                async fn $promise() {
                    suite::$promise(&Memory(MemoryCluster::default())).await;
                }
            )*
        }

        mod in_etcd {
            use super::*;
            $(
                #[tokio::test]
                async fn $promise() {
                    suite::$promise(&RealEtcd::start().await).await;
                }
            )*
        }
    };
}

conformance! {
    leases_are_unknown_until_the_snapshot,
    network_config_is_followed,
    unchanged_network_config_is_not_announced,
    one_of_many_claimers_wins,
    overlapping_pairs_are_refused,
    claim_on_an_older_set_stands,
    claim_decided_under_another_config_is_lost,
    claims_under_two_configs_never_overlap,
    record_is_stored_as_flannel_writes_it,
    rewrite_compares_the_revision,
    own_record_is_taken_over_by_its_revision,
    foreign_write_over_a_record_is_noticed,
    guard_outlives_its_record_for_its_owner,
    taking_over_a_flannel_record_creates_the_guards,
    keep_alive_extends_and_writes_nothing,
    unkept_lease_expires,
    revoked_lease_is_gone,
    freed_subnet_rests_for_a_grace,
    claim_ends_the_rest,
    place_of_a_reserved_subnet_is_held,
    release_removes_ours_alone,
    release_leaves_a_foreign_record,
    unreadable_record_keeps_the_last_good_one,
    flannel_record_appears,
    other_keys_are_ignored,
}
