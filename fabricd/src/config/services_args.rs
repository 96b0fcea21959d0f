//! The settings of Services: see docs/services.md.

use std::str::FromStr;

use clap::{Args, ValueEnum};
use fabric_core::model::Subnet;

use super::{Address, parse_address};

/// What is to be done about Services of Kubernetes.
#[derive(Clone, Debug, Args)]
pub struct ServicesArgs {
    /// Translate Services of Kubernetes, as kube-proxy does; it must not run on this node
    #[arg(long, env = "FABRICD_SERVICES", value_name = "SWITCH", default_value = "off")]
    pub services: Switch,

    /// With --services on: translate Services before a kube-proxy that runs, and remove its rules once it has ended
    #[arg(long, env = "FABRICD_REPLACE_KUBE_PROXY")]
    pub replace_kube_proxy: bool,

    /// With --services on: where load balancers ask whether this node takes connections (/healthz, /livez), or "off"
    #[arg(
        long,
        env = "FABRICD_SERVICES_HEALTH_ADDR",
        value_name = "IP:PORT",
        default_value = "[::]:10256",
        value_parser = parse_address
    )]
    pub services_health_addr: Address,

    /// With --services on: this host's addresses that take NodePorts: "primary" (the Node's first InternalIP of each
    /// family), "all", or those within prefixes, as in 192.0.2.0/24,2001:db8::/32
    #[arg(long, env = "FABRICD_NODE_PORT_ADDRESSES", value_name = "WHICH", default_value = "primary")]
    pub node_port_addresses: NodePortAddresses,

    /// With --services on: prefixes that ClusterIPs are from, beside those that the API server says (Kubernetes 1.33)
    #[arg(long, env = "FABRICD_SERVICE_CIDR", value_name = "CIDR,…", value_delimiter = ',')]
    pub service_cidr: Vec<Subnet>,
}

/// Which addresses of the host take NodePorts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// The Node's first `InternalIP` of each family.
    Primary,
    /// All.
    All,
    /// Those within one of these prefixes.
    Within(Vec<Subnet>),
}

impl FromStr for NodePortAddresses {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "primary" => Ok(Self::Primary),
            "all" => Ok(Self::All),
            text => {
                let prefix = |text: &str| text.trim().parse::<Subnet>().map_err(|error| format!("{text}: {error}"));
                Ok(Self::Within(text.split(',').map(prefix).collect::<Result<_, _>>()?))
            }
        }
    }
}

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Not done.
    Off,
    /// Done.
    On,
}
