//! `fabricctl log-level`.

use std::path::Path;

use fabric_proto::v1::SetLogLevelRequest;

use crate::{Answer, daemon};

pub async fn run(socket: &Path, level: Option<String>) -> anyhow::Result<Answer> {
    let request = SetLogLevelRequest { level: level.unwrap_or_default() };
    let answer = daemon::connect(socket).await?.set_log_level(request).await;
    let level = answer.map_err(|status| daemon::told(&status))?.into_inner().level;
    Ok(Answer::fine(format!("{level}\n")))
}
