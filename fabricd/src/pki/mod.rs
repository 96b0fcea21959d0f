//! `fabricd pki`: the certificates of an etcd that belongs to this network: an authority, what its members show to all
//! and to each other, and what fabricd shows to it.
//!
//! `init` makes what is missing and keeps what is there, so it may run any number of times and in any number of places
//! at once. `renew` makes anew what ends soon or no longer names the members' addresses. docs/pki.md has the contract.

mod authority;
mod folder;
mod issue;
mod secrets;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand};

use self::folder::Folder;
use self::issue::{Place, Plan};
use self::secrets::Secrets;
use crate::api_server;

/// The first word of the command line that asks for this instead of the daemon.
pub const COMMAND: &str = "pki";

/// Make and renew the certificates of etcd and its clients
#[derive(Debug, Parser)]
#[command(name = "fabricd pki", bin_name = "fabricd pki", version)]
pub struct Pki {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make what is missing: the authority, etcd's certificate, the clients'. What is there stays as it is
    Init(Wish),
    /// Make etcd's and the clients' certificate anew, those that end within a third of their life or don't name all addresses
    Renew {
        #[command(flatten)]
        wish: Wish,
        /// Both of them in any case
        #[arg(long)]
        all: bool,
    },
}

#[derive(Debug, Args)]
struct Wish {
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
    /// Folder for ca.crt, ca.key, server.crt, server.key, client.crt and client.key
    #[arg(long, value_name = "DIR", conflicts_with_all = ["namespace", "secret_prefix", "kubeconfig"])]
    out: Option<PathBuf>,

    /// Namespace, in Kubernetes, of the Secrets PREFIX-ca, PREFIX-ca-key, PREFIX-server and PREFIX-client
    #[arg(long, env = "FABRICD_NAMESPACE", value_name = "NAME")]
    namespace: Option<String>,

    /// What the Secrets' names begin with
    #[arg(long, value_name = "PREFIX", default_value = "fabric-etcd")]
    secret_prefix: String,

    /// How to reach Kubernetes [default: as a pod of the cluster]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
}

impl Pki {
    /// Reads the command line, if its first word asks for this.
    #[must_use]
    pub fn asked(args: impl IntoIterator<Item = OsString>) -> Option<Self> {
        let mut args = args.into_iter();
        let program = args.next()?;
        (args.next()? == COMMAND).then(|| Self::parse_from(std::iter::once(program).chain(args)))
    }

    /// Makes or renews, and says what was done.
    ///
    /// # Errors
    /// A file or Secret can't be read or written, or what is there can't be used.
    pub fn run(self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let (Action::Init(wish) | Action::Renew { wish, .. }) = &self.action;
            match (&wish.place.out, &wish.place.namespace) {
                (Some(dir), _) => self.action.take(&Folder(dir.clone())).await,
                (None, namespace) => {
                    let client = api_server::client(wish.place.kubeconfig.as_deref()).await?;
                    let namespace = namespace.as_deref().context("--out or --namespace is needed")?;
                    self.action.take(&Secrets::new(client, namespace, &wish.place.secret_prefix)).await
                }
            }
        })
    }
}

impl Action {
    async fn take(&self, place: &impl Place) -> Result<()> {
        let plan = |wish: &Wish| Plan { addresses: wish.addresses.clone(), days: wish.days };
        match self {
            Self::Init(wish) => plan(wish).init(place).await,
            Self::Renew { wish, all } => plan(wish).renew(place, *all).await,
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
