//! `fabricd pki node`: the certificate that a node's daemon shows to those of the other nodes.
//!
//! Who runs it sees the authority's key, the daemon doesn't: in Kubernetes it is a container of its own in the daemon's
//! pod, which stays, so that a certificate may be short-lived. docs/decisions/0050 says why.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use fabric_core::model::NodeName;
use time::OffsetDateTime;

use super::authority::{Authority, Subject, ends_soon};
use super::folder::Folder;
use super::issue::{Item, Place as _};
use crate::atomic_file::replace;
use crate::commands::stay::until_terminated;
use crate::errors::chain;

/// How often `--stay` looks for the authority while there is none.
const PERIOD: Duration = Duration::from_secs(1);
/// How often `--stay` looks whether the certificate still fits.
const WATCH_PERIOD: Duration = Duration::from_secs(5);

/// A node's certificate: what for, of whom, and where to.
#[derive(Debug, Args)]
pub struct NodeArgs {
    /// Folder with ca.crt and ca.key of the authority, as fabricd pki ca makes them
    #[arg(long, value_name = "DIR")]
    ca: PathBuf,

    /// Name of the node, as in its --node-name
    #[arg(long, env = "FABRICD_NODE_NAME", value_name = "NAME")]
    name: NodeName,

    /// Folder for ca.crt, node.crt and node.key
    #[arg(long, value_name = "DIR")]
    out: PathBuf,

    /// How many days the certificate is valid
    #[arg(long, value_name = "DAYS", default_value_t = 3650, value_parser = clap::value_parser!(u32).range(1..=36500))]
    days: u32,

    /// Don't end before SIGTERM: wait for the authority, and renew the certificate when a third of its life is left or the
    /// authority has changed
    #[arg(long)]
    stay: bool,
}

impl NodeArgs {
    /// Makes the certificate unless there is one that fits, and says what was done.
    ///
    /// # Errors
    /// There is no authority; a file can't be read or written.
    pub fn run(&self) -> Result<()> {
        if !self.stay {
            let authority = self.authority()?;
            let none = || {
                let (file, folder) = (self.ca.join("ca.crt"), self.ca.display());
                format!("there is no {}; create it with: fabricd pki ca --out {folder}", file.display())
            };
            return self.issue(&authority.with_context(none)?, true);
        }
        let mut told = false;
        until_terminated(|| match self.authority()? {
            Some(authority) => self.issue(&authority, !std::mem::replace(&mut told, true)).map(|()| WATCH_PERIOD),
            None => {
                if !std::mem::replace(&mut told, true) {
                    println!("waiting for {}", self.ca.join("ca.crt").display());
                }
                Ok(PERIOD)
            }
        })
    }

    fn authority(&self) -> Result<Option<Authority>> {
        let pair = futures::executor::block_on(Folder(self.ca.clone()).read(Item::Authority))?;
        pair.map(Authority::open).transpose()
    }

    fn issue(&self, authority: &Authority, tell: bool) -> Result<()> {
        let (folder, subject) = (Folder(self.out.clone()), Subject::Node(self.name.clone()));
        let name = folder.name(Item::Node);
        // What can't be read is replaced: nothing is lost with it.
        let there = futures::executor::block_on(folder.read(Item::Node)).ok().flatten();
        let reason = match &there {
            None => Some("it was missing or incomplete".to_owned()),
            Some(there) => match authority.objection(&subject, &there.certificate) {
                Err(error) => Some(chain(&error)),
                Ok(None) if ends_soon(&there.certificate, OffsetDateTime::now_utc())? => {
                    Some("it ends soon".to_owned())
                }
                Ok(objection) => objection,
            },
        };
        let ca = self.out.join("ca.crt");
        if fs::read(&ca).ok().as_deref() != Some(authority.certificate().as_bytes()) {
            replace(&ca, authority.certificate().as_bytes(), 0o644)?;
        }
        match reason {
            Some(reason) => {
                let pair = authority.sign(&subject, self.days)?;
                futures::executor::block_on(folder.replace(Item::Node, &pair, authority.certificate()))?;
                println!("{name} for {} created: {reason}", self.name);
            }
            None if tell => println!("{name} for {} is valid, unchanged", self.name),
            None => {}
        }
        Ok(())
    }
}
