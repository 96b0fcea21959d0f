//! `fabricctl log-level`.

use std::path::Path;

use fabric_proto::v1::SetLogLevelRequest;

use crate::output::Output;
use crate::{Answer, daemon};

/// Sets the level, if one is given, and shows it.
pub async fn run(socket: &Path, output: Output, level: Option<String>) -> anyhow::Result<Answer> {
    let request = SetLogLevelRequest { level: level.unwrap_or_default() };
    let answer = daemon::connect(socket).await?.set_log_level(request).await;
    let answer = answer.map_err(|status| daemon::told(&status))?.into_inner();
    Ok(Answer::fine(output.show(&answer, |_| format!("{}\n", answer.level))?))
}
