//! What a release has besides programs, and what is refused as one: the scripts of `deploy/release`, and the image of several
//! architectures. None compiles anything; a whole release is built by `deploy/release/check`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

const VERSION: &str = env!("CARGO_PKG_VERSION");
const REPOSITORY: &str = "registry.example/team/fabricd";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn run(command: &mut Command) -> Result<Output> {
    command.output().with_context(|| format!("cannot run {command:?}"))
}

fn told(command: &mut Command) -> Result<String> {
    let output = run(command)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{command:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    Ok(text)
}

/// What a command that fails says, with an error where it doesn't fail.
fn refusal(command: &mut Command) -> Result<String> {
    let output = run(command)?;
    ensure!(!output.status.success(), "{command:?} went through");
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

fn script(name: &str) -> Command {
    let mut command = Command::new(root().join("deploy/release").join(name));
    command.env_remove("SOURCE_DATE_EPOCH");
    command
}

/// The files of an archive by their names, as bytes.
fn unpacked(archive: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let folder = tempfile::tempdir()?;
    told(Command::new("tar").arg("--extract").arg("--file").arg(archive).arg("--directory").arg(folder.path()))?;
    let names = told(Command::new("find").args([".", "-type", "f", "-printf", r"%P\n"]).current_dir(folder.path()))?;
    names.lines().map(|name| Ok((name.to_owned(), std::fs::read(folder.path().join(name))?))).collect()
}

#[test]
fn notes_are_the_versions_section_of_the_changelog() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let changelog = folder.path().join("CHANGELOG.md");
    let text = "# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2026-01-02\n\n### Added\n\n- This.\n\n## [1.2.2] - 2026-01-01\n\n- That.\n";
    std::fs::write(&changelog, text)?;
    assert_eq!(told(script("notes").arg("1.2.3").arg(&changelog))?, "### Added\n\n- This.\n");
    assert_eq!(told(script("notes").arg("1.2.2").arg(&changelog))?, "- That.\n");
    for empty in ["Unreleased", "1.2.4", "1.2"] {
        let why = refusal(script("notes").arg(empty).arg(&changelog))?;
        ensure!(why.contains(&format!("no section ## [{empty}]")), "{why}");
    }
    Ok(())
}

/// Objects of every file to apply, with the images of ours renamed.
#[test]
fn manifests_differ_from_the_repositorys_by_the_image_alone() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let image = format!("{REPOSITORY}:{VERSION}");
    told(script("manifests").arg(&image).arg(folder.path()))?;
    for file in ["fabricd-etcd.yaml", "fabricd-kubernetes.yaml", "fabricd-cleanup.yaml"] {
        let ours = std::fs::read_to_string(root().join("deploy").join(file))?;
        let released = std::fs::read_to_string(folder.path().join(file))?;
        ensure!(ours.contains("localhost/fabricd:") && !released.contains("localhost/"), "{file}: {released}");
        assert_eq!(ours.replace(&format!("localhost/fabricd:{VERSION}"), &image), released, "{file}");
    }
    let folders = unpacked(&folder.path().join("fabricd-kustomize.tar.gz"))?;
    let daemon = folders.get("fabricd/kubernetes/base/daemonset.yaml").context("the base")?;
    ensure!(String::from_utf8_lossy(daemon).contains(&format!("image: {image}")), "the folders have the image");
    let left = folders.iter().find(|(_, bytes)| String::from_utf8_lossy(bytes).contains("localhost/"));
    ensure!(left.is_none(), "{:?} still names localhost's", left.map(|(name, _)| name));
    Ok(())
}

#[test]
fn manifests_for_a_name_that_is_no_image_are_refused() -> Result<()> {
    for image in ["registry.example/fabricd", "Registry Example/fabricd:1", "registry.example/fabricd:1#2", ""] {
        let folder = tempfile::tempdir()?;
        let why = refusal(script("manifests").arg(image).arg(folder.path()))?;
        ensure!(why.contains("is no image with a tag"), "{image}: {why}");
    }
    Ok(())
}

