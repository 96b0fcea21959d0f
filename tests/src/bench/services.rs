//! What Services cost: memory, the time from a list to the kernel, one change among many; the same in the layout of
//! kube-proxy's nftables mode.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::report::ms;
use super::{Report, usage};
use crate::kubernetes::{Nodes as _, api_on_underlay};
use crate::lab::{Lab, Node, wait_until};
use crate::services::{SERVICES, V1, endpoint, service, slice, slices_of};

/// How long anything may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(300);

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Services, each with one port.
    pub services: u16,
    /// Endpoints of each.
    pub endpoints: u8,
    /// Services that get other endpoints, one after the other.
    pub changes: u16,
}

/// Measures a node of its own, with all Services of IPv4.
///
/// # Errors
/// The lab breaks.
pub fn run(report: &mut Report, options: Options) -> Result<()> {
    let Options { services, endpoints, changes } = options;
    let section = format!("{services} Services with {endpoints} endpoints each");
    let mut lab = Lab::builder().name("bench-services").create()?;
    let api = api_on_underlay(&lab)?;
    let config = lab.dir().join("net-conf.json");
    std::fs::write(&config, r#"{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}"#)?;
    let node = lab.boot_node()?;
    api.add_node(&node.name, &["10.244.1.0/24"]);
    for number in 0..services {
        api.create(SERVICES, service(&name(number), &[&vip(number).to_string()], &Value::Null));
        api.create(&slices_of(V1), some_endpoints(number, 0, endpoints));
    }
    let (kubeconfig, config) = (api.kubeconfig(lab.dir())?, config.display().to_string());
    let kubeconfig = kubeconfig.display().to_string();
    let start = |services: &str| {
        let env = [
            ("FABRICD_STORE", "kubernetes"),
            ("FABRICD_KUBECONFIG", &kubeconfig),
            ("FABRICD_NET_CONFIG_PATH", &config),
            ("FABRICD_SERVICES", services),
        ];
        node.start_fabricd_with(&[], &env)?;
        wait_until("fabricd is ready", LIMIT, || {
            let reply = node.http_get(9472, "/readyz")?;
            ensure!(reply.status == 200, "{}", reply.body);
            Ok(())
        })?;
        node.service("fabricd").context("fabricd has ended")
    };

    let process = start("off")?;
    let (alone, _) = usage::resident(&process)?;
    node.stop_fabricd()?;
    for round in ["cold", "restart"] {
        let began = Instant::now();
        let process = start("on")?;
        report.number(&section, &format!("{round}: start to ready"), "ms", ms(began.elapsed()));
        report.number(&section, &format!("{round}: CPU until ready"), "ms", ms(usage::cpu(&process)?));
        let (resident, peak) = usage::resident(&process)?;
        report.number(&section, &format!("{round}: resident, beyond that without Services"), "MiB", resident - alone);
        report.number(&section, &format!("{round}: at its most, beyond that without Services"), "MiB", peak - alone);
        if round == "cold" {
            node.kill_fabricd()?;
        }
    }
    report.number(&section, "restart: changes that were written", "", latency(&node)?.0);
    let before = latency(&node)?;
    for number in 0..changes {
        let written = latency(&node)?.0;
        let patch = json!({"endpoints": some_endpoints(number, 1, endpoints)["endpoints"]});
        api.change(&slices_of(V1), &name(number), &patch);
        wait_until("the change is in the kernel", LIMIT, || {
            let now = latency(&node)?.0;
            ensure!(now > written, "{now}");
            Ok(())
        })?;
    }
    let after = latency(&node)?;
    let each = (after.1 - before.1) / (after.0 - before.0) * 1e3;
    report.number(&section, "one change: told to the kernel's acknowledgement, mean", "ms", each);
    node.stop_fabricd()?;
    as_kube_proxy(report, &section, &lab, &node, options)?;
    lab.destroy()
}

/// The same Services as kube-proxy's nftables mode lays them out (kubernetes/pkg/proxy/nftables): a chain for each, one for
/// each endpoint, and a verdict map. Written by `nft -f`, as kube-proxy does, but with two endpoints each at most, and 500
/// Services at a time: `nft` takes more memory the more it is given.
fn as_kube_proxy(report: &mut Report, section: &str, lab: &Lab, node: &Node, options: Options) -> Result<()> {
    let Options { services, changes, .. } = options;
    let endpoints = options.endpoints.min(2);
    let file = lab.dir().join("kube-proxy.nft");
    let write = |text: &str| -> Result<Duration> {
        std::fs::write(&file, text)?;
        let began = Instant::now();
        node.run(&["nft", "-f", &file.display().to_string()])?;
        Ok(began.elapsed())
    };
    let base = "
        add table ip kube-proxy
        add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
        add chain ip kube-proxy mark-for-masquerade
        add rule ip kube-proxy mark-for-masquerade mark set mark or 0x4000
        add chain ip kube-proxy services
        add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips
        add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority dstnat ; }
        add rule ip kube-proxy nat-prerouting jump services\n";
    let mut took = write(base)?;
    for first in (0..services).step_by(500) {
        let some = first..services.min(first.saturating_add(500));
        took += write(&some.map(|number| kube_proxy_service(number, endpoints)).collect::<String>())?;
    }
    report.number(section, &format!("kube-proxy's layout with {endpoints} endpoints, by nft -f: all"), "ms", ms(took));
    let mut times = vec![];
    for number in services..services.saturating_add(changes) {
        times.push(write(&kube_proxy_service(number, endpoints))?);
    }
    times.sort_unstable();
    let median = times.get(times.len() / 2).copied().unwrap_or_default();
    report.number(section, "kube-proxy's layout, by nft -f: one more Service, median", "ms", ms(median));
    Ok(())
}

