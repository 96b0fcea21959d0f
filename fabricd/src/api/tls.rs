//! [`Tls`]: the certificates by which daemons know each other.
//!
//! A node's certificate must carry the node's name: that is what a daemon that asks it looks for. Whoever has a
//! certificate of the authority may ask. The files are read at each connection, so a renewed certificate is used by the
//! next one, and files that come later than the daemon (`fabricd pki node`) are found.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use fabric_core::model::NodeName;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Certificate, ClientTlsConfig, Identity};
use tracing::{info, warn};

use crate::errors::chain;

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How many handshakes may go on at once.
const AT_ONCE: usize = 64;
/// How long to wait after a connection could not be accepted: too many files are open.
const PAUSE: Duration = Duration::from_millis(100);

/// The files of an authority's certificate and of a certificate of it with its key, all in PEM.
#[derive(Clone, Debug)]
pub struct Tls {
    ca: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

impl Tls {
    /// These files. None of them has to be there yet.
    #[must_use]
    pub fn new(ca: &Path, certificate: &Path, key: &Path) -> Self {
        Self { ca: ca.into(), certificate: certificate.into(), key: key.into() }
    }

    /// Of the three files of the settings; `None` when there are none of them.
    ///
    /// # Errors
    /// When one is there without the others.
    pub fn of(files: [Option<&PathBuf>; 3]) -> anyhow::Result<Option<Self>> {
        match files {
            [Some(ca), Some(cert), Some(key)] => Ok(Some(Self::new(ca, cert, key))),
            [None, None, None] => Ok(None),
            _ => anyhow::bail!("--api-cafile, --api-certfile and --api-keyfile go together; give all three or none"),
        }
    }

    /// For who asks `node`.
    ///
    /// # Errors
    /// When a file can't be read.
    pub(super) fn client(&self, node: &NodeName) -> anyhow::Result<ClientTlsConfig> {
        let [ca, certificate, key] = self.read()?;
        let own = Identity::from_pem(certificate, key);
        Ok(ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca)).identity(own).domain_name(node.as_str()))
    }

    /// For who listens: whoever asks shows a certificate too.
    fn acceptor(&self) -> anyhow::Result<TlsAcceptor> {
        let [ca, certificate, key] = self.read()?;
        let bad = |file: &Path| format!("cannot use {}", file.display());
        let certificates = |pem: &[u8]| CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(certificates(&ca).with_context(|| bad(&self.ca))?);
        let verifier = WebPkiClientVerifier::builder(roots.into()).build().with_context(|| bad(&self.ca))?;
        let chain = certificates(&certificate).with_context(|| bad(&self.certificate))?;
        let key = PrivateKeyDer::from_pem_slice(&key).with_context(|| bad(&self.key))?;
        let config = ServerConfig::builder().with_client_cert_verifier(verifier).with_single_cert(chain, key);
        let mut config = config.with_context(|| bad(&self.certificate))?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config).into())
    }

    /// Authority, certificate and key.
    fn read(&self) -> anyhow::Result<[Vec<u8>; 3]> {
        let read = |file: &Path| {
            fs::read(file).with_context(|| format!("cannot read {}, which fabricd pki node makes", file.display()))
        };
        Ok([read(&self.ca)?, read(&self.certificate)?, read(&self.key)?])
    }
}

/// The connections of those who have shown a certificate of our authority. Each handshake has a task of its own, so one
/// that hangs holds up nobody.
pub(super) fn accept(listener: TcpListener, tls: Tls) -> ReceiverStream<io::Result<TlsStream<TcpStream>>> {
    let (to, from) = mpsc::channel(8);
    tokio::spawn(async move {
        let turns = Arc::new(Semaphore::new(AT_ONCE));
        let first = tls.acceptor();
        let mut usable = first.is_ok();
        if let Err(error) = first {
            info!(reason = chain(&error), "waiting for the certificates of the API for other nodes");
        }
        loop {
            let Ok(turn) = turns.clone().acquire_owned().await else { return };
            let accepted = tokio::select! {
                () = to.closed() => return,
                accepted = listener.accept() => accepted,
            };
            let Ok((stream, _)) = accepted else {
                sleep(PAUSE).await;
                continue;
            };
            let acceptor = tls.acceptor();
            match &acceptor {
                // Once, and not for each connection attempt.
                Err(error) if usable => warn!(error = chain(error), "other nodes can't ask this one"),
                Ok(_) if !usable => info!("other nodes can ask this one"),
                _ => {}
            }
            usable = acceptor.is_ok();
            let (Ok(acceptor), to) = (acceptor, to.clone()) else { continue };
            tokio::spawn(async move {
                // Answers are small and waited for.
                let _ = stream.set_nodelay(true);
                if let Ok(Ok(stream)) = timeout(HANDSHAKE, acceptor.accept(stream)).await {
                    // Nobody waits for it when the daemon ends.
                    let _ = to.send(Ok(stream)).await;
                }
                drop(turn);
            });
        }
    });
    ReceiverStream::new(from)
}
