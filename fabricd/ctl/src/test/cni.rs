//! A network namespace attached by the node's CNI plugins, as a container runtime does it (CNI specification 1.0.0,
//! sections 3 and 4): the first config of the folder, its plugins in order for ADD, backwards for DEL.

use std::fs::{self, File};
use std::io::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context as _, Result, anyhow, bail};
use fabricd::errors::chain;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use serde_json::{Value, json};

/// Where network namespaces are, by their names, as with `ip netns`.
const NAMESPACES: &str = "/run/netns";
/// What the names of ours begin with; the process number follows.
const PREFIX: &str = "fabric-test-";
const INTERFACE: &str = "eth0";

/// The runtime's config and plugins.
#[derive(Clone, Debug)]
pub struct Network {
    conflist: Value,
    /// The file that it is from.
    pub file: PathBuf,
    bin_dirs: Vec<PathBuf>,
}

/// An attached namespace. [`Pod::remove`] takes it away.
#[derive(Debug)]
pub struct Pod {
    network: Network,
    name: String,
    result: Value,
}

impl Network {
    /// The config that a runtime takes: the first of the folder by name.
    ///
    /// # Errors
    /// There is none, or it isn't one.
    pub fn of(conf_dir: &Path, bin_dirs: &[PathBuf]) -> Result<Self> {
        let told = || format!("cannot read the CNI configs in {}", conf_dir.display());
        let entries =
            fs::read_dir(conf_dir).with_context(told)?.collect::<std::io::Result<Vec<_>>>().with_context(told)?;
        let is_config = |file: &PathBuf| {
            file.extension().is_some_and(|kind| ["conflist", "conf", "json"].iter().any(|known| kind == *known))
        };
        let file = entries.iter().map(fs::DirEntry::path).filter(is_config).min();
        let file = file.with_context(|| {
            format!("there is no CNI config in {}; fabricd install-cni writes one", conf_dir.display())
        })?;
        let text = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let config: Value = serde_json::from_slice(&text).with_context(|| format!("{} is no JSON", file.display()))?;
        let conflist = match config["plugins"].is_array() {
            true => config,
            false => json!({ "cniVersion": config["cniVersion"], "name": config["name"], "plugins": [config] }),
        };
        Ok(Self { conflist, file, bin_dirs: bin_dirs.to_vec() })
    }

    fn plugins(&self) -> &[Value] {
        self.conflist["plugins"].as_array().map_or(&[], Vec::as_slice)
    }

