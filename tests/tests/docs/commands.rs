//! Commands in pages, and those that programs print: the programs understand them, and the namespaces are there.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use fabric_tests::lab::binaries;
use regex::Regex;

use crate::{files, root};

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

/// A file of tests, whatever is above the project's folder.
fn is_test(path: &Path) -> Result<bool> {
    Ok(path.strip_prefix(root())?.to_string_lossy().contains("tests"))
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
        // What a test makes up is a user's.
        if is_test(&file)? {
            continue;
        }
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
            if is_test(&path)? {
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

/// What `--help` lists as commands.
fn subcommands(help: &str) -> Vec<String> {
    let (_, list) = help.split_once("\nCommands:\n").unwrap_or_default();
    let lines = list.lines().take_while(|line| line.starts_with("  "));
    let name = |line: &str| {
        line.strip_prefix("  ").filter(|rest| !rest.starts_with(' '))?.split(' ').next().map(str::to_owned)
    };
    lines.filter_map(name).filter(|name| name != "help").collect()
}

#[test]
fn commands_print_json_and_yaml_but_for_those_that_the_reference_excepts() -> Result<()> {
    let help = |words: &[&str]| -> Result<String> {
        let output = Command::new(binaries::folder()?.join("fabricctl")).args(words).arg("--help").output()?;
        ensure!(output.status.success(), "{words:?}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let mut without = BTreeSet::new();
    for name in subcommands(&help(&[])?) {
        let own = help(&[&name])?;
        let below = subcommands(&own);
        match below.is_empty() {
            true if !own.contains("--output") => drop(without.insert(name)),
            true => {}
            false => {
                for below in below {
                    ensure!(help(&[&name, &below])?.contains("--output"), "{name} {below}");
                }
            }
        }
    }
    let reference = fs::read_to_string(root().join("docs/reference.md"))?;
    let (_, told) = reference.split_once("Every command but ").context("a sentence")?;
    let (told, _) = told.split_once(" takes `-o").context("its end")?;
    let told: BTreeSet<String> = told.split(" and ").map(|name| name.trim_matches('`').to_owned()).collect();
    ensure!(without == told, "without: {without:?}, told: {told:?}");
    Ok(())
}
