//! The test on a node: a pod that the CNI plugins attach, and traffic from there to the gateway, the peers, the outside and
//! a DNS server. What fails from the pod is tried from the node itself, to tell whose trouble it is.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail};
use fabric_core::subnet::Subnet;
use fabric_proto::v1::{GetStatusRequest, GetStatusResponse, PeerState};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::spawn_blocking;

use super::cni::{Network, Pod, remove_stale};
use super::ping::ping;
use super::probe::{connect, millis, query};
use super::{Step, TestArgs};
use crate::daemon;
use fabricd::errors::chain;

/// A small packet, in bytes with its IP header.
const SMALL: usize = 84;
/// How many peers are tried at most.
const MOST_PEERS: usize = 20;

/// The steps and how they went.
///
/// # Errors
/// There is no CNI network; it was interrupted.
pub async fn run(args: TestArgs, socket: &Path) -> anyhow::Result<Vec<Step>> {
    let outside = args.outside.as_deref().map(destination).transpose()?;
    let network = Network::of(&args.host.cni_conf_dir, &args.host.cni_bin_dir)?;
    let status = match daemon::connect(socket).await {
        Ok(mut client) => client.get_status(GetStatusRequest {}).await.ok().map(tonic::Response::into_inner),
        Err(_) => None,
    };
    let interrupted = Arc::new(AtomicBool::new(false));
    let test = Test { args, outside, network, status, interrupted: interrupted.clone() };
    let mut steps = spawn_blocking(move || test.run());
    let mut terminate = signal(SignalKind::terminate())?;
    let steps = tokio::select! {
        steps = &mut steps => steps?,
        _ = tokio::signal::ctrl_c() => { interrupted.store(true, Ordering::Relaxed); steps.await? }
        _ = terminate.recv() => { interrupted.store(true, Ordering::Relaxed); steps.await? }
    };
    if interrupted.load(Ordering::Relaxed) {
        bail!("interrupted; the pod of the test is removed");
    }
    Ok(steps)
}

/// A destination outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Destination {
    Off,
    Ping(IpAddr),
    Connect(SocketAddr),
}

fn destination(text: &str) -> anyhow::Result<Destination> {
    if text == "off" {
        return Ok(Destination::Off);
    }
    let ping = text.parse().map(Destination::Ping);
    let connect = || text.parse().map(Destination::Connect);
    ping.or_else(|_| connect())
        .with_context(|| format!("--outside {text}: expected an address, as in 192.0.2.1, 192.0.2.1:443 or off"))
}

struct Test {
    args: TestArgs,
    outside: Option<Destination>,
    network: Network,
    status: Option<GetStatusResponse>,
    interrupted: Arc<AtomicBool>,
}

impl Test {
    fn run(&self) -> Vec<Step> {
        remove_stale(&self.network);
        let pod = match Pod::attach(&self.network) {
            Ok(pod) => pod,
            Err(error) => return self.with_node(vec![Step::new("attach", "", Err(chain(&error)))]),
        };
        let addresses = pod.addresses();
        let ips: Vec<String> = addresses.iter().map(|(ip, _)| ip.to_string()).collect();
        let attached = format!("{} by {}", ips.join(" "), self.network.file.display());
        let mut steps = vec![Step::new("attach", "", self.in_the_fabric(&addresses).map(|()| attached))];
        for (ip, gateway) in &addresses {
            match gateway {
                Some(gateway) => self.ping(&pod, &mut steps, "gateway", *gateway),
                None => steps.push(Step::new("gateway", ip, Err("the plugins gave this address no gateway".into()))),
            }
        }
        self.peers(&pod, &mut steps);
        for target in &self.args.host.to {
            self.ping(&pod, &mut steps, "ping", *target);
        }
        self.outside(&pod, &mut steps);
        self.dns(&pod, &mut steps);
        steps.push(Step::new(
            "detach",
            "",
            pod.remove().map(|()| "nothing is left".into()).map_err(|error| chain(&error)),
        ));
        self.with_node(steps)
    }

