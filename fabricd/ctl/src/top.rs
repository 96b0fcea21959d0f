//! `fabricctl top`: node, mesh and events, live, on a terminal's second screen until Ctrl-C; or once.

use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use fabric_proto::v1::{
    Event, GetMeshRequest, GetMeshResponse, GetStatusRequest, GetStatusResponse, MeshCause, WatchEventsRequest,
};

use serde::Serialize;

use crate::output::{Output, Screen, Severity};
use crate::{Answer, daemon, events, mesh, print};
use fabricd::errors::chain;

/// How many events are shown.
const EVENTS: usize = 8;
/// To the second screen, without a cursor; and back.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";

/// All that is shown, for programs.
#[derive(Debug, Serialize)]
struct Once {
    status: GetStatusResponse,
    mesh: GetMeshResponse,
    events: Vec<Event>,
}

/// What is shown, once: for programs, and without a terminal.
pub async fn once(socket: &Path, output: Output) -> anyhow::Result<Answer> {
    let (status, mesh, events) = look(socket).await?;
    let once = Once { status, mesh, events };
    let table = |screen: &Screen| {
        let Once { status, mesh, events } = &once;
        page(screen, usize::MAX, status, mesh.clone(), events, SystemTime::now())
    };
    Ok(Answer::fine(output.show(&once, table)?))
}

/// Draws until Ctrl-C.
pub async fn run(socket: &Path, every: Duration) -> anyhow::Result<Answer> {
    if Screen::stdout().width.is_none() {
        bail!("standard output is no terminal; for one look use: fabricctl top --once");
    }
    print(ENTER);
    let outcome = tokio::select! {
        outcome = draw_on(socket, every) => outcome,
        _ = tokio::signal::ctrl_c() => Ok(()),
    };
    print(LEAVE);
    outcome.map(|()| Answer::fine(String::new()))
}

async fn draw_on(socket: &Path, every: Duration) -> anyhow::Result<()> {
    loop {
        let page = match look(socket).await {
            Ok((status, mesh, past)) => {
                let height = rustix::termios::tcgetwinsize(std::io::stdout()).context("the terminal is gone")?.ws_row;
                page(&Screen::stdout(), usize::from(height), &status, mesh, &past, SystemTime::now())
            }
            // It may be restarting.
            Err(error) => format!("{}\n", chain(&error)),
        };
        // From the top, each line and the rest of the screen cleared behind what is written.
        if !print(&format!("\x1b[H{}\x1b[J", page.replace('\n', "\x1b[K\n"))) {
            return Ok(());
        }
        tokio::time::sleep(every).await;
    }
}

async fn look(socket: &Path) -> anyhow::Result<(GetStatusResponse, GetMeshResponse, Vec<Event>)> {
    let mut client = daemon::connect(socket).await?;
    let status = client.get_status(GetStatusRequest {}).await?.into_inner();
    let mesh = client.get_mesh(GetMeshRequest {}).await?.into_inner();
    let mut stream = client.watch_events(WatchEventsRequest { follow: false }).await?.into_inner();
    let mut past = vec![];
    while let Some(event) = stream.message().await? {
        past.push(event);
    }
    Ok((status, mesh, past))
}

/// A screen full: what is wrong comes first, what doesn't fit is counted.
fn page(
    screen: &Screen,
    height: usize,
    status: &GetStatusResponse,
    mut seen: GetMeshResponse,
    past: &[Event],
    now: SystemTime,
) -> String {
    let state = match status.ready {
        true => screen.paint("ready", Severity::Good),
        false => screen.paint(&format!("NOT READY: {}", status.reason), Severity::Bad),
    };
    let lease = status.lease.as_ref().map_or_else(|| "no lease".into(), |lease| lease.subnets.join(" "));
    let (done, all) = (status.peers_programmed, status.peers.len());
    let mut lines = vec![format!("{}  {state}  {lease}  {done} of {all} peers programmed", status.node), String::new()];

    seen.peers.sort_by_key(|peer| (mesh::severity(peer.cause()) != Severity::Bad, peer.cause() == MeshCause::Fine));
    let events = past.len().min(EVENTS);
    let room = height.saturating_sub(lines.len() + events + 4);
    let table = mesh::table(screen, &seen.peers);
    lines.extend(table.lines().take(room).map(str::to_owned));
    let hidden = table.lines().count().saturating_sub(room);
    lines.push(if hidden > 0 { format!("… and {hidden} more") } else { String::new() });
    for event in past.iter().rev().take(events) {
        lines.push(events::line(screen, event, now).trim_end().to_owned());
    }
    lines.truncate(height.saturating_sub(1));
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use fabric_proto::v1::MeshPeer;

    #[test]
    fn what_is_wrong_comes_first_and_all_fits_the_screen() {
        let peer = |n: usize, cause: MeshCause| MeshPeer {
            node: format!("node-{n}"),
            cause: cause.into(),
            ..MeshPeer::default()
        };
        let mut peers: Vec<MeshPeer> = (2..40).map(|n| peer(n, MeshCause::Fine)).collect();
        peers.push(peer(40, MeshCause::PeerDown));
        let status = GetStatusResponse { node: "node-1".into(), ready: true, ..GetStatusResponse::default() };
        let mesh = GetMeshResponse { peers, ..GetMeshResponse::default() };
        let told = page(&Screen::default(), 12, &status, mesh, &[], SystemTime::now());
        let lines: Vec<&str> = told.lines().collect();
        assert!(lines.len() < 12, "{told}");
        assert!(lines[3].starts_with("node-40"), "{told}");
        assert!(told.contains("… and "), "{told}");
    }
}
