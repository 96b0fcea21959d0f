//! A flannel node: what flanneld v0.28 and its CNI plugin leave on a host, made from their records, devices, routes, rules
//! and files; or the programs themselves, where `FLANNELD` and `FLANNEL_CNI` name them.
//!
//! | what | as flannel makes it |
//! |---|---|
//! | device | `flannel.1`, `flannel-v6.1`: `id 1 local IP dev eth0 dstport 8472 nolearning`, the subnet's first address, accept_ra 0 |
//! | peer | FDB entry, neighbour, and a route `via` the subnet's first address `onlink`, or to the peer itself (`DirectRouting`), of protocol boot |
//! | record | without a member of ours, on an etcd lease of a day; found again by its PublicIP |
//! | rules | chains `FLANNEL-POSTRTG` and `FLANNEL-FWD`, emptied and filled at each start, or the tables `flannel-ipv4` and `flannel-ipv6` |
//! | files | `/run/flannel/subnet.env`, `10-flannel.conflist`, `/var/lib/cni/flannel/<container>` |
//!
//! Without the real one nobody watches etcd: [`Flannel::follow`] makes the entries of all peers that are there now.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use fabric_core::model::Family;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::exec::Exec;
use super::node::Node;
use super::{Lab, addresses, cni, wait_until};
use crate::fake_api::{FakeApi, NODES};
use crate::kubernetes::PREFIX;

/// flannel's conflist.
pub const CONFLIST: &str = "10-flannel.conflist";

const SERVICE: &str = "flanneld";
const SUBNETS: &str = "/coreos.com/network/subnets/";

/// What flannel's plugin does: the delegate's configuration from `subnet.env`, remembered for DEL.
const PLUGIN: &str = r#"#!/bin/sh
cat >/dev/null
file=/var/lib/cni/flannel/$CNI_CONTAINERID
case $CNI_COMMAND in
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["0.3.0","0.3.1","0.4.0","1.0.0"]}'; exit ;;
CHECK) exit ;;
DEL) [ ! -e "$file" ] || { /opt/cni/bin/bridge <"$file" && rm "$file"; }; exit ;;
esac
. /run/flannel/subnet.env
[ "$FLANNEL_IPMASQ" = true ] && masq=false || masq=true
ranges= routes=
if [ -n "$FLANNEL_SUBNET" ]; then
    ranges="[{\"subnet\":\"${FLANNEL_SUBNET%.*}.0/24\"}]" routes="{\"dst\":\"$FLANNEL_NETWORK\"}"
fi
if [ -n "$FLANNEL_IPV6_SUBNET" ]; then
    ranges="${ranges:+$ranges,}[{\"subnet\":\"${FLANNEL_IPV6_SUBNET%1/64}/64\"}]"
    routes="${routes:+$routes,}{\"dst\":\"$FLANNEL_IPV6_NETWORK\"}"
fi
mkdir -p -m 700 /var/lib/cni/flannel
cat >"$file" <<EOF
{"cniVersion":"1.0.0","hairpinMode":true,"ipMasq":$masq,"ipam":{"ranges":[$ranges],"routes":[$routes],"type":"host-local"},"isDefaultGateway":true,"isGateway":true,"mtu":$FLANNEL_MTU,"name":"cbr0","type":"bridge"}
EOF
exec /opt/cni/bin/bridge <"$file"
"#;

/// How a flannel node is set up.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Its rules are nftables (`EnableNFTables`).
    pub nftables: bool,
    /// `DirectRouting`.
    pub direct: bool,
    /// flanneld has `--ip-masq`.
    pub masquerade: bool,
}

/// A node that is flannel's.
#[derive(Debug)]
pub struct Flannel {
    /// The node.
    pub node: Arc<Node>,
    /// What fabricd is told on this node, and its commands.
    pub settings: Vec<(String, String)>,
    families: super::Families,
    registry: Registry,
    /// IPv4's, if it isn't the usual one.
    network: Option<String>,
    /// How it is set up.
    pub options: Options,
}

/// Where flannel's records are.
#[derive(Clone)]
pub enum Registry {
    /// In etcd, at these endpoints.
    Etcd(String),
    /// In the annotations of Nodes (`--kube-subnet-mgr`).
    Nodes(Arc<FakeApi>),
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if matches!(self, Self::Etcd(_)) { "Etcd" } else { "Nodes" })
    }
}

/// A record: its key and value, as they are in etcd.
struct Record {
    key: String,
    value: Value,
}

impl Record {
    fn subnet(&self, family: Family) -> Option<String> {
        let mut parts = self.key.split('&').map(|part| part.replacen('-', "/", 1));
        parts.find(|part| part.contains(':') == (family == Family::V6))
    }

