//! What can be checked without a daemon: when it has ended or hangs, and before it ever ran (`--preflight`).
//!
//! The kernel is read here, by the same code as the daemon's; what only the daemon knows (the lease, the peers) is taken
//! from `node.json`, its last word.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fabric_core::handoff::{NODE_FILE, NodeFile, Readiness};
use fabric_core::model::Family;
use fabric_core::network::NetworkConfig;
use fabric_core::plan::Vtep;
use fabric_core::record::LeaseKey;
use tokio::time::timeout;

use super::checks::{ALL, Check};
use super::finding::{Finding, Problem};
use super::{Inspection, Places, Sections, overlay_checks};
use crate::config::{Config, StoreKind};
use crate::host::addresses;
use crate::host::lock;
use crate::host::underlay;
use crate::kernel::netlink::Netlink;
use crate::kernel::{self, Kernel as _, Observed, Options};
use crate::lease::{Holding, Own};
use crate::mesh::Mesh;
use crate::reconcile::Snapshot;
use crate::reconcile::firewall::Evaluator;
use crate::status::view::{View, VtepView};
use crate::store::LeaseStore as _;
use crate::store::etcd::Etcd;

/// Checks of the daemon's list that need no daemon.
const ON_A_NODE: [&str; 21] = [
    "foreign-vxlan",
    "kernel-version",
    "bridge",
    "pod-ports",
    "overlap",
    "foreign-input",
    "foreign-forward",
    "forwarding",
    "rp-filter",
    "br-netfilter",
    "conntrack",
    "networkd",
    "networkmanager",
    "udev",
    "bridge-mtu",
    "addresses",
    "cni-config",
    "egress",
    "clock",
    "certificates",
    "disk",
];

/// Those of them that say something of a host on which fabricd never ran.
const ON_A_NEW_HOST: [&str; 11] = [
    "foreign-vxlan",
    "kernel-version",
    "br-netfilter",
    "conntrack",
    "networkd",
    "networkmanager",
    "udev",
    "clock",
    "certificates",
    "disk",
    "rp-filter",
];

/// Modules that the data plane needs, and what for. A kernel may have them built in.
const MODULES: [(&str, &str, bool); 5] = [
    ("vxlan", "the tunnel", true),
    ("nf_tables", "the packet filter", true),
    ("bridge", "the pods' bridge", true),
    ("veth", "the pods' interfaces", true),
    ("br_netfilter", "kube-proxy's Services, with iptables or IPVS", false),
];

/// A check that was made.
pub type Made = (&'static str, &'static str, Finding);

/// The checks of a node whose daemon doesn't answer, for the reason in `why`.
pub async fn without_daemon(config: &Result<Config, String>, why: &str) -> Vec<Made> {
    let run_dir = config.as_ref().map_or_else(|_| fabric_core::handoff::RUN_DIR.into(), |c| c.run_dir.clone());
    let node = node_file(&run_dir);
    let mut made = vec![
        ("daemon", "daemon", daemon(why).await),
        ("log", "last lines of the log", log()),
        ("settings", "settings", settings(config)),
        ("node-file", "node.json", of_node_file(&run_dir, &node)),
    ];
    match inspection(config, node.ok().map(|(node, _)| node)).await {
        Err(error) => made.push(("kernel-state", "kernel entries", Finding::skipped(error))),
        Ok(inspection) => {
            made.push(("kernel-state", "kernel entries", standing(&inspection)));
            made.extend(run(&inspection, &ON_A_NODE));
        }
    }
    if let Ok(config) = config {
        made.push(("store", "datastore", store(config).await));
    }
    made
}

