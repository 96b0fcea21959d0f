//! What is there: store, kernel, processes, rules of iptables, files.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use fabric_core::diff::{Op, diff};
use fabric_core::handoff::{NODE_FILE, NodeFile, Readiness};
use fabric_core::model::{Family, PerFamily};
use fabric_core::record::LeaseKey;
use fabric_core::state::nft::TableKey;
use fabric_core::state::{Routing, State};
use fabric_core::takeover::{Facts, Iptables, Naming, Pod};
use nix::unistd::{SysconfVar, sysconf};
use serde_json::Value;
use tokio::time::timeout;

use super::{TakeoverArgs, open_kernel};
use crate::commands::conflists;
use crate::config::Config;
use crate::host::addresses::attachments;
use crate::host::lock;
use crate::kernel::{Kernel as _, takeover};
use crate::store::{LeaseStore, Network};

/// The network's name in our conflist as it is shipped.
const DEFAULT_NETWORK: &str = "fabric";

/// How long the store may take to answer.
const ANSWER: Duration = Duration::from_secs(10);

/// Everything that the decision depends on.
pub(super) async fn facts(args: &TakeoverArgs, config: &Config, store: &impl LeaseStore) -> Result<Facts> {
    let (network, leases) = timeout(ANSWER, async {
        let network = store.network().wait_for(|network| *network != Network::Unknown).await?.clone();
        let leases = store.leases().wait_for(Option::is_some).await?.clone();
        anyhow::Ok((network, leases.unwrap_or_default()))
    })
    .await
    .with_context(|| format!("the store does not answer: {:?}", *store.connection().borrow()))??;
    let place = store.config_place().name;
    let network = match network {
        Network::Valid(network) => network,
        Network::Invalid(error) => bail!("the network config at {place} can't be used: {error}"),
        Network::Missing | Network::Unknown => bail!("there is no network config at {place}"),
    };

    // Before the kernel is looked at: a node that is ready by then has its whole filter.
    let ready = ready(config);
    let mut kernel = takeover::TakeoverSocket::open()?;
    let routes = kernel.routes()?;
    let observed = open_kernel(config)?.observe().await?;
    let plan = diff(State::default(), observed.found(&Routing::new()));
    let told = |is_it: fn(&Op) -> bool| plan.ops().iter().filter(move |op| is_it(op)).map(ToString::to_string);
    let filter = told(|op| matches!(op, Op::Filter(_)));
    let fast_path = told(|op| matches!(op, Op::FastPath(_))).collect();
    let leased: BTreeSet<_> = Family::ALL.into_iter().flat_map(|family| leases.subnets(family)).collect();
    let left = routes.iter().filter(|route| route.ours && !leased.contains(&route.dst));
    let left = left.map(|route| format!("ip route del {} via {} dev {}", route.dst, route.gateway, route.dev));
    let nexthops = (!kernel.nexthops()?.is_empty()).then(|| "ip nexthop flush proto 250".to_owned());
    let has_filter = observed.filter.get(&TableKey::Fabric);
    let mut cni = conflists::find(&config.cni_conf_dir, &args.conf_name)?;
    let plugin = args.bin_dir.join("fabric-cni");
    cni.plugin_missing = (!plugin.is_file()).then(|| args.bin_dir.clone());
    let names: BTreeSet<String> =
        [&cni.ours, &cni.flannels, &cni.aside].into_iter().flatten().map(|file| file.network.clone()).collect();
    let is_clusters = |network: &str| network == DEFAULT_NETWORK || names.contains(network);
    let pods = attachments(&config.cni_state_dir)?.into_keys().filter(|owner| is_clusters(&owner.network));
    cni.pods =
        pods.map(|owner| Pod { network: owner.network, container: owner.container, ifname: owner.ifname }).collect();
    let flannels = cni.flannels.as_ref().or(cni.aside.as_ref());
    cni.has_flannels_pods = flannels.is_some_and(|file| remembers(&args.flannel_dir, &file.network));
    let running = lock::holder().await;
    let flanneld = process_of("flanneld")?;
    Ok(Facts {
        node: config.node().clone(),
        network,
        devices: kernel.devices()?,
        addresses: kernel.addresses()?,
        public_ips: config.public_ips(),
        naming: naming(),
        keep_name: args.keep_name,
        flanneld: flanneld.map(how_to_end),
        flanneld_wrote_subnet_env: flanneld.is_some_and(|pid| is_younger(&config.subnet_file, pid) == Some(true)),
        fabricd: running.map(|(_, pid)| pid.map_or_else(|| "ss -xlp shows its process".to_owned(), how_to_end)),
        ready,
        masquerades: has_filter.map(|table| table.chains.contains_key("postrouting")),
        masquerade_wanted: config.filter.ip_masq,
        masquerade_waived: args.no_masquerade,
        flannels_masquerade: fs::read_to_string(&config.subnet_file)
            .is_ok_and(|env| env.lines().any(|line| line == "FLANNEL_IPMASQ=true")),
        iptables: Family::ALL.into_iter().filter_map(|family| Some((family, rules(family)?))).collect(),
        flannel_tables: flannel_tables(),
        ours: left.chain(nexthops).chain(filter).collect(),
        fast_path,
        services: observed.filter.contains_key(&TableKey::Services),
        policies: observed.filter.contains_key(&TableKey::Policy),
        assigned: store.assigned().is_some(),
        routes,
        leases,
        cni,
    })
}