    fn of(&self, family: Family) -> Option<(String, &str, &str)> {
        let (ip, data) = members(family);
        Some((self.subnet(family)?, self.value[ip].as_str()?, self.value[data]["VtepMAC"].as_str()?))
    }
}

fn members(family: Family) -> (&'static str, &'static str) {
    match family {
        Family::V4 => ("PublicIP", "BackendData"),
        Family::V6 => ("PublicIPv6", "BackendV6Data"),
    }
}

fn annotations(family: Family) -> (&'static str, &'static str) {
    match family {
        Family::V4 => ("public-ip", "backend-data"),
        Family::V6 => ("public-ipv6", "backend-v6-data"),
    }
}

fn device(family: Family) -> &'static str {
    if family == Family::V4 { "flannel.1" } else { "flannel-v6.1" }
}

fn base(subnet: &str) -> &str {
    subnet.split('/').next().unwrap_or_default()
}

impl Flannel {
    /// Makes a flannel node of one that was booted: plugin and conflist, and flanneld, running.
    ///
    /// # Errors
    /// Something of it can't be made.
    pub fn start_on(lab: &Lab, node: &Arc<Node>, options: Options) -> Result<Self> {
        Self::start_with(lab, node, options, Registry::Etcd(lab.plan.etcd_endpoints.clone()))
    }

    /// The same, with its records there.
    ///
    /// # Errors
    /// Something of it can't be made.
    pub fn start_with(lab: &Lab, node: &Arc<Node>, options: Options, registry: Registry) -> Result<Self> {
        node.run(&["rm", "-f", &format!("{}/10-fabric.conflist", cni::NETWORKS)])?;
        let flannel = Self { registry, ..Self::install_on(lab, node, options)? };
        flannel.start()?;
        Ok(flannel)
    }

    /// Puts plugin and conflist on a node, beside what is there. flanneld isn't started.
    ///
    /// # Errors
    /// The node is off.
    pub fn install_on(lab: &Lab, node: &Arc<Node>, options: Options) -> Result<Self> {
        let registry = Registry::Etcd(lab.plan.etcd_endpoints.clone());
        let settings = vec![("FABRICD_IP_MASQ".to_owned(), "true".to_owned())];
        let network = lab.plan.network.iter().skip_while(|arg| *arg != "--network").nth(1).cloned();
        let flannel = Self { node: Arc::clone(node), settings, families: lab.families(), registry, network, options };
        let plugin = node.path(&format!("{}/flannel", cni::PLUGINS))?;
        match std::env::var_os("FLANNEL_CNI") {
            Some(real) => drop(fs::copy(real, &plugin)?),
            None => fs::write(&plugin, PLUGIN)?,
        }
        node.run(&["chmod", "755", &format!("{}/flannel", cni::PLUGINS)])?;
        flannel.write_conflist()?;
        Ok(flannel)
    }

    fn network(&self, family: Family) -> &str {
        let other = self.network.as_deref().filter(|_| family == Family::V4);
        other.unwrap_or_else(|| addresses::pod_network(family))
    }

    /// flannel's conflist, as its DaemonSet's init container writes it.
    ///
    /// # Errors
    /// The node is off.
    pub fn write_conflist(&self) -> Result<()> {
        let delegate = json!({ "hairpinMode": true, "isDefaultGateway": true });
        let conflist = json!({
            "cniVersion": "1.0.0", "name": "cbr0", "plugins": [{ "type": "flannel", "delegate": delegate }],
        });
        Ok(fs::write(self.node.path(&format!("{}/{CONFLIST}", cni::NETWORKS))?, conflist.to_string())?)
    }

    /// Starts flanneld: it has device, lease, peers, rules and `subnet.env` in order when this returns.
    ///
    /// # Errors
    /// Something of it can't be made; a flanneld that is real doesn't get there.
    pub fn start(&self) -> Result<()> {
        if let Ok(real) = std::env::var("FLANNELD") {
            return self.start_real(&real);
        }
        self.node.run(&["cp", "/bin/sleep", "/opt/flanneld"])?;
        self.node.start_service(SERVICE, &["/opt/flanneld", "infinity"], &[])?;
        // In the order of its main.go.
        let comes_up = || {
            let own = self.lease()?;
            self.rules(&own)?;
            self.write_subnet_env(&own)?;
            self.follow()
        };
        comes_up().or_else(|error| self.stop().and(Err(error)))
    }

