//! Which network a container runtime takes: the first file of its folder, by name.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::Inspection;
use super::finding::{Finding, Problem};

/// The plugin by which our configuration is known.
const OURS: &str = "fabric-cni";
/// Where runtimes look for plugins, below the root: containerd and CRI-O, Debian, Red Hat.
const PLUGINS: [&str; 3] = ["opt/cni/bin", "usr/lib/cni", "usr/libexec/cni"];

/// The network configurations of a folder, in the order in which a runtime tries them.
///
/// # Errors
/// When the folder can't be read.
pub fn configs(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let network = |path: &PathBuf| {
        path.extension().is_some_and(|ending| ["conf", "conflist", "json"].iter().any(|known| ending == *known))
    };
    let mut all: Vec<PathBuf> =
        fs::read_dir(dir)?.filter_map(|entry| Some(entry.ok()?.path())).filter(network).collect();
    all.sort();
    Ok(all)
}

/// Those that a runtime takes before `ours`: all files that sort first, but for Multus', which calls the next one.
#[must_use]
pub fn before<'a>(all: &'a [PathBuf], ours: &Path) -> Vec<&'a PathBuf> {
    let multus = |path: &Path| fs::read_to_string(path).is_ok_and(|text| text.contains("\"multus"));
    all.iter().filter(|path| path.as_path() < ours && !multus(path)).collect()
}

/// The command that disables a configuration.
#[must_use]
pub fn move_away(file: &Path) -> String {
    format!("mv {0} {0}.disabled", file.display())
}

pub(super) fn check(inspection: &Inspection) -> Finding {
    let dir = &inspection.places.cni_conf;
    let all = match configs(dir) {
        Ok(all) => all,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Finding::skipped(format!("{} is not here, or not visible to fabricd", dir.display()));
        }
        Err(error) => return Finding::skipped(format!("{}: {error}", dir.display())),
    };
    let Some(ours) = ours_of(&all) else {
        return Finding::warning(
            format!("no file in {} names {OURS}: container runtimes don't use this network", dir.display()),
            "fabricd install-cni",
        );
    };
    let problems = taken_first(&all, ours).map(|(file, what)| Problem::failure(what, move_away(file)));
    Finding::of(problems.chain(missing_plugin(&inspection.places.root)).collect(), ours.display().to_string())
}

/// Which configurations of a folder a runtime takes in the place of ours, each with the command against it; none when ours
/// isn't there, or the folder isn't visible.
#[must_use]
pub fn warnings(dir: &Path) -> Vec<String> {
    let all = configs(dir).unwrap_or_default();
    let others = ours_of(&all).map(|ours| taken_first(&all, ours));
    others.into_iter().flatten().map(|(file, what)| format!("{what}; {}", move_away(file))).collect()
}

/// The first configuration that names our plugin.
fn ours_of(all: &[PathBuf]) -> Option<&PathBuf> {
    all.iter().find(|path| fs::read_to_string(path).is_ok_and(|text| text.contains(OURS)))
}

/// Those that a runtime takes before `ours`, in words.
fn taken_first<'a>(all: &'a [PathBuf], ours: &'a Path) -> impl Iterator<Item = (&'a PathBuf, String)> {
    let told = |file: &PathBuf| format!("{} sorts before {}: new pods get that network", file.display(), name(ours));
    before(all, ours).into_iter().map(move |file| (file, told(file)))
}

/// That the plugin is in none of the usual folders. A runtime may have another one, and the daemon's container sees none.
fn missing_plugin(root: &Path) -> Option<Problem> {
    let visible: Vec<&str> = PLUGINS.into_iter().filter(|folder| root.join(folder).is_dir()).collect();
    let missing = !visible.is_empty() && !visible.iter().any(|folder| root.join(folder).join(OURS).exists());
    missing.then(|| {
        let folders: Vec<String> = visible.iter().map(|folder| format!("/{folder}")).collect();
        Problem::warning(
            format!("the plugin {OURS} is not in {}: a runtime that looks there attaches no pod", folders.join(" or ")),
            "fabricd install-cni --only plugins",
        )
    })
}

fn name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}