    fn call(&self, command: &str, name: &str, plugin: &Value, previous: &Value) -> Result<Value> {
        let kind =
            plugin["type"].as_str().with_context(|| format!("{} has a plugin without type", self.file.display()))?;
        let mut config = plugin.clone();
        for member in ["cniVersion", "name"] {
            config[member] = self.conflist[member].clone();
        }
        if !previous.is_null() {
            config["prevResult"] = previous.clone();
        }
        let folders: Vec<String> = self.bin_dirs.iter().map(|dir| dir.display().to_string()).collect();
        let program = self.bin_dirs.iter().map(|dir| dir.join(kind)).find(|file| file.is_file());
        let program = program.with_context(|| {
            let place = folders.join(" or ");
            format!("the CNI plugin {kind} is not in {place}; put it there, or name its folder with --cni-bin-dir")
        })?;
        let mut child = Command::new(program)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", name)
            .env("CNI_NETNS", path(name))
            .env("CNI_IFNAME", INTERFACE)
            .env("CNI_PATH", folders.join(":"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run the CNI plugin {kind}"))?;
        // One that ends before it has read all says why on its standard output.
        child.stdin.take().map(|mut stdin| stdin.write_all(config.to_string().as_bytes()));
        let output = child.wait_with_output()?;
        let said: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        if output.status.success() {
            return Ok(said);
        }
        let stderr = String::from_utf8_lossy(&output.stderr);
        let told = said["msg"].as_str().unwrap_or_else(|| stderr.trim());
        let details = said["details"].as_str().map(|more| format!(" {more}")).unwrap_or_default();
        bail!("CNI {command} by {kind}: {told}{details}")
    }
}

impl Pod {
    /// Makes and attaches one.
    ///
    /// # Errors
    /// The namespace can't be made, or a plugin refuses. Nothing is left then.
    pub fn attach(network: &Network) -> Result<Self> {
        let name = format!("{PREFIX}{}", std::process::id());
        make_namespace(&name).with_context(|| format!("cannot make the network namespace {name}; are you root?"))?;
        let mut pod = Self { network: network.clone(), name, result: Value::Null };
        for plugin in network.plugins() {
            match network.call("ADD", &pod.name, plugin, &pod.result) {
                Ok(result) => pod.result = result,
                Err(error) => {
                    // As a runtime does: whatever a failed ADD left is a DEL's to remove.
                    return Err(match pod.remove() {
                        Ok(()) => error,
                        // It fails for the same reason where a plugin is missing.
                        Err(more) if more.to_string() == error.to_string() => error,
                        Err(more) => anyhow!("{}; what it left can't be removed: {}", chain(&error), chain(&more)),
                    });
                }
            }
        }
        Ok(pod)
    }

    /// Its addresses, in the order of the result, each with its gateway, if it has one.
    pub fn addresses(&self) -> Vec<(IpAddr, Option<IpAddr>)> {
        let ips = self.result["ips"].as_array().map_or(&[][..], Vec::as_slice);
        let ip = |text: &Value| text.as_str()?.split('/').next()?.parse().ok();
        ips.iter().filter_map(|entry| Some((ip(&entry["address"])?, ip(&entry["gateway"])))).collect()
    }

    /// Runs `task` inside of it, on a thread of its own.
    ///
    /// # Errors
    /// The namespace is gone.
    pub fn inside<T: Send>(&self, task: impl FnOnce() -> T + Send) -> Result<T> {
        let namespace = File::open(path(&self.name)).context("the test's namespace is gone")?;
        let enter = || -> Result<T> {
            setns(&namespace, CloneFlags::CLONE_NEWNET).context("cannot enter the test's namespace")?;
            Ok(task())
        };
        thread::scope(|scope| scope.spawn(enter).join()).map_err(|_| anyhow!("a step panicked"))?
    }

    /// Detaches and removes it, as far as it can.
    ///
    /// # Errors
    /// The first thing that couldn't be removed.
    pub fn remove(&self) -> Result<()> {
        let calls = self.network.plugins().iter().rev();
        let calls = calls.map(|plugin| self.network.call("DEL", &self.name, plugin, &self.result).map(drop));
        let detached = calls.fold(Ok(()), Result::and);
        detached.and(remove_namespace(&self.name))
    }
}

/// Removes what tests left behind that were killed.
pub fn remove_stale(network: &Network) {
    let entries = fs::read_dir(NAMESPACES).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    for name in names {
        let Some(process) = name.strip_prefix(PREFIX).and_then(|process| process.parse::<u32>().ok()) else { continue };
        if !Path::new(&format!("/proc/{process}")).exists() {
            // The next test tries again.
            let _ = Pod { network: network.clone(), name, result: Value::Null }.remove();
        }
    }
}

fn path(name: &str) -> PathBuf {
    Path::new(NAMESPACES).join(name)
}

/// `ip netns add NAME`: a namespace that a file keeps.
fn make_namespace(name: &str) -> Result<()> {
    fs::create_dir_all(NAMESPACES)?;
    let path = path(name);
    File::create(&path)?;
    let keep = || -> Result<()> {
        unshare(CloneFlags::CLONE_NEWNET)?;
        Ok(mount(Some("/proc/thread-self/ns/net"), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
    };
    let kept = thread::scope(|scope| scope.spawn(keep).join()).map_err(|_| anyhow!("panicked"))?;
    if kept.is_err() {
        fs::remove_file(&path)?;
    }
    kept
}

/// `ip netns del NAME`
fn remove_namespace(name: &str) -> Result<()> {
    let path = path(name);
    // It may not have come to be mounted.
    let _ = umount2(&path, MntFlags::MNT_DETACH);
    fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_config_by_name_is_taken_and_a_single_plugin_is_a_list_of_one() {
        let dir = tempfile::tempdir().unwrap();
        let network = || Network::of(dir.path(), &[]);
        assert!(network().unwrap_err().to_string().contains("fabricd install-cni"));
        fs::write(dir.path().join("10-b.conflist"), r#"{"name":"b","plugins":[{"type":"one"},{"type":"two"}]}"#)
            .unwrap();
        fs::write(dir.path().join("00-notes.txt"), "").unwrap();
        assert_eq!(network().unwrap().plugins().len(), 2);
        fs::write(dir.path().join("05-a.conf"), r#"{"name":"a","cniVersion":"1.0.0","type":"one"}"#).unwrap();
        let taken = network().unwrap();
        assert!(taken.file.ends_with("05-a.conf") && taken.plugins().len() == 1);
        let error = taken.call("ADD", "x", &taken.plugins()[0], &Value::Null).unwrap_err().to_string();
        assert!(error.contains("the CNI plugin one is not in"), "{error}");
    }

    #[test]
    fn addresses_come_with_their_gateways() {
        let network = Network { conflist: Value::Null, file: PathBuf::new(), bin_dirs: vec![] };
        let result = json!({"ips": [
            {"address": "10.244.1.2/24", "gateway": "10.244.1.1"}, {"address": "fd00::2/64"}, {"address": "nonsense"},
        ]});
        let pod = Pod { network, name: "x".into(), result };
        let want =
            [("10.244.1.2".parse().unwrap(), Some("10.244.1.1".parse().unwrap())), ("fd00::2".parse().unwrap(), None)];
        assert_eq!(pod.addresses(), want);
    }
}