    fn start_real(&self, program: &str) -> Result<()> {
        let Registry::Etcd(endpoints) = &self.registry else { bail!("the real flanneld is tried with etcd alone") };
        let endpoints = format!("--etcd-endpoints={endpoints}");
        let masquerade = format!("--ip-masq={}", self.options.masquerade);
        self.node.start_service(SERVICE, &[program, &endpoints, &masquerade, "--iface=eth0"], &[])?;
        wait_until("flanneld has routes to all peers", Duration::from_secs(60), || {
            if !self.is_running() {
                return Ok(false);
            }
            self.node.run(&["cat", "/run/flannel/subnet.env"])?;
            for &family in self.families.each() {
                let flag = if family == Family::V4 { "-4" } else { "-6" };
                let shown = self.node.run(&["ip", flag, "route", "show"])?;
                for record in self.records()? {
                    let Some((subnet, ip, _)) = record.of(family) else { continue };
                    let is_own = ip == self.node.underlay_ip(family).to_string();
                    let route = shown.lines().find(|line| line.split(' ').next() == Some(&subnet)).unwrap_or_default();
                    ensure!(is_own || (!route.is_empty() && !route.contains("proto 250")), "{subnet}: {route}");
                }
            }
            Ok(true)
        })
        .and_then(|is_there| is_there.then_some(()).context("flanneld has ended"))
        .with_context(|| self.node.log_tail(SERVICE))
    }

    /// fabricd, or a command of it, on this node.
    ///
    /// # Errors
    /// The node is off.
    pub fn fabricd(&self, args: &[&str]) -> Result<Exec> {
        let command = self.node.command(&[&["fabricd"], args].concat())?;
        Ok(self.settings.iter().fold(command, |command, (name, value)| command.env(name, value)))
    }