    /// Whether the pod's addresses are of this node's subnets, as far as those are known. Else the runtime's config is another
    /// network's, and all that follows says nothing of this one.
    fn in_the_fabric(&self, addresses: &[(IpAddr, Option<IpAddr>)]) -> Result<(), String> {
        let lease = self.status.as_ref().and_then(|status| status.lease.as_ref());
        let subnets: Vec<Subnet> =
            lease.iter().flat_map(|lease| &lease.subnets).flat_map(|text| text.parse()).collect();
        let known = |ip: IpAddr| subnets.is_empty() || subnets.iter().any(|subnet| subnet.contains(ip));
        let Some((stray, _)) = addresses.iter().find(|(ip, _)| !known(*ip)) else { return Ok(()) };
        let subnets: Vec<String> = subnets.iter().map(ToString::to_string).collect();
        Err(format!(
            "{stray} by {} is not of this node's {}: the config that the runtime takes first is another network's; see \
             the check cni-config of fabricctl doctor",
            self.network.file.display(),
            subnets.join(" ")
        ))
    }

    fn with_node(&self, mut steps: Vec<Step>) -> Vec<Step> {
        let host = || fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned();
        let node = self.status.as_ref().map_or_else(host, |status| status.node.clone());
        steps.iter_mut().for_each(|step| step.from.clone_from(&node));
        steps
    }

    fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    /// A small packet and one of full size.
    fn ping(&self, pod: &Pod, steps: &mut Vec<Step>, step: &str, to: IpAddr) {
        if self.is_interrupted() {
            return;
        }
        let patience = self.args.timeout();
        let outcome = inside(pod, || ping(to, SMALL, patience)).and_then(|took| {
            let Some(full) = self.mtu() else { return Ok(millis(took)) };
            match inside(pod, || ping(to, full, patience)) {
                Ok(_) => Ok(format!("{}, and {full} bytes", millis(took))),
                Err(reason) => Err(format!("small packets are answered, those of {full} bytes aren't: {reason}")),
            }
        });
        steps.push(Step::new(step, to, outcome));
    }

    /// MTU of the pods' interfaces, if the daemon has told.
    fn mtu(&self) -> Option<usize> {
        let vteps = self.status.iter().flat_map(|status| &status.vteps);
        vteps.filter_map(|vtep| usize::try_from(vtep.mtu).ok()).filter(|mtu| *mtu > SMALL).min()
    }

    fn peers(&self, pod: &Pod, steps: &mut Vec<Step>) {
        let Some(status) = &self.status else {
            steps.push(Step::skipped("peers", "", "no fabricd answers, so they are not known; is it running?"));
            return;
        };
        let programmed = status.peers.iter().filter(|peer| peer.state() == PeerState::Programmed);
        for peer in programmed.take(MOST_PEERS) {
            let name = if peer.node.is_empty() { "(flannel)" } else { &peer.node };
            let vteps = peer.subnets.iter().filter_map(|subnet| subnet.split('/').next()?.parse().ok());
            for vtep in vteps {
                self.ping(pod, steps, &format!("peer {name}"), vtep);
            }
        }
        if status.peers.is_empty() {
            steps.push(Step::skipped("peers", "", "there is no other node"));
        }
        if status.peers.len() > MOST_PEERS {
            let reason = format!("{MOST_PEERS} of {} peers are tried; fabricctl mesh shows all", status.peers.len());
            steps.push(Step::skipped("peers", "", reason));
        }
    }

    fn outside(&self, pod: &Pod, steps: &mut Vec<Step>) {
        let (to, chosen) = match self.outside {
            Some(Destination::Off) => return,
            Some(to) => (to, true),
            None => match fs::read_to_string("/proc/net/route").ok().and_then(|routes| default_gateway(&routes)) {
                Some(gateway) => (Destination::Ping(gateway.into()), false),
                None => {
                    let reason = "this node has no default route; name a destination with --outside";
                    steps.push(Step::skipped("outside", "", reason));
                    return;
                }
            },
        };
        let patience = self.args.timeout();
        let attempt = move || match to {
            Destination::Off => Ok(Duration::ZERO),
            Destination::Ping(ip) => ping(ip, SMALL, patience),
            Destination::Connect(address) => connect(&address.to_string(), patience).map(|(_, took)| took),
        };
        let named = match to {
            Destination::Off => String::new(),
            Destination::Ping(ip) => ip.to_string(),
            Destination::Connect(address) => address.to_string(),
        };
        self.compared(pod, steps, ("outside", &named, chosen), attempt, |took| millis(*took));
    }

