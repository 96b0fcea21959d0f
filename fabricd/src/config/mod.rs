//! The settings of one node: flags, environment variables `FABRICD_*` and a TOML file, in that order of precedence.
//! [`Config::of_host`] reads them as the installed service does, for a program that is not the daemon.
//!
//! The file has the flags' names with `_` for `-`, as in `etcd_endpoints = ["http://192.0.2.1:2379"]`.

pub(crate) mod files;
pub mod filter_args;
pub mod log_level;
pub mod policy_args;
pub mod services_args;

use std::ffi::OsString;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::http::Uri;
use clap::{ArgMatches, Args, Command, CommandFactory, FromArgMatches, Parser, ValueEnum};
use fabric_core::model::{Family, NodeName, PerFamily};
use jiff::SignedDuration;
use regex::Regex;

use self::files::{variables, with_file, with_variables};
use self::filter_args::FilterArgs;
use self::policy_args::{PolicyArgs, PolicySwitch};
use self::services_args::{ServicesArgs, Switch};
use crate::host::addresses::CniDirs;
use crate::host::underlay::Selector;
use crate::kubernetes::addresses::{self, Addresses};
use crate::kubernetes::client::ApiServer;
use crate::status::fast_path::Mode;
use crate::store::etcd::{Options, Tls, User, complete};
use crate::store::kubernetes;

/// Node daemon of the fabricd overlay network.
#[derive(Clone, Debug, Parser)]
#[command(name = "fabricd", version, after_help = AFTER_HELP)]
pub struct Config {
    /// Name of this node: its identity in the datastore [default: the host name]
    #[arg(long, env = "FABRICD_NODE_NAME", value_name = "NAME")]
    pub node_name: Option<NodeName>,

    /// Settings file in TOML [default: /etc/fabric/fabricd.toml, if it exists]
    #[arg(long, env = "FABRICD_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Datastore of the leases
    #[arg(long, env = "FABRICD_STORE", value_name = "STORE", default_value = "etcd")]
    pub store: StoreKind,

    /// How etcd is reached.
    #[command(flatten)]
    pub etcd: EtcdArgs,

    /// How Kubernetes is reached.
    #[command(flatten)]
    pub kubernetes: KubernetesArgs,

    /// Time to live (TTL) of the lease after its last renewal, as in 90s, 30m, 24h
    #[arg(long, env = "FABRICD_LEASE_TTL", value_name = "TIME", default_value = "24h", value_parser = parse_duration)]
    pub lease_ttl: Duration,

    /// Grace period: how long an expired subnet is kept for its node, unless no other is free
    #[arg(long, env = "FABRICD_LEASE_GRACE", value_name = "TIME", default_value = "24h", value_parser = parse_duration)]
    pub lease_grace: Duration,

    /// Underlay interface, by name or address; repeatable, the first match wins [default: the default route's]
    #[arg(long, env = "FABRICD_IFACE", value_name = "NAME|IP", value_delimiter = ',')]
    pub iface: Vec<String>,

    /// Underlay interface, by a regular expression on its name or address; repeatable, tried after --iface
    #[arg(long, env = "FABRICD_IFACE_REGEX", value_name = "REGEX")]
    pub iface_regex: Vec<Regex>,

    /// Underlay interface, as the one that routes to this address; tried last
    #[arg(long, env = "FABRICD_IFACE_CAN_REACH", value_name = "IP", value_delimiter = ',')]
    pub iface_can_reach: Vec<IpAddr>,

    /// Public IPv4 address that peers send to, if not the interface's (NAT)
    #[arg(long, env = "FABRICD_PUBLIC_IP", value_name = "IPV4")]
    pub public_ip: Option<Ipv4Addr>,

    /// Public IPv6 address that peers send to, if not the interface's
    #[arg(long, env = "FABRICD_PUBLIC_IPV6", value_name = "IPV6")]
    pub public_ipv6: Option<Ipv6Addr>,

    /// The packet filter.
    #[command(flatten)]
    pub filter: FilterArgs,

    /// Network policies.
    #[command(flatten)]
    pub policy: PolicyArgs,

