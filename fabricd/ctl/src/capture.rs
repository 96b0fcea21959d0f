//! `fabricctl capture`: tcpdump where all packets pass, on whichever path.
//!
//! Programs of the fast path take packets before bridge and VXLAN device, so `tcpdump -i fabric.1` sees the others alone. All
//! of a pod pass its own end of the veth pair, and all of another node this node's underlay interface, which tcpdump reads
//! before the programs on receiving and behind them on sending.

use std::net::IpAddr;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, bail};
use clap::Args;
use fabric_core::attachments::{Owner, SavedAttachment};
use fabric_proto::v1::{GetStatusRequest, GetStatusResponse, ListPeersRequest, Peer};
use fabricd::config::Config;
use fabricd::host::addresses::attachments;

use crate::{Answer, daemon};

/// Whose packets, and how they are shown.
#[derive(Debug, Args)]
pub struct CaptureArgs {
    /// A pod of this node, by an address or as NAMESPACE/NAME, or the name of another node
    #[arg(value_name = "POD|NODE")]
    whom: String,
    /// Print the command instead of running it
    #[arg(long)]
    print: bool,
    /// More arguments of tcpdump, as in: -- -c 10 -w pod.pcap; for a pod an expression too
    #[arg(last = true, value_name = "ARGUMENT")]
    arguments: Vec<String>,
}

/// Runs tcpdump in the place of this process, or says how.
pub async fn run(socket: &Path, CaptureArgs { whom, print, arguments }: CaptureArgs) -> anyhow::Result<Answer> {
    // Of a pod the daemon has not to be asked.
    let (config, _) = Config::of_host(None)?;
    let saved = attachments(&config.cni_state_dir)
        .with_context(|| format!("cannot read the attachments of pods in {}", config.cni_state_dir.display()))?;
    let command = match saved.iter().find(|(_, saved)| is_meant(&whom, saved)) {
        Some((owner, saved)) => of_pod(owner, saved, arguments)?,
        None => {
            let mut client = daemon::connect(socket).await?;
            let status = client.get_status(GetStatusRequest {}).await?.into_inner();
            let peers = client.list_peers(ListPeersRequest {}).await?.into_inner().peers;
            let peer = peers.iter().find(|peer| peer.node == whom);
            let none = || format!("{whom} is neither a pod of this node nor another node: see fabricctl peers");
            of_peer(&status, peer.with_context(none)?, arguments)?
        }
    };
    let (program, arguments) = command.split_first().context("a command")?;
    let shown = command.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ");
    if print {
        return Ok(Answer::fine(format!("{shown}\n")));
    }
    eprintln!("{shown}");
    let error = Command::new(program).args(arguments).exec();
    bail!("cannot run {program}: {error}; install tcpdump and util-linux on this node, and run this as root")
}

fn is_meant(whom: &str, saved: &SavedAttachment) -> bool {
    let named = saved.pod.as_ref().is_some_and(|pod| whom == format!("{}/{}", pod.namespace, pod.name));
    named || whom.parse::<IpAddr>().is_ok_and(|ip| saved.ips().contains(&ip))
}

fn of_pod(owner: &Owner, saved: &SavedAttachment, arguments: Vec<String>) -> anyhow::Result<Vec<String>> {
    let netns = saved.netns.as_ref();
    let netns =
        netns.with_context(|| format!("it is not known where the network namespace of {} is", owner.container))?;
    let enter = ["nsenter".to_owned(), format!("--net={}", netns.display())];
    let tcpdump = ["tcpdump", "-n", "-i", &owner.ifname].map(str::to_owned);
    Ok(enter.into_iter().chain(tcpdump).chain(arguments).collect())
}

/// What is encapsulated has the nodes' addresses; what goes without (`DirectRouting`) those of the pods.
fn of_peer(status: &GetStatusResponse, peer: &Peer, arguments: Vec<String>) -> anyhow::Result<Vec<String>> {
    let port = status.network.as_ref().context("this node does not know the network yet")?.port;
    let first = &status.vteps.first().context("this node has no end of the tunnels yet")?.underlay_device;
    // Each family may have an underlay of its own.
    let is_the_only_one = status.vteps.iter().all(|vtep| vtep.underlay_device == *first);
    let device = if is_the_only_one { first } else { "any" };
    let hosts = peer.public_addresses.iter().map(|address| format!("(host {address} and udp port {port})"));
    let subnets = peer.subnets.iter().map(|subnet| format!("net {subnet}"));
    let expression = hosts.chain(subnets).collect::<Vec<_>>().join(" or ");
    let tcpdump = ["tcpdump", "-n", "-i", device].map(str::to_owned);
    Ok(tcpdump.into_iter().chain(arguments).chain([expression]).collect())
}

/// As a shell takes it for one word.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_=./:,@%+".contains(c);
    match !word.is_empty() && word.chars().all(is_plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use fabric_proto::v1::{Network, Vtep};

    use super::*;

    fn saved() -> SavedAttachment {
        let file = "{\"netns\":\"/run/netns/cni-7\",\"pod\":{\"namespace\":\"shop\",\"name\":\"web\"},\"config\":{}}\n\
                    {\"ports\":[\"veth7\"],\"mac\":\"02:42:c0:00:02:07\",\"ips\":[\"198.18.1.7\",\"2001:db8:1::7\"]}";
        SavedAttachment::decode(file.as_bytes())
    }

    #[test]
    fn pod_is_meant_by_each_address_and_by_its_name() {
        for whom in ["198.18.1.7", "2001:db8:1::7", "2001:db8:1:0::7", "shop/web"] {
            assert!(is_meant(whom, &saved()), "{whom}");
        }
        for whom in ["198.18.1.8", "web", "shop", "node-2", ""] {
            assert!(!is_meant(whom, &saved()), "{whom}");
        }
    }

    #[test]
    fn pod_is_seen_from_its_network_namespace_and_a_node_at_the_underlay() {
        let owner = Owner { network: "fabric".into(), container: "c1".into(), ifname: "eth0".into() };
        let command = of_pod(&owner, &saved(), vec!["-c".into(), "3".into()]).expect("known");
        assert_eq!(command.join(" "), "nsenter --net=/run/netns/cni-7 tcpdump -n -i eth0 -c 3");
        assert!(of_pod(&owner, &SavedAttachment::default(), vec![]).is_err());

        let status = GetStatusResponse {
            network: Some(Network { port: 8472, ..Network::default() }),
            vteps: vec![Vtep { underlay_device: "eth1".into(), ..Vtep::default() }],
            ..GetStatusResponse::default()
        };
        let peer = Peer {
            public_addresses: vec!["192.0.2.2".into()],
            subnets: vec!["198.18.2.0/24".into()],
            ..Peer::default()
        };
        let command = of_peer(&status, &peer, vec!["-c3".into()]).expect("known");
        let words: Vec<String> = command.iter().map(|word| quoted(word)).collect();
        let expected = "tcpdump -n -i eth1 -c3 '(host 192.0.2.2 and udp port 8472) or net 198.18.2.0/24'";
        assert_eq!(words.join(" "), expected);
        assert!(of_peer(&GetStatusResponse::default(), &peer, vec![]).is_err());

        let other = Vtep { underlay_device: "eth2".into(), ..Vtep::default() };
        let of_both = GetStatusResponse { vteps: [status.vteps.clone(), vec![other]].concat(), ..status };
        assert_eq!(of_peer(&of_both, &peer, vec![]).expect("known")[..4], ["tcpdump", "-n", "-i", "any"]);
    }
}
