//! What befalls the CNI plugin: it is killed, called twice, flooded, misled, and the disk or the delegate fails it.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::thread;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::runtime::{Call, Runtime, addresses};
use super::{Fault, Trial};
use crate::lab::cni::PLUGINS;
use crate::lab::{Lab, Stream};

pub(super) const ROWS: &[Fault] = &[
    Fault {
        number: 24,
        what: "ADD killed at some step, 10 times",
        holds: "DEL cleans: no cable, address or file is left",
        trial: killed_while_adding,
    },
    Fault {
        number: 25,
        what: "ADD twice; DEL thrice, without netns, prevResult and daemon",
        holds: "the second ADD is an error, every DEL succeeds",
        trial: repeated,
    },
    Fault {
        number: 26,
        what: "100 ADDs and DELs at once",
        holds: "all succeed, every address is given once",
        trial: crowd,
    },
    Fault {
        number: 27,
        what: "bad, huge and empty requests, names that are paths",
        holds: "codes 1, 4, 5, 6, 7; nothing happens",
        trial: bad_requests,
    },
    Fault {
        number: 28,
        what: "state files spoiled, the disk full",
        holds: "DEL cleans; ADD says so, attaches nothing, recovers",
        trial: spoiled_disk,
    },
    Fault {
        number: 29,
        what: "power cut under pods",
        holds: "the first ADD and GC free what they had",
        trial: power_cut,
    },
    Fault {
        number: 30,
        what: "ADD before the daemon is ready",
        holds: "STATUS 50, ADD 11, nothing left; later it succeeds",
        trial: too_early,
    },
    Fault {
        number: 31,
        what: "the delegate missing, dying, hanging",
        holds: "codes 100, 102, 101; cleaned up",
        trial: bad_delegates,
    },
    Fault {
        number: 32,
        what: "no descriptors left, read-only disk",
        holds: "0 packets lost; ADD fails cleanly, recovers",
        trial: starved,
    },
    Fault {
        number: 33,
        what: "a subnet's last address given",
        holds: "ADD says so, recovers after a DEL",
        trial: exhausted,
    },
];

fn killed_while_adding(trial: &mut Trial) -> Result<()> {
    let runtime = trial.runtime(|lab| lab)?;
    for _ in 0..10 {
        runtime.make("pod")?;
        let moment = format!("{:.4}", 0.001 + trial.random.f64() * 0.06);
        // In the foreground: the plugin alone, not what it has started.
        let killed = runtime.call("ADD", "pod").through(&["timeout", "--foreground", "-s", "KILL", &moment]);
        // Whether it had ended by then is chance.
        let _ = runtime.ask(&killed)?;
        // At once, while a delegate may still be at work.
        runtime.granted(&runtime.call("DEL", "pod"))?;
        runtime.unmake("pod")?;
        runtime.is_clean().with_context(|| format!("killed after {moment} s"))?;
    }
    Ok(())
}

fn repeated(trial: &mut Trial) -> Result<()> {
    let runtime = trial.runtime(|lab| lab)?;
    let first = runtime.add("pod")?;
    runtime.refused(&runtime.call("ADD", "pod"), &[103])?;
    let check = runtime.call("CHECK", "pod").with("prevResult", first.clone());
    runtime.granted(&check).context("the first attachment does not stay")?;

    let mut losses = [0, 1, 2];
    trial.random.shuffle(&mut losses);
    let mut del = runtime.call("DEL", "pod").with("prevResult", first);
    for loss in losses {
        match loss {
            0 => del = del.with("prevResult", Value::Null),
            1 => {
                runtime.unmake("pod")?;
                del.netns.clear();
            }
            _ => {
                runtime.node.kill_fabricd()?;
                runtime.node.run(&["rm", "/run/fabric/node.json"])?;
            }
        }
        runtime.granted(&del)?;
    }
    runtime.is_clean()
}

