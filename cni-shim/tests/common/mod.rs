//! A host of its own for a test: network and mount namespaces that go with the thread that made them, and the
//! runtime's side of CNI with the real plugins.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::fs;
use std::io::Write;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Where Debian's containernetworking-plugins puts them.
pub const PLUGINS: &str = "/usr/lib/cni";

/// The plugins that put pods on a bridge: what is true of one is true of the other.
pub const DELEGATES: [&str; 2] = ["bridge", "fabric-bridge"];

/// Runs `test` on a host for each delegate.
pub fn on_a_host_with_each_delegate(test: impl Fn(&Host) + Send + Copy + 'static) {
    for delegate in DELEGATES {
        println!("with {delegate}");
        on_a_host(delegate, test);
    }
}

/// Runs `test` on a host of its own.
pub fn on_a_host(delegate: &'static str, test: impl FnOnce(&Host) + Send + 'static) {
    // Threads and processes that are started from a thread are in its namespaces.
    let host = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("namespaces; this test has to run as root");
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private mounts");
        mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).expect("a /run of its own");
        for plugin in ["bridge", "host-local"] {
            let missing = "apt install containernetworking-plugins";
            assert!(Path::new(PLUGINS).join(plugin).exists(), "no {PLUGINS}/{plugin}: {missing}");
        }
        run("ip link set lo up");
        test(&Host { delegate, dir: TempDir::new().expect("a folder") });
    });
    if let Err(panic) = host.join() {
        resume_unwind(panic);
    }
}

pub struct Host {
    pub delegate: &'static str,
    pub dir: TempDir,
}

impl Host {
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a ready `node.json` with one subnet per family, given with its network.
    pub fn ready(&self, v4: Option<(&str, &str)>, v6: Option<(&str, &str)>) {
        let mut node = json!({"version": 1, "node": "node-1", "state": "ready", "mtu": 1450, "epoch": 1});
        match (v4, v6) {
            (Some(_), Some(_)) => node["ipv6_mtu"] = 1430.into(),
            (None, Some(_)) => node["mtu"] = 1430.into(),
            _ => {}
        }
        for (family, subnet) in [("ipv4", v4), ("ipv6", v6)] {
            if let Some((network, subnet)) = subnet {
                node[family] = json!({"network": network, "subnet": subnet});
            }
        }
        fs::write(self.path("node.json"), node.to_string()).expect("a file");
    }

    pub fn ready_on_both(&self) {
        self.ready(Some(("10.244.0.0/16", "10.244.3.0/24")), Some(("fd00:10:244::/48", "fd00:10:244:3::/64")));
    }

    pub fn conf(&self, version: &str) -> Value {
        json!({
            "cniVersion": version, "name": "fabric", "type": "fabric-cni", "nodeFile": self.path("node.json"),
            "stateDir": self.path("state"), "dataDir": self.path("addresses"), "readyTimeout": 0,
            "delegate": {"type": self.delegate},
        })
    }

    /// Calls any plugin as a runtime does, for interface `ifname` of `pod`.
    pub fn call(&self, plugin: &Path, verb: &str, pod: &str, ifname: &str, conf: &Value) -> Result<Value, Value> {
        heard(start(plugin, verb, pod, ifname, conf).wait_with_output().expect("it ends"))
    }

    /// Starts the shim for interface eth0 of `pod`, whose namespace has its name.
    pub fn start(&self, verb: &str, pod: &str, conf: &Value) -> Child {
        start(Path::new(env!("CARGO_BIN_EXE_fabric-cni")), verb, pod, "eth0", conf)
    }

    /// The shim's answer, `Err` by its exit code.
    pub fn ask(&self, verb: &str, pod: &str, conf: &Value) -> Result<Value, Value> {
        heard(self.start(verb, pod, conf).wait_with_output().expect("it ends"))
    }

    /// The shim's answer where the runtime's user adds `CNI_ARGS`.
    pub fn ask_with_args(&self, args: &str, verb: &str, pod: &str, conf: &Value) -> Result<Value, Value> {
        let mut shim = Command::new(env!("CARGO_BIN_EXE_fabric-cni"));
        heard(start_as(shim.env("CNI_ARGS", args), verb, pod, "eth0", conf).wait_with_output().expect("it ends"))
    }

    /// The shim's answer about interface eth0 of `pod`, whose namespace is called `netns`.
    pub fn ask_in(&self, netns: &str, verb: &str, pod: &str, conf: &Value) -> Result<Value, Value> {
        let script = format!("CNI_NETNS=/run/netns/{netns} exec {}", env!("CARGO_BIN_EXE_fabric-cni"));
        heard(
            start_as(Command::new("sh").args(["-c", &script]), verb, pod, "eth0", conf)
                .wait_with_output()
                .expect("it ends"),
        )
    }

