//! [`Tls`]: the certificates by which daemons know each other.
//!
//! A node's certificate must carry the node's name: that is what a daemon that asks it looks for. Whoever has a
//! certificate of the authority may ask.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use fabric_core::model::NodeName;
use tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};

/// An authority, and a certificate of it with its key; all in PEM.
#[derive(Clone)]
pub struct Tls {
    ca: Certificate,
    own: Identity,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// When one of them can't be read.
    pub fn read(ca: &Path, cert: &Path, key: &Path) -> anyhow::Result<Self> {
        let read = |file: &Path| fs::read(file).with_context(|| format!("cannot read {}", file.display()));
        Ok(Self { ca: Certificate::from_pem(read(ca)?), own: Identity::from_pem(read(cert)?, read(key)?) })
    }

    /// Of the three files of the settings; `None` when there are none of them.
    ///
    /// # Errors
    /// When one is there without the others, or can't be read.
    pub fn of(files: [Option<&PathBuf>; 3]) -> anyhow::Result<Option<Self>> {
        match files {
            [Some(ca), Some(cert), Some(key)] => Self::read(ca, cert, key).map(Some),
            [None, None, None] => Ok(None),
            _ => anyhow::bail!("--api-cafile, --api-certfile and --api-keyfile go together; give all three or none"),
        }
    }

    /// For who listens: whoever asks shows a certificate too.
    pub(super) fn server(&self) -> ServerTlsConfig {
        ServerTlsConfig::new().identity(self.own.clone()).client_ca_root(self.ca.clone())
    }
    /// For who asks `node`.
    pub(super) fn client(&self, node: &NodeName) -> ClientTlsConfig {
        ClientTlsConfig::new().ca_certificate(self.ca.clone()).identity(self.own.clone()).domain_name(node.as_str())
    }
}
