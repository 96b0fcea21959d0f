//! The manifests of `deploy/`: the files for `kubectl apply -f` are what the folders say, and name this version.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

const FILES: [&str; 3] = ["fabricd-etcd.yaml", "fabricd-kubernetes.yaml", "fabricd-cleanup.yaml"];

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{command:?}: {told}{}", String::from_utf8_lossy(&output.stderr));
    Ok(told)
}

#[test]
fn files_to_apply_are_what_kustomize_makes_of_the_folders() -> Result<()> {
    output(Command::new(deploy().join("kubernetes/render")).arg("--check"))?;
    Ok(())
}

#[test]
fn every_overlay_can_be_rendered() -> Result<()> {
    for folder in std::fs::read_dir(deploy().join("kubernetes"))? {
        let folder = folder?.path();
        if folder.join("kustomization.yaml").is_file() {
            let rendered = output(Command::new("kubectl").arg("kustomize").arg(&folder))?;
            ensure!(rendered.contains("kind: DaemonSet"), "{}: {rendered}", folder.display());
        }
    }
    Ok(())
}

#[test]
fn images_are_those_of_this_version() -> Result<()> {
    let ours = concat!("localhost/fabricd:", env!("CARGO_PKG_VERSION"));
    for file in FILES {
        let text = std::fs::read_to_string(deploy().join(file))?;
        let images = text.lines().filter_map(|line| line.trim_start_matches([' ', '-']).strip_prefix("image: "));
        for image in images.filter(|image| image.contains("fabricd")) {
            ensure!(image == ours, "{file} has {image}, not {ours}");
        }
    }
    Ok(())
}

/// What a pod of the daemon may do. Each line is a promise of docs/security.md.
#[test]
fn daemon_has_no_more_rights_than_it_needs() -> Result<()> {
    let text = std::fs::read_to_string(deploy().join(FILES[0]))?;
    ensure!(!text.contains("privileged: true"), "nothing is privileged");
    ensure!(text.matches("readOnlyRootFilesystem: true").count() == text.matches("  image: ").count());
    ensure!(text.matches("- ALL").count() == text.matches("  image: ").count(), "all capabilities are dropped");
    ensure!(text.matches("- NET_ADMIN").count() == 1, "one container has one back");
    ensure!(!text.contains("nodes"), "with etcd nobody reads the API server's nodes");
    Ok(())
}