/// Whether flannel's plugin remembers a pod of this network.
fn remembers(dir: &Path, network: &str) -> bool {
    let files = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut told = files.filter_map(|file| serde_json::from_slice::<Value>(&fs::read(file.path()).ok()?).ok());
    told.any(|config| config["name"] == network)
}

/// By the kernel's version.
fn naming() -> Naming {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map(|number| number.parse::<u32>().unwrap_or_default());
    match (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default()) {
        (..5, _) | (5, ..5) => Naming::Fixed,
        (5, _) | (6, ..2) => Naming::Altname,
        _ => Naming::Rename,
    }
}

/// The subnets of a `node.json` that says ready.
fn ready(config: &Config) -> Option<LeaseKey> {
    let node = NodeFile::decode(&fs::read(config.run_dir.join(NODE_FILE)).ok()?).ok()?;
    let subnets = node.subnets().map(|_, ours| ours.subnet);
    (node.readiness == Readiness::Ready).then(|| LeaseKey::new(subnets)).flatten()
}

/// A process of this name in this network namespace.
fn process_of(name: &str) -> Result<Option<i32>> {
    let here = fs::metadata("/proc/self/ns/net").context("cannot look at this network namespace")?.ino();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let comm = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        // Without CAP_SYS_PTRACE it can't be told where it is: here, as far as it matters.
        let is_elsewhere = || match fs::metadata(entry.path().join("ns/net")) {
            Ok(there) => there.ino() != here,
            Err(error) => error.kind() != ErrorKind::PermissionDenied,
        };
        if comm.trim() == name && !is_elsewhere() {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}

/// Whether a file was written after a process was started. `None` when one of them is not there any more.
fn is_younger(file: &Path, pid: i32) -> Option<bool> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Field 22 of proc(5), `starttime`; the second one is a name in parentheses, which may have spaces.
    let ticks: f64 = stat.rsplit(')').next()?.split_whitespace().nth(19)?.parse().ok()?;
    let per_second = sysconf(SysconfVar::CLK_TCK).ok()??;
    let uptime: f64 = fs::read_to_string("/proc/uptime").ok()?.split(' ').next()?.parse().ok()?;
    let runs_for = uptime - ticks / per_second as f64;
    let written = fs::metadata(file).ok()?.modified().ok()?;
    Some(written.elapsed().unwrap_or_default().as_secs_f64() < runs_for)
}

/// How a process is ended so that whoever started it doesn't start it again.
fn how_to_end(pid: i32) -> String {
    let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    if cgroup.contains("kubepods") {
        return format!("it is process {pid}, of a pod: keep its DaemonSet off this node by a label");
    }
    let service = cgroup.lines().filter_map(|line| line.rsplit('/').next()).find(|last| last.ends_with(".service"));
    match service {
        Some(service) => format!("systemctl disable --now {service}"),
        None => format!("kill {pid}"),
    }
}

/// What `iptables -S` shows; `None` where there is no such program, or it doesn't work.
fn rules(family: Family) -> Option<Iptables> {
    let program = if family == Family::V4 { "iptables" } else { "ip6tables" };
    let lines = |table: &str| {
        let output = Command::new(program).args(["--wait", "5", "-t", table, "-S"]).output().ok()?;
        let text = String::from_utf8(output.stdout).ok().filter(|_| output.status.success())?;
        Some(text.lines().map(str::to_owned).collect::<Vec<_>>())
    };
    Some(Iptables { nat: lines("nat")?, filter: lines("filter")? })
}

/// `nft list tables`, of flannel's.
fn flannel_tables() -> PerFamily<()> {
    let output = Command::new("nft").args(["list", "tables"]).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let has = |table: &str| text.lines().any(|line| line == table).then_some(());
    PerFamily { v4: has("table ip flannel-ipv4"), v6: has("table ip6 flannel-ipv6") }
}