fn crowd(trial: &mut Trial) -> Result<()> {
    let runtime = trial.runtime(|lab| lab)?;
    let pods: Vec<String> = (0..100).map(|number| format!("pod-{number}")).collect();
    pods.iter().try_for_each(|pod| runtime.make(pod))?;
    let (early, late) = pods.split_at(50);
    let adds = |pods: &[String]| pods.iter().map(|pod| runtime.call("ADD", pod)).collect::<Vec<_>>();
    let dels = |pods: &[String]| pods.iter().map(|pod| runtime.call("DEL", pod)).collect::<Vec<_>>();

    at_once(&runtime, &adds(early))?;
    let mut calls = [dels(early), adds(late)].concat();
    trial.random.shuffle(&mut calls);
    let given: Vec<String> = at_once(&runtime, &calls)?.iter().flat_map(addresses).collect();
    let different: BTreeSet<&String> = given.iter().collect();
    ensure!(
        (given.len(), different.len()) == (50, 50),
        "{} addresses given, {} different",
        given.len(),
        different.len()
    );
    at_once(&runtime, &dels(late))?;
    pods.iter().try_for_each(|pod| runtime.unmake(pod))?;
    runtime.is_clean()
}

fn at_once(runtime: &Runtime, calls: &[Call]) -> Result<Vec<Value>> {
    thread::scope(|scope| {
        let running: Vec<_> = calls.iter().map(|call| scope.spawn(|| runtime.granted(call))).collect();
        running.into_iter().map(|call| call.join().map_err(|_| anyhow::anyhow!("a call panicked"))?).collect()
    })
}

fn bad_requests(trial: &mut Trial) -> Result<()> {
    let runtime = trial.runtime(|lab| lab)?;
    runtime.make("pod")?;
    let good = runtime.call("ADD", "pod");
    let whole = good.config.to_string();
    let cut = whole[..trial.random.usize(0..whole.len())].to_owned();
    let huge = format!("{{\"x\":\"{}\"}}", "x".repeat(2 << 20));
    let noise: Vec<u8> = std::iter::repeat_with(|| trial.random.u8(..)).take(300).collect();
    for stdin in [Vec::new(), cut.into_bytes(), huge.into_bytes(), noise, b"[[[[".repeat(50_000)] {
        let said = runtime.ask_with(&good, stdin)?;
        ensure!(said.as_ref().is_err_and(|error| error["code"] == 6), "garbage is answered by {said:?}");
    }
    for name in ["../../etc/x", "a/b", "..", "", "a b", "\u{e9}"] {
        runtime.refused(&Call { pod: name.to_owned(), ..good.clone() }, &[4])?;
    }
    for (key, value, codes) in [
        ("cniVersion", json!("7.0.0"), &[1][..]),
        ("name", json!("../../etc"), &[7]),
        ("stateDir", json!("../state"), &[7]),
        ("delegate", json!({ "type": "../../bin/sh" }), &[7]),
        ("ipam", json!({ "type": "dhcp" }), &[2]),
    ] {
        runtime.refused(&good.clone().with(key, value), codes)?;
    }
    runtime.is_clean()
}

fn spoiled_disk(trial: &mut Trial) -> Result<()> {
    let runtime = trial.runtime(|lab| lab)?;
    let state = "/var/lib/cni/fabric/fabric/pod@eth0.json";
    for _ in 0..5 {
        runtime.add("pod")?;
        let file = runtime.node.path(state)?;
        let mut content = fs::read(&file)?;
        match trial.random.u8(0..4) {
            0 => content.clear(),
            1 => content.truncate(trial.random.usize(0..content.len())),
            2 => content.iter_mut().for_each(|byte| *byte = trial.random.u8(..)),
            _ => {
                let position = trial.random.usize(0..content.len());
                content[position] ^= 0x10;
            }
        }
        fs::write(&file, &content)?;
        runtime.granted(&runtime.call("DEL", "pod")).with_context(|| String::from_utf8_lossy(&content).into_owned())?;
        runtime.unmake("pod")?;
        runtime.is_clean().with_context(|| String::from_utf8_lossy(&content).into_owned())?;
    }
    // A disk with no room for another file.
    runtime.make("pod")?;
    let full = runtime.call("ADD", "pod").with("stateDir", json!("/run/full"));
    runtime.node.run(&["mkdir", "/run/full"])?;
    runtime.node.run(&["mount", "-t", "tmpfs", "-o", "nr_inodes=1", "tmpfs", "/run/full"])?;
    runtime.refused(&full, &[5])?;
    runtime.node.run(&["mount", "-o", "remount,nr_inodes=100", "/run/full"])?;
    runtime.granted(&full)?;
    runtime.granted(&Call { verb: "DEL", ..full })?;
    runtime.unmake("pod")?;
    runtime.is_clean()
}

