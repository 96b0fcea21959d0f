//! Throw-away certificates for tests of TLS, made by `openssl`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use tempfile::TempDir;

/// An authority, and what it signed: a server's certificate for 127.0.0.1 and a client's.
pub struct Certificates {
    dir: TempDir,
}

impl Certificates {
    /// Makes them. They last a day.
    ///
    /// # Errors
    /// When `openssl` is missing or fails.
    pub fn create() -> anyhow::Result<Self> {
        let all = Self { dir: tempfile::tempdir()? };
        all.renew()?;
        Ok(all)
    }

    /// Makes all of them anew, in the same files: another authority too.
    ///
    /// # Errors
    /// When `openssl` is missing or fails.
    pub fn renew(&self) -> anyhow::Result<()> {
        let (ca, ca_key) = (self.ca(), self.dir.path().join("ca.key"));
        openssl(
            &["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=tests"],
            &[("-out", &ca), ("-keyout", &ca_key)],
        )?;
        let extensions = self.dir.path().join("extensions");
        std::fs::write(&extensions, "subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")?;
        for name in ["server", "client"] {
            let ((certificate, key), request) = (self.pair(name), self.dir.path().join(name).with_extension("csr"));
            let subject = format!("/CN={name}");
            openssl(
                &["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", &subject],
                &[("-out", &request), ("-keyout", &key)],
            )?;
            openssl(
                &["x509", "-req", "-days", "1", "-CAcreateserial"],
                &[
                    ("-in", &request),
                    ("-CA", &ca),
                    ("-CAkey", &ca_key),
                    ("-extfile", &extensions),
                    ("-out", &certificate),
                ],
            )?;
        }
        Ok(())
    }

    /// The authority's certificate.
    #[must_use]
    pub fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// The server's certificate and key.
    #[must_use]
    pub fn server(&self) -> (PathBuf, PathBuf) {
        self.pair("server")
    }

    /// The client's certificate and key.
    #[must_use]
    pub fn client(&self) -> (PathBuf, PathBuf) {
        self.pair("client")
    }

    fn pair(&self, name: &str) -> (PathBuf, PathBuf) {
        (self.dir.path().join(name).with_extension("pem"), self.dir.path().join(name).with_extension("key"))
    }
}

fn openssl(args: &[&str], files: &[(&str, &Path)]) -> anyhow::Result<()> {
    let mut command = Command::new("openssl");
    command.args(args);
    for (option, file) in files {
        command.arg(option).arg(file);
    }
    let output = command.output().context("cannot run openssl; is it installed?")?;
    if !output.status.success() {
        bail!("openssl {}: {}", args[0], String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
