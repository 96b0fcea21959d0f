//! `fabricd takeover` and `fabricd giveback`: a node changes hands between flannel and fabricd while its pods run.
//!
//! ```text
//!   look ─► Facts ─► core::takeover::{takeover, giveback} ─► the first step ─► act ─┐
//!    ▲                                                                              │
//!    └──────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! After each step everything is looked at anew, so a step that was cut off is taken again, and whoever comes after a
//! `kill -9` needs to know nothing. The daemons themselves are started and ended by whoever has them: systemd, a DaemonSet.

mod act;
mod look;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::{Command, CommandFactory as _, FromArgMatches as _, Parser};
use fabric_core::attachments::IPAM_NETWORK;
use fabric_core::takeover::{Facts, Refusal, Step, giveback, guarded, takeover};
use nix::fcntl::{Flock, FlockArg};
use tokio::time::{Instant, sleep};

use crate::atomic_file::{remove_if_there, sweep_drafts};
use crate::commands::install_cni::CniVersion;
use crate::commands::stay::until_terminated;
use crate::config::{Config, StoreKind, asked_for};
use crate::files::state_dir::Disk;
use crate::host::addresses;
use crate::kernel::Options;
use crate::kernel::netlink::Netlink;
use crate::policy::applied::AppliedPolicies;
use crate::store::etcd::Etcd;
use crate::store::kubernetes::Kubernetes;
use crate::store::{Grant, LeaseStore};

/// The first word of the command line that asks to take a node over from flannel.
pub const TAKEOVER: &str = "takeover";

/// The first word of the command line that asks to give a node to flannel.
pub const GIVEBACK: &str = "giveback";

/// How often it is looked whether a daemon has done its part.
const PERIOD: Duration = Duration::from_millis(200);

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From flannel to fabricd.
    Takeover,
    /// From fabricd to flannel.
    Giveback,
}

/// Take this node over from flannel, or give it to flannel, with its pods running
#[derive(Clone, Debug, Parser)]
pub struct TakeoverArgs {
    /// Print what would be changed, and what refuses it, and change nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Settings file of the daemon in TOML [default: what its service has]
    #[arg(long, env = "FABRICD_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Take at most so many steps, to look in between; run again to go on, or turn round
    #[arg(long, value_name = "COUNT")]
    pub steps: Option<u32>,

    /// How many seconds to wait for the daemon that takes the node
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub wait: u64,

    /// Where the runtime has its CNI plugins
    #[arg(long, env = "FABRICD_CNI_BIN_DIR", value_name = "DIR", default_value = "/opt/cni/bin")]
    pub bin_dir: PathBuf,

    /// Name of our conflist; it has to sort before flannel's
    #[arg(long, value_name = "NAME", default_value = "10-fabric.conflist")]
    pub conf_name: String,

    /// Version of the CNI spec that our conflist asks for
    #[arg(long, value_name = "VERSION", default_value = "1.0.0")]
    pub cni_version: CniVersion,

    /// Where flannel's plugin remembers the pods that it attached
    #[arg(long, value_name = "DIR", default_value = "/var/lib/cni/flannel")]
    pub flannel_dir: PathBuf,

    /// Don't end before SIGTERM, when the node has changed hands: for a container
    #[arg(long, conflicts_with_all = ["dry_run", "steps"])]
    pub stay: bool,

    /// Take the node over although fabricd doesn't masquerade: what is outside has routes to the pods
    #[arg(long)]
    pub no_masquerade: bool,

    /// Leave the device its name, flannel.1, and mark it by an alternative one, as is done before Linux 6.2
    #[arg(long)]
    pub keep_name: bool,
}

impl TakeoverArgs {
    /// Both commands.
    #[must_use]
    pub fn commands() -> [Command; 2] {
        let about = [
            "Take this node over from flannel, with its pods running",
            "Give this node to flannel, with its pods running",
        ];
        let [takeover, giveback] = about.map(|about| Self::command().about(about));
        [takeover.name(TAKEOVER), giveback.name(GIVEBACK)]
    }