/// The checks of a host on which fabricd is going to run.
pub async fn preflight(config: &Result<Config, String>) -> Vec<Made> {
    let mut made =
        vec![("settings", "settings", settings(config)), ("modules", "kernel modules", modules(Path::new("/")))];
    match inspection(config, None).await {
        Err(error) => made.push(("kernel-state", "kernel entries", Finding::skipped(error))),
        Ok(inspection) => {
            made.push(("udp-port", "VXLAN port", port(&inspection)));
            if let Ok(config) = config {
                made.push(("underlay", "underlay interface", interface(&inspection, config)));
            }
            made.extend(run(&inspection, &ON_A_NEW_HOST));
            made.push(("cni-plugins", "CNI plugins", plugins()));
        }
    }
    if let Ok(config) = config {
        made.push(("store", "datastore", store(config).await));
    }
    made
}

fn run(inspection: &Inspection, ids: &[&str]) -> Vec<Made> {
    let wanted = |check: &&Check| ids.contains(&check.0);
    ALL.iter().filter(wanted).map(|(id, title, check)| (*id, *title, check(inspection))).collect()
}

/// The command that shows the log, and the one that starts the daemon, by what manages it.
fn systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

fn output(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

async fn daemon(why: &str) -> Finding {
    let holder = lock::holder().await;
    let unit =
        if systemd() { output("systemctl", &["is-active", "fabricd"]).filter(|state| !state.is_empty()) } else { None };
    let unit = unit.map_or(String::new(), |state| format!("; its unit is {state}"));
    match holder {
        Some((holder, pid)) => {
            let pid = pid.map_or_else(|| "a process of another PID namespace".to_owned(), |pid| format!("pid {pid}"));
            let elsewhere =
                holder.map_or(String::new(), |holder| format!(", with the socket {}", holder.socket.display()));
            let fix = match systemd() {
                true => "end it; systemd starts it again\nsystemctl restart fabricd".to_owned(),
                false => format!("end it, and start it again\nkill {}", pid.trim_start_matches("pid ")),
            };
            Finding::failed(format!("it runs ({pid}{elsewhere}) but doesn't answer: {why}{unit}"), fix)
        }
        None => Finding::failed(
            format!("it doesn't run: {why}{unit}; running pods go on talking, nothing is repaired"),
            if systemd() {
                "systemctl start fabricd"
            } else {
                "start it: fabricd, or the DaemonSet's pod of this node"
            },
        ),
    }
}

/// The last lines of the log that tell of trouble.
fn log() -> Finding {
    let journal =
        if systemd() { output("journalctl", &["-u", "fabricd", "-n", "50", "--no-pager", "-o", "cat"]) } else { None };
    let Some(text) =
        journal.filter(|text| !text.is_empty()).or_else(|| fs::read_to_string("/var/log/fabricd.log").ok())
    else {
        return Finding::skipped(
            "there is no journal of fabricd here; in Kubernetes: kubectl -n fabric-system logs --prefix --container fabricd \
             --selector app.kubernetes.io/name=fabricd",
        );
    };
    let troubles =
        text.lines().rev().filter(|line| ["WARN", "ERROR", "panicked"].iter().any(|word| line.contains(word)));
    let mut last: Vec<&str> = troubles.take(3).collect();
    last.reverse();
    match last.is_empty() {
        true => Finding::fine(text.lines().last().unwrap_or_default().trim()),
        false => Finding::warning(last.join("\n"), "see these messages in docs/symptoms.md"),
    }
}

fn settings(config: &Result<Config, String>) -> Finding {
    match config {
        Ok(config) => {
            let store = match config.store {
                StoreKind::Etcd => format!("etcd at {}", config.etcd.endpoints.join(", ")),
                StoreKind::Kubernetes => "Kubernetes".to_owned(),
            };
            Finding::fine(format!("node {}, leases in {store}", config.node()))
        }
        Err(error) => Finding::failed(error, "correct that setting: fabricd --help shows all of them"),
    }
}

/// `node.json`, and how long ago it was written.
fn node_file(run_dir: &Path) -> Result<(NodeFile, Duration), String> {
    let file = run_dir.join(NODE_FILE);
    let told = |error: &dyn std::fmt::Display| format!("{}: {error}", file.display());
    let json = fs::read(&file).map_err(|error| told(&error))?;
    let written = fs::metadata(&file).and_then(|meta| meta.modified()).map_err(|error| told(&error))?;
    let node = NodeFile::decode(&json).map_err(|error| told(&error))?;
    Ok((node, SystemTime::now().duration_since(written).unwrap_or_default()))
}

fn of_node_file(run_dir: &Path, node: &Result<(NodeFile, Duration), String>) -> Finding {
    match node {
        Err(error) => Finding::failed(
            format!("{error}: no pod can be added"),
            format!("it is written when the daemon is ready; is {} its folder?", run_dir.display()),
        ),
        Ok((node, age)) => {
            let subnets: Vec<String> = node.subnets().values().map(|subnet| subnet.subnet.to_string()).collect();
            let age = format!("written {} min ago", age.as_secs() / 60);
            match &node.readiness {
                Readiness::Ready => Finding::fine(format!("ready, {}, {age}: pods are still added", subnets.join(" "))),
                Readiness::NotReady { reason, .. } => Finding::failed(
                    format!("not ready, {age}: {reason}"),
                    "start the daemon, and see: fabricctl doctor",
                ),
            }
        }
    }
}

/// What the daemon would know, from the kernel and `node.json`.
async fn inspection(config: &Result<Config, String>, node: Option<NodeFile>) -> Result<Inspection, String> {
    let mut netlink = Netlink::new(Options::default()).map_err(|error| error.to_string())?;
    let observed = netlink.observe().await.map_err(|error| format!("{error}; are you root?"))?;
    let fib = tokio::task::spawn_blocking(kernel::fib).await.map_err(|error| error.to_string())?;
    let name = node.as_ref().map(|node| node.node.clone());
    let name = name.or_else(|| config.as_ref().ok().map(|config| config.node().clone()));
    let mut view = View::new(name.unwrap_or_else(|| "unknown".parse().expect("a valid name")));
    let places = match config {
        Ok(config) => Places::of(config),
        Err(_) => Places::usual(),
    };
    view.vteps = vteps(&observed);
    view.pod_bridges = addresses::bridges_of(addresses::attachments(&places.attachments).unwrap_or_default().values());
    if let Some(node) = node {
        (view.mtu, view.ipv6_mtu) = (node.mtu, node.ipv6_mtu);
        view.network = network(&node, &observed);
        let key = LeaseKey::new(node.subnets().map(|_, subnet| subnet.subnet));
        view.holding = Holding {
            own: key.map(|key| Own { key, endpoints: Default::default(), epoch: node.epoch }),
            ..Holding::default()
        };
        view.readiness = node.readiness;
        view.firewall = Evaluator::default().evaluate(&view, &observed);
    }
    let snapshot = Snapshot {
        wanted: None,
        observed: Some(observed),
        left: None,
        last: None,
        blocked: "the daemon doesn't answer".into(),
    };
    Ok(Inspection {
        view: Arc::new(view),
        snapshot,
        mesh: Arc::new(Mesh::default()),
        places,
        fib: Arc::new(fib.map_err(|error| error.to_string())?),
        sections: Sections::default(),
        policy: None,
    })
}

fn vteps(observed: &Observed) -> Vec<VtepView> {
    let of = |(device, link): (&_, &fabric_core::state::VxlanLink)| {
        let has = |host: &&underlay::HostLink| host.addresses.iter().any(|(ip, _)| *ip == link.local);
        let underlay = observed.host.links.iter().find(has)?.name;
        let vtep = Vtep { mac: link.mac, local: link.local, mtu: link.mtu };
        Some(VtepView { device: *device, underlay, public_ip: link.local, vtep })
    };
    observed.ours.links.iter().filter_map(of).collect()
}

/// The network by `node.json`, with VNI and port of the device that stands.
fn network(node: &NodeFile, observed: &Observed) -> Option<NetworkConfig> {
    let mut config = serde_json::json!({ "Backend": { "Type": "vxlan" } });
    match node.ipv4 {
        Some(v4) => config["Network"] = v4.network.to_string().into(),
        None => config["EnableIPv4"] = false.into(),
    }
    if let Some(v6) = node.ipv6 {
        config["EnableIPv6"] = true.into();
        config["IPv6Network"] = v6.network.to_string().into();
        config["IPv6SubnetLen"] = v6.subnet.prefix_len().into();
    }
    if let Some(v4) = node.ipv4 {
        config["SubnetLen"] = v4.subnet.prefix_len().into();
    }
    if let Some(link) = observed.ours.links.values().next() {
        config["Backend"]["VNI"] = link.vni.get().into();
        config["Backend"]["Port"] = link.port.into();
    }
    NetworkConfig::decode(config.to_string().as_bytes()).ok()
}

/// What stands of ours in the kernel, which running pods go by.
fn standing(inspection: &Inspection) -> Finding {
    let Some(observed) = &inspection.snapshot.observed else { return Finding::skipped("the kernel can't be read") };
    let ours = &observed.ours;
    let names: Vec<String> = ours.links.keys().map(ToString::to_string).collect();
    let down = ours
        .links
        .iter()
        .filter(|(_, link)| !link.up)
        .map(|(name, _)| Problem::failure(format!("{name} is down"), format!("ip link set {name} up")));
    match names.is_empty() {
        true => Finding::failed(
            "there is no VXLAN device of fabricd: pods reach no other node",
            "the daemon makes it, and all that hangs on it: start it",
        ),
        false => Finding::of(
            down.collect(),
            format!(
                "{}, {} routes, {} neighbours, {} FDB entries: running pods reach the other nodes",
                names.join(" "),
                ours.routes.len(),
                ours.neighbours.len(),
                ours.fdb.len()
            ),
        ),
    }
}

async fn store(config: &Config) -> Finding {
    if config.store == StoreKind::Kubernetes {
        return Finding::skipped("it is Kubernetes: kubectl get nodes");
    }
    let shown = config.etcd.endpoints.join(", ");
    let options = match config.etcd.options() {
        Ok(options) => options,
        Err(error) => return Finding::failed(error.to_string(), "correct that setting: fabricd --help"),
    };
    let fix = format!("etcdctl --endpoints {} endpoint health", config.etcd.endpoints.join(","));
    match timeout(Duration::from_secs(5), Etcd::start(options).probe()).await {
        Ok(Ok(())) => Finding::fine(format!("etcd answers at {shown}")),
        Ok(Err(error)) => Finding::failed(format!("etcd at {shown}: {error}"), fix),
        Err(_) => Finding::failed(format!("etcd doesn't answer at {shown} within 5 s"), fix),
    }
}

/// Whether the VXLAN port is free for fabricd: that of flannel on Linux, unless the network config says another.
fn port(inspection: &Inspection) -> Finding {
    const USUAL: u16 = 8472;
    let observed = inspection.snapshot.observed.iter();
    let others = observed.flat_map(|observed| &observed.foreign.links);
    let device = others.filter(|(_, link)| link.vxlan.is_some_and(|(_, port, _)| port == USUAL)).map(|(name, _)| name);
    let choose = "or choose another Port in the network config";
    let mut problems: Vec<Problem> = device
        .map(|name| {
            Problem::failure(
                format!("the VXLAN device {name} has UDP port {USUAL}"),
                format!("remove what made it and the device, {choose}:\nip link del {name}"),
            )
        })
        .collect();
    if problems.is_empty() && overlay_checks::socket_at(inspection, USUAL) && inspection.view.vteps.is_empty() {
        problems.push(Problem::failure(
            format!("a program has UDP port {USUAL}"),
            format!("end it, {choose}:\nss -ulpn sport = :{USUAL}"),
        ));
    }
    Finding::of(problems, format!("UDP port {USUAL} is free for fabricd"))
}

fn interface(inspection: &Inspection, config: &Config) -> Finding {
    let Some(observed) = &inspection.snapshot.observed else { return Finding::skipped("the kernel can't be read") };
    match underlay::choose(&config.selectors(), &observed.host, Family::V4, &[]).map(|choice| choice.underlay) {
        Ok(chosen) => Finding::fine(format!("{}, {}, MTU {}", chosen.dev, chosen.local, chosen.mtu)),
        Err(error) => Finding::failed(error.to_string(), "name it: --iface NAME, or FABRICD_IFACE"),
    }
}

fn modules(root: &Path) -> Finding {
    let release = fs::read_to_string(root.join("proc/sys/kernel/osrelease")).unwrap_or_default();
    let folder = root.join("lib/modules").join(release.trim());
    let lists: Vec<String> = ["modules.builtin", "modules.dep"]
        .iter()
        .filter_map(|file| fs::read_to_string(folder.join(file)).ok())
        .collect();
    if lists.is_empty() {
        return Finding::skipped(format!("{} is not visible here", folder.display()));
    }
    let there = |module: &str| {
        let file = |name: &str| lists.iter().any(|list| list.contains(&format!("/{name}.ko")));
        root.join("sys/module").join(module).exists() || file(module) || file(&module.replace('_', "-"))
    };
    let missing = MODULES.iter().filter(|(name, ..)| !there(name)).map(|(name, what, needed)| {
        let words = format!("the kernel has no module {name}, for {what}");
        let fix = "install the modules of this kernel: linux-modules-extra on Ubuntu, kernel-modules-extra on Fedora";
        if *needed { Problem::failure(words, fix) } else { Problem::warning(words, fix) }
    });
    Finding::of(missing.collect(), "all are there, or are loaded when they are needed")
}

/// Whether a runtime finds the plugins that a pod takes.
fn plugins() -> Finding {
    let folders = ["/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"];
    let has = |name: &str| folders.iter().any(|folder| Path::new(folder).join(name).exists());
    let missing: Vec<PathBuf> =
        ["bridge", "host-local"].into_iter().filter(|name| !has(name)).map(PathBuf::from).collect();
    match missing.is_empty() {
        true => Finding::fine("bridge and host-local are there; fabricd install-cni brings fabric-cni"),
        false => Finding::warning(
            format!(
                "missing in {}: {}",
                folders.join(", "),
                missing.iter().map(|name| name.display().to_string()).collect::<Vec<_>>().join(" ")
            ),
            "install the standard plugins (Debian: apt install containernetworking-plugins), or name fabric-bridge as \
             the delegate: docs/cni.md",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnosis::Outcome;

    #[test]
    fn module_that_is_neither_loaded_nor_installed_is_missed() {
        let root = tempfile::tempdir().unwrap();
        let has = |file: &str, content: &str| {
            let file = root.path().join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, content).unwrap();
        };
        has("proc/sys/kernel/osrelease", "6.1.0\n");
        assert_eq!(modules(root.path()).outcome, Outcome::Skipped, "nothing is visible");
        has("lib/modules/6.1.0/modules.builtin", "kernel/net/bridge/bridge.ko\nkernel/drivers/net/veth.ko\n");
        has("lib/modules/6.1.0/modules.dep", "kernel/net/netfilter/nf_tables.ko.xz: kernel/x.ko.xz\n");
        let found = modules(root.path());
        assert_eq!(found.outcome, Outcome::Failed);
        assert_eq!(
            found.evidence,
            "2: the kernel has no module vxlan, for the tunnel; the kernel has no module br_netfilter, for \
             kube-proxy's Services, with iptables or IPVS"
        );
        has("sys/module/vxlan/version", "");
        assert_eq!(modules(root.path()).outcome, Outcome::Warning);
    }

    #[test]
    fn checks_that_are_made_without_a_daemon_exist() {
        for id in ON_A_NODE.iter().chain(&ON_A_NEW_HOST) {
            assert!(ALL.iter().any(|(known, ..)| known == id), "{id}");
        }
    }
}
