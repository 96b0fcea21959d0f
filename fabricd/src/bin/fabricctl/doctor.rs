//! `fabricctl doctor`: looks for what is wrong on this node, and packs what others need to look for it.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context as _;
use fabric_proto::Word as _;
use fabric_proto::v1::{
    Check, CheckResult, DiagnoseRequest, GetKernelStateRequest, GetMeshRequest, GetStatusRequest, ListLeasesRequest,
    WatchEventsRequest,
};
use serde::Serialize;

use crate::output::{Output, Screen, Tone};
use crate::table::cut;
use crate::{Answer, NOT_ALL_WELL, daemon, print};

/// Prints each check when it is made; exit code 4 when one has failed.
pub async fn show(socket: &Path, output: Output, quiet: bool, bundle: Option<&Path>) -> anyhow::Result<Answer> {
    let mut stream = daemon::connect(socket).await?.diagnose(DiagnoseRequest {}).await?.into_inner();
    let mut checks = vec![];
    while let Some(check) = stream.message().await? {
        let looks = !quiet || matches!(check.result(), CheckResult::Warning | CheckResult::Failed);
        if looks && !print(&output.show_next(&check, |screen| line(screen, &check))?) {
            break;
        }
        checks.push(check);
    }
    let failed = checks.iter().filter(|check| check.result() == CheckResult::Failed).count();
    let warned = checks.iter().filter(|check| check.result() == CheckResult::Warning).count();
    let mut text = String::new();
    if matches!(output, Output::Table | Output::Wide) {
        let _ = writeln!(text, "\n{} checks, {failed} failed, {warned} warnings", checks.len());
    }
    if let Some(file) = bundle {
        pack(socket, file, &checks).await?;
        let _ = writeln!(
            text,
            "{} has it all: there are no keys or passwords in it, but addresses and names",
            file.display()
        );
    }
    Ok(Answer::well_if(failed == 0, text, NOT_ALL_WELL))
}

/// A check in a line, with evidence and fix below when something is wrong.
pub fn line(screen: &Screen, check: &Check) -> String {
    let (word, tone) = match check.result() {
        CheckResult::Ok => ("ok", Tone::Good),
        CheckResult::Warning => ("WARNING", Tone::Doubtful),
        CheckResult::Failed => ("FAILED", Tone::Bad),
        CheckResult::Skipped | CheckResult::Unspecified => ("skipped", Tone::Plain),
    };
    let padding = " ".repeat(8 - word.len());
    let told = format!("{:16} {}: {}", check.id, check.title, check.evidence);
    // Of what is wrong everything is said; what isn't takes a line.
    let told = if check.fix.is_empty() {
        cut(&told, screen.width.map_or(usize::MAX, |width| width.saturating_sub(8)))
    } else {
        told
    };
    let mut text = format!("{}{padding}{told}\n", screen.paint(word, tone));
    for (place, fix) in check.fix.lines().enumerate() {
        let _ = writeln!(text, "        {} {fix}", if place == 0 { "fix:" } else { "    " });
    }
    text
}

/// Writes an archive of what the daemon shows. It shows no secret, so there is none in it.
async fn pack(socket: &Path, file: &Path, checks: &[Check]) -> anyhow::Result<()> {
    let mut client = daemon::connect(socket).await?;
    let told = || format!("cannot write {}", file.display());
    let mut archive = tar::Builder::new(std::fs::File::create(file).with_context(told)?);
    add(&mut archive, "checks.json", &checks)?;
    add(&mut archive, "status.json", &client.get_status(GetStatusRequest {}).await?.into_inner())?;
    add(&mut archive, "leases.json", &client.list_leases(ListLeasesRequest {}).await?.into_inner())?;
    add(&mut archive, "mesh.json", &client.get_mesh(GetMeshRequest {}).await?.into_inner())?;
    let kernel = client.get_kernel_state(GetKernelStateRequest { entries: true }).await?.into_inner();
    add(&mut archive, "kernel.json", &kernel)?;
    let mut stream = client.watch_events(WatchEventsRequest { follow: false }).await?.into_inner();
    let mut events = vec![];
    while let Some(event) = stream.message().await? {
        events.push(event);
    }
    add(&mut archive, "events.json", &events)?;
    archive.into_inner().and_then(|file| file.sync_all()).with_context(told)
}

fn add<T: Serialize + ?Sized>(archive: &mut tar::Builder<std::fs::File>, name: &str, value: &T) -> anyhow::Result<()> {
    let json = serde_json::to_vec_pretty(value)?;
    let mut header = tar::Header::new_gnu();
    header.set_size(json.len().try_into()?);
    header.set_mode(0o600);
    header.set_mtime(std::time::UNIX_EPOCH.elapsed()?.as_secs());
    Ok(archive.append_data(&mut header, format!("fabricd/{name}"), json.as_slice())?)
}

/// The word of a result, for other commands.
pub fn tone(result: CheckResult) -> (String, Tone) {
    let tone = match result {
        CheckResult::Ok => Tone::Good,
        CheckResult::Warning => Tone::Doubtful,
        CheckResult::Failed => Tone::Bad,
        CheckResult::Skipped | CheckResult::Unspecified => Tone::Plain,
    };
    (result.word(), tone)
}
