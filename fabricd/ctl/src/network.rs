//! `fabricctl network`: the network config in the datastore.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use fabric_core::model::Subnet;
use fabric_core::network::{AddressSpace, BackendDocument, NetworkConfig, NetworkDocument};
use fabric_proto::v1::MigrateNetworkRequest;
use fabricd::config::StoreKind;
use fabricd::store::etcd::Init;

use crate::network_config::{IN_KUBERNETES, Written, check_overlap, in_time, stored};
use crate::network_set::{self, SetArgs};
use crate::output::{OutputArg, Screen};
use crate::settings::{Datastore, StoreArgs};
use crate::{Answer, daemon};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write the network config, once for the whole cluster
    Init(InitArgs),
    /// Change keys of the network config and keep all others
    Set(Box<SetArgs>),
    /// Apply pending changes of the network config on this node; pods may be cut off
    Migrate {
        #[command(flatten)]
        form: OutputArg,
    },
    /// Show the network config
    Show {
        #[command(flatten)]
        form: OutputArg,
        /// The datastore.
        #[command(flatten)]
        store: StoreArgs,
    },
}

#[derive(Debug, Args)]
pub struct InitArgs {
    /// IPv4 addresses of all pods
    #[arg(long, value_name = "CIDR", required_unless_present = "ipv6_network")]
    network: Option<Subnet>,

    /// IPv6 addresses of all pods
    #[arg(long, value_name = "CIDR")]
    ipv6_network: Option<Subnet>,

    /// Prefix length of a node's IPv4 subnet [default: 24]
    #[arg(long, value_name = "BITS", requires = "network")]
    subnet_len: Option<u8>,

    /// Prefix length of a node's IPv6 subnet [default: 64]
    #[arg(long, value_name = "BITS", requires = "ipv6_network")]
    ipv6_subnet_len: Option<u8>,

    /// First IPv4 subnet to lease [default: the second of the network]
    #[arg(long, value_name = "IPV4", requires = "network")]
    subnet_min: Option<Ipv4Addr>,

    /// Last IPv4 subnet to lease [default: the last of the network]
    #[arg(long, value_name = "IPV4", requires = "network")]
    subnet_max: Option<Ipv4Addr>,

    /// First IPv6 subnet to lease
    #[arg(long, value_name = "IPV6", requires = "ipv6_network")]
    ipv6_subnet_min: Option<Ipv6Addr>,

    /// Last IPv6 subnet to lease
    #[arg(long, value_name = "IPV6", requires = "ipv6_network")]
    ipv6_subnet_max: Option<Ipv6Addr>,

    /// Backend; only vxlan is supported
    #[arg(long, value_name = "TYPE", default_value = "vxlan")]
    backend: String,

    /// VXLAN network identifier
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    vni: u32,

    /// UDP port of VXLAN
    #[arg(long, value_name = "PORT", default_value_t = fabric_core::network::DEFAULT_PORT)]
    port: u16,

    /// MTU of the underlay in bytes, if less than the interfaces' own
    #[arg(long, value_name = "BYTES")]
    mtu: Option<u32>,

    /// Route packets to peers on the same link directly, without VXLAN
    #[arg(long)]
    direct_routing: bool,

    /// Replace an existing config; to change single keys, use: fabricctl network set
    #[arg(long)]
    force: bool,

    #[command(flatten)]
    form: OutputArg,

    /// The datastore.
    #[command(flatten)]
    store: StoreArgs,
}

impl InitArgs {
    fn document(&self) -> NetworkDocument {
        NetworkDocument {
            enable_ipv4: self.network.is_none().then_some(false),
            enable_ipv6: self.ipv6_network.is_some().then_some(true),
            enable_nftables: None,
            network: self.network,
            ipv6_network: self.ipv6_network,
            subnet_len: self.subnet_len,
            ipv6_subnet_len: self.ipv6_subnet_len,
            subnet_min: self.subnet_min,
            subnet_max: self.subnet_max,
            ipv6_subnet_min: self.ipv6_subnet_min,
            ipv6_subnet_max: self.ipv6_subnet_max,
            backend: Some(BackendDocument {
                kind: self.backend.clone(),
                vni: Some(self.vni),
                port: Some(self.port),
                mtu: self.mtu,
                gbp: None,
                learning: None,
                direct_routing: self.direct_routing.then_some(true),
            }),
        }
    }
}

