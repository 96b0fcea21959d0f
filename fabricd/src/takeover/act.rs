//! Takes a step. Each can be taken again after it was cut off in the middle.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use fabric_core::attachments::Owner;
use fabric_core::diff::{Op, diff};
use fabric_core::handoff::NODE_FILE;
use fabric_core::model::Family;
use fabric_core::state::{Routing, State};
use fabric_core::takeover::{ASIDE, Facts, Pod, Step};
use nix::fcntl::{Flock, FlockArg};
use serde_json::{Map, Value};

use super::{TakeoverArgs, open_kernel};
use crate::atomic_file::{remove_if_there, replace};
use crate::commands::install_cni::{InstallCni, Part};
use crate::config::Config;
use crate::kernel::{Kernel as _, takeover};

/// Takes a step that isn't one of waiting.
pub(super) async fn take(step: &Step, args: &TakeoverArgs, config: &Config, facts: &Facts) -> Result<()> {
    match step {
        Step::AwaitFabricd | Step::AwaitFlanneld => Ok(()),
        Step::Rename(from, to) => Ok(takeover::TakeoverSocket::open()?.rename(from, to)?),
        Step::AddAltname(dev, name) => Ok(takeover::TakeoverSocket::open()?.add_altname(dev, name)?),
        Step::DeleteAltname(dev, name) => Ok(takeover::TakeoverSocket::open()?.delete_altname(dev, name)?),
        Step::DeleteRoute(route) => Ok(takeover::TakeoverSocket::open()?.delete_route(route)?),
        Step::Iptables(family, rules) => {
            let program = if *family == Family::V4 { "iptables-restore" } else { "ip6tables-restore" };
            run(program, &["--noflush", "--wait", "5"], rules)
        }
        Step::DeleteFlannelTable(Family::V4) => run("nft", &["delete", "table", "ip", "flannel-ipv4"], ""),
        Step::DeleteFlannelTable(Family::V6) => run("nft", &["delete", "table", "ip6", "flannel-ipv6"], ""),
        Step::DeleteFastPath(_) => delete_all(config, |op| matches!(op, Op::FastPath(_))).await,
        Step::DeleteOurs(_) => delete_ours(config, facts).await,
        Step::OurConflist(_, network, flannels) => {
            let install = InstallCni {
                bin_dir: args.bin_dir.clone(),
                conf_dir: config.cni_conf_dir.clone(),
                conf_name: args.conf_name.clone(),
                network_name: Some(network.clone()),
                cni_version: args.cni_version,
                source_dir: None,
                run_dir: config.run_dir.clone(),
                ready_timeout: 0,
                only: Some(Part::Conflist),
                stay: false,
                uninstall: false,
            };
            // Ours sorts first: from now on the runtime takes it, and the other is of no use any more.
            install.place_conflist()?;
            match flannels {
                Some(file) => rename(&config.cni_conf_dir, file, &format!("{file}{ASIDE}")),
                None => Ok(()),
            }
        }
        Step::FlannelsConflist { dir, back, gone } => {
            if let Some(file) = back {
                rename(dir, file, file.trim_end_matches(ASIDE))?;
            }
            // Ours sorted first: from now on the runtime takes flannel's.
            gone.iter().try_for_each(|file| Ok(remove_if_there(&dir.join(file))?))
        }
        Step::CloseNode => Ok(remove_if_there(&config.run_dir.join(NODE_FILE))?),
        Step::HandOverPod(pod, network) => hand_over(pod, network, &args.flannel_dir, config),
    }
}

fn rename(dir: &Path, from: &str, to: &str) -> Result<()> {
    let (from, to) = (dir.join(from), dir.join(to));
    fs::rename(&from, &to).with_context(|| format!("mv {} {}", from.display(), to.display()))
}

fn run(program: &str, args: &[&str], input: &str) -> Result<()> {
    let said = || format!("{program} {}", args.join(" "));
    let mut child = Command::new(program);
    let mut child = child.args(args).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().with_context(said)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).with_context(said)?;
    }
    let output = child.wait_with_output().with_context(said)?;
    ensure!(output.status.success(), "{}: {}", said(), String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// Routes of peers that are gone, all nexthop objects, and then the packet filter: while peers are reached by a route of
/// ours, nothing of it goes.
async fn delete_ours(config: &Config, facts: &Facts) -> Result<()> {
    let mut kernel = takeover::TakeoverSocket::open()?;
    let is_leased = |route: &fabric_core::takeover::Route| {
        facts.leases.subnets(route.dst.family()).any(|subnet| subnet == route.dst)
    };
    for route in facts.routes.iter().filter(|route| route.ours && !is_leased(route)) {
        kernel.delete_route(route)?;
    }
    for id in kernel.nexthops()? {
        kernel.delete_nexthop(id)?;
    }
    delete_all(config, |op| matches!(op, Op::Filter(_))).await
}

/// Deletes all that is ours of one section.
async fn delete_all(config: &Config, is_of_it: fn(&Op) -> bool) -> Result<()> {
    let mut kernel = open_kernel(config)?;
    let observed = kernel.observe().await?;
    let plan = diff(State::default(), observed.found(&Routing::new()));
    for stage in plan.stages() {
        let ops: Vec<Op> = stage.iter().filter(|op| is_of_it(op)).cloned().collect();
        for outcome in kernel.apply(&ops).await {
            outcome?;
        }
    }
    Ok(())
}

/// flannel's file first, then the addresses, then our own memory: whatever is left in between, a DEL of either plugin
/// finds what it needs.
fn hand_over(pod: &Pod, network: &str, flannel_dir: &Path, config: &Config) -> Result<()> {
    let saved = config.cni_state_dir.join(&pod.network).join(format!("{}@{}.json", pod.container, pod.ifname));
    let content = fs::read(&saved).with_context(|| format!("cannot read {}", saved.display()))?;
    let line = content.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let mut told: Map<String, Value> = serde_json::from_slice::<Map<String, Value>>(line)
        .ok()
        .and_then(|saved| Some(saved.get("config")?.as_object()?.clone()))
        .with_context(|| format!("{} is spoiled; end that pod first", saved.display()))?;
    told.insert("name".into(), network.into());
    told.insert("cniVersion".into(), "1.0.0".into());
    if told.get("type").is_some_and(|kind| kind == "fabric-bridge") {
        told.insert("type".into(), "bridge".into());
    }
    replace(&flannel_dir.join(&pod.container), &serde_json::to_vec(&told)?, 0o600)?;

    let owner = Owner { network: pod.network.clone(), container: pod.container.clone(), ifname: pod.ifname.clone() };
    let target = config.cni_data_dir.join(network);
    fs::create_dir_all(&target).with_context(|| format!("cannot make {}", target.display()))?;
    let lock = fs::OpenOptions::new().create(true).truncate(false).write(true).open(target.join("lock"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    for entry in crate::host::addresses::entries(&config.cni_data_dir)? {
        let folder = entry.file.parent().unwrap_or(Path::new("/"));
        if entry.owner.as_ref() == Some(&owner) && folder != target {
            let content = format!("{}\r\n{}", pod.container, pod.ifname);
            replace(&target.join(entry.ip.to_string()), content.as_bytes(), 0o600)?;
            remove_if_there(&entry.file)?;
        }
    }
    Ok(remove_if_there(&saved)?)
}