fn power_cut(trial: &mut Trial) -> Result<()> {
    let runtime = trial.runtime(|lab| lab)?;
    let before: Vec<Value> = (0..3).map(|n| runtime.add(&format!("pod-{n}"))).collect::<Result<_>>()?;
    runtime.node.power_off()?;
    runtime.node.boot()?;
    runtime.node.start_fabricd()?;
    runtime.node.wait_ready()?;
    let by_gc = trial.random.bool();
    if by_gc {
        let gc = runtime.call("GC", "").with("cni.dev/valid-attachments", json!([])).with("cniVersion", json!("1.1.0"));
        runtime.granted(&gc)?;
    } else {
        runtime.add("first")?;
    }
    let held = runtime.node.run(&["ls", "/var/lib/cni/networks/fabric"])?;
    let held: Vec<&str> = held.lines().filter(|name| name.parse::<std::net::IpAddr>().is_ok()).collect();
    ensure!(held.len() == usize::from(!by_gc), "held after the reboot: {held:?}; before: {before:?}");
    Ok(())
}

fn too_early(trial: &mut Trial) -> Result<()> {
    let runtime = trial.runtime(|lab| lab)?;
    let node = &runtime.node;
    node.kill_fabricd()?;
    if trial.random.bool() {
        node.run(&["rm", "/run/fabric/node.json"])?;
    } else {
        let reason = "the lease is another's";
        let said = json!({ "version": 1, "node": "node-1", "state": "not-ready", "code": "quarantine", "reason": reason,
                           "mtu": 1450, "epoch": 1 });
        fs::write(node.path("/run/fabric/node.json")?, said.to_string())?;
    }
    runtime.make("pod")?;
    let add = runtime.call("ADD", "pod").with("readyTimeout", json!(1));
    runtime.refused(&runtime.call("STATUS", "").with("cniVersion", json!("1.1.0")), &[50])?;
    runtime.refused(&add, &[11])?;
    runtime.is_clean()?;
    node.start_fabricd()?;
    runtime.granted(&add.with("readyTimeout", json!(60)))?;
    runtime.granted(&runtime.call("STATUS", "").with("cniVersion", json!("1.1.0")))?;
    runtime.granted(&runtime.call("DEL", "pod"))?;
    runtime.unmake("pod")?;
    runtime.is_clean()
}

fn bad_delegates(trial: &mut Trial) -> Result<()> {
    let runtime = trial.runtime(|lab| lab)?;
    let folder = runtime.node.path("/run/delegates")?;
    fs::create_dir(&folder)?;
    // The last two do their work before they fail: what they have attached has to go again.
    for (name, body) in [
        ("dying", "kill -9 $$"),
        ("babbling", "echo nonsense; exit 1"),
        ("dying-late", "/opt/cni/bin/bridge > /dev/null; kill -9 $$"),
        ("hanging", "/opt/cni/bin/bridge > /dev/null; sleep 1000"),
    ] {
        let known = r#"{"cniVersion":"1.0.0","supportedVersions":["0.4.0","1.0.0"]}"#;
        let plugin = folder.join(name);
        let script = format!(
            "#!/bin/sh\n[ $CNI_COMMAND != VERSION ] || {{ echo '{known}'; exit 0; }}\n\
             [ $CNI_COMMAND = ADD ] || exec /opt/cni/bin/bridge\n{body}\n"
        );
        fs::write(&plugin, script)?;
        fs::set_permissions(&plugin, fs::Permissions::from_mode(0o755))?;
    }
    for (kind, code) in [("missing", 100), ("dying", 102), ("babbling", 102), ("dying-late", 102), ("hanging", 101)] {
        runtime.make("pod")?;
        let call = runtime.call("ADD", "pod").with("delegate", json!({ "type": kind }));
        let call = Call { path: format!("/run/delegates:{PLUGINS}"), ..call };
        runtime.refused(&call, &[code])?;
        runtime.is_clean().with_context(|| format!("a {kind} delegate"))?;
        runtime.unmake("pod")?;
    }
    Ok(())
}