pub async fn run(command: Command, socket: &Path) -> anyhow::Result<Answer> {
    match command {
        Command::Init(args) => init(args, socket).await,
        Command::Set(args) => network_set::set(*args, socket).await,
        Command::Migrate { form } => migrate(socket, form).await,
        Command::Show { form, store } => show(&store.find(socket).await?, form).await,
    }
}

async fn migrate(socket: &Path, form: OutputArg) -> anyhow::Result<Answer> {
    let answer = daemon::connect(socket).await?.migrate_network(MigrateNetworkRequest {}).await;
    let answer = answer.map_err(|status| daemon::told(&status))?.into_inner();
    Ok(Answer::fine(form.output.show(&answer, |_| match answer.changes.is_empty() {
        true => "nothing is pending on this node\n".into(),
        false => format!("being applied on this node: {}\n", answer.changes.join(", ")),
    })?))
}

async fn init(args: InitArgs, socket: &Path) -> anyhow::Result<Answer> {
    let document = args.document();
    let config = document.validate()?;
    check_overlap(&config).await?;
    let json = serde_json::to_string(&document)?;
    let store = args.store.find(socket).await?;
    let etcd = store.etcd(IN_KUBERNETES)?;
    let key = store.config_key();
    let (before, said) = match in_time(&store, etcd.network_init(json.as_bytes(), args.force)).await? {
        Init::Created => (None, None),
        Init::Unchanged => (None, Some(format!("{key} says so already: {json}\n"))),
        Init::Replaced(before) => (Some(before.json), None),
        Init::Exists(there) => bail!(
            "{key} is there already, and says {}; replace it with --force, or change single keys with: fabricctl network set",
            String::from_utf8_lossy(&there.json)
        ),
    };
    let written = Written::new(key, json.as_bytes(), before.as_deref());
    let text = args.form.output.show(&written, |_| {
        let mut text = said.unwrap_or_else(|| written.describe());
        config.spaces.iter().for_each(|(family, space)| text += &format!("{family}: {}\n", subnets(space)));
        text
    })?;
    Ok(Answer::fine(text))
}

/// How many nodes an address space has room for.
fn subnets(space: &AddressSpace) -> String {
    let (count, len) = (space.capacity(), space.subnet_len);
    format!("{count} subnets, {}/{len} to {}/{len}", space.min, space.max)
}

async fn show(store: &Datastore, form: OutputArg) -> anyhow::Result<Answer> {
    let (place, json) = match store.kind {
        StoreKind::Etcd => (store.config_key(), stored(store).await?.json),
        StoreKind::Kubernetes => {
            let file = &store.net_config;
            let json = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
            (file.display().to_string(), json)
        }
    };
    let text = String::from_utf8_lossy(&json);
    let config = NetworkConfig::decode(&json).with_context(|| format!("{place} can't be used; it says {text}"))?;
    config.warnings().iter().for_each(|warning| eprintln!("fabricctl: {warning}"));
    let table = |_: &Screen| describe(&config, &format!("{place}, set by {}", store.source));
    Ok(Answer::fine(form.output.show(&config.document(), table)?))
}

/// The config with its defaults.
fn describe(config: &NetworkConfig, place: &str) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:13}{value}");
    };
    for space in config.spaces.values() {
        line("Network", format!("{}: {}", space.network, subnets(space)));
    }
    let vxlan = &config.vxlan;
    line("Backend", format!("vxlan, VNI {}, UDP port {}", vxlan.vni, vxlan.port));
    line("Underlay MTU", vxlan.underlay_mtu.map_or("of each node's interface".into(), |mtu| mtu.to_string()));
    let options = [(vxlan.direct_routing, "direct routing"), (vxlan.gbp, "GBP"), (vxlan.learning, "learning")];
    let options: Vec<&str> = options.into_iter().filter(|(on, _)| *on).map(|(_, name)| name).collect();
    if !options.is_empty() {
        line("Options", options.join(", "));
    }
    line("Stored at", place.to_owned());
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_is_shown_with_its_defaults() {
        let json = br#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}"#;
        let config = NetworkConfig::decode(json).unwrap();
        let want = "\
Network      10.244.0.0/16: 255 subnets, 10.244.1.0/24 to 10.244.255.0/24
Backend      vxlan, VNI 1, UDP port 8472
Underlay MTU of each node's interface
Options      direct routing
Stored at    /coreos.com/network/config, set by /etc/fabric/fabricd.toml
";
        assert_eq!(describe(&config, "/coreos.com/network/config, set by /etc/fabric/fabricd.toml"), want);
    }
}
