//! `fabricd install-cni`: the CNI plugins and their conflist, put where a container runtime looks for them.
//!
//! The binaries come first and the conflist last, and only when this node is ready: its arrival is what makes a kubelet
//! call the node ready, and pods would fail before. Everything arrives by rename, so a runtime never starts half a
//! binary nor reads half a conflist, and a pod that is being added meanwhile isn't disturbed. Away it goes the other way
//! round. A node without the plugin `loopback` gets that name for `fabric-bridge`, which does it: containerd adds no pod
//! without.
//!
//! In Kubernetes the two steps are two containers, since an init container that waited for the daemon would wait for
//! ever: `--only plugins` before the daemon, `--only conflist --stay` beside it.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::{CommandFactory as _, FromArgMatches as _, Parser, ValueEnum};
use fabric_core::handoff::{NODE_FILE, NodeFile, RUN_DIR, Readiness};
use serde_json::{Value, json};

use crate::atomic_file::{FileError, replace};
use crate::commands::conflists;
use crate::commands::stay::until_terminated;
use crate::config::asked_for;
use crate::diagnosis::cni_config;

/// The first word of the command line that asks for this instead of the daemon.
pub const COMMAND: &str = "install-cni";

/// What is installed.
const PLUGINS: [&str; 2] = ["fabric-cni", "fabric-bridge"];

/// What containerd adds no pod without. Where the node hasn't got it, a link to the plugin that does its work by this name.
const LOOPBACK: &str = "loopback";

/// The conflist as it is shipped.
const CONFLIST: &str = include_str!("../../../deploy/cni/10-fabric.conflist");

/// How often the node is asked whether it is ready.
const PERIOD: Duration = Duration::from_millis(200);

/// How often `--stay` looks whether the conflist is still as it should be.
const WATCH_PERIOD: Duration = Duration::from_secs(5);

/// Put the CNI plugins and their conflist in place, the conflist when this node is ready
#[derive(Clone, Debug, Parser)]
#[command(name = COMMAND)]
pub struct InstallCni {
    /// Where the runtime has its CNI plugins
    #[arg(long, env = "FABRICD_CNI_BIN_DIR", value_name = "DIR", default_value = "/opt/cni/bin")]
    pub bin_dir: PathBuf,

    /// Where the runtime has its network configurations
    #[arg(long, env = "FABRICD_CNI_CONF_DIR", value_name = "DIR", default_value = "/etc/cni/net.d")]
    pub conf_dir: PathBuf,

    /// Name of the conflist: runtimes take the first of the folder
    #[arg(long, value_name = "NAME", default_value = "10-fabric.conflist")]
    pub conf_name: String,

    /// Name of the network in the conflist [default: that of the conflist that is there, ours or flannel's; else fabric]
    #[arg(long, value_name = "NAME")]
    pub network_name: Option<String>,

    /// Version of the CNI spec that the conflist asks for: containerd 1.6 and podman 4 go no further than 1.0.0
    #[arg(long, value_name = "VERSION", default_value = "1.0.0")]
    pub cni_version: CniVersion,

    /// Where fabric-cni and fabric-bridge are taken from [default: beside this program]
    #[arg(long, value_name = "DIR")]
    pub source_dir: Option<PathBuf>,

    /// Folder of node.json
    #[arg(long, env = "FABRICD_RUN_DIR", value_name = "DIR", default_value = RUN_DIR)]
    pub run_dir: PathBuf,

    /// How many seconds to wait for the node to become ready
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub ready_timeout: u64,

    /// Do only half of it: put the plugins in place, without waiting for the node, or the conflist
    #[arg(long, value_name = "PART", conflicts_with = "uninstall")]
    pub only: Option<Part>,

    /// Don't end before SIGTERM: wait for the node, and put the conflist back whenever it is gone or changed
    #[arg(long, conflicts_with = "ready_timeout")]
    pub stay: bool,

    /// Take conflist and plugins away again
    #[arg(long)]
    pub uninstall: bool,
}

/// Half of an installation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// fabric-cni and fabric-bridge.
    Plugins,
    /// What names them.
    Conflist,
}

/// A version of the spec that a conflist may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CniVersion {
    /// What every runtime in use speaks.
    #[value(name = "1.0.0")]
    V1_0_0,
    /// With GC and STATUS.
    #[value(name = "1.1.0")]
    V1_1_0,
}

