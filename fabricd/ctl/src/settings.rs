//! Where `lease` and `network` find the datastore: as the running daemon does, else as the daemon's settings files say.
//! Flags win over both.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use fabric_proto::v1::{GetSettingsRequest, GetSettingsResponse};
use fabricd::config::{Config, DEFAULT_FILE, ENVIRONMENT_FILE, EtcdArgs, StoreKind};
use fabricd::store::etcd::Etcd;

use crate::daemon;

/// How long the daemon may take to tell its settings.
const PATIENCE: Duration = Duration::from_secs(2);

/// The datastore, as far as flags and variables name it.
#[derive(Clone, Debug, Default, Args)]
pub struct StoreArgs {
    /// Settings file of the daemon; without it the running daemon is asked, and when none answers,
    /// /etc/fabric/fabricd.toml and /etc/default/fabricd are read
    #[arg(long, env = "FABRICD_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,

    /// URLs of etcd's members
    #[arg(long, env = "FABRICD_ETCD_ENDPOINTS", value_name = "URL,…", value_delimiter = ',')]
    etcd_endpoints: Vec<String>,

    /// Prefix of all keys in etcd
    #[arg(long, env = "FABRICD_ETCD_PREFIX", value_name = "PATH")]
    etcd_prefix: Option<String>,

    /// Certificate authority (CA) of etcd's server certificates, in PEM
    #[arg(long, env = "FABRICD_ETCD_CAFILE", value_name = "FILE")]
    etcd_cafile: Option<PathBuf>,

    /// Client certificate for etcd, in PEM
    #[arg(long, env = "FABRICD_ETCD_CERTFILE", value_name = "FILE")]
    etcd_certfile: Option<PathBuf>,

    /// Private key of the client certificate, in PEM
    #[arg(long, env = "FABRICD_ETCD_KEYFILE", value_name = "FILE")]
    etcd_keyfile: Option<PathBuf>,

    /// User name for etcd
    #[arg(long, env = "FABRICD_ETCD_USERNAME", value_name = "NAME")]
    etcd_username: Option<String>,

    /// File with that user's password
    #[arg(long, env = "FABRICD_ETCD_PASSWORD_FILE", value_name = "FILE")]
    etcd_password_file: Option<PathBuf>,
}

/// The datastore, and who said where it is.
#[derive(Clone, Debug)]
pub struct Datastore {
    /// Which one.
    pub kind: StoreKind,
    /// etcd.
    pub etcd: EtcdArgs,
    /// flannel's net-conf.json, where it is Kubernetes.
    pub net_config: PathBuf,
    /// Where the settings are from, for errors.
    pub source: String,
}

impl StoreArgs {
    /// Where the datastore is.
    ///
    /// # Errors
    /// A settings file can't be read, or isn't one.
    pub async fn find(&self, socket: &Path) -> anyhow::Result<Datastore> {
        let mut found = match (&self.config, ask(socket).await) {
            (None, Some(told)) => of_daemon(told, socket),
            (file, _) => of_files(file.as_deref(), socket)?,
        };
        self.override_with_flags(&mut found);
        Ok(found)
    }

    fn override_with_flags(&self, found: &mut Datastore) {
        let etcd = &mut found.etcd;
        if !self.etcd_endpoints.is_empty() {
            etcd.endpoints.clone_from(&self.etcd_endpoints);
            found.kind = StoreKind::Etcd;
            "--etcd-endpoints or FABRICD_ETCD_ENDPOINTS".clone_into(&mut found.source);
        }
        if let Some(prefix) = &self.etcd_prefix {
            etcd.prefix.clone_from(prefix);
        }
        for (flag, setting) in [
            (&self.etcd_cafile, &mut etcd.cafile),
            (&self.etcd_certfile, &mut etcd.certfile),
            (&self.etcd_keyfile, &mut etcd.keyfile),
            (&self.etcd_password_file, &mut etcd.password_file),
        ] {
            if flag.is_some() {
                setting.clone_from(flag);
            }
        }
        if self.etcd_username.is_some() {
            etcd.username.clone_from(&self.etcd_username);
        }
    }
}

impl Datastore {
    /// Etcd, where it is that. `instead` says what to do where the cluster's Nodes are the leases.
    ///
    /// # Errors
    /// It is Kubernetes; a password file can't be read.
    pub fn etcd(&self, instead: &str) -> anyhow::Result<Etcd> {
        if self.kind == StoreKind::Kubernetes {
            bail!("the datastore is Kubernetes, by {}; {instead}", self.source);
        }
        Ok(Etcd::start(self.etcd.options()?))
    }

