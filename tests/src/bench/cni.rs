//! What a pod's start and end wait for: ADD and DEL of each way to have a pod on a bridge, beside the standard
//! plugins called directly.
//!
//! Time runs from before the plugin is started to its end, as a runtime has it. The ways take turns, so that what else
//! goes on on the machine falls on all of them; each has a bridge and a subnet of its own.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::Report;
use super::report::{ms, quantile, sorted};
use crate::lab::binaries;
use crate::netns::ip;

/// Where Debian has the standard plugins.
const STANDARD: &str = "/usr/lib/cni";

/// How many pods come at the same time.
const CROWD: usize = 8;

/// One way to have a pod on a bridge.
struct Way {
    name: &'static str,
    plugin: PathBuf,
    config: PathBuf,
}

/// Measures so many ADDs and DELs of each way, one at a time and eight at once; our plugins are those in `ours`.
///
/// # Errors
/// A plugin fails, or this isn't root.
pub fn run(report: &mut Report, ours: &Path, rounds: usize) -> Result<()> {
    let measured = thread::scope(|scope| scope.spawn(|| on_a_host(ours, rounds)).join());
    let measured = measured.map_err(|_| anyhow!("the benchmark panicked"))??;
    for (section, ways) in measured {
        let mut reference: Option<[f64; 2]> = None;
        for (name, samples) in ways {
            let samples = sorted(samples);
            let quantiles = [0.5, 0.99].map(|share| quantile(&samples, share));
            for (label, value) in ["p50", "p99"].into_iter().zip(quantiles) {
                report.number(&section, &format!("{name}, {label}"), "ms", value);
            }
            match reference {
                None => reference = Some(quantiles),
                Some(reference) => {
                    report.ratio(
                        &section,
                        &format!("{name}, p50, of the standard plugins'"),
                        quantiles[0],
                        reference[0],
                    );
                    report.ratio(
                        &section,
                        &format!("{name}, p99, of the standard plugins'"),
                        quantiles[1],
                        reference[1],
                    );
                }
            }
        }
    }
    Ok(())
}

type Measured = Vec<(String, Vec<(&'static str, Vec<f64>)>)>;

/// In network and mount namespaces that go with this thread.
fn on_a_host(ours: &Path, rounds: usize) -> Result<Measured> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).context("this benchmark runs as root")?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none)?;
    ip("link set lo up");
    let pods: Vec<String> = (1..=CROWD).map(|number| format!("pod-{number}")).collect();
    pods.iter().for_each(|pod| drop(ip(&format!("netns add {pod}"))));
    // Not in memory: host-local's books are on the disk, and so is what fabric-cni remembers.
    let disk = TempDir::new_in(binaries::folder()?)?;
    let ways = ways(ours, disk.path())?;

    let mut measured = Measured::new();
    for (label, crowd, rounds) in [("one at a time", 1, rounds), ("eight at once", CROWD, rounds.div_ceil(CROWD))] {
        let mut samples: Vec<[Vec<f64>; 2]> = ways.iter().map(|_| [vec![], vec![]]).collect();
        // The first round makes bridges and folders, and isn't counted.
        for round in 0..=rounds {
            for (way, samples) in ways.iter().zip(&mut samples) {
                for (verb, samples) in ["ADD", "DEL"].into_iter().zip(samples) {
                    let times = at_once(&pods[..crowd], |pod| way.call(verb, pod))?;
                    if round > 0 {
                        samples.extend(times.into_iter().map(ms));
                    }
                }
            }
        }
        for (which, verb) in ["ADD", "DEL"].into_iter().enumerate() {
            let of_verb = ways.iter().zip(&samples).map(|(way, samples)| (way.name, samples[which].clone()));
            measured.push((format!("CNI {verb}, {label}"), of_verb.collect()));
        }
    }
    Ok(measured)
}

fn ways(ours: &Path, disk: &Path) -> Result<Vec<Way>> {
    let bridge = |number: u8, kind: &str| {
        let routes = json!([{ "dst": "10.244.0.0/16", "gw": format!("10.244.{number}.1") }]);
        json!({
            "cniVersion": "1.0.0", "name": format!("way-{number}"), "type": kind, "bridge": format!("cni{number}"),
            "isGateway": true, "isDefaultGateway": true, "hairpinMode": true, "ipMasq": false, "mtu": 1450,
            "ipam": {
                "type": "host-local", "dataDir": disk.join("addresses"), "routes": routes,
                "ranges": [[{ "subnet": format!("10.244.{number}.0/24") }]],
            },
        })
    };
    let shim = |number: u8, kind: &str| -> Result<Value> {
        let node = disk.join(format!("node-{number}.json"));
        let subnet = json!({ "network": "10.244.0.0/16", "subnet": format!("10.244.{number}.0/24") });
        let content =
            json!({ "version": 1, "node": "node-1", "state": "ready", "mtu": 1450, "epoch": 1, "ipv4": subnet });
        fs::write(&node, content.to_string())?;
        Ok(json!({
            "cniVersion": "1.0.0", "name": format!("way-{number}"), "type": "fabric-cni", "nodeFile": node,
            "stateDir": disk.join("state"), "dataDir": disk.join("addresses"),
            "delegate": { "type": kind, "bridge": format!("cni{number}") },
        }))
    };
    let ways = [
        ("bridge + host-local", Path::new(STANDARD).join("bridge"), bridge(1, "bridge")),
        ("fabric-cni over bridge + host-local", ours.join("fabric-cni"), shim(2, "bridge")?),
        ("fabric-bridge", ours.join("fabric-bridge"), bridge(3, "fabric-bridge")),
        ("fabric-cni with fabric-bridge", ours.join("fabric-cni"), shim(4, "fabric-bridge")?),
    ];
    ways.into_iter()
        .enumerate()
        .map(|(number, (name, plugin, config))| {
            let file = disk.join(format!("config-{number}.json"));
            fs::write(&file, config.to_string())?;
            Ok(Way { name, plugin, config: file })
        })
        .collect()
}

impl Way {
    fn call(&self, verb: &str, pod: &str) -> Result<Duration> {
        let mut command = Command::new(&self.plugin);
        command.env_clear().env("CNI_COMMAND", verb).env("CNI_CONTAINERID", pod).env("CNI_IFNAME", "eth0");
        command.env("CNI_NETNS", format!("/run/netns/{pod}")).env("CNI_PATH", STANDARD);
        let answer = tempfile::tempfile()?;
        command.stdin(File::open(&self.config)?).stdout(Stdio::from(answer.try_clone()?));
        let began = Instant::now();
        let status = command.status().with_context(|| format!("cannot run {}", self.plugin.display()))?;
        let took = began.elapsed();
        if !status.success() {
            use std::io::{Read as _, Seek as _};
            let (mut answer, mut text) = (answer, String::new());
            answer.rewind()?;
            answer.read_to_string(&mut text)?;
            let how = status.code().or(status.signal());
            ensure!(status.success(), "{verb} by {} for {pod} ended with {how:?}: {text}", self.name);
        }
        Ok(took)
    }
}

fn at_once<T: Send>(pods: &[String], task: impl Fn(&str) -> Result<T> + Sync) -> Result<Vec<T>> {
    thread::scope(|scope| {
        let running: Vec<_> = pods.iter().map(|pod| scope.spawn(|| task(pod))).collect();
        running.into_iter().map(|one| one.join().map_err(|_| anyhow!("a call panicked"))?).collect()
    })
}