    /// Services of Kubernetes.
    #[command(flatten)]
    pub services: ServicesArgs,

    /// Runtime directory: node.json, which fabric-cni reads, and the lock
    #[arg(long, env = "FABRICD_RUN_DIR", value_name = "DIR", default_value = fabric_core::handoff::RUN_DIR)]
    pub run_dir: PathBuf,

    /// State directory, kept over reboots: lease, peers and network config
    #[arg(long, env = "FABRICD_STATE_DIR", value_name = "DIR", default_value = crate::files::state_dir::STATE_DIR)]
    pub state_dir: PathBuf,

    /// IPAM state of host-local: the pods' addresses
    #[arg(long, env = "FABRICD_CNI_DATA_DIR", value_name = "DIR", default_value = "/var/lib/cni/networks")]
    pub cni_data_dir: PathBuf,

    /// State of fabric-cni: the attached pods, with veth and addresses
    #[arg(long, env = "FABRICD_CNI_STATE_DIR", value_name = "DIR", default_value = fabric_core::handoff::ATTACHMENTS_DIR)]
    pub cni_state_dir: PathBuf,

    /// Directory of the container runtime's network configurations, read by fabricctl doctor
    #[arg(long, env = "FABRICD_CNI_CONF_DIR", value_name = "DIR", default_value = "/etc/cni/net.d")]
    pub cni_conf_dir: PathBuf,

    /// flannel's subnet.env, for other programs
    #[arg(long, env = "FABRICD_SUBNET_FILE", value_name = "FILE", default_value = "/run/flannel/subnet.env")]
    pub subnet_file: PathBuf,

    /// Writable mount of /proc/sys/net
    #[arg(long, env = "FABRICD_SYSCTL_ROOT", value_name = "DIR", default_value = "/proc/sys/net")]
    pub sysctl_root: PathBuf,

    /// Carry TCP and UDP between IPv4 pods past bridge, routes and packet filter, by eBPF programs (Linux 6.6)
    #[arg(long, env = "FABRICD_FAST_PATH", value_name = "MODE", value_enum, default_value_t)]
    pub fast_path: Mode,

    /// Mount of eBPF's file system, for --fast-path
    #[arg(long, env = "FABRICD_BPFFS", value_name = "DIR", default_value = "/sys/fs/bpf")]
    pub bpffs: PathBuf,

    /// Unix socket of the gRPC API
    #[arg(long, env = "FABRICD_SOCKET", value_name = "FILE", default_value = DEFAULT_SOCKET)]
    pub socket: PathBuf,

    /// Listen address of the gRPC API for other nodes (read-only, mTLS), as in [::]:9473, or "off"
    #[arg(long, env = "FABRICD_API_ADDR", value_name = "IP:PORT", default_value = "off", value_parser = parse_address)]
    pub api_addr: Address,

    /// Certificate authority (CA) of the nodes' certificates, in PEM; fabricd pki ca and node create these files
    #[arg(long, env = "FABRICD_API_CAFILE", value_name = "FILE")]
    pub api_cafile: Option<PathBuf>,

    /// This node's certificate for the gRPC API, with its node name as DNS name, in PEM
    #[arg(long, env = "FABRICD_API_CERTFILE", value_name = "FILE")]
    pub api_certfile: Option<PathBuf>,

    /// Private key of that certificate, in PEM
    #[arg(long, env = "FABRICD_API_KEYFILE", value_name = "FILE")]
    pub api_keyfile: Option<PathBuf>,

    /// Listen address of /healthz, /readyz, /metrics and the status page, or "off"
    #[arg(long, env = "FABRICD_HEALTH_ADDR", value_name = "IP:PORT", default_value = "127.0.0.1:9472", value_parser = parse_address)]
    pub health_addr: Address,

    /// Log format
    #[arg(long, env = "FABRICD_LOG_FORMAT", value_name = "FORM", default_value = "text")]
    pub log_format: LogFormat,

    /// Log level, as in info, debug or warn,fabricd::kernel=debug
    #[arg(long, env = "FABRICD_LOG_LEVEL", value_name = "LEVEL", default_value = "info")]
    pub log_level: String,

