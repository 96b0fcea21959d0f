//! `fabricctl doctor`: looks for what is wrong on this node.
//!
//! The daemon makes the checks. Where none answers this program makes those that need no daemon, and before one ever ran
//! (`--preflight`) those that say whether it can.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use fabric_proto::Word as _;
use fabric_proto::v1::{Check, CheckResult, DiagnoseRequest};
use fabricd::api::convert;
use fabricd::config::Config;
use fabricd::diagnosis::standalone::{self, Made};
use tokio::time::timeout;

use crate::output::{Output, Screen, Severity};
use crate::table::cut;
use crate::{Answer, NOT_ALL_WELL, bundle, daemon, print};

/// How long the daemon may take until its next check, some of which send packets or ask the store.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is looked for, and what is shown of it.
#[derive(Clone, Debug, Args)]
pub struct DoctorArgs {
    /// Only warnings and failures
    #[arg(short, long)]
    quiet: bool,
    /// Check whether fabricd can run on this host, before it does; asks no daemon
    #[arg(long)]
    preflight: bool,
    /// Write a support bundle, a tar archive without secrets
    #[arg(long, value_name = "FILE")]
    bundle: Option<PathBuf>,
}

/// Prints each check when it is made; exit code 4 when one has failed.
pub async fn show(socket: &Path, output: Output, args: &DoctorArgs) -> anyhow::Result<Answer> {
    let mut report = Report { output, quiet: args.quiet, checks: vec![] };
    if !args.preflight {
        daemon::permitted(socket)?;
    }
    let asked = if args.preflight { Err("it was not asked".to_owned()) } else { ask(socket, &mut report).await };
    match (&asked, args.preflight) {
        (Ok(()), _) => {}
        (Err(_), true) => report.take(standalone::preflight(&settings()).await)?,
        (Err(why), false) => {
            report.checks.clear();
            report.take(standalone::without_daemon(&settings(), why).await)?;
        }
    }
    let count = |result: CheckResult| report.checks.iter().filter(|check| check.result() == result).count();
    let (failed, warned) = (count(CheckResult::Failed), count(CheckResult::Warning));
    let mut text = String::new();
    if matches!(output, Output::Table | Output::Wide) {
        let plural = if warned == 1 { "" } else { "s" };
        let _ = writeln!(text, "\n{} checks, {failed} failed, {warned} warning{plural}", report.checks.len());
        if asked.is_err() && !args.preflight {
            let _ = writeln!(text, "The daemon doesn't answer: these are the checks that need none.");
        }
    }
    if let Some(file) = &args.bundle {
        bundle::pack(asked.is_ok().then_some(socket), file, &report.checks).await?;
        // Not among the checks, which a program may read.
        eprintln!("{} has it all: there are no keys or passwords in it, but addresses and names", file.display());
    }
    Ok(Answer::well_if(failed == 0, text, NOT_ALL_WELL))
}

/// Checks as they come.
struct Report {
    output: Output,
    quiet: bool,
    checks: Vec<Check>,
}

impl Report {
    fn add(&mut self, check: Check) -> anyhow::Result<()> {
        let looks = !self.quiet || matches!(check.result(), CheckResult::Warning | CheckResult::Failed);
        if looks {
            print(&self.output.show_next(&check, |screen| line(screen, &check))?);
        }
        self.checks.push(check);
        Ok(())
    }

    fn take(&mut self, made: Vec<Made>) -> anyhow::Result<()> {
        made.into_iter().try_for_each(|(id, title, finding)| self.add(convert::check(id, title, finding)))
    }
}

/// The daemon's checks; the reason when it doesn't answer.
async fn ask(socket: &Path, report: &mut Report) -> Result<(), String> {
    let hangs = |_| format!("no answer within {} s", PATIENCE.as_secs());
    let told = |status: tonic::Status| status.message().to_owned();
    let client = timeout(PATIENCE, daemon::connect(socket)).await.map_err(hangs)?;
    let mut client = client.map_err(|error| error.to_string())?;
    let stream = timeout(PATIENCE, client.diagnose(DiagnoseRequest {})).await.map_err(hangs)?;
    let mut stream = stream.map_err(told)?.into_inner();
    while let Some(check) = timeout(PATIENCE, stream.message()).await.map_err(hangs)?.map_err(told)? {
        report.add(check).map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// The daemon's settings, by the files and variables that its service reads.
fn settings() -> Result<Config, String> {
    let named = |(mut config, _): (Config, _)| config.fill_in_name().map(|()| config);
    Config::of_host(None).and_then(named).map_err(|error| error.to_string())
}

/// A check in a line, with evidence and fix below when something is wrong.
pub fn line(screen: &Screen, check: &Check) -> String {
    let (word, severity) = match check.result() {
        CheckResult::Ok => ("ok", Severity::Good),
        CheckResult::Warning => ("WARNING", Severity::Doubtful),
        CheckResult::Failed => ("FAILED", Severity::Bad),
        CheckResult::Skipped | CheckResult::Unspecified => ("skipped", Severity::Plain),
    };
    let padding = " ".repeat(8 - word.len());
    let indent = format!("\n{}", " ".repeat(8 + 19 + check.title.chars().count() + 2));
    let told = format!("{:18} {}: {}", check.id, check.title, check.evidence);
    // Of what is wrong everything is said; what isn't takes a line.
    let told = told.replace('\n', &indent);
    let told = if check.fix.is_empty() {
        cut(&told, screen.width.map_or(usize::MAX, |width| width.saturating_sub(8)))
    } else {
        told
    };
    let mut text = format!("{}{padding}{told}\n", screen.paint(word, severity));
    for (place, fix) in check.fix.lines().enumerate() {
        let _ = writeln!(text, "        {} {fix}", if place == 0 { "fix:" } else { "    " });
    }
    text
}

/// The word of a result, for other commands.
pub fn severity(result: CheckResult) -> (String, Severity) {
    let severity = match result {
        CheckResult::Ok => Severity::Good,
        CheckResult::Warning => Severity::Doubtful,
        CheckResult::Failed => Severity::Bad,
        CheckResult::Skipped | CheckResult::Unspecified => Severity::Plain,
    };
    (result.word(), severity)
}