    /// Reads the command line, if its first word asks for this.
    #[must_use]
    pub fn asked(args: impl IntoIterator<Item = OsString>) -> Option<(Self, Direction)> {
        let args: Vec<OsString> = args.into_iter().collect();
        let directions = [Direction::Takeover, Direction::Giveback];
        Self::commands().into_iter().zip(directions).find_map(|(command, direction)| {
            let matches = asked_for(args.clone(), command)?;
            Some((Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit()), direction))
        })
    }

    /// Takes all steps that are left, and prints each.
    ///
    /// # Errors
    /// What refuses it; the first step that fails; a daemon that doesn't do its part in time. To be run again then.
    pub fn run(&self, direction: Direction) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let (mut config, _) = Config::of_host(self.config.as_deref())?;
            config.fill_in_name()?;
            match config.store {
                StoreKind::Etcd => self.go(direction, &config, &Etcd::start(config.etcd.options()?)).await,
                StoreKind::Kubernetes => self.go(direction, &config, &Kubernetes::start(config.kubernetes())).await,
            }
        })?;
        drop(runtime);
        if self.stay { until_terminated(|| Ok(PERIOD)) } else { Ok(()) }
    }

    async fn go(&self, direction: Direction, config: &Config, store: &impl LeaseStore) -> Result<()> {
        let _alone = if self.dry_run { None } else { Some(alone(&config.run_dir)?) };
        if !self.dry_run {
            self.sweep_drafts(config)?;
        }
        let mut last: Option<Step> = None;
        let mut deadline = None;
        let mut taken = 0;
        loop {
            let facts = look::facts(self, config, store).await?;
            let steps = steps(direction, &facts)?;
            if self.dry_run {
                steps.iter().for_each(|step| println!("{step}"));
                if steps.is_empty() {
                    println!("{}", nothing_to_do(direction, &facts));
                }
                return Ok(());
            }
            let Some(step) = steps.into_iter().next() else {
                return self.finish(direction, config, store, &facts).await;
            };
            let is_again = last.as_ref() == Some(&step);
            if !is_again {
                if self.steps.is_some_and(|most| taken >= most) {
                    return Ok(());
                }
                taken += 1;
                println!("{step}");
                deadline = Some(Instant::now() + Duration::from_secs(self.wait));
            }
            match step {
                Step::AwaitFabricd | Step::AwaitFlanneld => {
                    let daemon = if step == Step::AwaitFabricd { "fabricd" } else { "flanneld" };
                    if deadline.is_some_and(|deadline| Instant::now() > deadline) {
                        bail!(
                            "{daemon} has not taken this node within {} s; start it, see its log, and run this again, or \
                             turn round: fabricd {}",
                            self.wait,
                            if direction == Direction::Takeover { GIVEBACK } else { TAKEOVER }
                        );
                    }
                    sleep(PERIOD).await;
                }
                _ if is_again => bail!("this step has no effect: {step}"),
                _ => act::take(&step, self, config, &facts).await?,
            }
            last = Some(step);
        }
    }

    /// What is left of us on a node that is flannel's goes; what a node that is ours has is what it needs.
    async fn finish(
        &self,
        direction: Direction,
        config: &Config,
        store: &impl LeaseStore,
        facts: &Facts,
    ) -> Result<()> {
        let Some(key) = guarded(facts).filter(|_| direction == Direction::Giveback) else {
            println!("this node is {}", if direction == Direction::Takeover { "fabricd's" } else { "flannel's" });
            return Ok(());
        };
        // A record of flannel's hangs on no lease of ours, so it stays, and the guards that name this node go.
        let (node, ttl, expires) = (config.node().clone(), config.lease_ttl, Instant::now());
        let grant = Grant { node, key, mod_revision: 0, lease_id: fastrand::i64(1..), expires, ttl };
        if store.assigned().is_none() {
            store.release(&grant).await?;
        }
        Disk::new(&config.state_dir, config.node()).remove()?;
        for file in [&config.socket, &config.run_dir.join(fabric_core::handoff::NODE_FILE)] {
            remove_if_there(file)?;
        }
        AppliedPolicies::new(&config.run_dir)
            .turn_off()
            .context("cannot remove the folder of pods whose policies are applied")?;
        self.forget_addresses(config)?;
        // Nobody writes a conflist of ours any more.
        sweep_drafts(&config.cni_conf_dir, Duration::ZERO)?;
        println!("this node is flannel's");
        let stays = self.stays(config)?;
        if !stays.is_empty() {
            println!("these stay, and flannel goes by none of them: {}", stays.join(", "));
        }
        Ok(())
    }

    /// What a run that was killed in the middle of a file has left.
    fn sweep_drafts(&self, config: &Config) -> Result<()> {
        // Beside us only `install-cni` writes there.
        sweep_drafts(&config.cni_conf_dir, Duration::from_secs(10))?;
        sweep_drafts(&self.flannel_dir, Duration::ZERO)?;
        let folders = fs::read_dir(&config.cni_data_dir).into_iter().flatten().flatten();
        for folder in folders.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            sweep_drafts(&folder.path(), Duration::ZERO)?;
        }
        Ok(())
    }

    /// Removes what the plugins have no pod in any more.
    fn forget_addresses(&self, config: &Config) -> Result<()> {
        let shared = config.cni_data_dir.join(IPAM_NETWORK);
        let is_used =
            addresses::entries(&config.cni_data_dir)?.iter().any(|entry| entry.file.parent() == Some(shared.as_path()));
        let has_pods = !addresses::attachments(&config.cni_state_dir)?.is_empty();
        for (folder, is_needed) in [(&shared, is_used || has_pods), (&config.cni_state_dir, has_pods)] {
            if folder.exists() && !is_needed {
                fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
            }
        }
        Ok(())
    }

    /// Files of ours that a node of flannel's has no use for.
    fn stays(&self, config: &Config) -> Result<Vec<String>> {
        let programs = ["fabric-cni", "fabric-bridge"].map(|program| self.bin_dir.join(program));
        let folders = [&config.run_dir, &config.state_dir, &config.cni_state_dir].map(PathBuf::clone);
        let there = programs.into_iter().chain(folders).filter(|path| path.exists());
        let mut stays: Vec<String> = there.map(|path| path.display().to_string()).collect();
        let folder = config.cni_data_dir.join(IPAM_NETWORK);
        if folder.exists() {
            let entries = addresses::entries(&config.cni_data_dir)?;
            let taken = entries.iter().filter(|entry| entry.file.parent() == Some(folder.as_path())).count();
            stays.push(format!("{} ({taken} addresses)", folder.display()));
        }
        Ok(stays)
    }
}

