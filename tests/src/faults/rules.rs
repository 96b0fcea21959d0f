//! What must not get through, and what others do to the rules that see to it.
//!
//! [`Field`] is two nodes with an attacker's choice of places to stand. The same attacks are made on a VXLAN that was
//! made by hand, where they get through: so that they prove something where they fail.

use std::net::{IpAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fabric_core::model::{Family, MacAddr};

use super::{Fault, Trial};
use crate::lab::attack::advertise_router;
use crate::lab::{Builder, Families, Forged, Lab, Machine, Node, Pod, Stream, wait_until};

/// How long a rule may be missing.
const REPAIR: Duration = Duration::from_secs(2);
const SOON: Duration = Duration::from_secs(5);

pub(super) const ROWS: &[Fault] = &[
    Fault {
        number: 35,
        what: "strangers, pods and peers forge packets (attacks 1 to 4)",
        holds: "none gets through; what peers may send does",
        trial: attacks,
    },
    Fault {
        number: 36,
        what: "our rules deleted, flushed and added to by others",
        holds: "0 packets lost; as before within 2 s",
        trial: rules_spoiled,
    },
];

/// What others do to our rules, by mistake or not.
const DEEDS: [&str; 6] = [
    "flush ruleset",
    "delete table inet fabric",
    "flush table inet fabric",
    "flush chain inet fabric senders",
    "delete table bridge fabric",
    "insert rule inet fabric input accept",
];

fn attacks(trial: &mut Trial) -> Result<()> {
    let field = Field::of_fabricd(Lab::builder().name(&trial.name), &["--ip-masq"])?;
    let outcomes = field.attacks()?;
    let (peers, attacks): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(|(name, _)| name.starts_with("the peer"));
    ensure!(peers.iter().all(|(_, got_through)| *got_through), "peers don't get through: {peers:#?}");
    let through: Vec<&String> = attacks.iter().filter(|(_, got)| *got).map(|(name, _)| name).collect();
    ensure!(through.is_empty(), "these got through: {through:#?}");
    Ok(())
}

fn rules_spoiled(trial: &mut Trial) -> Result<()> {
    let field = Field::of_fabricd(Lab::builder().name(&trial.name), &[])?;
    let mut deeds = DEEDS;
    trial.random.shuffle(&mut deeds);
    for deed in deeds {
        let streams = [Family::V4, Family::V6].map(|ip| Stream::start_with(&field.peer, &field.target, ip, 1_000));
        is_repaired(&field.target.node, deed)?;
        for stream in streams {
            let report = stream?.stop()?;
            ensure!((report.lost, report.duplicated) == (0, 0), "`nft {deed}`: {report:?}");
        }
    }
    Ok(())
}

/// A source in the network that belongs to no node.
#[must_use]
pub fn nobodys(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([10, 244, 255, 9]),
        Family::V6 => "fd00:10:244:ffff::9".parse().expect("an address"),
    }
}

/// An address of the same node that no pod has.
fn beside(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => IpAddr::V4((ip.to_bits() & !0xff | 250).into()),
        IpAddr::V6(ip) => IpAddr::V6((ip.to_bits() & !0xffff | 250).into()),
    }
}

/// Two nodes with a VXLAN device each, a pod on each, and another on the first.
#[derive(Debug)]
pub struct Field {
    /// All of it.
    pub lab: Lab,
    /// The pod that is to be reached.
    pub target: Pod,
    /// A pod on the same node.
    pub neighbour: Pod,
    /// A pod on the other node.
    pub peer: Pod,
    devices: [&'static str; 2],
}

impl Field {
    /// VXLAN as anybody makes it by hand.
    ///
    /// # Errors
    /// The lab doesn't start.
    pub fn by_hand(lab: Builder) -> Result<Self> {
        let lab = lab.nodes(2).families(Families::Dual).plain().start()?;
        for node in lab.nodes() {
            for (name, family) in [("hand4", Family::V4), ("hand6", Family::V6)] {
                let local = node.underlay_ip(family).to_string();
                let vxlan = ["type", "vxlan", "id", "1", "dstport", "8472", "local", &local, "nolearning"];
                node.run(&[&["ip", "link", "add", name, "up"], &vxlan[..]].concat())?;
            }
        }
        Self::with(lab, ["hand4", "hand6"])
    }