    /// Remove everything that fabricd created on this node, release its lease, and exit
    #[arg(long)]
    pub cleanup: bool,
}

/// How etcd is reached; `fabricctl` takes the same.
#[derive(Clone, Debug, Args)]
pub struct EtcdArgs {
    /// Addresses of etcd's members; without a scheme http (https with --etcd-cafile), without a port 2379
    #[arg(
        id = "etcd_endpoints",
        long = "etcd-endpoints",
        env = "FABRICD_ETCD_ENDPOINTS",
        value_name = "URL,…",
        value_delimiter = ',',
        default_value = DEFAULT_ENDPOINT
    )]
    pub endpoints: Vec<String>,

    /// Prefix of all keys in etcd
    #[arg(
        id = "etcd_prefix",
        long = "etcd-prefix",
        env = "FABRICD_ETCD_PREFIX",
        value_name = "PATH",
        default_value = "/coreos.com/network",
        value_parser = etcd_prefix
    )]
    pub prefix: String,

    /// Certificate authority (CA) of etcd's server certificates, in PEM
    #[arg(id = "etcd_cafile", long = "etcd-cafile", env = "FABRICD_ETCD_CAFILE", value_name = "FILE")]
    pub cafile: Option<PathBuf>,

    /// Client certificate for etcd, in PEM
    #[arg(id = "etcd_certfile", long = "etcd-certfile", env = "FABRICD_ETCD_CERTFILE", value_name = "FILE")]
    pub certfile: Option<PathBuf>,

    /// Private key of the client certificate, in PEM
    #[arg(id = "etcd_keyfile", long = "etcd-keyfile", env = "FABRICD_ETCD_KEYFILE", value_name = "FILE")]
    pub keyfile: Option<PathBuf>,

    /// User name for etcd
    #[arg(id = "etcd_username", long = "etcd-username", env = "FABRICD_ETCD_USERNAME", value_name = "NAME")]
    pub username: Option<String>,

    /// File with that user's password
    #[arg(
        id = "etcd_password_file",
        long = "etcd-password-file",
        env = "FABRICD_ETCD_PASSWORD_FILE",
        value_name = "FILE"
    )]
    pub password_file: Option<PathBuf>,
}

/// How the datastore is reached: what another program has to know to reach the same one.
#[derive(Clone, Debug)]
pub struct StoreSettings {
    /// Which datastore.
    pub kind: StoreKind,
    /// etcd.
    pub etcd: EtcdArgs,
    /// Kubernetes.
    pub kubernetes: KubernetesArgs,
}

/// How the API server of Kubernetes is reached, and what it is told.
#[derive(Clone, Debug, Args)]
pub struct KubernetesArgs {
    /// With --store kubernetes or --network-policy on or --services on: kubeconfig file [default: the pod's service account]
    #[arg(long, env = "FABRICD_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,

    /// Addresses of the API server that are tried before that of kubeconfig or pod, such as https://192.0.2.10:6443
    #[arg(
        long,
        env = "FABRICD_API_SERVER",
        value_name = "URL,…",
        value_delimiter = ',',
        value_parser = addresses::parse_url
    )]
    pub api_server: Vec<Uri>,

    /// With --store kubernetes: flannel's net-conf.json from a ConfigMap; changes are followed
    #[arg(
        long,
        env = "FABRICD_NET_CONFIG_PATH",
        value_name = "FILE",
        default_value = "/etc/kube-flannel/net-conf.json"
    )]
    pub net_config_path: PathBuf,

    /// With --store kubernetes: startup taint to remove from the Node when its network is ready
    #[arg(long, env = "FABRICD_STARTUP_TAINT", value_name = "KEY")]
    pub startup_taint: Option<String>,
}

