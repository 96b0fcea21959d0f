//! The underlay: a bridge on a machine of its own, one port for each node.
//!
//! ```text
//!    node-1           node-2                     underlay
//!     eth0 ──────┐     eth0 ──────┐
//!                │                │
//!             [node-1]         [node-2]   ports of  br0 ── 10.99.0.1 gateway
//!                └───────br0──────┘                        10.99.0.2 etcd
//! ```

use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::addresses::{self, Families};
use super::capture::Capture;
use super::machine::Machine;

/// The bridge.
pub const BRIDGE: &str = "br0";

/// The machine that holds the bridge and etcd.
#[derive(Debug)]
pub struct Underlay {
    /// The machine itself.
    pub machine: Machine,
    families: Families,
}

impl Underlay {
    pub(super) fn new(machine: Machine, families: Families) -> Self {
        Self { machine, families }
    }

    /// Switches it on, with an address for each of `etcd_members`.
    pub(super) fn boot(&self, etcd_members: u16) -> Result<()> {
        self.machine.boot()?;
        // An address of its own: else a bridge takes the lowest of its ports', so it changes as nodes come and go, and
        // who knows the gateway by the former one loses packets. No multicast snooping: without a querier it would
        // swallow neighbour solicitations.
        let (mac, options) = (addresses::GATEWAY_MAC, "stp_state 0 forward_delay 0 mcast_snooping 0");
        self.ip(&format!("link add {BRIDGE} address {mac} type bridge {options}"))?;
        for &family in self.families.each() {
            let members = (1..=etcd_members).map(|member| addresses::etcd(family, member));
            for ip in members.chain([addresses::gateway(family)]) {
                self.add_address(&self.machine, BRIDGE, &addresses::with_prefix(ip))?;
            }
        }
        self.ip(&format!("link set {BRIDGE} up"))
    }

    /// Lays a cable from a port called like the machine to its eth0, and gives that its addresses and
    /// default route.
    pub(super) fn connect(&self, node: &Machine, index: u16) -> Result<()> {
        let (port, mac) = (&node.name, addresses::node_mac(index));
        self.ip(&format!("link add {port} type veth peer name eth0 address {mac} netns {}", node.pid()?))?;
        self.ip(&format!("link set {port} master {BRIDGE} up"))?;
        for &family in self.families.each() {
            self.add_address(node, "eth0", &addresses::with_prefix(addresses::node(family, index)))?;
        }
        node.run(&["ip", "link", "set", "eth0", "up"])?;
        for &family in self.families.each() {
            node.run(&["ip", "route", "add", "default", "via", &addresses::gateway(family).to_string()])?;
        }
        Ok(())
    }

    /// Takes the cable away, with both its ends.
    pub(super) fn disconnect(&self, node: &str) -> Result<()> {
        self.ip(&format!("link del {node}"))
    }

    /// Pulls a node's cable: its eth0 loses the carrier and keeps addresses and routes.
    ///
    /// # Errors
    /// There is no such node.
    pub fn unplug(&self, node: &str) -> Result<()> {
        self.ip(&format!("link set {node} down"))
    }

    /// Plugs the cable in again.
    ///
    /// # Errors
    /// There is no such node.
    pub fn plug(&self, node: &str) -> Result<()> {
        self.ip(&format!("link set {node} up"))
    }

    /// Records what passes a node's port.
    ///
    /// # Errors
    /// There is no such node.
    pub fn capture(&self, node: &str) -> Result<Capture> {
        Capture::start(&self.machine.network()?, node)
    }

    fn add_address(&self, machine: &Machine, device: &str, address: &str) -> Result<()> {
        // Without duplicate address detection the address serves at once.
        let nodad: &[&str] = if address.contains(':') { &["nodad"] } else { &[] };
        machine.run(&[&["ip", "address", "add", address, "dev", device], nodad].concat())?;
        Ok(())
    }

    /// `ip` in the underlay's network but among the host's processes, whose numbers `netns` takes.
    fn ip(&self, args: &str) -> Result<()> {
        let command = || Command::new("ip").args(args.split(' ')).output().context("cannot run ip");
        let output = self.machine.network()?.run(command)?;
        ensure!(output.status.success(), "`ip {args}` in the underlay: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}
