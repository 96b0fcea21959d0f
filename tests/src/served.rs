//! A daemon's API and page on what a test publishes: no kernel, no store.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context as _, Result};
use fabric_core::handoff::Readiness;
use fabric_core::leases::{Entry, LeaseSet};
use fabric_core::network::NetworkConfig;
use fabric_core::plan::Vtep;
use fabric_core::record::LeaseKey;
use fabricd::api::{Controls, Remote, Sources};
use fabricd::command_line::command_line;
use fabricd::config::log_level::LogLevel;
use fabricd::config::{Config, LogFormat, StoreKind};
use fabricd::diagnosis::{Inspector, Places, Sections};
use fabricd::lease::{self, Holding, Own};
use fabricd::mesh::Mesh;
use fabricd::reconcile;
use fabricd::status::events::Events;
use fabricd::status::view::{View, VtepView};
use fabricd::store::Connection;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

const DAY: Duration = Duration::from_secs(86_400);

/// What the API reads from, the test's ends of it, and what it asks of the daemon's tasks.
pub struct Served {
    /// Publishes.
    pub view: watch::Sender<Arc<View>>,
    /// What is served.
    pub sources: Sources,
    /// What the reconcile loop is asked.
    pub network: mpsc::Receiver<reconcile::Command>,
    /// What the lease's keeper is asked.
    pub lease: mpsc::Receiver<lease::Command>,
}

impl Served {
    /// A daemon that publishes `view` and has this mesh.
    ///
    /// # Errors
    /// Logging can't be set up.
    pub fn new(view: View, mesh: Mesh) -> Result<Self> {
        // What is logged is one for the process.
        static LOG_LEVEL: OnceLock<Result<LogLevel, String>> = OnceLock::new();
        let log_level = LOG_LEVEL.get_or_init(|| LogLevel::start(LogFormat::Text, "warn")).clone();
        let (view, seen) = watch::channel(Arc::new(view));
        let (to_network, network) = mpsc::channel(1);
        let (to_lease, lease) = mpsc::channel(1);
        let mesh = Arc::new(mesh);
        let sources = Sources {
            services: None,
            policy: None,
            view: seen,
            events: Arc::new(Events::default()),
            inspector: Arc::new(Inspector {
                store: None,
                mesh: mesh.clone(),
                places: nowhere(),
                sections: Sections::default(),
                policy: None,
            }),
            remote: Remote { access: None },
            mesh,
            log_level: log_level.map_err(anyhow::Error::msg)?,
            controls: Controls { lease: to_lease, network: to_network },
            store: Arc::new(Config::load(command_line(), ["fabricd".into()])?.store_settings()),
        };
        Ok(Self { view, sources, network, lease })
    }
}

fn nowhere() -> Places {
    let nowhere = PathBuf::from("/nowhere");
    Places {
        addresses: nowhere.clone(),
        attachments: nowhere.clone(),
        cni_conf: nowhere.clone(),
        root: nowhere,
        certificates: vec![],
        kubernetes: false,
        store: StoreKind::Etcd,
    }
}

/// The key of a node's lease. Its VTEP's address is one of this machine, so that a daemon can be asked there.
///
/// # Errors
/// There is no such node.
pub fn key(node: u16) -> Result<LeaseKey> {
    LeaseKey::decode(&key_text(node)).with_context(|| format!("no key for node {node}"))
}

fn key_text(node: u16) -> String {
    format!("127.{}.{}.0-24", 1 + node / 256, node % 256)
}

/// What node-1 knows, ready, when these other nodes hold leases besides its own.
///
/// # Errors
/// There are no such nodes.
pub fn view(others: &[u16]) -> Result<View> {
    let leases = [&[1], others].concat();
    let leases = LeaseSet::snapshot(&LeaseSet::default(), leases.iter().map(|node| entry(*node)).collect(), 7);
    let key = key(1)?;
    let own = leases.get(&key).context("the lease of node-1")?;
    let own = Own { key, endpoints: own.record.endpoints(), epoch: 1 };
    let vtep = Vtep { mac: "02:42:00:00:00:01".parse()?, local: "198.18.0.1".parse()?, mtu: 1450 };
    Ok(View {
        readiness: Readiness::Ready,
        leases: Some(Arc::new(leases)),
        connection: Connection::Up,
        network: Some(NetworkConfig::decode(br#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#)?),
        holding: Holding { own: Some(own), expires: Some(Instant::now() + DAY), ..Holding::default() },
        mtu: 1450,
        vteps: vec![VtepView {
            device: "fabric.1".parse()?,
            underlay: "eth0".parse()?,
            public_ip: "198.18.0.1".parse()?,
            vtep,
        }],
        ..View::new("node-1".parse()?)
    })
}

fn entry(node: u16) -> Entry {
    let [high, low] = node.to_be_bytes();
    Entry {
        key: key_text(node),
        value: format!(
            r#"{{"PublicIP":"198.18.{high}.{low}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:42:00:00:{high:02x}:{low:02x}"}},"Fabric":{{"v":1,"node":"node-{node}","boot":"b","netns":1,"epoch":1}}}}"#
        )
        .into_bytes(),
        create_revision: 1,
        mod_revision: 1,
    }
}