/// The commands that add one Service.
fn kube_proxy_service(number: u16, endpoints: u8) -> String {
    let (vip, mut text) = (vip(number), String::new());
    let ip = |n: u8| endpoint_ip(number, 0, n);
    for n in 0..endpoints {
        let chain = format!("endpoint-{number}-{n}");
        text += &format!(
            "add chain ip kube-proxy {chain}\n\
             add rule ip kube-proxy {chain} ip saddr {0} jump mark-for-masquerade\n\
             add rule ip kube-proxy {chain} meta l4proto tcp dnat to {0}:8080\n",
            ip(n)
        );
    }
    let draw: Vec<String> = (0..endpoints).map(|n| format!("{n} : goto endpoint-{number}-{n}")).collect();
    text += &format!(
        "add chain ip kube-proxy service-{number}\n\
         add rule ip kube-proxy service-{number} ip daddr {vip} tcp dport 80 ip saddr != 10.244.0.0/16 \
         jump mark-for-masquerade\n\
         add rule ip kube-proxy service-{number} numgen random mod {endpoints} vmap {{ {} }}\n\
         add element ip kube-proxy service-ips {{ {vip} . tcp . 80 : goto service-{number} }}\n",
        draw.join(", ")
    );
    text
}

fn endpoint_ip(number: u16, variant: u8, n: u8) -> String {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(172 + variant, high, low, n + 1).to_string()
}

fn name(number: u16) -> String {
    format!("s{number}")
}

fn vip(number: u16) -> IpAddr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(10, 96, high, low).into()
}

/// The slice of a Service, in one of several variants.
fn some_endpoints(number: u16, variant: u8, count: u8) -> Value {
    let mut slice = slice(&name(number), &name(number), &[]);
    let ip = |n: u8| endpoint_ip(number, variant, n);
    let nodes = ["node-1", "node-2", "node-3"];
    slice["endpoints"] = (0..count).map(|n| endpoint(&ip(n), nodes[usize::from(n) % nodes.len()])).collect();
    slice
}

/// How many changes were written, and how long all of them took, in seconds.
fn latency(node: &Node) -> Result<(f64, f64)> {
    let metrics = node.http_get(9472, "/metrics")?.body;
    let of = |name: &str| {
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)).context("no such metric")?;
        anyhow::Ok(line.trim().parse::<f64>()?)
    };
    Ok((of("fabricd_services_latency_seconds_count")?, of("fabricd_services_latency_seconds_sum")?))
}
