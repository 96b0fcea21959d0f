//! Throw-away certificates for tests of TLS, made by `openssl`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, anyhow, bail};
use fabricd::pki::Pki;
use tempfile::TempDir;

/// An authority, and what it signed.
pub struct Certificates {
    dir: TempDir,
    /// Names, and the alternative name of each.
    names: Vec<(String, String)>,
}

impl Certificates {
    /// A server's certificate for 127.0.0.1 and a client's.
    ///
    /// # Errors
    /// As [`Certificates::create_for`].
    pub fn create() -> anyhow::Result<Self> {
        Self::create_for(&[("server", "IP:127.0.0.1"), ("client", "IP:127.0.0.1")])
    }

    /// Certificates by name, each for the alternative name beside it. They last a day.
    ///
    /// # Errors
    /// When `openssl` is missing or fails.
    pub fn create_for(names: &[(&str, &str)]) -> anyhow::Result<Self> {
        let names = names.iter().map(|(name, alternative)| (String::from(*name), String::from(*alternative))).collect();
        let all = Self { dir: tempfile::tempdir()?, names };
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
        for (name, alternative) in &self.names {
            std::fs::write(&extensions, format!("subjectAltName={alternative}\nbasicConstraints=CA:FALSE\n"))?;
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

    /// Has `fabricd pki init` make them.
    ///
    /// # Errors
    /// When it fails.
    pub fn by_fabricd() -> anyhow::Result<Self> {
        let all = Self { dir: tempfile::tempdir()?, names: vec![] };
        let dir = all.dir.path().to_owned();
        let line = ["fabricd", "pki", "init", "--etcd-address", "127.0.0.1", "--out"].map(OsString::from);
        let pki = Pki::asked(line.into_iter().chain([dir.clone().into()])).context("the words for it")?;
        // It brings a runtime of its own.
        std::thread::spawn(|| pki.run()).join().map_err(|_| anyhow!("fabricd pki has panicked"))??;
        for name in ["ca", "server", "client"] {
            std::fs::rename(dir.join(name).with_extension("crt"), dir.join(name).with_extension("pem"))?;
        }
        Ok(all)
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

    /// The certificate and key of this name.
    #[must_use]
    pub fn pair(&self, name: &str) -> (PathBuf, PathBuf) {
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
