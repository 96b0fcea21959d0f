//! A node: a machine on the underlay with a fabricd of its own, and pods.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fabric_core::model::Family;
use nix::sys::signal::Signal;
use serde_json::Value;

use super::addresses;
use super::binaries;
use super::cni;
use super::http::{self, Reply};
use super::machine::Machine;
use super::underlay::Underlay;
use super::{Plan, Wiring, api_certificates, plain, wait_until};

/// The name of the daemon among the node's services: its log is `fabricd.log`.
const FABRICD: &str = "fabricd";

/// A node of the cluster. All that a [`Machine`] can do it can do too.
#[derive(Debug)]
pub struct Node {
    machine: Machine,
    /// 1 for `node-1`.
    pub index: u16,
    plan: Arc<Plan>,
    underlay: Arc<Underlay>,
}

impl Deref for Node {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.machine
    }
}

impl Node {
    pub(super) fn new(machine: Machine, index: u16, plan: Arc<Plan>, underlay: Arc<Underlay>) -> Self {
        Self { machine, index, plan, underlay }
    }

    /// Switches the node on, on the underlay and with the network configuration that pods need. fabricd
    /// isn't started by this.
    ///
    /// # Errors
    /// It is on already, or the machine can't be made.
    pub fn boot(&self) -> Result<()> {
        self.machine.boot()?;
        let furnished = self.furnish();
        if furnished.is_err() {
            self.machine.power_off()?;
        }
        furnished
    }

    fn furnish(&self) -> Result<()> {
        self.forget_pods()?;
        self.underlay.connect(&self.machine, self.index)?;
        let (name, conflist) = match self.plan.wiring {
            Wiring::Fabric => {
                api_certificates::make(&self.name, self.dir())?;
                ("10-fabric", cni::fabric_conflist())
            }
            Wiring::Plain => {
                plain::prepare(&self.machine, self.plan.families)?;
                ("10-plain", plain::conflist(self.index, self.plan.families))
            }
        };
        let path = self.path(&format!("{}/{name}.conflist", cni::NETWORKS))?;
        Ok(fs::write(path, format!("{conflist:#}\n"))?)
    }

    /// Pulls the plug, and the cable with it. `/var/lib`, `/var/log` and `/etc/cni` stay for the next boot.
    ///
    /// # Errors
    /// The machine can't be killed.
    pub fn power_off(&self) -> Result<()> {
        if self.is_on() {
            self.underlay.disconnect(&self.name)?;
        }
        self.machine.power_off()
    }

    /// The node's own address on the underlay.
    #[must_use]
    pub fn underlay_ip(&self, family: Family) -> IpAddr {
        addresses::node(family, self.index)
    }

    /// Starts fabricd with the defaults; where etcd is it knows by the environment of every process of the
    /// node. Doesn't wait for it.
    ///
    /// # Errors
    /// It runs already, or ended at once: the error shows its log.
    pub fn start_fabricd(&self) -> Result<()> {
        self.start_fabricd_with(&[], &[])
    }

    /// Starts fabricd with more arguments and environment.
    ///
    /// # Errors
    /// It runs already, or ended at once: the error shows its log.
    pub fn start_fabricd_with(&self, args: &[&str], env: &[(&str, &str)]) -> Result<()> {
        self.start_daemon(&[&["fabricd"], args].concat(), env)
    }

    /// Starts another version of fabricd, by its path.
    ///
    /// # Errors
    /// As [`Node::start_fabricd`].
    pub fn start_this_fabricd(&self, program: &str) -> Result<()> {
        self.start_daemon(&[program], &[])
    }

    fn start_daemon(&self, argv: &[&str], env: &[(&str, &str)]) -> Result<()> {
        let lab = binaries::lab()?;
        let lab = lab.to_str().context("the path of `lab` is no text")?;
        let without = if self.plan.without_tcx { &[lab, "without-tcx"][..] } else { &[] };
        self.start_service(FABRICD, &[without, argv].concat(), env)?;
        Ok(())
    }

    /// Stops fabricd in good order (SIGTERM) and waits for its end.
    ///
    /// # Errors
    /// It doesn't run or doesn't end.
    pub fn stop_fabricd(&self) -> Result<()> {
        self.end(FABRICD, Signal::SIGTERM)
    }

    /// Kills fabricd (SIGKILL) and waits for its end.
    ///
    /// # Errors
    /// It doesn't run.
    pub fn kill_fabricd(&self) -> Result<()> {
        self.end(FABRICD, Signal::SIGKILL)
    }

    /// Stops fabricd's time (SIGSTOP).
    ///
    /// # Errors
    /// It doesn't run.
    pub fn freeze_fabricd(&self) -> Result<()> {
        self.signal(FABRICD, Signal::SIGSTOP)
    }

    /// Lets fabricd go on (SIGCONT).
    ///
    /// # Errors
    /// It doesn't run.
    pub fn thaw_fabricd(&self) -> Result<()> {
        self.signal(FABRICD, Signal::SIGCONT)
    }

    /// Waits until fabricd says that it is ready.
    ///
    /// # Errors
    /// It isn't after a minute: the error shows why, and its log.
    pub fn wait_ready(&self) -> Result<()> {
        let ready = wait_until(&format!("fabricd is ready on {}", self.name), Duration::from_secs(60), || {
            if let ended @ Err(_) = self.running_service(FABRICD) {
                return Ok(ended.map(drop)); // no use waiting
            }
            let reply = self.http_get(9472, "/readyz")?;
            ensure!(reply.status == 200, "not ready: {}", reply.body);
            Ok(Ok(()))
        });
        ready.map_err(|error| error.context(self.log_tail(FABRICD)))?
    }

    /// `GET http://127.0.0.1:PORT/PATH` on the node.
    ///
    /// # Errors
    /// Nothing listens there.
    pub fn http_get(&self, port: u16, path: &str) -> Result<Reply> {
        http::get(&self.network()?, SocketAddr::from(([127, 0, 0, 1], port)), path)
    }

    /// What `fabricctl status -o json` prints of a node that is ready, whatever else is not well.
    ///
    /// # Errors
    /// It is not ready, or fabricd doesn't answer.
    pub fn status(&self) -> Result<Value> {
        let shown = self.exec(&["fabricctl", "status", "-o", "json"])?;
        ensure!(matches!(shown.status.code(), Some(0 | 4)), "{shown:?}");
        serde_json::from_str(&shown.stdout).context("fabricctl prints malformed JSON")
    }

    /// Drops all packets between the node itself and an address, both ways, until [`Node::heal`]; nothing
    /// is told to either side.
    ///
    /// # Errors
    /// nft refuses.
    pub fn cut_off(&self, from: IpAddr) -> Result<()> {
        let ip = if from.is_ipv4() { "ip" } else { "ip6" };
        let rules = format!(
            "table inet lab_cut {{
                chain in {{ type filter hook input priority -400; {ip} saddr {from} drop; }}
                chain out {{ type filter hook output priority -400; {ip} daddr {from} drop; }}
            }}"
        );
        self.command(&["nft", "-f", "-"])?.stdin(rules).run()?;
        Ok(())
    }

    /// Takes all cuts back.
    ///
    /// # Errors
    /// There are none.
    pub fn heal(&self) -> Result<()> {
        self.run(&["nft", "delete", "table", "inet", "lab_cut"])?;
        Ok(())
    }
}