impl EtcdArgs {
    /// These settings as the store takes them. The password is read from its file here.
    ///
    /// # Errors
    /// When that file can't be read, or an endpoint is no address.
    pub fn options(&self) -> Result<Options, ConfigError> {
        let user = match self.username.clone().zip(self.password_file.as_ref()) {
            Some((name, file)) => {
                let password = std::fs::read_to_string(file);
                let password = password.map_err(|source| ConfigError::File { file: file.clone(), source })?;
                Some(User { name, password: password.trim_end_matches('\n').to_owned() })
            }
            None => None,
        };
        let half = |given: &str, lacks: &str| ConfigError::Half { given: given.into(), lacks: lacks.into() };
        // Not left to clap: one half may come from the file, and clap doesn't count that as given.
        for (first, second, names) in [
            (self.certfile.is_some(), self.keyfile.is_some(), ("--etcd-certfile", "--etcd-keyfile")),
            (self.username.is_some(), self.password_file.is_some(), ("--etcd-username", "--etcd-password-file")),
        ] {
            match (first, second) {
                (true, false) => return Err(half(names.0, names.1)),
                (false, true) => return Err(half(names.1, names.0)),
                _ => {}
            }
        }
        let client = self.certfile.clone().zip(self.keyfile.clone());
        let tls = Tls { ca: self.cafile.clone(), client };
        let scheme = if tls.ca.is_some() { "https" } else { "http" };
        let endpoints = self.endpoints.iter().map(|endpoint| complete(endpoint, scheme)).collect::<Result<_, _>>();
        let prefix = self.prefix.trim_end_matches('/').to_owned();
        Ok(Options { prefix, tls, user, ..Options::new(endpoints.map_err(ConfigError::Endpoint)?) })
    }
}

/// The datastore of the leases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StoreKind {
    /// etcd: nodes choose their subnets.
    Etcd,
    /// The Nodes of Kubernetes: the cluster assigns subnets.
    Kubernetes,
}

/// Default path of the gRPC socket.
pub const DEFAULT_SOCKET: &str = "/run/fabric/fabricd.sock";

/// Where etcd is unless its members are named.
pub const DEFAULT_ENDPOINT: &str = "http://127.0.0.1:2379";

/// The settings file that is read unless another one is named.
pub const DEFAULT_FILE: &str = "/etc/fabric/fabricd.toml";

/// The variables that the packaged service starts the daemon with: its `EnvironmentFile`.
pub const ENVIRONMENT_FILE: &str = "/etc/default/fabricd";

const AFTER_HELP: &str = "\
The network config that all nodes share is in the datastore: see fabricctl network init --help.";

/// The log's format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines of text.
    Text,
    /// One JSON object per line.
    Json,
}

/// An address to listen on, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address(pub Option<SocketAddr>);

/// Why the settings can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The flags or environment; clap says it best, and `--help` and `--version` come this way too.
    #[error(transparent)]
    Flags(#[from] clap::Error),
    /// The file can't be read.
    #[error("cannot read the settings in {}: {source}", .file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no TOML, or has a setting that there isn't.
    #[error("{}: {reason}", .file.display())]
    Setting {
        /// The file.
        file: PathBuf,
        /// Why.
        reason: String,
    },
    /// Two settings that only make sense together.
    #[error("{given} needs {lacks}; give both or neither")]
    Half {
        /// The one that is there.
        given: String,
        /// The one that lacks.
        lacks: String,
    },
    /// An address of etcd that is none.
    #[error("--etcd-endpoints: {0}")]
    Endpoint(String),
    /// The host's name can't be a node's name.
    #[error(
        "cannot use the host's name as the node's name: {0}; set it with hostnamectl hostname NAME, or give --node-name NAME"
    )]
    NodeName(String),
}

impl Config {
    /// Where the CNI plugins keep what they know of this node's pods.
    #[must_use]
    pub fn cni_dirs(&self) -> CniDirs {
        CniDirs { addresses: self.cni_data_dir.clone(), attachments: self.cni_state_dir.clone() }
    }

