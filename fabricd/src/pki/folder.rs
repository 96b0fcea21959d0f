//! Certificates in a folder. A certificate is written after its key, so that one that is there is whole; a key alone is
//! what an attempt that was cut short left, and nothing was signed for it.

use std::fs;
use std::io;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

use super::authority::CertifiedKey;
use super::issue::{Item, Place};
use crate::atomic_file::replace;

/// `ca`, `server`, `client` and `node`, each with `.crt` and `.key`, in one folder.
pub struct Folder(pub PathBuf);

impl Folder {
    fn stem(item: Item) -> &'static str {
        match item {
            Item::Authority => "ca",
            Item::Server => "server",
            Item::Client => "client",
            Item::Node => "node",
        }
    }

    fn file(&self, item: Item, extension: &str) -> PathBuf {
        self.0.join(Self::stem(item)).with_extension(extension)
    }
}

impl Place for Folder {
    fn name(&self, item: Item) -> String {
        self.file(item, "crt").display().to_string()
    }

    fn flags(&self) -> String {
        format!("--out {}", self.0.display())
    }

    async fn read(&self, item: Item) -> Result<Option<CertifiedKey>> {
        let read = |file: PathBuf| fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()));
        let certificate = match fs::read_to_string(self.file(item, "crt")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            _ => read(self.file(item, "crt"))?,
        };
        Ok(Some(CertifiedKey { certificate, key: read(self.file(item, "key"))? }))
    }

    async fn create(&self, item: Item, pair: &CertifiedKey, ca: &str) -> Result<bool> {
        self.replace(item, pair, ca).await.map(|()| true)
    }

    async fn replace(&self, item: Item, pair: &CertifiedKey, _ca: &str) -> Result<()> {
        replace(&self.file(item, "key"), pair.key.as_bytes(), 0o600)?;
        replace(&self.file(item, "crt"), pair.certificate.as_bytes(), 0o644)?;
        Ok(())
    }

    /// Only the keys are closed to others.
    async fn publish(&self, _ca: &str) -> Result<()> {
        Ok(())
    }
}
