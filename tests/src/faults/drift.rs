//! Somebody deletes or alters what is ours, or has things of his own there.

use anyhow::{Result, ensure};

use super::pair::{BY_AUDIT, BY_EVENT, PATIENCE};
use super::{Fault, Trial};
use crate::lab::wait_until;

pub(super) const ROWS: &[Fault] = &[
    Fault {
        number: 17,
        what: "the VXLAN device is deleted",
        holds: "back within 2 s, with the same MAC and all peers",
        trial: device_deleted,
    },
    Fault {
        number: 18,
        what: "any entry is deleted or altered by hand",
        holds: "right again within 2 s, nothing else moves",
        trial: entries_altered,
    },
    Fault {
        number: 19,
        what: "entries of others; our device's name with another VNI",
        holds: "theirs stay byte-identical; a clear error",
        trial: what_is_foreign,
    },
];

fn device_deleted(trial: &mut Trial) -> Result<()> {
    let pair = trial.pair(1000)?;
    let before = pair.shown()?;
    let traffic = pair.traffic()?;
    for _ in 0..3 {
        pair.node.run(&["ip", "link", "del", "fabric.1"])?;
        pair.shows_again(&before, BY_EVENT)?;
        traffic.goes_on(100)?;
    }
    traffic.flows()
}

/// What somebody does by hand; `{subnet}`, `{base}`, `{mac}` and `{id}` are a peer's.
const DEEDS: &[&str] = &[
    "bridge fdb del {mac} dev fabric.1 self",
    "bridge fdb replace {mac} dev fabric.1 dst 203.0.113.9 self permanent",
    "ip neighbour del {base} dev fabric.1",
    "ip neighbour replace {base} lladdr 02:00:00:00:00:99 dev fabric.1 nud permanent",
    "ip neighbour replace {base} lladdr {mac} dev fabric.1 nud reachable",
    "ip nexthop del id {id}",
    "ip nexthop replace id {id} via 10.128.77.0 dev fabric.1 onlink proto 250",
    "ip route del {subnet} proto 250",
    "ip route replace blackhole {subnet} proto 250",
    "ip route replace {subnet} via {base} dev fabric.1 onlink proto 250",
    "ip route replace {subnet} via {base} dev fabric.1 onlink",
    "ip address flush dev fabric.1 scope global",
    "ip link set fabric.1 mtu 1300",
    "ip link set fabric.1 address 02:00:00:00:00:98",
    "ip link set fabric.1 down",
    "ip link set fabric.1 type vxlan learning",
    "echo 0 > /proc/sys/net/ipv4/ip_forward",
];

/// No event speaks of these.
const UNANNOUNCED: &[&str] =
    &["echo 1 > /proc/sys/net/ipv6/conf/fabric.1/accept_ra", "echo 1 > /proc/sys/net/ipv4/conf/fabric.1/rp_filter"];

fn entries_altered(trial: &mut Trial) -> Result<()> {
    let pair = trial.pair(200)?;
    let before = pair.shown()?;
    let traffic = pair.traffic()?;
    let mut deeds: Vec<(&str, _)> =
        DEEDS.iter().map(|deed| (*deed, BY_EVENT)).chain(UNANNOUNCED.iter().map(|deed| (*deed, BY_AUDIT))).collect();
    trial.random.shuffle(&mut deeds);
    for (deed, limit) in deeds {
        let peer = crate::lab::Peer::new(trial.random.u32(1..200));
        let base = peer.subnet().to_string();
        let id = before
            .lines()
            .find_map(|line| line.strip_prefix("id ")?.split_once(&format!(" via {base} ")))
            .map_or("0", |(id, _)| id);
        let deed = deed
            .replace("{subnet}", &format!("{base}/24"))
            .replace("{base}", &base)
            .replace("{mac}", &peer.mac())
            .replace("{id}", id);
        pair.node.run(&["sh", "-ec", &deed])?;
        pair.shows_again(&before, limit).map_err(|error| error.context(deed))?;
    }
    traffic.flows()
}

fn what_is_foreign(trial: &mut Trial) -> Result<()> {
    let pair = trial.pair(20)?;
    let theirs = "
        ip link add other.7 up type vxlan id 7 dstport 8472 local 10.99.0.11
        bridge fdb append 02:00:00:00:00:77 dev other.7 dst 203.0.113.7 self permanent
        ip route add 10.200.0.0/16 dev other.7
        ip route add 10.201.0.0/24 via 10.128.1.0 dev fabric.1 onlink
        ip nexthop add id 7 dev other.7
        ip nexthop add id 4194400000 dev other.7
        ip neighbour add 10.128.1.9 lladdr 02:00:00:00:00:79 dev fabric.1 nud noarp";
    pair.node.run(&["sh", "-ec", theirs])?;
    let look = "ip -o -d link show dev other.7 | sed 's/ageing.*//'; bridge fdb show dev other.7 | sort
        ip route show | grep -v 'proto 250' | sort; ip nexthop show | grep -v 'proto 250' | sort
        ip neighbour show dev fabric.1 nud noarp | grep 10.128";
    let before = pair.node.run(&["sh", "-c", look])?;
    let traffic = pair.traffic()?;
    pair.node.kill_fabricd()?;
    pair.node.start_fabricd()?;
    pair.node.wait_ready()?;
    traffic.lost_nothing()?;
    ensure!(pair.node.run(&["sh", "-c", look])? == before, "what is foreign has changed");

    // A stranger takes our device's name.
    pair.node.stop_fabricd()?;
    pair.node.run(&["ip", "link", "del", "fabric.1"])?;
    pair.node.run(&["ip", "link", "add", "fabric.1", "type", "vxlan", "id", "9", "dstport", "9999"])?;
    pair.node.start_fabricd()?;
    wait_until("the error", PATIENCE, || {
        let reply = pair.node.http_get(9472, "/readyz")?;
        ensure!(reply.body.contains("the interface fabric.1 exists and is not ours"), "{}", reply.body);
        Ok(())
    })?;
    pair.node.run(&["ip", "link", "del", "fabric.1"])?;
    pair.node.wait_ready()?;
    pair.traffic()?.flows()
}