    /// The fabric, each fabricd with these arguments.
    ///
    /// # Errors
    /// The lab doesn't start, or the rules don't come.
    pub fn of_fabricd(lab: Builder, args: &[&str]) -> Result<Self> {
        let lab = lab.nodes(2).families(Families::Dual).start()?;
        for node in lab.nodes() {
            restart_with(node, args)?;
        }
        let field = Self::with(lab, ["fabric.1", "fabric6.1"])?;
        for node in field.lab.nodes() {
            // A port is known a moment after its pod is there, the peer's address after it has joined.
            let pods = [&field.target, &field.neighbour, &field.peer];
            let own: Vec<_> = pods.into_iter().filter(|pod| Arc::ptr_eq(&pod.node, node)).flat_map(Pod::ips).collect();
            wait_until("the filter knows peer and pods", SOON, || {
                let rules = node.run(&["nft", "list", "ruleset"])?;
                let knows = |ip: &&IpAddr| rules.contains(&format!(" . {ip}"));
                ensure!(own.iter().all(knows) && rules.contains("10.99.0.") && rules.contains("fe80::/10"), "{rules}");
                Ok(())
            })?;
        }
        Ok(field)
    }

    fn with(lab: Lab, devices: [&'static str; 2]) -> Result<Self> {
        let (first, second) = (lab.node("node-1")?.clone(), lab.node("node-2")?.clone());
        let (target, neighbour) = (first.add_pod("target")?, first.add_pod("neighbour")?);
        Ok(Self { target, neighbour, peer: second.add_pod("peer")?, lab, devices })
    }

    /// Attacks 1 to 4, each with whether it got through. The first is none: a peer sends what it may.
    ///
    /// # Errors
    /// An attack can't be made.
    pub fn attacks(&self) -> Result<Vec<(String, bool)>> {
        let mut outcomes = vec![];
        let target = &*self.target.node;
        let stranger = self.lab.underlay().machine.network()?;
        for (family, device) in Family::ALL.into_iter().zip(self.devices) {
            let vtep = mac(target, device)?;
            let node = target.underlay_ip(family);
            let whole = Forged { vtep, vni: 1, source: self.peer.ip(family)?, size: 100 };
            let large = Forged { size: 1300, ..whole.clone() };
            let spoofed = Forged { source: nobodys(family), ..whole.clone() };
            let of_target = Forged { source: self.neighbour.ip(family)?, ..whole.clone() };
            let peer_node = self.peer.node.network()?;
            for sender in [&self.peer, &self.neighbour] {
                let ways =
                    wait_until("a way to the node", SOON, || sender.run(&["ping", "-c1", "-W1", &node.to_string()]));
                ways.with_context(|| format!("{} can't attack", sender.full_name()))?;
            }
            let mut attack = |name: &str, got: bool| outcomes.push((format!("{name} over {family}"), got));

            // IPv6 takes a moment to be sure of its addresses.
            let peer_itself = wait_until("a packet of the peer itself", SOON, || {
                ensure!(whole.reaches(&peer_node, node, &self.target)?, "it does not arrive");
                Ok(true)
            })?;
            attack("the peer itself", peer_itself);
            attack("1: a stranger", whole.reaches(&stranger, node, &self.target)?);
            attack("2: a pod of another node", whole.reaches(&self.peer.network()?, node, &self.target)?);
            attack("2: a pod of the same node", whole.reaches(&self.neighbour.network()?, node, &self.target)?);
            attack("3: a peer as nobody", spoofed.reaches(&peer_node, node, &self.target)?);
            attack("3: a peer as a pod of the target", of_target.reaches(&peer_node, node, &self.target)?);
            // Fragments of 1,280 bytes are possible everywhere.
            let cut = |machine: &Machine, link: &str, how: &str| -> Result<()> {
                let version = if family == Family::V4 { "-4" } else { "-6" };
                let to = node.to_string();
                match how {
                    "1280" => {
                        machine.run(&["ip", version, "route", "replace", &to, "dev", link, "mtu", "lock", how])?
                    }
                    _ => machine.run(&["ip", version, "route", "del", &to, "dev", link])?,
                };
                Ok(())
            };
            for (machine, link, name) in [
                (&self.lab.underlay().machine, "br0", "1: a stranger, in fragments"),
                (&**self.peer.node, "eth0", "3: a peer as nobody, in fragments"),
            ] {
                cut(machine, link, "1280")?;
                let sent = if link == "br0" { &large } else { &Forged { size: 1300, ..spoofed.clone() } };
                attack(name, sent.reaches(&machine.network()?, node, &self.target)?);
                cut(machine, link, "whole")?;
            }
            attack("4: a pod as nobody", self.spoofs(&self.peer, nobodys(family))?);
            attack("4: a pod as nobody, on the same bridge", self.spoofs(&self.neighbour, nobodys(family))?);
            let of_its_node = beside(self.neighbour.ip(family)?);
            attack("4: a pod as another of its own node", self.spoofs(&self.neighbour, of_its_node)?);
        }
        outcomes.push(("4: a router advertisement to a pod".into(), self.advertises()?));
        Ok(outcomes)
    }

    /// Whether a pod reaches the target under an address that isn't its own.
    fn spoofs(&self, pod: &Pod, false_ip: IpAddr) -> Result<bool> {
        let family = Family::of(false_ip);
        let prefix = format!("{false_ip}/{}", family.bits());
        pod.run(&["ip", "address", "add", &prefix, "dev", "lo"])?;
        let sink = self.target.network()?.run(|| Ok(UdpSocket::bind((self.target.ip(family)?, 0))?))?;
        sink.set_read_timeout(Some(Duration::from_millis(300)))?;
        let source = pod.network()?.run(|| {
            // A new IPv6 address can't be used at once.
            wait_until("the false address", SOON, || Ok(UdpSocket::bind((false_ip, 0))?))
        })?;
        let mut got = false;
        for _ in 0..3 {
            source.send_to(b"spoofed", sink.local_addr()?)?;
            got |= sink.recv_from(&mut [0; 16]).is_ok();
        }
        pod.run(&["ip", "address", "del", &prefix, "dev", "lo"])?;
        Ok(got)
    }

    /// Whether a pod becomes its neighbour's router by saying so.
    fn advertises(&self) -> Result<bool> {
        for _ in 0..3 {
            advertise_router(&self.neighbour)?;
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(!self.target.run(&["ip", "-6", "route", "show", "default", "proto", "ra"])?.is_empty())
    }
}

/// The address of a node's device.
///
/// # Errors
/// There is no such device.
pub fn mac(node: &Node, device: &str) -> Result<MacAddr> {
    let link: serde_json::Value = serde_json::from_str(&node.run(&["ip", "-j", "link", "show", device])?)?;
    Ok(link[0]["address"].as_str().context("a link without address")?.parse()?)
}

/// Starts a node's fabricd anew with other arguments.
///
/// # Errors
/// It doesn't get ready.
pub fn restart_with(node: &Node, args: &[&str]) -> Result<()> {
    node.stop_fabricd()?;
    node.start_fabricd_with(args, &[])?;
    node.wait_ready()
}

/// Does to our rules what others do, and waits until they are as before.
///
/// # Errors
/// They are not after two seconds.
pub fn is_repaired(node: &Node, deed: &str) -> Result<()> {
    let whole = rules_of(node)?;
    node.run(&["nft", deed])?;
    wait_until(deed, REPAIR, || {
        let now = rules_of(node)?;
        ensure!(now == whole, "after `nft {deed}`:\n{now}");
        Ok(())
    })
}

/// All rules of ours, without what changes by itself: chains and sets are listed in the order in which they were made, which
/// is no matter.
///
/// # Errors
/// A table is missing.
pub fn rules_of(node: &Node) -> Result<String> {
    let table = |family| -> Result<String> {
        let listed = node.run(&["nft", "-s", "list", "table", family, "fabric"])?;
        let (header, parts) = listed.split_once('\n').context("a table has lines")?;
        let parts = parts.strip_suffix("}\n").context("a table ends")?;
        let mut parts: Vec<&str> = parts.trim_end().split("\n\n").collect();
        parts.sort_unstable();
        Ok(format!("{header}\n{}\n}}\n", parts.join("\n\n")))
    };
    Ok(table("inet")? + &table("bridge")?)
}