fn starved(trial: &mut Trial) -> Result<()> {
    let lab = Lab::builder().name(&trial.name).nodes(2).start()?;
    let there = lab.node("node-2")?.add_pod("there")?;
    let runtime = Runtime::on(lab, trial.slack)?;
    let stream = Stream::start(&there, &runtime.bystander)?;
    let daemon = runtime.node.running_service("fabricd")?.pid.to_string();
    let limit = |files: u32| {
        let status = Command::new("prlimit").args(["--pid", &daemon, &format!("--nofile={files}:1024")]).status()?;
        ensure!(status.success(), "prlimit: {status}");
        Ok(())
    };
    limit(4)?;
    for _ in 0..5 {
        runtime.make("pod")?;
        let files = format!("ulimit -n {}; exec \"$@\"", trial.random.u32(3..16));
        let _ = runtime.ask(&runtime.call("ADD", "pod").through(&["sh", "-c", &files, "sh"]))?;
        runtime.granted(&runtime.call("DEL", "pod"))?;
        runtime.unmake("pod")?;
        runtime.is_clean().with_context(|| format!("ADD after {files}"))?;
    }
    // The folder of all that CNI remembers.
    runtime.node.run(&["mount", "--bind", "/var/lib/cni", "/var/lib/cni"])?;
    runtime.node.run(&["mount", "-o", "remount,bind,ro", "/var/lib/cni"])?;
    runtime.make("pod")?;
    runtime.refused(&runtime.call("ADD", "pod"), &[5])?;
    runtime.is_clean()?;
    runtime.node.run(&["umount", "/var/lib/cni"])?;
    limit(1024)?;
    runtime.granted(&runtime.call("ADD", "pod"))?;
    runtime.granted(&runtime.call("DEL", "pod"))?;
    runtime.unmake("pod")?;
    runtime.is_clean()?;
    let report = stream.stop()?;
    ensure!(report.lost == 0, "{report:?}");
    runtime.node.wait_ready()
}

fn exhausted(trial: &mut Trial) -> Result<()> {
    let runtime = trial.runtime(|lab| lab.network(&["--network", "10.244.0.0/16", "--subnet-len", "29"]))?;
    // Of eight addresses the first is the VTEP's, the next the gateway's, the last for all; one is the bystander's.
    let pods: Vec<String> = (0..4).map(|number| format!("pod-{number}")).collect();
    for pod in &pods {
        runtime.add(pod)?;
    }
    runtime.make("last")?;
    let last = runtime.call("ADD", "last");
    let error = runtime.ask(&last)?;
    let said = error.as_ref().err().and_then(|error| error["msg"].as_str()).context("an address too many")?;
    ensure!(said.contains("no IP addresses available"), "{said}");
    let lucky = &pods[trial.random.usize(0..pods.len())];
    runtime.granted(&runtime.call("DEL", lucky))?;
    runtime.granted(&last)?;
    for pod in pods.iter().map(String::as_str).chain(["last"]) {
        runtime.granted(&runtime.call("DEL", pod))?;
        runtime.unmake(pod)?;
    }
    runtime.is_clean()
}