    /// Reads flags, environment and file. `command` is the whole command line, [`crate::command_line::command_line`].
    ///
    /// # Errors
    /// [`ConfigError`], which says what, where, and what would be right.
    pub fn load(command: Command, args: impl IntoIterator<Item = OsString>) -> Result<Self, ConfigError> {
        let args: Vec<OsString> = args.into_iter().collect();
        let first = Self::from_arg_matches(&command.clone().try_get_matches_from(&args)?)?;
        let file = first.config.clone().or_else(|| Path::new(DEFAULT_FILE).exists().then(|| DEFAULT_FILE.into()));
        let mut config = match file {
            Some(file) => Self::parse_with(with_file(command, &file)?, &args, &file)?,
            None => first,
        };
        config.fill_in_name()?;
        Ok(config)
    }

    /// Takes the host's name for the node's, unless that was given: [`Config::of_host`] leaves it open, since not every
    /// program needs it.
    ///
    /// # Errors
    /// The host's name can't be a node's.
    pub fn fill_in_name(&mut self) -> Result<(), ConfigError> {
        if self.node_name.is_none() {
            let name = std::fs::read_to_string("/proc/sys/kernel/hostname");
            self.node_name = Some(name_of_host(&name.map_err(|e| ConfigError::NodeName(e.to_string()))?)?);
        }
        Ok(())
    }

    /// The settings of this host's daemon, as its installed service would get them, with the files that they are from:
    /// `file`, or else [`DEFAULT_FILE`] below [`ENVIRONMENT_FILE`], as far as they exist. Variables of this process count
    /// too.
    ///
    /// # Errors
    /// [`ConfigError`], which names the file.
    pub fn of_host(file: Option<&Path>) -> Result<(Self, Vec<PathBuf>), ConfigError> {
        let service = Path::new(ENVIRONMENT_FILE);
        let variables = match (file, std::fs::read_to_string(service)) {
            (None, Ok(text)) => Some(variables(&text)),
            (None, Err(error)) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(ConfigError::File { file: service.into(), source: error });
            }
            _ => None,
        };
        let named = variables.iter().flatten().find(|(name, _)| name == "config").map(|(_, file)| file.into());
        let file = file.map(Path::to_owned).or(named);
        let file = file.or_else(|| Path::new(DEFAULT_FILE).exists().then(|| DEFAULT_FILE.into()));

        let mut command = Self::command();
        if let Some(file) = &file {
            command = with_file(command, file)?;
        }
        if let Some(variables) = &variables {
            command = with_variables(command, variables);
        }
        let files: Vec<PathBuf> = file.into_iter().chain(variables.map(|_| service.into())).collect();
        let told = files.last().cloned().unwrap_or_default();
        Ok((Self::parse_with(command, &["fabricd".into()], &told)?, files))
    }

    fn parse_with(command: Command, args: &[OsString], file: &Path) -> Result<Self, ConfigError> {
        let matches = command.try_get_matches_from(args);
        let matches = matches.map_err(|e| ConfigError::Setting { file: file.into(), reason: e.to_string() })?;
        Ok(Self::from_arg_matches(&matches)?)
    }

    /// Whether network policies are enforced here.
    #[must_use]
    pub fn enforces_policies(&self) -> bool {
        self.policy.network_policy == PolicySwitch::On
    }

    /// Whether Services are translated here.
    #[must_use]
    pub fn translates_services(&self) -> bool {
        self.services.services == Switch::On
    }

    /// How the datastore is reached.
    #[must_use]
    pub fn store_settings(&self) -> StoreSettings {
        StoreSettings { kind: self.store, etcd: self.etcd.clone(), kubernetes: self.kubernetes.clone() }
    }

    /// This node's name.
    #[must_use]
    pub fn node(&self) -> &NodeName {
        self.node_name.as_ref().expect("load() fills it in")
    }

    /// What is to be said of this node's name when it is one that other machines may well have too.
    #[must_use]
    pub fn name_warning(&self) -> Option<String> {
        let name = self.node().as_str();
        is_everybodys(name).then(|| {
            format!(
                "the node is named {name}, as every machine is that has no name of its own; a second node of this name \
                 gets no lease; give each its own with --node-name"
            )
        })
    }

    /// The settings of a store in Kubernetes.
    #[must_use]
    pub fn kubernetes(&self) -> kubernetes::Options {
        let KubernetesArgs { kubeconfig, net_config_path, startup_taint, .. } = self.kubernetes.clone();
        let (node, addresses) = (self.node().clone(), self.api_addresses());
        kubernetes::Options { node, kubeconfig, addresses, config: net_config_path, startup_taint }
    }

    /// The API server of Kubernetes.
    #[must_use]
    pub fn api_server(&self) -> ApiServer {
        ApiServer::new(self.kubernetes.kubeconfig.clone()).at(self.api_addresses())
    }

    fn api_addresses(&self) -> Addresses {
        Addresses::new(self.kubernetes.api_server.clone(), &self.state_dir)
    }

    /// How the underlay interface is chosen.
    #[must_use]
    pub fn selectors(&self) -> Vec<Selector> {
        let names = self.iface.iter().cloned().map(Selector::Iface);
        let regexes = self.iface_regex.iter().cloned().map(Selector::Matching);
        let targets = self.iface_can_reach.iter().copied().map(Selector::CanReach);
        names.chain(regexes).chain(targets).collect()
    }

    /// The addresses that peers send to, where they are not the interface's.
    #[must_use]
    pub fn public_ips(&self) -> PerFamily<IpAddr> {
        let given = [(Family::V4, self.public_ip.map(IpAddr::V4)), (Family::V6, self.public_ipv6.map(IpAddr::V6))];
        given.into_iter().filter_map(|(family, ip)| Some((family, ip?))).collect()
    }
}