    fn dns(&self, pod: &Pod, steps: &mut Vec<Step>) {
        let name = self.args.dns.as_deref().unwrap_or("example.com");
        let resolvers = || fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        let Some(server) = self.args.host.dns_server.or_else(|| resolver(&resolvers())) else {
            let reason = "/etc/resolv.conf names no server that a pod could reach; name one with --dns-server";
            steps.push(Step::skipped("dns", name, reason));
            return;
        };
        let chosen = self.args.host.dns_server.is_some();
        let patience = self.args.timeout();
        let attempt = move || match query(server, name, patience)? {
            (code @ ("NOERROR" | "NXDOMAIN"), took) => Ok((code, took)),
            (code, _) => Err(format!("the server answers {code}")),
        };
        let to = format!("{name} by {server}");
        self.compared(pod, steps, ("dns", &to, chosen), attempt, |(code, took)| format!("{code} in {}", millis(*took)));
    }

    /// Tries something from the pod, and if that fails from the node. Where nobody has chosen the destination, one that the
    /// node doesn't reach either proves nothing.
    fn compared<T: Send>(
        &self,
        pod: &Pod,
        steps: &mut Vec<Step>,
        (step, to, chosen): (&str, &str, bool),
        attempt: impl Fn() -> Result<T, String> + Sync,
        tell: impl Fn(&T) -> String,
    ) {
        if self.is_interrupted() {
            return;
        }
        steps.push(match (inside(pod, &attempt), &attempt) {
            (Ok(done), _) => Step::new(step, to, Ok(tell(&done))),
            (Err(reason), attempt) => match attempt() {
                Ok(_) => {
                    let hint =
                        "the node itself gets an answer: does fabricd masquerade (--ip-masq)? see fabricctl doctor";
                    Step::new(step, to, Err(format!("{reason}; {hint}")))
                }
                Err(_) if chosen => {
                    Step::new(step, to, Err(format!("{reason}; the node itself gets no answer either")))
                }
                Err(_) => {
                    let flag = if step == "dns" { "--dns-server" } else { "--outside" };
                    Step::skipped(step, to, format!("the node itself gets no answer either; name another with {flag}"))
                }
            },
        });
    }
}

fn inside<T: Send>(pod: &Pod, task: impl FnOnce() -> Result<T, String> + Send) -> Result<T, String> {
    pod.inside(task).map_err(|error| chain(&error))?
}

/// The gateway of the default route with the smallest metric, by `/proc/net/route`.
fn default_gateway(routes: &str) -> Option<Ipv4Addr> {
    let routes = routes.lines().skip(1).filter_map(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let gateway = u32::from_str_radix(columns.get(2)?, 16).ok()?;
        let metric: u32 = columns.get(6)?.parse().ok()?;
        let is_default = columns.get(1) == Some(&"00000000") && columns.get(7) == Some(&"00000000");
        // In the order of bytes that the machine has.
        (is_default && gateway != 0).then(|| (metric, Ipv4Addr::from(gateway.to_ne_bytes())))
    });
    routes.min().map(|(_, gateway)| gateway)
}

/// The first DNS server that isn't on loopback: those answer the node alone.
fn resolver(resolv_conf: &str) -> Option<IpAddr> {
    let servers = resolv_conf.lines().filter_map(|line| line.trim().strip_prefix("nameserver")?.trim().parse().ok());
    servers.into_iter().find(|server: &IpAddr| !server.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateway_and_resolver_are_found_where_the_system_has_them() {
        let routes = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\n\
                      eth1\t00000000\t0102000A\t0003\t0\t0\t200\t00000000\t0\n\
                      eth0\t00000000\t010200C0\t0003\t0\t0\t100\t00000000\t0\n\
                      eth0\t000200C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\n";
        assert_eq!(default_gateway(routes), Some(Ipv4Addr::new(192, 0, 2, 1)));
        assert_eq!(default_gateway("Iface\n"), None);
        assert_eq!(resolver("# x\nnameserver 127.0.0.53\nnameserver 192.0.2.53\n"), "192.0.2.53".parse().ok());
        assert_eq!(resolver("nameserver 127.0.0.53\noptions edns0\n"), None);
    }

    #[test]
    fn outside_is_an_address_with_or_without_a_port() {
        assert_eq!(destination("192.0.2.1").unwrap(), Destination::Ping("192.0.2.1".parse().unwrap()));
        assert_eq!(
            destination("[2001:db8::1]:443").unwrap(),
            Destination::Connect("[2001:db8::1]:443".parse().unwrap())
        );
        assert_eq!(destination("off").unwrap(), Destination::Off);
        assert!(destination("example.com").unwrap_err().to_string().contains("192.0.2.1:443"));
    }
}
