//! `fabricctl plan`: desired and actual state of the kernel, and the steps between.

use std::fmt::Write as _;
use std::path::Path;
use std::time::SystemTime;

use fabric_proto::v1::{GetKernelStateRequest, GetKernelStateResponse, KernelTables};

use crate::events::ago;
use crate::output::{Output, Screen, Severity};
use crate::table::{Cell, render};
use crate::{Answer, NOT_ALL_WELL, daemon};

/// Shows it; exit code 4 when there are steps left.
pub async fn show(socket: &Path, output: Output, entries: bool) -> anyhow::Result<Answer> {
    let state = daemon::connect(socket).await?.get_kernel_state(GetKernelStateRequest { entries }).await?.into_inner();
    let well = state.plan.is_empty() && state.conflicts.is_empty() && state.desired.is_some();
    Ok(Answer::well_if(well, output.show(&state, |screen| describe(screen, &state, SystemTime::now()))?, NOT_ALL_WELL))
}

fn describe(screen: &Screen, state: &GetKernelStateResponse, now: SystemTime) -> String {
    let columns: [fn(&KernelTables) -> u32; 7] =
        [|t| t.links, |t| t.addresses, |t| t.fdb, |t| t.neighbours, |t| t.nexthops, |t| t.routes, |t| t.sysctls];
    let row = |name: &str, tables: &Option<KernelTables>| -> [Cell; 8] {
        let count = |column: fn(&KernelTables) -> u32| {
            tables.as_ref().map_or_else(|| "unknown".to_owned(), |tables| column(tables).to_string())
        };
        let mut cells: [Cell; 8] = Default::default();
        cells[0] = name.into();
        columns.iter().enumerate().for_each(|(place, column)| cells[place + 1] = count(*column).into());
        cells
    };
    let header = ["", "LINKS", "ADDRESSES", "FDB", "NEIGHBOURS", "NEXTHOPS", "ROUTES", "SYSCTLS"];
    let mut text = render(screen, header, &[row("desired", &state.desired), row("actual", &state.actual)]);
    text.push('\n');
    match (&state.desired, state.plan.is_empty()) {
        (None, _) => {
            let _ = writeln!(text, "{}: {}", screen.paint("Nothing is planned", Severity::Bad), state.blocked);
        }
        (Some(_), true) if state.conflicts.is_empty() => text += "In sync: the kernel's state is the desired one.\n",
        (Some(_), true) => {}
        (Some(_), false) => {
            let _ = writeln!(text, "Out of sync, steps that are being retried: {}", state.plan.len());
            state.plan.iter().for_each(|step| text += &format!("  {step}\n"));
        }
    }
    if !state.conflicts.is_empty() {
        let _ = writeln!(
            text,
            "{}",
            screen.paint("Conflicts with objects of other programs, which are not touched:", Severity::Bad)
        );
        state.conflicts.iter().for_each(|conflict| text += &format!("  {conflict}\n"));
    }
    if let Some(last) = &state.last {
        let failed = if last.failed == 0 { String::new() } else { format!(", {} of them failed", last.failed) };
        let _ = writeln!(text, "\nLast written, {} ago: {} steps{failed}", ago(last.unix_millis, now), last.steps);
        last.lines.iter().for_each(|step| text += &format!("  {step}\n"));
        let more = usize::try_from(last.steps).unwrap_or(0).saturating_sub(last.lines.len());
        if more > 0 {
            let _ = writeln!(text, "  … and {more} more");
        }
    }
    for (name, tables) in [("Desired", &state.desired), ("Actual", &state.actual)] {
        if let Some(tables) = tables.as_ref().filter(|tables| !tables.entries.is_empty()) {
            let _ = writeln!(text, "\n{name} entries:");
            tables.entries.iter().for_each(|entry| text += &format!("  {entry}\n"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plan_reads_as_a_page() {
        let tables = |routes| KernelTables { links: 1, addresses: 1, fdb: 2, routes, ..KernelTables::default() };
        let state = GetKernelStateResponse {
            desired: Some(tables(2)),
            actual: Some(tables(1)),
            plan: vec!["+ ip route add 10.244.2.0/24 nhid 4194304000 proto 250".into()],
            ..GetKernelStateResponse::default()
        };
        let want = "         LINKS  ADDRESSES  FDB  NEIGHBOURS  NEXTHOPS  ROUTES  SYSCTLS
desired  1      1          2    0           0         2       0
actual   1      1          2    0           0         1       0

Out of sync, steps that are being retried: 1
  + ip route add 10.244.2.0/24 nhid 4194304000 proto 250
";
        assert_eq!(describe(&Screen::default(), &state, SystemTime::now()), want);
        let conflict = "the interface fabric.1 exists and is not ours (bridge)".to_owned();
        let state = GetKernelStateResponse { plan: vec![], conflicts: vec![conflict.clone()], ..state };
        let page = describe(&Screen::default(), &state, SystemTime::now());
        assert!(page.contains(&conflict) && !page.contains("In sync"), "{page}");
    }
}