    /// The same by a process that may open so many descriptors. `Err` of null when it couldn't even be started.
    pub fn ask_with_descriptors(&self, limit: u32, verb: &str, pod: &str, conf: &Value) -> Result<Value, Value> {
        let script = format!("ulimit -n {limit}; exec {}", env!("CARGO_BIN_EXE_fabric-cni"));
        let mut limited = Command::new("sh");
        let output =
            start_as(limited.args(["-c", &script]), verb, pod, "eth0", conf).wait_with_output().expect("it ends");
        if output.status.success() || output.status.code() == Some(1) { heard(output) } else { Err(Value::Null) }
    }

    /// The configuration of another network that the same node serves.
    pub fn conf_of(&self, network: &str) -> Value {
        let mut conf = self.conf("1.0.0");
        conf["name"] = network.into();
        conf
    }

    /// Adds a pod, whose namespace has its name, to a network.
    pub fn add_to(&self, network: &str, pod: &str) -> Value {
        run(&format!("ip netns add {pod}"));
        // A runtime does this by the loopback plugin.
        run(&format!("ip -n {pod} link set lo up"));
        self.ask("ADD", pod, &self.conf_of(network)).expect("ADD succeeds")
    }

    /// A runtime's way to make a node's pods and its memory go, but not the files on disk.
    pub fn reboot(&self, pods: &[&str]) {
        pods.iter().for_each(|pod| drop(run(&format!("ip netns del {pod}"))));
        run("ip link del cni0");
        wait_until("the pods' veths are gone", || !run("ip -o link show type veth").contains("link-netns"));
    }

    pub fn add(&self, pod: &str) -> Value {
        self.add_to("fabric", pod)
    }

    /// Addresses that host-local holds.
    pub fn addresses(&self) -> Vec<String> {
        self.addresses_in("fabric")
    }

    /// Addresses that are taken in a folder of host-local's, in order.
    pub fn addresses_in(&self, folder: &str) -> Vec<String> {
        let names = |entry: fs::DirEntry| entry.file_name().into_string().expect("text");
        let files = fs::read_dir(self.path("addresses").join(folder)).into_iter().flatten();
        let mut held: Vec<_> = files.map(|entry| names(entry.expect("an entry"))).collect();
        held.retain(|name| name != "lock" && !name.starts_with("last_reserved_ip"));
        held.sort();
        held
    }

    /// No address, no state file, no end of a veth.
    pub fn assert_clean(&self) {
        wait_until("veths of dead namespaces are gone", || run("ip -o link show type veth").is_empty());
        assert_eq!(self.addresses(), [""; 0], "addresses left");
        let files = fs::read_dir(self.path("state/fabric")).map_or(0, Iterator::count);
        assert_eq!(files, 0, "state files left");
        assert_eq!(run("ip -o link show type veth"), "", "interfaces left");
    }
}

fn start(plugin: &Path, verb: &str, pod: &str, ifname: &str, conf: &Value) -> Child {
    start_as(&mut Command::new(plugin), verb, pod, ifname, conf)
}

fn start_as(plugin: &mut Command, verb: &str, pod: &str, ifname: &str, conf: &Value) -> Child {
    let mut child = plugin
        .env("CNI_COMMAND", verb)
        .env("CNI_CONTAINERID", pod)
        .env("CNI_NETNS", format!("/run/netns/{pod}"))
        .env("CNI_IFNAME", ifname)
        .env("CNI_PATH", PLUGINS)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the plugin starts");
    // One that can't even start reads nothing.
    let _ = child.stdin.take().expect("piped").write_all(conf.to_string().as_bytes());
    child
}

fn heard(output: Output) -> Result<Value, Value> {
    let text = String::from_utf8(output.stdout).expect("text");
    let json = if text.is_empty() { Value::Null } else { serde_json::from_str(&text).expect("JSON") };
    let stderr = String::from_utf8_lossy(&output.stderr);
    match output.status.code() {
        Some(0) => Ok(json),
        Some(1) => Err(json),
        other => panic!("exit {other:?}: {text} {stderr}"),
    }
}

/// Waits for what the kernel does by itself a moment later: a namespace goes after its last file, its veths with it.
pub fn wait_until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline, "not within ten seconds: {what}");
        #[expect(clippy::disallowed_methods, reason = "between two looks")]
        thread::sleep(Duration::from_millis(10));
    }
}

/// All answers of shims that run at the same time.
pub fn all(running: Vec<Child>) -> Vec<Result<Value, Value>> {
    running.into_iter().map(|child| heard(child.wait_with_output().expect("it ends"))).collect()
}

/// Runs a command that must succeed in the end: a neighbour may not answer yet, while the plugin `bridge` has its
/// address checked for duplicates.
pub fn eventually(command: &str) {
    wait_until(command, || output(command).status.success());
}

fn output(command: &str) -> Output {
    let mut words = command.split_whitespace();
    Command::new(words.next().expect("a command")).args(words).output().expect(command)
}

/// Runs a command that must succeed.
pub fn run(command: &str) -> String {
    let output = output(command);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {stderr}{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stdout).expect("text")
}

/// What `ip -j` says.
pub fn ip(arguments: &str) -> Value {
    serde_json::from_str(&run(&format!("ip -j {arguments}"))).expect("JSON")
}