    /// Whether flanneld runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.node.service(SERVICE).is_some()
    }

    /// Ends flanneld (SIGTERM). It leaves everything.
    ///
    /// # Errors
    /// It doesn't run.
    pub fn stop(&self) -> Result<()> {
        self.node.end(SERVICE, Signal::SIGTERM)
    }

    /// Makes the entries of all peers that are in etcd now.
    ///
    /// # Errors
    /// etcd or the kernel refuses.
    pub fn follow(&self) -> Result<()> {
        if std::env::var_os("FLANNELD").is_some() {
            return Ok(());
        }
        let (mut forwarding, mut paths) = (String::new(), String::new());
        for record in self.records()? {
            for &family in self.families.each() {
                let Some((subnet, ip, mac)) = record.of(family) else { continue };
                if ip == self.node.underlay_ip(family).to_string() {
                    continue;
                }
                let (dev, base) = (device(family), base(&subnet));
                let via =
                    if self.options.direct { format!("{ip} dev eth0") } else { format!("{base} dev {dev} onlink") };
                writeln!(forwarding, "fdb replace {mac} dev {dev} dst {ip} self permanent")?;
                writeln!(paths, "neighbour replace {base} lladdr {mac} dev {dev} nud permanent")?;
                writeln!(paths, "route replace {subnet} via {via}")?;
            }
        }
        self.node.command(&["bridge", "-batch", "-"])?.stdin(forwarding).run()?;
        self.node.command(&["ip", "-batch", "-"])?.stdin(paths).run()?;
        Ok(())
    }

    /// The lease of before, found by its PublicIP, or a new one; and the devices for it.
    fn lease(&self) -> Result<Record> {
        let records = self.records()?;
        let first = self.families.first();
        let ip = self.node.underlay_ip(first).to_string();
        let known = match &self.registry {
            Registry::Etcd(_) => records.into_iter().find(|record| record.value[members(first).0] == ip.as_str()),
            Registry::Nodes(api) => api.get(NODES, &self.node.name).map(|node| self.record_of(&node)),
        };
        let number = 100 + self.node.index;
        let subnet = |family: &Family| match family {
            Family::V4 if self.network.as_deref() == Some("10.128.0.0/10") => format!("10.190.{number}.0-24"),
            Family::V4 => format!("10.244.{number}.0-24"),
            Family::V6 => format!("fd00:10:244:{number:x}::-64"),
        };
        let key = known
            .map_or_else(|| self.families.each().iter().map(subnet).collect::<Vec<_>>().join("&"), |record| record.key);
        let mut own = Record { key, value: json!({ "PublicIP": "0.0.0.0", "BackendType": "vxlan" }) };
        for &family in self.families.each() {
            let (dev, local) = (device(family), self.node.underlay_ip(family));
            let subnet = own.subnet(family).context("a subnet of each family")?;
            if !self.node.exec(&["ip", "link", "show", dev])?.success() {
                let vxlan = "dstport 8472 nolearning ttl auto udpcsum";
                self.sh(&format!("ip link add {dev} type vxlan id 1 local {local} dev eth0 {vxlan}"))?;
                let (mtu, bits) = if family == Family::V4 { (1450, 32) } else { (1430, 128) };
                self.sh(&format!("ip address add {}/{bits} dev {dev}", base(&subnet)))?;
                self.sh(&format!("ip link set {dev} mtu {mtu} up && echo 0 >/proc/sys/net/ipv6/conf/{dev}/accept_ra"))?;
            }
            let shown: Value = serde_json::from_str(&self.node.run(&["ip", "-j", "link", "show", dev])?)?;
            let (ip, data) = members(family);
            own.value[ip] = local.to_string().into();
            own.value[data] = json!({ "VNI": 1, "VtepMAC": shown[0]["address"] });
            let switch = if family == Family::V4 { "ipv4/ip_forward" } else { "ipv6/conf/all/forwarding" };
            self.sh(&format!("echo 1 >/proc/sys/net/{switch}"))?;
        }
        self.publish(&own)?;
        Ok(own)
    }

    fn publish(&self, own: &Record) -> Result<()> {
        if let Registry::Nodes(api) = &self.registry {
            let mut said = json!({ "kube-subnet-manager": "true", "backend-type": "vxlan" });
            for &family in self.families.each() {
                let ((ip, data), (public, backend)) = (members(family), annotations(family));
                said[public] = own.value[ip].clone();
                said[backend] = own.value[data].to_string().into();
            }
            let said = said.as_object().into_iter().flatten().map(|(name, value)| (format!("{PREFIX}/{name}"), value));
            let said: BTreeMap<String, &Value> = said.collect();
            api.change(NODES, &self.node.name, &json!({ "metadata": { "annotations": said } }));
            return Ok(());
        }
        let granted = self.node.run(&["etcdctl", "lease", "grant", "86400"])?;
        let lease = granted.split_whitespace().nth(1).context("a lease's id")?;
        let key = format!("{SUBNETS}{}", own.key);
        self.node.run(&["etcdctl", "put", &key, &own.value.to_string(), &format!("--lease={lease}")])?;
        Ok(())
    }

    fn records(&self) -> Result<Vec<Record>> {
        if let Registry::Nodes(api) = &self.registry {
            return Ok(api.all(NODES).iter().map(|node| self.record_of(node)).collect());
        }
        let shown = self.node.run(&["etcdctl", "get", "--prefix", SUBNETS])?;
        let lines: Vec<&str> = shown.lines().filter(|line| !line.is_empty()).collect();
        let record = |pair: &[&str]| {
            let key = pair[0].strip_prefix(SUBNETS).context("a key below subnets/")?.to_owned();
            Ok(Record { key, value: serde_json::from_str(pair[1])? })
        };
        lines.chunks_exact(2).map(record).collect()
    }

    /// A Node's podCIDRs and annotations as a record.
    fn record_of(&self, node: &Value) -> Record {
        let cidrs = node["spec"]["podCIDRs"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let key = cidrs.map(|cidr| cidr.replace('/', "-")).collect::<Vec<_>>().join("&");
        let mut value = json!({ "BackendType": "vxlan" });
        for &family in self.families.each() {
            let ((ip, data), (public, backend)) = (members(family), annotations(family));
            let said = |name: &str| node["metadata"]["annotations"][format!("{PREFIX}/{name}")].as_str();
            value[ip] = said(public).into();
            value[data] = said(backend).and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
        }
        Record { key, value }
    }

    fn rules(&self, own: &Record) -> Result<()> {
        for &family in self.families.each() {
            let (network, pods) = (self.network(family), own.subnet(family).context("a subnet")?);
            let multicast = if family == Family::V4 { "224.0.0.0/4" } else { "ff00::/8" };
            if self.options.nftables {
                self.tables(family, network, &pods, multicast)?;
                continue;
            }
            if self.options.masquerade {
                let rules = [
                    ("-m mark --mark 0x4000/0x4000", "RETURN"),
                    (&format!("-s {pods} -d {network}"), "RETURN"),
                    (&format!("-s {network} -d {pods}"), "RETURN"),
                    (&format!("! -s {network} -d {pods}"), "RETURN"),
                    (&format!("-s {network} ! -d {multicast}"), "MASQUERADE --random-fully"),
                    (&format!("! -s {network} -d {network}"), "MASQUERADE --random-fully"),
                ];
                self.chain(family, ["nat", "POSTROUTING", "FLANNEL-POSTRTG", "flanneld masq"], &rules)?;
            }
            let rules = [(&*format!("-s {network}"), "ACCEPT"), (&format!("-d {network}"), "ACCEPT")];
            self.chain(family, ["filter", "FORWARD", "FLANNEL-FWD", "flanneld forward"], &rules)?;
        }
        Ok(())
    }

    /// One of its chains of iptables, whether or not it is there: emptied by one command, filled by another.
    fn chain(&self, family: Family, names: [&str; 4], rules: &[(&str, &str)]) -> Result<()> {
        let [table, from, chain, comment] = names;
        let program = if family == Family::V4 { "iptables" } else { "ip6tables" };
        self.sh(&format!("{program} -t {table} -F {chain} 2>/dev/null || {program} -t {table} -N {chain}"))?;
        let comment = format!("-m comment --comment \"{comment}\"");
        let jump = format!("{from} {comment} -j {chain}");
        let mut text = format!("*{table}\n");
        if self.node.exec(&["sh", "-c", &format!("{program} -t {table} -C {jump}")])?.success() {
            writeln!(text, "-D {jump}")?;
        }
        writeln!(text, "-A {jump}")?;
        for (matches, verdict) in rules {
            writeln!(text, "-A {chain} {matches} {comment} -j {verdict}")?;
        }
        text += "COMMIT\n";
        self.node.command(&[&format!("{program}-restore"), "--noflush"])?.stdin(text).run().map(drop)
    }

    /// Its table of nftables (`EnableNFTables`): each chain in one transaction, whether or not it is there.
    fn tables(&self, family: Family, network: &str, pods: &str, multicast: &str) -> Result<()> {
        let (ip, table) = if family == Family::V4 { ("ip", "ip flannel-ipv4") } else { ("ip6", "ip6 flannel-ipv6") };
        let chain = |name: &str, hook: &str, rules: &str| {
            let text = format!(
                "table {table} {{ chain {name} {{ {hook} }}\n}}\nflush chain {table} {name}\n\
                 table {table} {{ chain {name} {{ {rules} }}\n}}\n"
            );
            self.node.command(&["nft", "-f", "-"])?.stdin(text).run().map(drop)
        };
        if self.options.masquerade {
            let rules = format!(
                "meta mark 0x4000 return; {ip} saddr {pods} {ip} daddr {network} return; \
                 {ip} saddr {network} {ip} daddr {pods} return; {ip} saddr != {pods} {ip} daddr {network} return; \
                 {ip} saddr {network} {ip} daddr != {multicast} masquerade fully-random; \
                 {ip} saddr != {network} {ip} daddr {network} masquerade fully-random;"
            );
            chain("postrtg", "type nat hook postrouting priority 100;", &rules)?;
        }
        let rules = format!("{ip} saddr {network} accept; {ip} daddr {network} accept;");
        chain("forward", "type filter hook forward priority 0;", &rules)
    }

    fn write_subnet_env(&self, own: &Record) -> Result<()> {
        let mut text = String::new();
        for &family in self.families.each() {
            let (network, subnet) = (self.network(family), own.subnet(family).context("a subnet")?);
            let (name, gateway) = match family {
                Family::V4 => ("FLANNEL", subnet.replacen(".0/", ".1/", 1)),
                Family::V6 => ("FLANNEL_IPV6", subnet.replacen("::/", "::1/", 1)),
            };
            text += &format!("{name}_NETWORK={network}\n{name}_SUBNET={gateway}\n");
        }
        text += &format!("FLANNEL_MTU=1450\nFLANNEL_IPMASQ={}\n", self.options.masquerade);
        self.node.run(&["mkdir", "-p", "/run/flannel"])?;
        Ok(fs::write(self.node.path("/run/flannel/subnet.env")?, text)?)
    }

    fn sh(&self, script: &str) -> Result<String> {
        self.node.run(&["sh", "-c", script])
    }
}

/// A network config with members that `fabricctl network init` knows nothing of, as flannel's config has them.
///
/// # Errors
/// etcd refuses.
pub fn extend_config(lab: &Lab, options: Options) -> Result<()> {
    const CONFIG: &str = "/coreos.com/network/config";
    let etcd = &lab.underlay().machine;
    let endpoints = format!("--endpoints={}", lab.plan.etcd_endpoints);
    let shown = etcd.run(&["env", "ETCDCTL_API=3", "etcdctl", &endpoints, "get", "--print-value-only", CONFIG])?;
    let mut config: Value = serde_json::from_str(&shown)?;
    config["EnableNFTables"] = options.nftables.into();
    config["Backend"]["DirectRouting"] = options.direct.into();
    etcd.run(&["env", "ETCDCTL_API=3", "etcdctl", &endpoints, "put", CONFIG, &config.to_string()])?;
    Ok(())
}
