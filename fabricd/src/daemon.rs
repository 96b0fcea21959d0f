//! The daemon put together: store, lease keeper, reconcile loop, and those who tell about them.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context as _, bail};
use fabric_core::handoff::BOOT_ID;
use fabric_core::inquiry::unix_millis;
use fabric_core::record::Instance;
use fabric_core::state::nft::{Section, TableKey};
use futures::FutureExt as _;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::api::{Controls, Remote, Sources, Tls};
use crate::config::log_level::LogLevel;
use crate::config::policy_args::{OpenConnections, OwnNode};
use crate::config::{Config, StoreKind};
use crate::diagnosis::{Inspector, Places, Probe, Sections, node_events};
use crate::files::Files;
use crate::files::state_dir::{self, Disk, Uptime};
use crate::host::addresses::NodePods;
use crate::host::attachments::{self, AttachedPods};
use crate::host::lock::{Holder, Lock};
use crate::kernel::Options;
use crate::kernel::netlink::Netlink;
use crate::kernel::section::SectionTable;
use crate::kubernetes::event_recorder::EventRecorder;
use crate::lease::{Hosts, Keeper, LeaseOptions};
use crate::mesh::Mesh;
use crate::metrics::Metrics;
use crate::policy::applied::AppliedPolicies;
use crate::policy::reconcile::Inputs;
use crate::reconcile::{Node, Reconciler};
use crate::status::events;
use crate::status::events::Events;
use crate::status::fast_path::Mode;
use crate::status::view::View;
use crate::store::LeaseStore;
use crate::store::etcd::Etcd;
use crate::store::kubernetes::Kubernetes;
use crate::{api, http, mesh, policy, services};

/// Runs until SIGTERM or SIGINT. The data plane stays as it is: pods go on talking without a daemon.
///
/// # Errors
/// What keeps it from starting at all. Whatever can pass by itself (no store, no interface yet) is waited for instead.
pub async fn run(config: Config, log_level: LogLevel) -> anyhow::Result<()> {
    let _lock = Lock::take(&holder(&config, false)).await?;
    let disk = Disk::new(&config.state_dir, config.node());
    let before = disk.load(&Uptime::now().context("cannot read how long this machine is up")?);
    if let Some(warning) = config.name_warning() {
        warn!("{warning}");
    }
    info!(node = %config.node(), version = env!("CARGO_PKG_VERSION"), store = ?config.store, "fabricd starts");
    match config.store {
        StoreKind::Etcd => {
            let store = Etcd::start_remembering(config.etcd.options()?, before.leases.clone());
            serve(&config, store, before, log_level).await
        }
        StoreKind::Kubernetes => serve(&config, Kubernetes::start(config.kubernetes()), before, log_level).await,
    }
}

