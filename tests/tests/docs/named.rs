//! What pages name is there: files and functions of the source, metrics, checks, modules.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context as _, Result, ensure};
use fabric_bpf::Reason;
use regex::Regex;

use crate::{files, pages, root};

#[test]
fn files_in_the_table_of_times_are_there() -> Result<()> {
    let reference = fs::read_to_string(root().join("docs/reference.md"))?;
    let (_, times) = reference.split_once("\n## Times\n").context("a section Times")?;
    let place = Regex::new(r"\| `([^`]+)` \|$")?;
    let places: Vec<_> =
        times.lines().filter_map(|line| place.captures(line).map(|found| found[1].to_owned())).collect();
    ensure!(places.len() > 40, "only {} lines of the table name a place", places.len());
    for name in places.iter().flat_map(|place| alternatives(place)) {
        ensure!(root().join(&name).exists(), "the table of times names {name}");
    }
    Ok(())
}

/// `kernel/{nft,routing}/mod.rs` are two.
fn alternatives(name: &str) -> Vec<String> {
    match name.split_once('{').and_then(|(head, rest)| Some((head, rest.split_once('}')?))) {
        Some((head, (names, tail))) => names.split(',').map(|name| format!("{head}{}{tail}", name.trim())).collect(),
        None => vec![name.to_owned()],
    }
}

/// What a page names of the source and isn't there. Files may lack folders in front, names of functions may be cut by `…`.
fn gone(markdown: &str, sources: &[String], identifiers: &BTreeSet<String>) -> Result<Vec<String>> {
    let file = Regex::new(r"`([A-Za-z0-9_./{},-]+\.rs)`")?;
    let function = Regex::new(r"`(?:[A-Za-z_]+::)+(\{[^`]+\}|[A-Za-z0-9_…]+)`")?;
    let of = |pattern: &Regex| -> Vec<String> {
        pattern.captures_iter(markdown).flat_map(|found| alternatives(&found[1])).collect()
    };
    let has_file = |name: &String| sources.iter().any(|path| format!("/{path}").ends_with(&format!("/{name}")));
    let has_function = |name: &String| {
        if !name.contains('…') {
            return identifiers.contains(name);
        }
        let pieces: Vec<&str> = name.split('…').filter(|piece| !piece.is_empty()).collect();
        identifiers
            .iter()
            .any(|known| !pieces.contains(&known.as_str()) && pieces.iter().all(|piece| known.contains(piece)))
    };
    let files = of(&file).into_iter().filter(|name| !has_file(name));
    Ok(files.chain(of(&function).into_iter().filter(|name| !has_function(name))).collect())
}

#[test]
fn sources_and_tests_that_the_pages_name_are_there() -> Result<()> {
    let (mut sources, mut identifiers) = (Vec::new(), BTreeSet::new());
    for path in files(".rs")? {
        let text = fs::read_to_string(&path)?;
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        identifiers.extend(words.filter(|word| !word.is_empty()).map(str::to_owned));
        sources.push(path.strip_prefix(root())?.display().to_string());
    }
    for page in files(".md")? {
        let gone = gone(&fs::read_to_string(&page)?, &sources, &identifiers)?;
        ensure!(gone.is_empty(), "{} names what is not there: {gone:?}", page.display());
    }
    let wrong = gone("`faults.rs` `tests/{faults,nowhere}.rs` `faults::{gone, xyzzy_…}`", &sources, &identifiers)?;
    ensure!(wrong == ["tests/nowhere.rs", "xyzzy_…"], "{wrong:?}");
    Ok(())
}

