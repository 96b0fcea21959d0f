//! The example as a user runs it, against the API that a daemon serves.

use std::process::Command;

use anyhow::{Result, ensure};
use fabric_tests::served::{Served, view};
use fabricd::{api, mesh::Mesh};

#[tokio::test(flavor = "multi_thread")]
async fn the_status_of_a_node_is_printed() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("fabricd.sock");
    let served = Served::new(view(&[2])?, Mesh::default())?;
    tokio::spawn(api::serve(api::listen(&socket)?, served.sources.clone()));

    let mut example = Command::new(env!("CARGO_BIN_EXE_status"));
    let output = tokio::task::spawn_blocking(move || example.arg(socket).output()).await??;
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    ensure!(told == "node-1: ready, 127.1.1.0/24, 1 of 1 peers programmed\n", "{told}");
    Ok(())
}