async fn serve(
    config: &Config,
    store: impl LeaseStore,
    before: state_dir::State,
    log_level: LogLevel,
) -> anyhow::Result<()> {
    let health = match config.health_addr.0 {
        Some(address) => Some(http::listen(address).await?),
        None => None,
    };
    let api = api::listen(&config.socket).with_context(|| format!("cannot listen on {}", config.socket.display()))?;
    let remote = api_for_others(config).await?;

    let store = Arc::new(store);
    let files = Files::new(&config.run_dir, &config.subnet_file)
        .masquerading(config.filter.ip_masq)
        .with_addresses_in(&config.cni_data_dir);
    let disk = Disk::new(&config.state_dir, config.node());
    let options = LeaseOptions {
        node: config.node().clone(),
        instance: instance()?,
        ttl: config.lease_ttl,
        grace: config.lease_grace,
        pods: NodePods::new(config.cni_dirs()),
        since: unix_millis(SystemTime::now()) / 1000,
        hosts: Hosts::new(|ip| mesh::probe::is_host_there(ip).boxed()),
    };
    let keeper = Keeper::new(store.clone(), options, before.lease.clone());
    let node = Node {
        name: config.node().clone(),
        selectors: config.selectors(),
        public_ips: config.public_ips(),
        filter: config.filter.options(),
        fast_path: config.fast_path,
    };
    let mut reconciler = Reconciler::new(node, store.clone(), open_kernel(config)?, files, before);
    let (enforces, translates) = (config.enforces_policies(), config.translates_services());
    let attached = (config.filter.check_pods || enforces || translates || config.fast_path != Mode::Off)
        .then(|| attachments::watch_attachments(config.cni_state_dir.clone()));
    if let Some(attached) = attached.clone() {
        reconciler.take_pods(attached);
    }
    if enforces {
        reconciler.refuse_fast_path(
            "NetworkPolicies are enforced here, and its programs bypass them; switch --network-policy off for it",
        );
    }
    if let Some(attached) = attached.clone().filter(|_| config.filter.check_pods) {
        reconciler.guard_ports(attached);
    }
    let services = match attached.clone().filter(|_| translates) {
        Some(attached) => {
            reconciler.leave(Section::Services);
            Some(services(config, reconciler.view(), attached)?)
        }
        None => None,
    };
    let applied = AppliedPolicies::new(&config.run_dir);
    let policies = match attached.filter(|_| enforces) {
        Some(attached) => {
            reconciler.leave(Section::Policy);
            Some(policies(config, attached, applied)?)
        }
        None => {
            applied.turn_off().context("cannot say that network policies are off")?;
            None
        }
    };
    let controls = Controls { lease: keeper.commands(), network: reconciler.commands() };
    let events = Arc::new(Events::default());
    let (view, wanted, holding) = (reconciler.view(), reconciler.wanted(), keeper.holding());
    let counters = reconciler.counters();

    // Each on a task of its own, so that none waits for another's turn.
    let mut tasks = JoinSet::new();
    tasks.spawn(async {
        keeper.run(wanted).await;
        "the lease keeper has ended".to_owned()
    });
    tasks.spawn(async {
        reconciler.run(holding).await;
        "the reconcile loop has ended".to_owned()
    });
    let (policy, policy_counters) = policies.as_ref().map(|policies| (policies.view(), policies.counters())).unzip();
    if let Some(policies) = policies {
        let view = policies.view();
        tasks.spawn(async move {
            view.drops.run(view.applied).await;
            "the task that reads what network policies drop has ended".to_owned()
        });
        tasks.spawn(async {
            policies.run().await;
            "the loop of network policies has ended".to_owned()
        });
    }
    let (services_handle, services_counters) =
        services.as_ref().map(|services| (services.handle(), services.counters())).unzip();
    if let Some(services) = services {
        tasks.spawn(async {
            services.run().await;
            "the loop of Services has ended".to_owned()
        });
    }
    let asked = store.clone();
    let probe: Probe = Arc::new(move || {
        let store = asked.clone();
        async move { store.probe().await }.boxed()
    });
    let mut seen = view.clone();
    tasks.spawn(async move {
        while seen.changed().await.is_ok() {
            store.announce(&seen.borrow_and_update().readiness);
        }
        "the reconcile loop has ended".to_owned()
    });
    let seen = view.clone();
    tasks.spawn(async {
        state_dir::watch_view(disk, seen).await;
        "the reconcile loop has ended".to_owned()
    });
    let (told, seen) = (events.clone(), view.clone());
    tasks.spawn(async {
        events::watch_view(told, seen).await;
        "the reconcile loop has ended".to_owned()
    });
    let mesh = Arc::new(Mesh::counted_by(counters.round_trips()));
    let (probed, told, seen) = (mesh.clone(), events.clone(), view.clone());
    tasks.spawn(async {
        mesh::run(probed, told, seen).await;
        "the reconcile loop has ended".to_owned()
    });
    let services = services_handle;
    let sections = Sections {
        policy: policy.as_ref().map(|of| of.status.clone()),
        services: services.as_ref().map(|of| of.status.clone()),
    };
    for (name, section) in sections.iter() {
        let told = events.clone();
        tasks.spawn(async move {
            events::watch_section(told, name, section).await;
            format!("the loop of {name} has ended")
        });
    }
    let inspector = Inspector {
        store: Some(probe),
        mesh: mesh.clone(),
        places: Places::of(config),
        sections,
        policy: policy.clone(),
    };
    let inspector = Arc::new(inspector);
    if config.store == StoreKind::Kubernetes {
        let events = EventRecorder::start(Arc::new(config.api_server()), config.node().clone());
        let (seen, inspector) = (view.clone(), inspector.clone());
        tasks.spawn(async {
            node_events::run(events, seen, inspector).await;
            "the reconcile loop has ended".to_owned()
        });
    }
    let access = remote.as_ref().and_then(|(_, tls)| Some((tls.clone(), config.api_addr.0?.port())));
    let remote_access = Remote { access };
    let store = Arc::new(config.store_settings());
    let sources =
        Sources { view, policy, services, events, mesh, inspector, remote: remote_access, log_level, controls, store };
    if let Some(listener) = health {
        let mut metrics = Metrics::new(&counters);
        if let Some(policies) = &policy_counters {
            metrics = metrics.with_policies(policies);
        }
        if let Some(services) = &services_counters {
            metrics = metrics.with_services(services);
        }
        let (sources, metrics) = (sources.clone(), Arc::new(metrics));
        tasks.spawn(async {
            format!("the health endpoint has ended: {:?}", http::serve(listener, sources, metrics).await)
        });
    }
    if let Some((listener, tls)) = remote {
        let sources = sources.clone();
        tasks.spawn(async move {
            format!("the gRPC API for other nodes has ended: {:?}", api::serve_tls(listener, tls, sources).await)
        });
    }
    tasks.spawn(async { format!("the gRPC API has ended: {:?}", api::serve(api, sources).await) });

    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        Some(ended) = tasks.join_next() => bail!(ended?),
    }
    info!("fabricd ends, the data plane stays");
    Ok(())
}