/// Texts in quotes of these folders of sources.
fn literals(folders: &[&str]) -> Result<BTreeSet<String>> {
    let quoted = Regex::new(r#""([a-z0-9_{}-]+)""#)?;
    let mut found = BTreeSet::new();
    for folder in folders {
        let folder = root().join(folder);
        for path in files(".rs")?.into_iter().filter(|path| path.starts_with(&folder)) {
            found.extend(quoted.captures_iter(&fs::read_to_string(path)?).map(|text| text[1].to_owned()));
        }
    }
    Ok(found)
}

/// `fabricd_peers` is registered as `peers`, and what its type and unit add stands behind that.
fn is_metric(name: &str, literals: &BTreeSet<String>) -> bool {
    const ENDS: [&str; 7] = ["_total", "_bucket", "_info", "_seconds", "_ratio", "_bytes", "_packets"];
    let Some(mut name) = name.strip_prefix("fabricd_") else { return false };
    loop {
        let of_device = name.strip_prefix("device_").and_then(|rest| rest.split_once('_'));
        let is_direction = of_device.is_some_and(|(direction, _)| literals.contains(direction));
        // `…_peer_` and `fabricd_polic` (for grep) stand for all of a stem.
        let is_stem = name.len() > 4 && literals.iter().any(|literal| literal.starts_with(name));
        if literals.contains(name) || is_direction || is_stem {
            return true;
        }
        match ENDS.iter().find_map(|end| name.strip_suffix(end)) {
            Some(shorter) => name = shorter,
            None => return false,
        }
    }
}

#[test]
fn metrics_that_the_pages_name_are_registered() -> Result<()> {
    let literals =
        literals(&["fabricd/src/metrics", "fabricd/src/status", "fabricd/src/services", "fabricd/src/policy"])?;
    let name = Regex::new(r"\bfabricd_[a-z0-9_]+")?;
    let mut known = BTreeSet::new();
    for (page, text) in pages()? {
        for found in name.find_iter(&text).map(|found| found.as_str().to_owned()) {
            ensure!(is_metric(&found, &literals), "{page} names {found}");
            known.insert(found);
        }
    }
    ensure!(known.len() > 12, "{known:?}");
    ensure!(!is_metric("fabricd_pears", &literals) && !is_metric("fabricd_total", &literals));
    Ok(())
}

#[test]
fn each_reason_of_the_fast_path_to_leave_a_packet_to_the_kernel_is_explained() -> Result<()> {
    let page = fs::read_to_string(root().join("docs/datapath.md"))?;
    for reason in Reason::ALL.into_iter().filter(|reason| reason.path() != fabric_bpf::Path::Fast) {
        ensure!(page.contains(&format!("`{}`", reason.label())), "docs/datapath.md doesn't explain {}", reason.label());
    }
    Ok(())
}

#[test]
fn checks_of_doctor_that_the_pages_name_are_made() -> Result<()> {
    let literals = literals(&["fabricd/src/diagnosis"])?;
    let named = Regex::new(r"\bchecks? `([a-z-]+)`(?: and `([a-z-]+)`)?")?;
    let mut known = BTreeSet::new();
    for (page, text) in pages()? {
        for name in named.captures_iter(&text).flat_map(|found| [found.get(1), found.get(2)]).flatten() {
            ensure!(literals.contains(name.as_str()), "{page} names the check {}", name.as_str());
            known.insert(name.as_str().to_owned());
        }
    }
    ensure!(known.len() > 5, "{known:?}");
    let table = fs::read_to_string(root().join("fabricd/src/diagnosis/checks.rs"))?;
    // The read of the store is apart, since it waits.
    let count = 1 + Regex::new(r#"(?m)^    \("[a-z-]+", "[^"]+", [a-z_:]+\),$"#)?.find_iter(&table).count();
    let symptoms = fs::read_to_string(root().join("docs/symptoms.md"))?;
    ensure!(symptoms.contains(&format!("{count} checks of this node")), "doctor makes {count} checks");
    Ok(())
}

#[test]
fn modules_of_the_errors_are_loaded_by_the_package_and_explained() -> Result<()> {
    let read = |path: &str| fs::read_to_string(root().join(path)).with_context(|| path.to_owned());
    let (list, page) = (read("deploy/systemd/modules-load.conf")?, read("docs/kernels.md")?);
    let loaded: Vec<&str> = list.lines().filter(|line| !line.starts_with('#')).collect();
    for module in &loaded {
        ensure!(page.contains(&format!("`{module}`")), "docs/kernels.md doesn't say what {module} is for");
    }
    let errors = read("fabricd/src/kernel/refusal.rs")?;
    let named: BTreeSet<&str> = Regex::new(r#""(nft?_[a-z_]+)"|modprobe ([a-z][a-z_]+)"#)?
        .captures_iter(&errors)
        .filter_map(|found| Some(found.get(1).or(found.get(2))?.as_str()))
        .collect();
    ensure!(named.len() >= 12, "the errors name {named:?} alone");
    for module in &named {
        ensure!(page.contains(&format!("`{module}`")), "docs/kernels.md doesn't say what {module} is for");
    }
    // The CNI plugins have words of their own, and what is off by default isn't loaded at boot.
    for module in loaded.iter().filter(|module| !["bridge", "veth"].contains(module)) {
        ensure!(named.contains(module), "no error names {module}");
    }
    Ok(())
}
