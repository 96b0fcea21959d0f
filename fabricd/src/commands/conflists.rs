//! The network configurations of the container runtime: ours, flannel's, and flannel's where a takeover has put it.

use std::fs;
use std::io;
use std::path::Path;

use fabric_core::takeover::{ASIDE, Cni, Conflist};
use serde_json::Value;

/// The plugin by which ours is known.
const OURS: &str = "fabric-cni";

/// The plugin by which flannel's is known.
const FLANNELS: &str = "flannel";

/// What is in a folder, where our file is called `our_file`. Of several the first in the runtime's order counts.
///
/// # Errors
/// When the folder can't be read. One that is missing is empty.
pub fn find(dir: &Path, our_file: &str) -> io::Result<Cni> {
    let mut found = Cni { dir: dir.to_owned(), our_file: our_file.to_owned(), ..Cni::default() };
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        entries => entries?,
    };
    let mut names: Vec<String> = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    for file in names {
        let is_aside = file.ends_with(ASIDE);
        let is_read = [".conf", ".conflist", ".json"].iter().any(|ending| file.ends_with(ending));
        let Some((network, plugin)) = known(&dir.join(&file)).filter(|_| is_read || is_aside) else { continue };
        let place = match plugin {
            OURS if !is_aside => &mut found.ours,
            FLANNELS if is_aside => &mut found.aside,
            FLANNELS => &mut found.flannels,
            _ => continue,
        };
        place.get_or_insert(Conflist { file, network });
    }
    Ok(found)
}

/// The name of a network of ours or flannel's, and which plugin it names.
fn known(file: &Path) -> Option<(String, &'static str)> {
    let config: Value = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
    let listed = config["plugins"].as_array().into_iter().flatten();
    let mut plugins = listed.chain([&config]).filter_map(|plugin| plugin["type"].as_str());
    let plugin = plugins.find_map(|plugin| [OURS, FLANNELS].into_iter().find(|known| *known == plugin))?;
    Some((config["name"].as_str()?.to_owned(), plugin))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_and_flannels_are_told_apart_by_their_plugins_and_what_is_aside_by_its_name() {
        let dir = tempfile::tempdir().expect("a folder");
        assert_eq!(find(&dir.path().join("none"), "10-fabric.conflist").expect("empty").flannels, None);
        for (file, content) in [
            ("05-bridge.conflist", r#"{"name":"b","plugins":[{"type":"bridge"}]}"#),
            ("10-fabric.conflist", r#"{"name":"cbr0","plugins":[{"type":"fabric-cni"}]}"#),
            ("10-flannel.conflist", r#"{"name":"cbr0","plugins":[{"type":"flannel"},{"type":"portmap"}]}"#),
            ("10-flannel.conflist.before-fabricd", r#"{"name":"old","plugins":[{"type":"flannel"}]}"#),
            ("20-flannel.conf", r#"{"name":"later","type":"flannel"}"#),
            ("30-flannel.conflist.disabled", r#"{"name":"off","type":"flannel"}"#),
            ("40-broken.conflist", "{"),
        ] {
            fs::write(dir.path().join(file), content).expect("a file");
        }
        let found = find(dir.path(), "10-fabric.conflist").expect("read");
        let names = [found.ours, found.flannels, found.aside].map(|file| {
            let Conflist { file, network } = file.expect("found");
            format!("{file} {network}")
        });
        assert_eq!(
            names,
            ["10-fabric.conflist cbr0", "10-flannel.conflist cbr0", "10-flannel.conflist.before-fabricd old"]
        );
        fs::remove_file(dir.path().join("10-flannel.conflist")).expect("removed");
        let found = find(dir.path(), "10-fabric.conflist").expect("read");
        assert_eq!(found.flannels.map(|file| file.network).as_deref(), Some("later"));
    }
}