    /// The key of the network config.
    pub fn config_key(&self) -> String {
        format!("{}/config", self.etcd.prefix.trim_end_matches('/'))
    }

    /// What is said when nobody answers.
    pub fn unreached(&self) -> String {
        format!(
            "etcd does not answer at {} (set by {}); name it with --etcd-endpoints",
            self.etcd.endpoints.join(", "),
            self.source
        )
    }
}

/// What the daemon says; nothing when none runs, it is of an older version, or it doesn't answer.
async fn ask(socket: &Path) -> Option<GetSettingsResponse> {
    let asking = async { daemon::connect(socket).await.ok()?.get_settings(GetSettingsRequest {}).await.ok() };
    Some(tokio::time::timeout(PATIENCE, asking).await.ok()??.into_inner())
}

fn of_daemon(told: GetSettingsResponse, socket: &Path) -> Datastore {
    let some = |text: String| Some(text).filter(|text| !text.is_empty());
    let file = |text: String| some(text).map(PathBuf::from);
    Datastore {
        kind: if told.store == "kubernetes" { StoreKind::Kubernetes } else { StoreKind::Etcd },
        etcd: EtcdArgs {
            endpoints: told.etcd_endpoints,
            prefix: told.etcd_prefix,
            cafile: file(told.etcd_cafile),
            certfile: file(told.etcd_certfile),
            keyfile: file(told.etcd_keyfile),
            username: some(told.etcd_username),
            password_file: file(told.etcd_password_file),
        },
        net_config: told.net_config_path.into(),
        source: format!("the daemon at {}", socket.display()),
    }
}

fn of_files(file: Option<&Path>, socket: &Path) -> anyhow::Result<Datastore> {
    let (config, files) = Config::of_host(file).context("cannot tell where the datastore is")?;
    let settings = config.store_settings();
    let files: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
    let source = match files.is_empty() {
        false => files.join(" and "),
        true => format!(
            "default: no daemon answers at {}, and there is no {DEFAULT_FILE} or {ENVIRONMENT_FILE}",
            socket.display()
        ),
    };
    let net_config = settings.kubernetes.net_config_path;
    Ok(Datastore { kind: settings.kind, etcd: settings.etcd, net_config, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told() -> GetSettingsResponse {
        GetSettingsResponse {
            store: "etcd".into(),
            etcd_endpoints: vec!["https://192.0.2.10:2379".into()],
            etcd_prefix: "/other".into(),
            etcd_cafile: "/etc/fabric/ca.pem".into(),
            ..GetSettingsResponse::default()
        }
    }

    #[test]
    fn flags_win_each_by_itself_over_what_the_daemon_says() {
        let mut found = of_daemon(told(), Path::new("/run/fabric/fabricd.sock"));
        assert_eq!(found.etcd.cafile, Some("/etc/fabric/ca.pem".into()));
        assert_eq!((found.etcd.keyfile.clone(), found.etcd.username.clone()), (None, None));
        let want = "etcd does not answer at https://192.0.2.10:2379 (set by the daemon at /run/fabric/fabricd.sock); \
                    name it with --etcd-endpoints";
        assert_eq!(found.unreached(), want);
        assert_eq!(found.config_key(), "/other/config");

        let args = StoreArgs { etcd_endpoints: vec!["http://192.0.2.20:2379".into()], ..StoreArgs::default() };
        args.override_with_flags(&mut found);
        assert!(found.unreached().contains("http://192.0.2.20:2379 (set by --etcd-endpoints"), "{}", found.unreached());
        assert_eq!(found.etcd.prefix, "/other");
    }

    #[test]
    fn etcd_is_not_asked_where_nodes_are_the_leases() {
        let told = GetSettingsResponse { store: "kubernetes".into(), ..told() };
        let mut found = of_daemon(told, Path::new("/run/fabric/fabricd.sock"));
        let error = found.etcd("see them with: fabricctl leases").err().expect("refused").to_string();
        assert_eq!(
            error,
            "the datastore is Kubernetes, by the daemon at /run/fabric/fabricd.sock; see them with: fabricctl leases"
        );
        StoreArgs { etcd_endpoints: vec!["http://192.0.2.20:2379".into()], ..StoreArgs::default() }
            .override_with_flags(&mut found);
        assert_eq!(found.kind, StoreKind::Etcd, "who names etcd means it");
    }
}
