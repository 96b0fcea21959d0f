//! `fabricctl network`: the network config in etcd.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use fabric_core::model::{Family, Subnet};
use fabric_core::network::{BackendDocument, NetworkConfig, NetworkDocument};
use fabric_proto::v1::MigrateNetworkRequest;
use fabricd::config::EtcdArgs;
use fabricd::kernel::Kernel as _;
use fabricd::kernel::netlink::{Netlink, Options};
use fabricd::store::etcd::{Etcd, Init};
use fabricd::underlay;

use crate::{Answer, daemon};

/// How long etcd may take.
pub const PATIENCE: Duration = Duration::from_secs(15);

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write the network config, once for the whole cluster
    Init(InitArgs),
    /// Apply on this node what is pending of the network config; pods may be cut off
    Migrate,
    /// Show the network config
    Show {
        /// Where etcd is.
        #[command(flatten)]
        etcd: EtcdArgs,
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

    /// How packets travel between nodes
    #[arg(long, value_name = "TYPE", default_value = "vxlan")]
    backend: String,

    /// VXLAN network identifier
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    vni: u32,

    /// UDP port of VXLAN
    #[arg(long, value_name = "PORT", default_value_t = fabric_core::network::DEFAULT_PORT)]
    port: u16,

    /// MTU of the underlay, if it is less than the interfaces' own
    #[arg(long, value_name = "BYTES")]
    mtu: Option<u32>,

    /// Route packets to peers on the same link without VXLAN
    #[arg(long)]
    direct_routing: bool,

    /// Replace a config that is there
    #[arg(long)]
    force: bool,

    /// Where etcd is.
    #[command(flatten)]
    etcd: EtcdArgs,
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
        Command::Init(args) => init(args).await,
        Command::Migrate => migrate(socket).await,
        Command::Show { etcd } => show(etcd).await,
    }
}

async fn migrate(socket: &Path) -> anyhow::Result<Answer> {
    let answer = daemon::connect(socket).await?.migrate_network(MigrateNetworkRequest {}).await;
    let changes = answer.map_err(|status| daemon::told(&status))?.into_inner().changes;
    Ok(Answer::fine(match changes.is_empty() {
        true => "nothing is pending on this node\n".into(),
        false => format!("being applied on this node: {}\n", changes.join(", ")),
    }))
}

async fn init(args: InitArgs) -> anyhow::Result<Answer> {
    let document = args.document();
    let config = document.validate()?;
    check_overlap(&config).await?;
    let json = serde_json::to_string(&document)?;
    let store = Etcd::start(args.etcd.options()?);
    let written = tokio::time::timeout(PATIENCE, store.network_init(json.as_bytes(), args.force));
    let key = format!("{}/config", args.etcd.prefix);
    let mut text = match written.await.with_context(|| unreached(&args.etcd))?? {
        Init::Created => format!("{key} written: {json}\n"),
        Init::Unchanged => format!("{key} says so already: {json}\n"),
        Init::Replaced(before) => {
            format!("{key} written: {json}\nit was: {}\n", String::from_utf8_lossy(&before.json))
        }
        Init::Exists(there) => {
            bail!("{key} is there already, and says {}; replace it with --force", String::from_utf8_lossy(&there.json));
        }
    };
    for (family, space) in config.spaces.iter() {
        let (count, len) = (space.capacity(), space.subnet_len);
        let _ = writeln!(text, "{family}: {count} subnets, {}/{len} to {}/{len}", space.min, space.max);
    }
    Ok(Answer::fine(text))
}

/// The network must not overlap what this host's underlay reaches: the nodes are alike in that.
async fn check_overlap(config: &NetworkConfig) -> anyhow::Result<()> {
    let Ok(mut kernel) = Netlink::new(Options::default()) else { return Ok(()) };
    let observed = kernel.observe().await.context("cannot look at this host's links")?;
    for family in Family::ALL {
        let Ok(chosen) = underlay::choose(&[], &observed.host, family, &[]) else { continue };
        let link = observed.host.links.iter().find(|link| link.name == chosen.underlay.dev);
        let prefixes: Vec<Subnet> = link.iter().flat_map(|link| link.addresses.iter().map(|(_, p)| *p)).collect();
        if let Some((network, prefix)) = config.overlap(&prefixes) {
            bail!(
                "the network {network} overlaps {prefix}, which this host's {} reaches directly; choose another",
                chosen.underlay.dev
            );
        }
    }
    Ok(())
}

async fn show(etcd: EtcdArgs) -> anyhow::Result<Answer> {
    let store = Etcd::start(etcd.options()?);
    let key = format!("{}/config", etcd.prefix);
    match tokio::time::timeout(PATIENCE, store.read_config()).await.with_context(|| unreached(&etcd))?? {
        Some(config) => {
            let network = NetworkConfig::decode(&config.json)
                .with_context(|| format!("{key} can't be used; it says {}", String::from_utf8_lossy(&config.json)))?;
            network.warnings().iter().for_each(|warning| eprintln!("fabricctl: {warning}"));
            Ok(Answer::fine(serde_json::to_string_pretty(&network.document())? + "\n"))
        }
        None => bail!("there is nothing at {key}; make it with: fabricctl network init --network 10.244.0.0/16"),
    }
}

pub fn unreached(etcd: &EtcdArgs) -> String {
    format!("etcd does not answer at {}; name it with --etcd-endpoints", etcd.endpoints.join(", "))
}