/// The node's name, if nobody has given it one.
fn name_of_host(host: &str) -> Result<NodeName, ConfigError> {
    let host = host.trim().to_lowercase();
    if host.is_empty() || is_everybodys(&host) {
        let name = if host.is_empty() { "none" } else { &host };
        let reason = format!("it is {name}, which tells no two machines apart");
        return Err(ConfigError::NodeName(reason));
    }
    host.parse().map_err(|e: fabric_core::model::Invalid| ConfigError::NodeName(e.to_string()))
}

/// True for what machines are called that nobody has named: by distributions, and `(none)` by the kernel.
fn is_everybodys(name: &str) -> bool {
    name == "(none)" || name.split('.').next().is_some_and(|first| first == "localhost")
}

/// What the command line says to `command`, if its first word asks for that.
#[must_use]
pub fn asked_for(args: impl IntoIterator<Item = OsString>, command: Command) -> Option<ArgMatches> {
    let args: Vec<OsString> = args.into_iter().collect();
    let name = command.get_name().to_owned();
    if args.get(1)? != name.as_str() {
        return None;
    }
    // Under its parent, so that usage and errors show both words.
    let whole = Command::new("fabricd").version(env!("CARGO_PKG_VERSION")).propagate_version(true).subcommand(command);
    whole.get_matches_from(args).remove_subcommand().map(|(_, matches)| matches)
}

/// Reads a time such as `90s`, `30m`, `24h` or `1h 30m`.
///
/// # Errors
/// When it is none, or no whole number of seconds from 5 s to a year (etcd's leases count in seconds).
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let time = text.parse::<SignedDuration>().ok().and_then(|time| Duration::try_from(time).ok());
    time.filter(|time| time.subsec_nanos() == 0 && (5..=8760 * 3600).contains(&time.as_secs()))
        .ok_or_else(|| "expected a number and a unit, as in 90s, 30m or 24h; from 5s to 8760h".to_owned())
}

/// Without one, fabricd would take all that is in etcd for its own.
fn etcd_prefix(text: &str) -> Result<String, String> {
    match text.trim_matches('/') {
        "" => Err("expected a path, as in /coreos.com/network".into()),
        _ => Ok(text.to_owned()),
    }
}

fn parse_address(text: &str) -> Result<Address, String> {
    if text == "off" {
        return Ok(Address(None));
    }
    let address =
        text.parse().map_err(|_| "expected an address and a port, as in 127.0.0.1:9472, or off".to_owned())?;
    Ok(Address(Some(address)))
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(address) => address.fmt(f),
            None => f.write_str("off"),
        }
    }
}

#[cfg(test)]
mod tests;
