//! `fabricd pki`: the certificates of an etcd that belongs to this network (an authority, what its members show to all and
//! to each other, and what fabricd shows to it), and those that the daemons show each other.
//!
//! `init` and `ca` make what is missing and keep what is there, so they may run any number of times and in any number of
//! places at once. `renew` replaces what ends soon or no longer names the members' addresses, `node` does both for one
//! node. docs/pki.md has the contract.

mod authority;
mod folder;
mod issue;
mod node;
mod secrets;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use self::folder::Folder;
use self::issue::{Place, Plan, authority};
use self::node::NodeArgs;
use self::secrets::Secrets;
use crate::config::asked_for;
use crate::kubernetes::client;

/// The first word of the command line that asks for this instead of the daemon.
pub const COMMAND: &str = "pki";

/// What the names of etcd's Secrets begin with, and those of the API between daemons.
const ETCD: &str = "fabric-etcd";
const API: &str = "fabric-api";

/// Create and renew certificates: those of etcd and its clients, and those that daemons show each other
#[derive(Debug, Parser)]
#[command(name = COMMAND)]
pub struct Pki {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Create what is missing for etcd: an authority, etcd's certificate, the clients'. What exists stays as it is
    Init(IssueArgs),
    /// Renew etcd's and the clients' certificate, if less than a third of its life is left or it lacks an address
    Renew {
        #[command(flatten)]
        args: IssueArgs,
        /// Both of them in any case
        #[arg(long)]
        all: bool,
    },
    /// Create the authority of the nodes' certificates, if it is missing
    Ca {
        #[command(flatten)]
        place: PlaceArgs,
    },
    /// Create a node's certificate for the API between daemons, or renew it: if it is missing, less than a third of its life
    /// is left, or the name or the authority has changed
    Node(NodeArgs),
}

#[derive(Debug, Args)]
struct IssueArgs {
    /// Addresses and names of etcd's members; 127.0.0.1, ::1 and localhost are always in
    #[arg(long = "etcd-address", value_name = "IP|NAME", value_delimiter = ',', required = true, value_parser = address)]
    addresses: Vec<String>,

    /// How many days the certificates are valid
    #[arg(long, value_name = "DAYS", default_value_t = 3650, value_parser = clap::value_parser!(u32).range(1..=36500))]
    days: u32,

    #[command(flatten)]
    place: PlaceArgs,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
struct PlaceArgs {
    /// Folder for the .crt and .key files of ca and, with init and renew, server and client
    #[arg(long, value_name = "DIR", conflicts_with_all = ["namespace", "secret_prefix", "kubeconfig"])]
    out: Option<PathBuf>,

    /// Namespace, in Kubernetes, of the Secrets PREFIX-ca, PREFIX-ca-key and, with init and renew, PREFIX-server and
    /// PREFIX-client
    #[arg(long, env = "FABRICD_NAMESPACE", value_name = "NAME")]
    namespace: Option<String>,

    /// What the Secrets' names begin with [default: fabric-etcd; with ca fabric-api]
    #[arg(long, value_name = "PREFIX")]
    secret_prefix: Option<String>,

    /// How to reach Kubernetes [default: as a pod of the cluster]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
}

impl Pki {
    /// Reads the command line, if its first word asks for this.
    #[must_use]
    pub fn asked(args: impl IntoIterator<Item = OsString>) -> Option<Self> {
        let matches = asked_for(args, Self::command())?;
        Some(Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit()))
    }

    /// Makes or renews, and says what was done.
    ///
    /// # Errors
    /// A file or Secret can't be read or written, or what is there can't be used.
    pub fn run(self) -> Result<()> {
        let (place, prefix) = match &self.action {
            Action::Node(node) => return node.run(),
            Action::Ca { place } => (place, API),
            Action::Init(args) | Action::Renew { args, .. } => (&args.place, ETCD),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            match (&place.out, &place.namespace) {
                (Some(dir), _) => self.action.take(&Folder(dir.clone())).await,
                (None, namespace) => {
                    let client = client::client(place.kubeconfig.as_deref()).await?;
                    let namespace = namespace.as_deref().context("--out or --namespace is needed")?;
                    let prefix = place.secret_prefix.as_deref().unwrap_or(prefix);
                    self.action.take(&Secrets::new(client, namespace, prefix)).await
                }
            }
        })
    }
}

impl Action {
    async fn take(&self, place: &impl Place) -> Result<()> {
        let plan = |args: &IssueArgs| Plan { addresses: args.addresses.clone(), days: args.days };
        match self {
            Self::Init(args) => plan(args).init(place).await,
            Self::Renew { args, all } => plan(args).renew(place, *all).await,
            Self::Ca { .. } => authority(place, "fabric-api-ca").await.map(drop),
            Self::Node(node) => node.run(),
        }
    }
}

/// An address in its shortest spelling, or a name.
fn address(text: &str) -> Result<String, String> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Ok(ip.to_string());
    }
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '*');
    if text.is_empty() || !text.chars().all(fits) {
        return Err("expected an address or a name without port, as in 192.0.2.10 or etcd.example".to_owned());
    }
    Ok(text.to_ascii_lowercase())
}