#[test]
fn chart_is_packed_as_helm_does_with_version_and_image() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let package = folder.path().join("new/fabricd.tgz");
    told(script("chart").args([REPOSITORY, "9.8.7"]).arg(&package))?;
    let files = unpacked(&package)?;
    let yaml = |name: &str| -> Result<Value> {
        let bytes = files.get(name).with_context(|| name.to_owned())?;
        Ok(serde_saphyr::from_str(std::str::from_utf8(bytes)?)?)
    };
    let chart = yaml("fabricd/Chart.yaml")?;
    assert_eq!((&chart["version"], &chart["appVersion"]), (&json!("9.8.7"), &json!("9.8.7")));
    assert_eq!(yaml("fabricd/values.yaml")?["image"]["repository"], REPOSITORY);
    // The names in the order of the archive: helm looks for Chart.yaml first, and a link would lead out of it.
    let listed = told(Command::new("tar").env("TZ", "UTC").args(["--list", "--verbose", "--file"]).arg(&package))?;
    ensure!(listed.lines().next().is_some_and(|line| line.ends_with("fabricd/Chart.yaml")), "{listed}");
    ensure!(listed.lines().all(|line| line.starts_with('-')), "files alone: {listed}");
    ensure!(listed.lines().all(|line| line.contains(" 0/0 ") && line.contains(" 1970-01-01 00:00 ")), "{listed}");
    let ours =
        told(Command::new("find").args(["-L", ".", "-type", "f"]).current_dir(root().join("deploy/helm/fabricd")))?;
    assert_eq!(ours.lines().count(), files.len());
    Ok(())
}

#[test]
fn packages_of_the_same_files_have_the_same_bytes() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut made = vec![];
    for (name, umask) in [("one", "022"), ("other/deeper", "077")] {
        let out = folder.path().join(name);
        let commands =
            r#"umask $1; "$2/chart" r.example/fabricd 1.0.0 "$3/c.tgz" && "$2/manifests" r.example/fabricd:1.0.0 "$3""#;
        let release = root().join("deploy/release");
        let shell = |command: &mut Command| told(command.arg(umask).arg(&release).arg(&out));
        shell(Command::new("bash").env("TZ", "Asia/Kolkata").args(["-euc", commands, "-"]))?;
        made.push((std::fs::read(out.join("c.tgz"))?, std::fs::read(out.join("fabricd-kustomize.tar.gz"))?));
    }
    ensure!(made[0] == made[1], "they differ");
    Ok(())
}

#[test]
fn sums_are_of_every_file_and_the_given_key_signs_them() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let keys = tempfile::tempdir()?;
    let (public, secret) = (keys.path().join("public"), keys.path().join("secret"));
    told(Command::new("minisign").args(["-G", "-W", "-p"]).arg(&public).arg("-s").arg(&secret))?;
    for name in ["one.deb", "NOTES.md", "a name with spaces"] {
        std::fs::write(folder.path().join(name), name)?;
    }

    let unsigned = run(script("sums").arg(folder.path()).env_remove("SIGNING_KEY"))?;
    ensure!(String::from_utf8_lossy(&unsigned.stderr).contains("not signed"), "{unsigned:?}");
    ensure!(!folder.path().join("SHA256SUMS.minisig").exists());
    told(script("sums").arg(folder.path()).env("SIGNING_KEY", &secret).env("SIGNED_AS", "fabricd 1.2.3"))?;

    let checked = told(Command::new("sha256sum").args(["--check", "SHA256SUMS"]).current_dir(folder.path()))?;
    assert_eq!(checked, "NOTES.md: OK\na name with spaces: OK\none.deb: OK\n");
    let verify = || {
        let mut command = Command::new("minisign");
        command.args(["-V", "-m", "SHA256SUMS", "-p"]).arg(&public).current_dir(folder.path());
        command
    };
    ensure!(told(&mut verify())?.contains("fabricd 1.2.3"), "the trusted comment");
    std::fs::write(folder.path().join("SHA256SUMS"), checked)?;
    ensure!(refusal(&mut verify())?.contains("verification failed"), "other sums were taken");
    let why = refusal(script("sums").arg(folder.path()).env("SIGNING_KEY", keys.path().join("none")))?;
    ensure!(!why.is_empty() && !folder.path().join("SHA256SUMS.minisig").exists(), "{why}");
    Ok(())
}

/// A repository of its own with the scripts and a changelog, committed.
fn repository(changelog: &str) -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    let deploy = folder.path().join("deploy");
    std::fs::create_dir(&deploy)?;
    told(Command::new("cp").arg("-r").arg(root().join("deploy/release")).arg(&deploy))?;
    std::fs::write(folder.path().join("Cargo.toml"), "[workspace.package]\nversion = \"1.2.3\"\n")?;
    std::fs::write(folder.path().join("CHANGELOG.md"), changelog)?;
    git(&folder, &["init", "--quiet"])?;
    git(&folder, &["add", "."])?;
    git(&folder, &["commit", "--quiet", "--message", "first"])?;
    Ok(folder)
}