/// The kernel with all sections, whoever else in the daemon has one for itself.
fn open_kernel(config: &Config) -> Result<Netlink> {
    let options =
        Options { sysctl_root: config.sysctl_root.clone(), bpffs: config.bpffs.clone(), ..Options::default() };
    Netlink::new(options).context("cannot talk to the kernel over netlink; run this as root")
}

/// Held until it is dropped: two at once would undo each other's work.
fn alone(run_dir: &Path) -> Result<Flock<fs::File>> {
    fs::create_dir_all(run_dir).with_context(|| format!("cannot make {}", run_dir.display()))?;
    let folder = fs::File::open(run_dir).with_context(|| format!("cannot open {}", run_dir.display()))?;
    Flock::lock(folder, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
        let why = format!("another takeover or giveback has locked {}; see it with: fuser -v {0}", run_dir.display());
        anyhow::Error::new(errno).context(why)
    })
}

/// What `--dry-run` says where no step is left.
fn nothing_to_do(direction: Direction, facts: &Facts) -> &'static str {
    match direction {
        Direction::Takeover => "this node is fabricd's: nothing is to be changed",
        Direction::Giveback if guarded(facts).is_some() => {
            "this node is flannel's: nothing is to be changed but that what fabricd may have kept goes, its files and the guards of the lease"
        }
        Direction::Giveback => "this node is flannel's: nothing is to be changed",
    }
}

fn steps(direction: Direction, facts: &Facts) -> Result<Vec<Step>> {
    let steps = match direction {
        Direction::Takeover => takeover(facts),
        Direction::Giveback => giveback(facts),
    };
    steps.map_err(|refusals| {
        let told: Vec<String> = refusals.iter().map(Refusal::to_string).collect();
        anyhow::anyhow!("nothing is changed:\n{}", told.join("\n"))
    })
}
