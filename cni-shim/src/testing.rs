//! A node for the unit tests: folders of its own, and a fake `bridge` that keeps a IPAM state.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use fabric_core::handoff::{NODE_FILE_VERSION, NodeFile, NodeSubnet, NotReady, Readiness};
use fabric_core::model::IfName;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::error::CniError;
use crate::exec::{Exec, ExecError, Exit, Invocation};
use crate::request::Request;
use crate::verbs::answer;

pub const ALL_VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// What Debian's plugins 1.1.1 say.
pub const DEBIAN: &[&str] = &["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0"];

/// The bridge of all tests, since a `cni0` may exist on the machine that runs them.
pub const NO_BRIDGE: &str = "no-such-bridge";

/// How the fake misbehaves.
#[derive(Clone)]
pub enum Fault {
    /// Exit code 1 with this on stdout.
    Says(String),
    /// Exit code 0 with this on stdout.
    Answers(String),
    Hangs,
    DiesOf(i32),
}

/// One call of the fake.
#[derive(Clone, Debug)]
pub struct Seen {
    pub verb: String,
    pub env: BTreeMap<&'static str, OsString>,
    pub config: Value,
}

pub struct FakeBridge {
    pub speaks: Vec<&'static str>,
    pub faults: BTreeMap<&'static str, Fault>,
    pub seen: RefCell<Vec<Seen>>,
    /// Container and interface of every address given out.
    pub ipam: RefCell<BTreeMap<(OsString, OsString), u8>>,
    /// The MTU of IPv6 routes by network namespace.
    pub limited: RefCell<Vec<(PathBuf, u32)>>,
}

impl Exec for FakeBridge {
    fn limit_ipv6(&self, netns: &Path, _: &IfName, mtu: u32) -> Result<(), CniError> {
        self.limited.borrow_mut().push((netns.to_owned(), mtu));
        Ok(())
    }

    fn make_bridge(&self, _: &IfName, _: u32) -> Result<(), CniError> {
        Ok(())
    }

    fn exec(&self, call: &Invocation) -> Result<Exit, ExecError> {
        let env: BTreeMap<_, _> = call.env.iter().cloned().collect();
        let verb = env["CNI_COMMAND"].to_string_lossy().into_owned();
        let config: Value = serde_json::from_slice(&call.stdin).expect("a delegate is told JSON");
        self.seen.borrow_mut().push(Seen { verb: verb.clone(), env: env.clone(), config: config.clone() });
        let exit =
            |code: i32, stdout: String| Ok(Exit { status: ExitStatus::from_raw(code << 8), stdout: stdout.into() });
        let key = || (env["CNI_CONTAINERID"].clone(), env["CNI_IFNAME"].clone());
        // A fault strikes after the work, which is when it leaves most behind.
        let mut output = json!({}).to_string();
        match verb.as_str() {
            "VERSION" => output = json!({"cniVersion": "1.0.0", "supportedVersions": self.speaks}).to_string(),
            "ADD" => {
                let mut ipam = self.ipam.borrow_mut();
                let last = (2..=254).find(|last| !ipam.values().any(|taken| taken == last)).expect("a free address");
                assert!(ipam.insert(key(), last).is_none(), "the delegate was called twice for one attachment");
                output = json!({
                    "cniVersion": config["cniVersion"],
                    "interfaces": [{"name": "cni0"}, {"name": "eth0", "sandbox": "/run/netns/pod"}],
                    "ips": [{"interface": 1, "address": format!("10.244.3.{last}/24"), "gateway": "10.244.3.1"}],
                    "routes": [{"dst": "10.244.0.0/16"}],
                })
                .to_string();
            }
            "DEL" => drop(self.ipam.borrow_mut().remove(&key())),
            _ => {}
        }
        match self.faults.get(verb.as_str()) {
            None => exit(0, output),
            Some(Fault::Answers(text)) => exit(0, text.clone()),
            Some(Fault::Says(text)) => exit(1, text.clone()),
            Some(Fault::DiesOf(signal)) => Ok(Exit { status: ExitStatus::from_raw(*signal), stdout: Vec::new() }),
            Some(Fault::Hangs) => {
                Err(ExecError::TimedOut { plugin: call.plugin.clone(), deadline: Duration::from_secs(45) })
            }
        }
    }
}

