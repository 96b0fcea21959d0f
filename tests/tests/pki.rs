//! The certificates of `fabricd pki`, used by those that they are for: a real etcd, and Secrets of Kubernetes.

use std::time::Duration;

use fabric_tests::certificates::Certificates;
use fabric_tests::conformance::store::{claim, now};
use fabric_tests::etcd::EtcdServer;
use fabric_tests::fake_api::{FakeApi, Fault};
use fabric_tests::kubernetes::Nodes as _;
use fabricd::pki::Pki;
use fabricd::store::LeaseStore as _;
use fabricd::store::etcd::{Etcd, Options, Tls};
use serde_json::{Map, Value};
use tempfile::TempDir;

const SECRETS: &str = "/api/v1/namespaces/net/secrets";

/// An API server, and who asks it.
struct Cluster {
    api: FakeApi,
    dir: TempDir,
}

impl Cluster {
    fn start() -> Self {
        let api = FakeApi::start(([127, 0, 0, 1], 0).into()).expect("a free port");
        let dir = tempfile::tempdir().expect("a folder");
        api.kubeconfig(dir.path()).expect("written");
        Self { api, dir }
    }

    fn pki(&self, action: &[&str]) -> anyhow::Result<()> {
        let kubeconfig = self.dir.path().join("kubeconfig").display().to_string();
        let place = ["--etcd-address", "192.0.2.10", "--namespace", "net", "--kubeconfig", &kubeconfig];
        let line = ["fabricd", "pki"].iter().chain(action).chain(&place);
        Pki::asked(line.map(Into::into)).expect("the words for it").run()
    }

    fn secret(&self, name: &str) -> Map<String, Value> {
        let secret = self.api.get(SECRETS, name).unwrap_or_else(|| panic!("no Secret {name}"));
        secret["data"].as_object().expect("data").clone()
    }
}

#[tokio::test]
async fn real_etcd_and_its_clients_take_them() {
    let certificates = Certificates::by_fabricd().expect("made");
    let tls = Tls { ca: Some(certificates.ca()), client: Some(certificates.client()) };
    let etcd = EtcdServer::start_with_tls(certificates).await.expect("a real etcd");
    let store = Etcd::start(Options { tls, ..Options::new(vec![etcd.endpoint().into()]) });
    store.claim(&claim(1, "10.244.1.0-24", &*now(&store).await)).await.expect("let in");
}

#[test]
fn secrets_are_made_once_and_kept() {
    let cluster = Cluster::start();
    cluster.pki(&["init"]).expect("made");
    let names = |name| cluster.secret(name).keys().cloned().collect::<Vec<_>>();
    assert_eq!(names("fabric-etcd-ca"), ["ca.crt"]);
    assert_eq!(names("fabric-etcd-ca-key"), ["ca.crt", "ca.key"]);
    for name in ["fabric-etcd-server", "fabric-etcd-client"] {
        assert_eq!(names(name), ["ca.crt", "tls.crt", "tls.key"]);
        assert_eq!(cluster.api.get(SECRETS, name).expect("there")["type"], "kubernetes.io/tls");
        assert_eq!(cluster.secret(name)["ca.crt"], cluster.secret("fabric-etcd-ca")["ca.crt"]);
    }
    let made = cluster.api.revision();
    cluster.pki(&["init"]).expect("kept");
    assert_eq!(cluster.api.revision(), made);

    let before = ["ca", "ca-key", "server", "client"].map(|name| cluster.secret(&format!("fabric-etcd-{name}")));
    cluster.pki(&["renew", "--all"]).expect("renewed");
    let after = ["ca", "ca-key", "server", "client"].map(|name| cluster.secret(&format!("fabric-etcd-{name}")));
    let same: Vec<bool> = before.iter().zip(&after).map(|(before, after)| before == after).collect();
    assert_eq!(same, [true, true, false, false]);
    cluster.pki(&["init"]).expect("fits");
}

#[test]
fn two_jobs_at_once_agree() {
    let cluster = Cluster::start();
    cluster.api.set(Fault::Slow(Duration::from_millis(100)));
    std::thread::scope(|scope| {
        let jobs = [(); 2].map(|()| scope.spawn(|| cluster.pki(&["init"])));
        for job in jobs {
            job.join().expect("no panic").expect("made or kept");
        }
    });
    cluster.pki(&["init"]).expect("they fit together");
}

#[test]
fn secret_of_another_authority_is_named() {
    let cluster = Cluster::start();
    cluster.pki(&["init"]).expect("made");
    cluster.api.delete(SECRETS, "fabric-etcd-ca-key");
    let error = format!("{:#}", cluster.pki(&["init"]).expect_err("another authority"));
    assert!(error.contains("Secret net/fabric-etcd-ca holds another authority"), "{error}");
    cluster.api.set(Fault::Refuses(403));
    let error = format!("{:#}", cluster.pki(&["init"]).expect_err("refused"));
    assert!(
        error.contains("cannot read the Secret net/fabric-etcd-ca-key") && error.contains("told to refuse"),
        "{error}"
    );
}