fn git(folder: &tempfile::TempDir, args: &[&str]) -> Result<String> {
    let name = ["-c", "user.name=test", "-c", "user.email=test@example.org"];
    told(Command::new("git").current_dir(folder.path()).args(name).args(args))
}

#[test]
fn what_nobody_could_build_again_is_refused_before_anything_is_compiled() -> Result<()> {
    const COMPLETE: &str = "## [Unreleased]\n\n## [1.2.3] - 2026-01-02\n\n- This.\n";
    let build = |folder: &tempfile::TempDir, registry: &str| {
        let mut command = Command::new(folder.path().join("deploy/release/build"));
        command.env("REGISTRY", registry).env_remove("DRAFT").env_remove("SIGNING_KEY");
        refusal(&mut command)
    };
    let without_section = repository("## [Unreleased]\n\n## [1.2.2] - 2026-01-02\n\n- This.\n")?;
    ensure!(build(&without_section, "r.example")?.contains("CHANGELOG.md has nothing about 1.2.3"));
    let unreleased = repository("## [Unreleased]\n\n- That.\n\n## [1.2.3] - 2026-01-02\n\n- This.\n")?;
    ensure!(build(&unreleased, "r.example")?.contains("entries under [Unreleased]"));

    let complete = repository(COMPLETE)?;
    ensure!(build(&complete, "")?.contains("REGISTRY names no registry"));
    git(&complete, &["tag", "v1.2.3"])?;
    // Nothing is left to refuse: it goes on to what compiles, which this repository lacks.
    let further = build(&complete, "r.example")?;
    ensure!(!further.contains("no release") && further.contains("deploy/image/programs"), "{further}");
    git(&complete, &["commit", "--quiet", "--allow-empty", "--message", "second"])?;
    ensure!(build(&complete, "r.example")?.contains("v1.2.3 is another commit"));
    std::fs::write(complete.path().join("new"), "")?;
    ensure!(build(&complete, "r.example")?.contains("changes that no commit has"));
    Ok(())
}

#[test]
fn image_of_two_architectures_has_an_index_whose_digests_hold() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let content = folder.path().join("content");
    std::fs::create_dir_all(content.join("bin"))?;
    let image = root().join("deploy/image");
    let mut archives = vec![];
    for arch in ["amd64", "arm64"] {
        std::fs::write(content.join("bin/program"), arch)?;
        let archive = folder.path().join(arch);
        let mut pack = Command::new(image.join("pack"));
        pack.arg("r.example/fabricd:1.2.3").arg(&content).arg(&archive).arg("/bin/program").env("ARCH", arch);
        archives.push((arch, archive, told(&mut pack)?.trim().to_owned()));
    }
    let joined = folder.path().join("joined");
    let mut join = Command::new(image.join("join"));
    join.arg("r.example/fabricd:1.2.3").arg(&joined).args(archives.iter().map(|(_, archive, _)| archive));
    let digest = told(&mut join)?.trim().to_owned();

    let files = unpacked(&joined)?;
    let blob = |descriptor: &Value| -> Result<Value> {
        let digest = descriptor["digest"].as_str().context("a digest")?;
        let bytes = files.get(&digest.replace("sha256:", "blobs/sha256/")).context("the blob")?;
        assert_eq!(descriptor["size"], bytes.len(), "{digest}");
        Ok(serde_json::from_slice(bytes)?)
    };
    let top: Value = serde_json::from_slice(files.get("index.json").context("index.json")?)?;
    assert_eq!(top["manifests"].as_array().map(Vec::len), Some(1));
    assert_eq!(top["manifests"][0]["digest"], digest);
    assert_eq!(top["manifests"][0]["annotations"]["io.containerd.image.name"], "r.example/fabricd:1.2.3");
    let index = blob(&top["manifests"][0])?;
    let manifests = index["manifests"].as_array().context("manifests")?;
    for (entry, (arch, _, digest)) in manifests.iter().zip(&archives) {
        assert_eq!(entry["platform"], json!({ "architecture": arch, "os": "linux" }));
        assert_eq!(entry["digest"], *digest);
        assert_eq!(blob(&blob(entry)?["config"])?["architecture"], *arch);
    }
    assert_eq!(manifests.len(), 2);
    for (name, _) in files.iter().filter(|(name, _)| name.starts_with("blobs/")) {
        let path = folder.path().join("blob");
        std::fs::write(&path, &files[name])?;
        let sum = told(Command::new("sha256sum").arg(&path))?;
        ensure!(name.ends_with(sum.split(' ').next().unwrap_or("none")), "{name} is {sum}");
    }
    Ok(())
}