/// The loop of network policies.
fn policies(
    config: &Config,
    attached: watch::Receiver<Arc<AttachedPods>>,
    applied: AppliedPolicies,
) -> anyhow::Result<policy::reconcile::Reconciler> {
    let api = Arc::new(config.api_server());
    let inputs = Inputs {
        sources: policy::watch::Sources::watch(&api),
        api,
        node: config.node().clone(),
        attached,
        pods: NodePods::new(config.cni_dirs()),
        files: Files::new(&config.run_dir, &config.subnet_file),
        applied,
        own_node_allowed: config.policy.policy_own_node == OwnNode::Allow,
        reevaluates_open: config.policy.policy_open_connections == OpenConnections::Enforce,
        sysctl_root: config.sysctl_root.clone(),
    };
    let open = |table| {
        SectionTable::open(table).context("cannot talk to the kernel over netlink; does fabricd have CAP_NET_ADMIN?")
    };
    let tables = [open(TableKey::Policy)?, open(TableKey::PolicyBridge)?];
    Ok(policy::reconcile::Reconciler::new(inputs, tables))
}

/// The loop of Services.
fn services(
    config: &Config,
    view: watch::Receiver<Arc<View>>,
    pods: watch::Receiver<Arc<AttachedPods>>,
) -> anyhow::Result<services::reconcile::Reconciler> {
    let api = Arc::new(config.api_server());
    let inputs = services::reconcile::Inputs {
        node: config.node().clone(),
        sources: services::watch::Sources::watch(api.clone(), config.node()),
        api,
        view,
        files: Files::new(&config.run_dir, &config.subnet_file),
        pods,
        sysctl_root: config.sysctl_root.clone(),
        health_addr: config.services.services_health_addr.0,
        replaces_kube_proxy: config.services.replace_kube_proxy,
        node_ports_at: config.services.node_port_addresses.clone(),
        service_cidrs: config.services.service_cidr.clone(),
    };
    let table = SectionTable::open(TableKey::Services);
    let table = table.context("cannot talk to the kernel over netlink; does fabricd have CAP_NET_ADMIN?")?;
    Ok(services::reconcile::Reconciler::new(inputs, table))
}

/// Opens the API to other nodes, if it is asked for: never without certificates.
async fn api_for_others(config: &Config) -> anyhow::Result<Option<(TcpListener, Tls)>> {
    let files = [&config.api_cafile, &config.api_certfile, &config.api_keyfile];
    match (config.api_addr.0, Tls::of(files.map(Option::as_ref))?) {
        (Some(address), Some(tls)) => {
            let listener = api::listen_tcp(address);
            let told = || format!("cannot listen on {address} for other nodes; choose another with --api-addr, or off");
            Ok(Some((listener.with_context(told)?, tls)))
        }
        (Some(address), None) => bail!(
            "--api-addr {address} needs --api-cafile, --api-certfile and --api-keyfile, which fabricd pki node makes: \
             nobody may ask without a certificate"
        ),
        (None, _) => Ok(None),
    }
}

/// The connection to the kernel.
pub(crate) fn open_kernel(config: &Config) -> anyhow::Result<Netlink> {
    let services_apart = config.translates_services() && !config.cleanup;
    let options = Options {
        can_reach: config.iface_can_reach.clone(),
        sysctl_root: config.sysctl_root.clone(),
        services_apart,
        bpffs: config.bpffs.clone(),
        fast_path: config.fast_path != Mode::Off,
    };
    Netlink::new(options).context("cannot talk to the kernel over netlink; does fabricd have CAP_NET_ADMIN?")
}

/// What is said to another daemon that would start beside this one.
pub(crate) fn holder(config: &Config, cleanup: bool) -> Holder {
    let Config { run_dir, socket, .. } = config.clone();
    Holder { node: config.node().to_string(), run_dir, socket, cleanup }
}

/// Which machine this is, until it boots again.
pub(crate) fn instance() -> anyhow::Result<Instance> {
    let boot = fs::read_to_string(BOOT_ID).context("cannot read this machine's boot id")?;
    let netns = fs::metadata("/proc/self/ns/net").context("cannot look at this network namespace")?.ino();
    Ok(Instance { boot: boot.trim().to_owned(), netns })
}