impl InstallCni {
    /// Reads the command line, if its first word asks for this.
    #[must_use]
    pub fn asked(args: impl IntoIterator<Item = OsString>) -> Option<Self> {
        let matches = asked_for(args, Self::command())?;
        Some(Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit()))
    }

    /// Installs or takes away, and says what was done.
    ///
    /// # Errors
    /// A file can't be read or written; the node doesn't become ready; something else has our conflist's name.
    pub fn run(&self) -> Result<()> {
        if self.uninstall {
            self.uninstall()?;
            return if self.stay { until_terminated(|| Ok(WATCH_PERIOD)) } else { Ok(()) };
        }
        if self.only != Some(Part::Conflist) {
            self.install_plugins()?;
        }
        if self.only == Some(Part::Plugins) {
            return Ok(());
        }
        self.refuse_foreign_conflist()?;
        if self.stay {
            return self.keep_conflist();
        }
        self.wait_until_ready()?;
        self.install_conflist()?;
        self.warn_of_earlier_ones(&mut vec![])
    }

    fn install_plugins(&self) -> Result<()> {
        let source = match &self.source_dir {
            Some(dir) => dir.clone(),
            None => std::env::current_exe()?.parent().unwrap_or(Path::new("/")).to_owned(),
        };
        for plugin in PLUGINS {
            let from = source.join(plugin);
            let content = fs::read(&from)
                .with_context(|| format!("cannot read {}; --source-dir says where the plugins are", from.display()))?;
            replace(&self.bin_dir.join(plugin), &content, 0o755)?;
            println!("{}", self.bin_dir.join(plugin).display());
        }
        let loopback = self.bin_dir.join(LOOPBACK);
        match symlink(PLUGINS[1], &loopback) {
            Ok(()) => println!("{}", loopback.display()),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(FileError { file: loopback, error }.into()),
        }
        Ok(())
    }

    fn install_conflist(&self) -> Result<()> {
        let conflist = format!("{:#}\n", self.conflist()?);
        if fs::read(self.conflist_path()).is_ok_and(|there| there == conflist.as_bytes()) {
            return Ok(());
        }
        replace(&self.conflist_path(), conflist.as_bytes(), 0o644)?;
        println!("{}", self.conflist_path().display());
        Ok(())
    }

    fn keep_conflist(&self) -> Result<()> {
        let mut warned = vec![];
        until_terminated(|| {
            self.warn_of_earlier_ones(&mut warned)?;
            if self.not_ready().is_some() {
                return Ok(PERIOD);
            }
            self.refuse_foreign_conflist()?;
            self.install_conflist()?;
            Ok(WATCH_PERIOD)
        })
    }

    /// The conflist first: from then on the runtime adds no more pods.
    fn uninstall(&self) -> Result<()> {
        self.refuse_foreign_conflist()?;
        let plugins = PLUGINS.map(|plugin| self.bin_dir.join(plugin));
        let loopback = self.bin_dir.join(LOOPBACK);
        let is_ours = fs::read_link(&loopback).is_ok_and(|target| target == Path::new(PLUGINS[1]));
        for file in [self.conflist_path()].iter().chain(is_ours.then_some(&loopback)).chain(&plugins) {
            match fs::remove_file(file) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(FileError { file: file.clone(), error }.into()),
                Ok(()) => println!("{} removed", file.display()),
            }
        }
        Ok(())
    }

    fn conflist_path(&self) -> PathBuf {
        self.conf_dir.join(&self.conf_name)
    }

    /// The shipped conflist in the version that is asked for, without plugins that this node hasn't got: a conflist
    /// that names one which is missing fails for every pod.
    fn conflist(&self) -> Result<Value> {
        let mut conflist: Value = serde_json::from_str(CONFLIST).context("the conflist that is built in")?;
        conflist["cniVersion"] = match self.cni_version {
            CniVersion::V1_0_0 => json!("1.0.0"),
            CniVersion::V1_1_0 => json!("1.1.0"),
        };
        // Runtimes know their pods by the network's name, so it stays when another plugin takes over.
        if let Some(name) = self.network_name.clone().or_else(|| self.name_there()) {
            conflist["name"] = name.into();
        }
        if let Some(plugins) = conflist["plugins"].as_array_mut() {
            plugins.retain(|plugin| {
                let name = plugin["type"].as_str().unwrap_or_default();
                let there = self.bin_dir.join(name).is_file();
                if !there {
                    println!("without {name}, which is not in {}", self.bin_dir.display());
                }
                there
            });
        }
        Ok(conflist)
    }

    fn name_there(&self) -> Option<String> {
        let there = conflists::find(&self.conf_dir, &self.conf_name).ok()?;
        there.ours.or(there.flannels).or(there.aside).map(|file| file.network)
    }

    /// Puts the conflist in place, whether or not the node is ready.
    ///
    /// # Errors
    /// A file can't be read or written; something else has our conflist's name.
    pub(crate) fn place_conflist(&self) -> Result<()> {
        self.refuse_foreign_conflist()?;
        self.install_conflist()
    }

    fn wait_until_ready(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(self.ready_timeout);
        while let Some(why) = self.not_ready() {
            if Instant::now() >= deadline {
                bail!("the conflist is not in place, since this node is not ready: {why}");
            }
            #[expect(clippy::disallowed_methods, reason = "a command of its own, without async code")]
            thread::sleep(PERIOD);
        }
        Ok(())
    }

    /// Why no pod can be added to this node, if so.
    fn not_ready(&self) -> Option<String> {
        let file = self.run_dir.join(NODE_FILE);
        let node = fs::read(&file).map_err(|e| e.to_string());
        let node = node.and_then(|json| NodeFile::decode(&json).map_err(|e| e.to_string()));
        match node.map(|node| node.readiness) {
            Ok(Readiness::Ready) => None,
            Ok(Readiness::NotReady { reason, .. }) => Some(reason),
            Err(e) => Some(format!("{}: {e}; is fabricd running?", file.display())),
        }
    }

    /// A file of our name that isn't ours is somebody's network.
    fn refuse_foreign_conflist(&self) -> Result<()> {
        let path = self.conflist_path();
        match fs::read_to_string(&path) {
            Ok(text) if !text.contains(PLUGINS[0]) => {
                bail!("{} is not ours: it names no {}; say another --conf-name", path.display(), PLUGINS[0])
            }
            _ => Ok(()),
        }
    }

    /// Says which configurations a runtime takes before ours, whoever put them there and when; again only when they change.
    fn warn_of_earlier_ones(&self, warned: &mut Vec<PathBuf>) -> Result<()> {
        let all = match cni_config::configs(&self.conf_dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => vec![],
            all => all?,
        };
        let earlier: Vec<PathBuf> = cni_config::before(&all, &self.conflist_path()).into_iter().cloned().collect();
        if earlier != *warned {
            for file in &earlier {
                let name = file.file_name().unwrap_or_default().to_string_lossy();
                eprintln!(
                    "warning: {name} sorts before {}, so new pods get that network; if it is a leftover: {}",
                    self.conf_name,
                    cni_config::move_away(file)
                );
            }
            *warned = earlier;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use tempfile::TempDir;

    use super::*;

    /// A machine with plugins to install in `from`, and a node that is ready or not.
    fn machine(ready: bool, args: &[&str]) -> (TempDir, InstallCni) {
        let dir = TempDir::new().expect("a folder");
        let path = |name: &str| dir.path().join(name).into_os_string();
        for folder in ["from", "run", "bin"] {
            fs::create_dir(path(folder)).expect("a folder");
        }
        for plugin in PLUGINS {
            fs::write(dir.path().join("from").join(plugin), plugin).expect("a file");
        }
        fs::write(dir.path().join("bin/portmap"), "").expect("a file");
        let state = if ready { r#""ready""# } else { r#""not-ready", "code": "starting", "reason": "no lease yet""# };
        let subnet = r#"{"network": "10.244.0.0/16", "subnet": "10.244.3.0/24"}"#;
        let node = format!(
            r#"{{"version": 1, "node": "node-1", "state": {state}, "ipv4": {subnet}, "mtu": 1450, "epoch": 1}}"#
        );
        fs::write(dir.path().join("run/node.json"), node).expect("a file");
        let mut line: Vec<OsString> = vec!["fabricd".into(), COMMAND.into(), "--ready-timeout".into(), "0".into()];
        for (flag, folder) in
            [("--bin-dir", "bin"), ("--conf-dir", "net.d"), ("--source-dir", "from"), ("--run-dir", "run")]
        {
            line.extend([flag.into(), path(folder)]);
        }
        line.extend(args.iter().map(Into::into));
        let asked = InstallCni::asked(line).expect("it is asked for");
        (dir, asked)
    }

    fn content(dir: &TempDir, file: &str) -> Option<String> {
        fs::read_to_string(dir.path().join(file)).ok()
    }

    #[test]
    fn plugins_and_conflist_arrive_and_leave_and_may_be_asked_to_twice() {
        let (dir, install) = machine(true, &[]);
        for _ in 0..2 {
            install.run().expect("installed");
            assert_eq!(content(&dir, "bin/fabric-cni").as_deref(), Some("fabric-cni"));
            let mode = fs::metadata(dir.path().join("bin/fabric-bridge")).expect("a file").permissions().mode();
            assert_eq!(mode & 0o777, 0o755);
            let conflist: Value =
                serde_json::from_str(&content(&dir, "net.d/10-fabric.conflist").expect("a conflist")).expect("JSON");
            assert_eq!(conflist, serde_json::from_str::<Value>(CONFLIST).expect("JSON"));
        }
        let uninstall = InstallCni { uninstall: true, ..install };
        for _ in 0..2 {
            uninstall.run().expect("taken away");
            for file in ["bin/fabric-cni", "bin/fabric-bridge", "net.d/10-fabric.conflist"] {
                assert_eq!(content(&dir, file), None, "{file}");
            }
        }
        assert!(content(&dir, "bin/portmap").is_some(), "what is not ours stays");
    }

    #[test]
    fn loopback_is_a_link_to_our_plugin_where_there_is_none_and_another_ones_stays() {
        let (dir, install) = machine(true, &[]);
        let loopback = dir.path().join("bin/loopback");
        let uninstall = InstallCni { uninstall: true, ..install.clone() };
        for _ in 0..2 {
            install.run().expect("installed");
        }
        assert_eq!(content(&dir, "bin/loopback").as_deref(), Some("fabric-bridge"));
        uninstall.run().expect("taken away");
        assert!(!loopback.is_symlink(), "ours is gone");

        fs::write(&loopback, "the node's").expect("a file");
        install.run().expect("installed");
        uninstall.run().expect("taken away");
        assert_eq!(content(&dir, "bin/loopback").as_deref(), Some("the node's"));
    }

    #[test]
    fn a_plugin_that_runs_is_replaced_by_another_file_not_written_over() {
        let (dir, install) = machine(true, &[]);
        install.run().expect("installed");
        let (plugin, conflist) = (dir.path().join("bin/fabric-cni"), dir.path().join("net.d/10-fabric.conflist"));
        let read_later = [&plugin, &conflist].map(|file| fs::File::open(file).expect("a file"));
        fs::write(dir.path().join("from/fabric-cni"), "the next version").expect("a file");
        InstallCni { cni_version: CniVersion::V1_1_0, ..install }.run().expect("installed");

        assert_eq!(content(&dir, "bin/fabric-cni").as_deref(), Some("the next version"));
        assert!(content(&dir, "net.d/10-fabric.conflist").expect("a conflist").contains("1.1.0"));
        let [old_plugin, old_conflist] = read_later.map(|file| io::read_to_string(file).expect("its text"));
        assert_eq!(old_plugin, "fabric-cni");
        assert_eq!(serde_json::from_str::<Value>(&old_conflist).expect("a whole one")["cniVersion"], "1.0.0");
        let left = fs::read_dir(dir.path().join("bin")).expect("a folder").count();
        assert_eq!(left, 4, "nothing half-written is left beside portmap, the two plugins and loopback");
    }

    #[test]
    fn the_conflist_goes_before_the_plugins_that_it_names() {
        let (dir, install) = machine(true, &[]);
        install.run().expect("installed");
        // A plugin that can't be removed: whatever is done after it is not done.
        for plugin in PLUGINS {
            fs::remove_file(dir.path().join("bin").join(plugin)).expect("removed");
            fs::create_dir(dir.path().join("bin").join(plugin)).expect("a folder");
        }
        let error = InstallCni { uninstall: true, ..install }.run().expect_err("a folder is no file").to_string();
        assert!(error.contains("fabric-cni"), "{error}");
        assert_eq!(content(&dir, "net.d/10-fabric.conflist"), None);
    }

    #[test]
    fn conflist_waits_for_the_node_and_the_error_says_why_it_is_not_ready() {
        let (dir, install) = machine(false, &[]);
        let error = install.run().expect_err("not ready").to_string();
        assert!(error.contains("no lease yet"), "{error}");
        assert!(content(&dir, "bin/fabric-cni").is_some());
        assert_eq!(content(&dir, "net.d/10-fabric.conflist"), None);
    }

    #[test]
    fn plugins_alone_wait_for_nobody_and_the_conflist_alone_brings_no_plugins() {
        let (dir, install) = machine(false, &["--only", "plugins"]);
        install.run().expect("installed");
        assert!(content(&dir, "bin/fabric-cni").is_some());
        assert_eq!(content(&dir, "net.d/10-fabric.conflist"), None);

        let (dir, install) = machine(true, &["--only", "conflist"]);
        install.run().expect("installed");
        assert_eq!(content(&dir, "bin/fabric-cni"), None);
        assert!(content(&dir, "net.d/10-fabric.conflist").is_some());
    }

    #[test]
    fn conflist_speaks_the_version_asked_for_and_names_no_plugin_that_is_missing() {
        let (dir, install) = machine(true, &["--cni-version", "1.1.0"]);
        fs::remove_file(dir.path().join("bin/portmap")).expect("removed");
        install.run().expect("installed");
        let conflist: Value =
            serde_json::from_str(&content(&dir, "net.d/10-fabric.conflist").expect("a conflist")).expect("JSON");
        assert_eq!(
            (&conflist["cniVersion"], &conflist["plugins"]),
            (&"1.1.0".into(), &json!([{"type": "fabric-cni"}]))
        );
    }

    #[test]
    fn network_keeps_the_name_that_runtimes_know_its_pods_by() {
        let name = |install: &InstallCni, dir: &TempDir| {
            install.run().expect("installed");
            let conflist = content(dir, "net.d/10-fabric.conflist").expect("a conflist");
            serde_json::from_str::<Value>(&conflist).expect("JSON")["name"].clone()
        };
        let (dir, install) = machine(true, &[]);
        fs::create_dir(dir.path().join("net.d")).expect("a folder");
        let flannels = r#"{"name":"cbr0","plugins":[{"type":"flannel"}]}"#;
        fs::write(dir.path().join("net.d/10-flannel.conflist"), flannels).expect("a file");
        assert_eq!(name(&install, &dir), "cbr0", "flannel's");
        fs::remove_file(dir.path().join("net.d/10-flannel.conflist")).expect("removed");
        assert_eq!(name(&install, &dir), "cbr0", "ours, as it was");
        let told = InstallCni { network_name: Some("pods".into()), ..install };
        assert_eq!(name(&told, &dir), "pods");
    }

    #[test]
    fn foreign_conflist_of_our_name_is_neither_replaced_nor_removed() {
        let (dir, install) = machine(true, &[]);
        fs::create_dir(dir.path().join("net.d")).expect("a folder");
        fs::write(dir.path().join("net.d/10-fabric.conflist"), "{}").expect("a file");
        for uninstall in [false, true] {
            let error = InstallCni { uninstall, ..install.clone() }.run().expect_err("not ours").to_string();
            assert!(error.contains("--conf-name"), "{error}");
        }
        assert_eq!(content(&dir, "net.d/10-fabric.conflist").as_deref(), Some("{}"));
    }

    #[test]
    fn configurations_that_sort_first_are_all_told_again_when_they_change() {
        let (dir, install) = machine(true, &[]);
        let mut warned = vec![];
        install.warn_of_earlier_ones(&mut warned).expect("there is no folder yet");
        install.run().expect("installed");
        for (file, content, told) in [
            ("05-cilium.conflist", "{}", 1),
            ("00-multus.conf", r#"{"type": "multus-shim"}"#, 1),
            ("10-calico.conflist", "{}", 2),
            ("99-loopback.conf", "{}", 2),
            ("README", "", 2),
        ] {
            fs::write(dir.path().join("net.d").join(file), content).expect("a file");
            install.warn_of_earlier_ones(&mut warned).expect("told");
            assert_eq!(warned.len(), told, "{file}: {warned:?}");
        }
        fs::remove_file(dir.path().join("net.d/05-cilium.conflist")).expect("removed");
        install.warn_of_earlier_ones(&mut warned).expect("told");
        assert_eq!(warned, [dir.path().join("net.d/10-calico.conflist")]);
    }

    #[test]
    fn daemons_flags_do_not_ask_for_it() {
        assert!(InstallCni::asked(["fabricd", "--cleanup"].map(OsString::from)).is_none());
        assert!(InstallCni::asked(["fabricd".into()]).is_none());
    }
}
