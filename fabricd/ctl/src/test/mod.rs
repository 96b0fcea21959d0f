//! `fabricctl test`: a connectivity test by real traffic, step by step.
//!
//! | file | what it is |
//! |---|---|
//! | [`host`] | on a node: a pod made for it by the CNI plugins, as a runtime does, and traffic from there |
//! | [`cni`] | the plugins called, and the network namespace that they attach |
//! | [`ping`], [`probe`] | echo requests; TCP, DNS and the small server |
//! | [`cluster`] | in Kubernetes: short-lived pods on several nodes, each running [`probe`] |
//!
//! Whatever is made is removed again, also after a failure or Ctrl-C. What a killed test left is removed by the next.

mod cluster;
mod cni;
mod host;
mod ping;
pub mod probe;

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::output::{OutputArg, Screen, Severity};
use crate::table::{Cell, render};
use crate::{Answer, NOT_ALL_WELL};

/// What is tested, and from where.
#[derive(Debug, Args)]
pub struct TestArgs {
    #[command(flatten)]
    form: OutputArg,

    /// Test from pods of this Kubernetes cluster; without it from a pod that is made on this node
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,

    /// Destination outside of the cluster network: an address to ping, or with a port to connect to by TCP; "off" for none
    /// [default: the default gateway, with --kubeconfig the API server]
    #[arg(long, value_name = "IP[:PORT]|off")]
    outside: Option<String>,

    /// Name to look up [default: example.com, with --kubeconfig the name of a Service made for the test]
    #[arg(long, value_name = "NAME")]
    dns: Option<String>,

    /// Seconds that one step may take
    #[arg(long, value_name = "SECONDS", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=60))]
    timeout: u64,

    #[command(flatten)]
    host: HostArgs,

    #[command(flatten)]
    cluster: ClusterArgs,
}

/// Of the test on a node.
#[derive(Debug, Args)]
#[command(next_help_heading = "Without --kubeconfig")]
struct HostArgs {
    /// More addresses that have to answer a ping, such as those of pods of other nodes
    #[arg(long, value_name = "IP,…", value_delimiter = ',', conflicts_with = "kubeconfig")]
    to: Vec<IpAddr>,

    /// DNS server to ask [default: the first in /etc/resolv.conf that is not on loopback]
    #[arg(long, value_name = "IP", conflicts_with = "kubeconfig")]
    dns_server: Option<IpAddr>,

    /// Folder of the runtime's network configs
    #[arg(long, env = "FABRICD_CNI_CONF_DIR", value_name = "DIR", default_value = "/etc/cni/net.d")]
    cni_conf_dir: PathBuf,

    /// Folders of the CNI plugins
    #[arg(
        long,
        env = "FABRICD_CNI_BIN_DIR",
        value_name = "DIR,…",
        value_delimiter = ',',
        default_value = "/opt/cni/bin,/usr/lib/cni"
    )]
    cni_bin_dir: Vec<PathBuf>,
}

/// Of the test in Kubernetes.
#[derive(Debug, Args)]
#[command(next_help_heading = "With --kubeconfig")]
struct ClusterArgs {
    /// Nodes to test between [default: up to three that are ready]
    #[arg(long, value_name = "NODE,…", value_delimiter = ',', requires = "kubeconfig")]
    nodes: Vec<String>,

    /// Image of the test pods; fabricctl has to be in it
    #[arg(long, value_name = "IMAGE", default_value = cluster::IMAGE, requires = "kubeconfig")]
    image: String,

    /// Seconds until the test pods run
    #[arg(long, value_name = "SECONDS", default_value_t = 120, requires = "kubeconfig")]
    pod_timeout: u64,
}

impl TestArgs {
    fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }
}

/// What became of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Ok,
    Failed,
    Skipped,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Step {
    /// The node that it is tested from.
    from: String,
    /// What is tested.
    step: String,
    /// The destination; empty where there is none.
    to: String,
    result: Outcome,
    /// How it went, or why not.
    detail: String,
}

impl Step {
    fn new(step: impl Into<String>, to: impl ToString, outcome: Result<String, String>) -> Self {
        let (result, detail) = match outcome {
            Ok(detail) => (Outcome::Ok, detail),
            Err(reason) => (Outcome::Failed, reason),
        };
        Self { from: String::new(), step: step.into(), to: to.to_string(), result, detail }
    }

    fn skipped(step: impl Into<String>, to: impl ToString, reason: impl Into<String>) -> Self {
        let (step, to, detail) = (step.into(), to.to_string(), reason.into());
        Self { from: String::new(), step, to, result: Outcome::Skipped, detail }
    }
}

/// Tests; exit code 4 when a step has failed.
///
/// # Errors
/// There is nothing to test from.
pub async fn run(args: TestArgs, socket: &Path) -> anyhow::Result<Answer> {
    let form = args.form.output;
    let steps = match &args.kubeconfig {
        Some(kubeconfig) => cluster::run(kubeconfig, &args).await?,
        None => host::run(args, socket).await?,
    };
    let well = steps.iter().all(|step| step.result != Outcome::Failed);
    Ok(Answer::well_if(well, form.show(&steps, |screen| describe(screen, &steps))?, NOT_ALL_WELL))
}

fn describe(screen: &Screen, steps: &[Step]) -> String {
    let rows: Vec<[Cell; 5]> = steps
        .iter()
        .map(|step| {
            let (word, severity) = match step.result {
                Outcome::Ok => ("ok", Severity::Good),
                Outcome::Failed => ("FAILED", Severity::Bad),
                Outcome::Skipped => ("skipped", Severity::Plain),
            };
            // The reason of a failure is told whole, below.
            let detail = if step.result == Outcome::Failed { "" } else { &step.detail };
            [
                Cell::coloured(word, severity),
                step.from.clone().into(),
                step.step.clone().into(),
                step.to.clone().into(),
                detail.into(),
            ]
        })
        .collect();
    let mut text = render(screen, ["RESULT", "FROM", "STEP", "TO", "DETAIL"], &rows);
    let failed: Vec<&Step> = steps.iter().filter(|step| step.result == Outcome::Failed).collect();
    for Step { from, step, to, detail, .. } in &failed {
        let to = if to.is_empty() { String::new() } else { format!(" to {to}") };
        let _ = writeln!(text, "\n{} {step} from {from}{to}: {detail}", screen.paint("FAILED", Severity::Bad));
    }
    let skipped = steps.iter().filter(|step| step.result == Outcome::Skipped).count();
    let _ = writeln!(text, "\n{} steps, {} failed, {skipped} skipped", steps.len(), failed.len());
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_told_whole_below_the_table() {
        let mut steps = vec![
            Step::new("gateway", "10.244.1.1", Ok("0.10 ms".into())),
            Step::new("outside", "192.0.2.1", Err("no answer in 3 s".into())),
            Step::skipped("dns", "example.com", "no DNS server"),
        ];
        steps.iter_mut().for_each(|step| step.from = "node-1".into());
        let want = "\
RESULT   FROM    STEP     TO           DETAIL
ok       node-1  gateway  10.244.1.1   0.10 ms
FAILED   node-1  outside  192.0.2.1
skipped  node-1  dns      example.com  no DNS server

FAILED outside from node-1 to 192.0.2.1: no answer in 3 s

3 steps, 1 failed, 1 skipped
";
        assert_eq!(describe(&Screen::default(), &steps), want);
        let json = serde_json::to_value(&steps).unwrap();
        assert_eq!((&json[1]["result"], &json[0]["to"]), (&"failed".into(), &"10.244.1.1".into()));
    }
}