/// A node with a ready `node.json` and a fake `bridge`.
pub struct Node {
    pub dir: TempDir,
    pub bridge: FakeBridge,
}

impl Node {
    pub fn new() -> Self {
        let dir = TempDir::new().expect("a folder");
        fs::create_dir(dir.path().join("bin")).expect("a folder");
        fs::write(dir.path().join("bin/bridge"), "").expect("a file");
        let bridge = FakeBridge {
            speaks: DEBIAN.to_vec(),
            faults: BTreeMap::new(),
            seen: RefCell::default(),
            ipam: RefCell::default(),
            limited: RefCell::default(),
        };
        let node = Self { dir, bridge };
        node.write_node_file(Readiness::Ready);
        node
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write_node_file(&self, readiness: Readiness) {
        fs::write(self.path("node.json"), node_file(readiness).encode()).expect("a file");
    }

    pub fn not_ready(&self, code: NotReady) {
        self.write_node_file(Readiness::NotReady { code, reason: "the lease belongs to node-2".into() });
    }

    pub fn conf(&self, version: &str) -> Value {
        json!({
            "cniVersion": version, "name": "fabric", "type": "fabric-cni",
            "nodeFile": self.path("node.json"), "stateDir": self.path("state"), "readyTimeout": 0,
            "dataDir": self.path("addresses"), "delegate": {"bridge": NO_BRIDGE},
        })
    }

    /// Asks as a runtime would, about interface eth0 of container c1.
    pub fn ask(&self, verb: &str, conf: &Value) -> Result<Option<Value>, CniError> {
        self.ask_about("c1", verb, conf)
    }

    pub fn ask_about(&self, container: &str, verb: &str, conf: &Value) -> Result<Option<Value>, CniError> {
        let env = |name: &str| {
            Some(match name {
                "CNI_COMMAND" => verb.into(),
                "CNI_CONTAINERID" => container.into(),
                "CNI_IFNAME" => "eth0".into(),
                "CNI_NETNS" => "/proc/self/ns/net".into(),
                "CNI_PATH" => OsString::from(self.path("bin")),
                _ => return None,
            })
        };
        answer(&Request::read(env, conf.to_string().as_bytes())?, &self.bridge)
    }

    pub fn add(&self) -> Value {
        self.ask("ADD", &self.conf("1.0.0")).expect("ADD succeeds").expect("a result")
    }

    pub fn state_file(&self) -> PathBuf {
        self.path("state/fabric/c1@eth0.json")
    }

    /// Verbs that the delegate saw, without VERSION.
    pub fn delegated(&self) -> Vec<String> {
        let seen = self.bridge.seen.borrow();
        seen.iter().map(|seen| seen.verb.clone()).filter(|verb| verb != "VERSION").collect()
    }

    pub fn last_config(&self) -> Value {
        self.bridge.seen.borrow().last().expect("the delegate was called").config.clone()
    }

    /// No address taken, no file left.
    pub fn assert_clean(&self) {
        assert!(self.bridge.ipam.borrow().is_empty(), "addresses left: {:?}", self.bridge.ipam);
        let files = fs::read_dir(self.path("state/fabric")).map_or(0, Iterator::count);
        assert_eq!(files, 0, "files left in the state folder");
    }
}

pub fn node_file(readiness: Readiness) -> NodeFile {
    let ours = |network: &str, subnet: &str| NodeSubnet {
        network: network.parse().expect("valid"),
        subnet: subnet.parse().expect("valid"),
    };
    NodeFile {
        version: NODE_FILE_VERSION,
        node: "node-1".parse().expect("valid"),
        readiness,
        ipv4: Some(ours("10.244.0.0/16", "10.244.3.0/24")),
        ipv6: Some(ours("fd00:10:244::/48", "fd00:10:244:3::/64")),
        mtu: 1430,
        epoch: 7,
        ipv6_mtu: None,
        cni_data_dir: None,
    }
}
