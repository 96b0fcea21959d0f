//! The folders of a crate import each other in one direction, as docs/architecture.md says.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Result, ensure};
use regex::Regex;

use crate::{files, root};

/// The modules at the top of a crate, and which of the others each imports. Links of comments and unit tests import nothing.
fn imports(crate_root: &str) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let sources = root().join(crate_root).join("src");
    let import = Regex::new(r"\bcrate::(?:([a-z_]+)\b|\{([^;]*)\};)")?;
    let (nested, test) = (Regex::new(r"::\{[^{}]*\}")?, Regex::new(r"(^|/)(tests|[a-z_]*_tests)(\.rs|/)")?);
    let mut all: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for path in files(".rs")?.into_iter().filter(|path| path.starts_with(&sources)) {
        let name = path.strip_prefix(&sources)?.display().to_string();
        let module = name.split('/').next().unwrap_or_default().trim_end_matches(".rs").to_owned();
        if ["lib", "main"].contains(&module.as_str()) || test.is_match(&name) {
            continue;
        }
        let text = fs::read_to_string(&path)?;
        let code: Vec<&str> = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
        let code = code.join("\n");
        let code = code.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
        let of = all.entry(module.clone()).or_default();
        for found in import.captures_iter(code) {
            let list = found.get(1).or(found.get(2)).map_or("", |list| list.as_str()).to_owned();
            let mut flat = list;
            while nested.is_match(&flat) {
                flat = nested.replace_all(&flat, "").into_owned();
            }
            let first = |item: &str| item.trim().split("::").next().unwrap_or_default().to_owned();
            of.extend(flat.split(',').map(first).filter(|name| *name != module));
        }
    }
    let modules: BTreeSet<String> = all.keys().cloned().collect();
    all.values_mut().for_each(|imported| imported.retain(|name| modules.contains(name)));
    Ok(all)
}

/// What is left when modules that import none of the rest are taken away, again and again: none of it can be taken away.
fn circles(mut imports: BTreeMap<String, BTreeSet<String>>) -> BTreeMap<String, BTreeSet<String>> {
    loop {
        let left: BTreeSet<String> = imports.keys().cloned().collect();
        imports.values_mut().for_each(|imported| imported.retain(|name| left.contains(name)));
        let before = imports.len();
        imports.retain(|_, imported| !imported.is_empty());
        if imports.len() == before {
            return imports;
        }
    }
}

#[test]
fn folders_import_each_other_in_one_direction() -> Result<()> {
    for (name, at_least) in [("fabricd", 20), ("fabricd/core", 15)] {
        let imports = imports(name)?;
        ensure!(imports.len() > at_least, "{name}: {imports:?}");
        let circles = circles(imports);
        ensure!(circles.is_empty(), "{name}: these lead back to themselves: {circles:#?}");
    }
    let imports = imports("fabricd")?;
    ensure!(imports["reconcile"].contains("kernel") && imports["http"].contains("api"), "{imports:?}");
    let of = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let made_up = [("a", of(&["b"])), ("b", of(&["c", "d"])), ("c", of(&["b"])), ("d", of(&[]))];
    let found = circles(made_up.map(|(name, imported)| (name.to_owned(), imported)).into());
    ensure!(found.keys().collect::<Vec<_>>() == ["a", "b", "c"], "{found:?}");
    Ok(())
}
