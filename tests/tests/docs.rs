//! The documentation leads somewhere: links, headings, the pages and files that text and programs name, and the commands that
//! it gives.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use fabric_bpf::Reason;
use fabric_tests::lab::binaries;
use regex::Regex;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// All files that are part of the project, with the ending, or all of them.
fn files(ending: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![root()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            match path.is_dir() {
                true if [".git", "target", "corpus", "artifacts"].contains(&name.as_str()) => {}
                true => folders.push(path),
                false if name.ends_with(ending) => found.push(path),
                false => {}
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The text without blocks and spans of code, where brackets are no links.
fn prose(markdown: &str) -> String {
    let mut in_block = false;
    let lines = markdown.lines().filter(|line| {
        let fence = line.trim_start().starts_with("```");
        in_block ^= fence;
        !fence && !in_block
    });
    let text = lines.collect::<Vec<_>>().join("\n");
    Regex::new("`[^`\n]*`").expect("a pattern").replace_all(&text, "").into_owned()
}

/// The anchors of a page's headings, as GitHub makes them.
fn anchors(markdown: &str) -> Vec<String> {
    let headings = markdown.lines().filter(|line| line.starts_with('#'));
    let anchor = |heading: &str| {
        let text = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = text.chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(anchor).collect()
}

/// What is wrong with the links of a page.
fn broken_links(page: &Path, markdown: &str) -> Result<Vec<String>> {
    let mut broken = Vec::new();
    let link = Regex::new(r"\]\(([^)\s]+)\)")?;
    for (_, [target]) in link.captures_iter(&prose(markdown)).map(|found| found.extract()) {
        if target.contains("://") {
            continue;
        }
        let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
        let file = if file.is_empty() { page.to_owned() } else { page.with_file_name("").join(file) };
        if !file.exists() {
            broken.push(format!("{}: {target}: no such file", page.display()));
        } else if !anchor.is_empty() && !anchors(&fs::read_to_string(&file)?).iter().any(|known| known == anchor) {
            broken.push(format!("{}: {target}: no such heading", page.display()));
        }
    }
    Ok(broken)
}

#[test]
fn every_link_leads_to_a_file_and_a_heading() -> Result<()> {
    let mut broken = Vec::new();
    for page in files(".md")? {
        broken.extend(broken_links(&page, &fs::read_to_string(&page)?)?);
    }
    ensure!(broken.is_empty(), "{}", broken.join("\n"));
    Ok(())
}

#[test]
fn a_link_to_nowhere_is_found() -> Result<()> {
    let page = root().join("docs/README.md");
    let text = "# Real heading\n[a](#real-heading) `[b](gone.md)` [c](gone.md) [d](#gone) [e](../Makefile)";
    let broken = broken_links(&page, text)?;
    ensure!(broken.len() == 3, "the heading of the page on disk is another, and c and d lead nowhere: {broken:?}");
    Ok(())
}

#[test]
fn every_page_is_in_the_index() -> Result<()> {
    let index = fs::read_to_string(root().join("docs/README.md"))?;
    for page in fs::read_dir(root().join("docs"))? {
        let name = page?.file_name().to_string_lossy().into_owned();
        ensure!(name == "README.md" || index.contains(&name), "docs/README.md doesn't name {name}");
    }
    Ok(())
}

#[test]
fn pages_that_programs_and_manifests_name_are_there() -> Result<()> {
    let name = Regex::new(r"docs/[a-z0-9/-]+\.md")?;
    for file in files("")? {
        // What is no text names no page.
        let Ok(text) = fs::read_to_string(&file) else { continue };
        for page in name.find_iter(&text) {
            ensure!(root().join(page.as_str()).exists(), "{} names {}", file.display(), page.as_str());
        }
    }
    Ok(())
}

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
    let wrong = gone("`docs.rs` `tests/{docs,nowhere}.rs` `docs::{gone, xyzzy_…}`", &sources, &identifiers)?;
    ensure!(wrong == ["tests/nowhere.rs", "xyzzy_…"], "{wrong:?}");
    Ok(())
}

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

/// The pages for users and operators, with their names.
fn pages() -> Result<Vec<(String, String)>> {
    let mut pages = vec![root().join("README.md"), root().join("deploy/helm/fabricd/README.md")];
    for page in fs::read_dir(root().join("docs"))? {
        pages.push(page?.path());
    }
    let pages = pages.into_iter().filter(|page| page.extension().is_some_and(|end| end == "md"));
    pages.map(|page| Ok((page.display().to_string(), fs::read_to_string(&page)?))).collect()
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
        // `…_peer_` stands for all of a stem.
        let is_stem = name.ends_with('_') && literals.iter().any(|literal| literal.starts_with(name));
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

/// Our commands in a page: in spans of code, and the lines of blocks.
fn commands(markdown: &str) -> Result<BTreeSet<String>> {
    let span = Regex::new("`((?:fabricctl|fabricd) [^`\n]+)`")?;
    let mut found: BTreeSet<String> = span.captures_iter(markdown).map(|found| found[1].to_owned()).collect();
    let mut in_block = false;
    for line in markdown.lines() {
        in_block ^= line.trim_start().starts_with("```");
        if in_block && (line.starts_with("fabricctl ") || line.starts_with("fabricd ")) {
            found.insert(line.to_owned());
        }
    }
    Ok(found)
}

/// Whether the program understands a command. It answers `--help` once it has understood all that stands before; nothing
/// is done.
fn is_understood(command: &str) -> Result<bool> {
    let behind = ["#", "&", "&&", "|"];
    let words = command.split_whitespace().take_while(|word| !behind.contains(word));
    // `explain A B` is of two addresses.
    let words = words.map(|word| if matches!(word, "A" | "B") { "192.0.2.1" } else { word });
    let words: Vec<&str> = words.collect();
    let (program, arguments) = words.split_first().context("a command")?;
    let output = Command::new(binaries::folder()?.join(program)).args(arguments).arg("--help").output()?;
    // A flag is named without its value.
    Ok(output.status.success() || String::from_utf8_lossy(&output.stderr).contains("a value is required for"))
}

#[test]
fn programs_understand_the_commands_in_the_documentation() -> Result<()> {
    let mut pages = vec![root().join("README.md")];
    for page in fs::read_dir(root().join("docs"))? {
        pages.push(page?.path());
    }
    let mut tried = BTreeSet::new();
    for page in pages.iter().filter(|page| page.extension().is_some_and(|end| end == "md")) {
        // What is left out or may be left out is the reader's to say.
        for command in commands(&fs::read_to_string(page)?)?.into_iter().filter(|text| !text.contains(['…', '[', '|']))
        {
            ensure!(is_understood(&command)?, "{}: {command}", page.display());
            tried.insert(command);
        }
    }
    ensure!(tried.len() > 40, "only {} commands were found: {tried:?}", tried.len());
    ensure!(!is_understood("fabricctl no-such-command")? && !is_understood("fabricctl status --no-such-flag")?);
    Ok(())
}

/// `kubectl -n NAMESPACE` in texts, pages and manifests: those of ours are in the manifests, the others are Kubernetes' and
/// flannel's.
#[test]
fn namespaces_in_commands_are_those_of_the_manifests() -> Result<()> {
    let others = ["kube-system", "kube-flannel"];
    let named = Regex::new(r"kubectl (?:-n|--namespace)[ =]([a-z][a-z-]*)")?;
    let namespace = Regex::new(r"(?m)^  namespace: ([a-z-]+)$")?;
    let mut ours = BTreeSet::new();
    for file in ["fabricd-etcd.yaml", "fabricd-kubernetes.yaml", "fabricd-cleanup.yaml"] {
        let text = fs::read_to_string(root().join("deploy").join(file))?;
        ours.extend(namespace.captures_iter(&text).map(|found| found[1].to_owned()));
    }
    let mut count = 0;
    for file in files("")? {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        for name in named.captures_iter(&text).map(|found| found[1].to_owned()) {
            ensure!(ours.contains(&name) || others.contains(&name.as_str()), "{} names {name}", file.display());
            count += 1;
        }
    }
    ensure!(count > 10 && ours.contains("fabric-system"), "{count} {ours:?}");
    Ok(())
}

/// Commands of ours in what programs print, as far as they are sure to be meant as such: up to the first placeholder or
/// point, and of words only those that are commands.
fn printed_commands(source: &str) -> Result<BTreeSet<String>> {
    let command = Regex::new(
        r"\b(fabricctl(?: [a-z]+(?:-[a-z]+)*){1,2}|fabricd (?:pki [a-z]+|install-cni|takeover|giveback))((?: --[a-z][a-z-]+)*)",
    )?;
    let code = source.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let code = code.split("#[cfg(test)]\nmod ").next().unwrap_or_default().replace("\\\n", "");
    let mut found = BTreeSet::new();
    for text in Regex::new(r#""((?:[^"\\]|\\.)*)""#)?.captures_iter(&code) {
        for command in command.captures_iter(&text[1]) {
            let (words, flags) = (&command[1], &command[2]);
            let mut words: Vec<&str> = words.split(' ').collect();
            // `fabricctl mesh has the round trip`: two words are a command of these alone.
            if words.len() > 2 && !["lease", "network", "pki"].contains(&words[1]) {
                words.truncate(2);
                found.insert(words.join(" "));
            } else {
                found.insert(words.join(" ") + flags);
            }
        }
    }
    Ok(found)
}

#[test]
fn programs_understand_the_commands_that_they_print() -> Result<()> {
    let mut all = BTreeSet::new();
    for folder in ["fabricd/src", "fabricd/core/src", "fabricd/ctl/src", "cni-shim/src"] {
        let folder = root().join(folder);
        for path in files(".rs")?.into_iter().filter(|path| path.starts_with(&folder)) {
            if path.to_string_lossy().contains("tests") {
                continue;
            }
            for command in printed_commands(&fs::read_to_string(&path)?)? {
                ensure!(is_understood(&command)?, "{}: {command}", path.display());
                all.insert(command);
            }
        }
    }
    ensure!(all.len() > 20, "{all:?}");
    let made_up = printed_commands("let a = \"see: fabricctl pears; or fabricctl lease renumber --force\";")?;
    ensure!(
        made_up == ["fabricctl lease renumber --force", "fabricctl pears"].map(str::to_owned).into(),
        "{made_up:?}"
    );
    Ok(())
}
