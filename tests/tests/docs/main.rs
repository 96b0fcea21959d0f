//! The documentation leads somewhere: links, headings, the pages and files that text and programs name, and the commands that
//! both give.

mod commands;
mod imports;
mod named;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
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

/// The pages for users and operators, with their names.
fn pages() -> Result<Vec<(String, String)>> {
    let mut pages = vec![root().join("README.md"), root().join("deploy/helm/fabricd/README.md")];
    for page in fs::read_dir(root().join("docs"))? {
        pages.push(page?.path());
    }
    let pages = pages.into_iter().filter(|page| page.extension().is_some_and(|end| end == "md"));
    pages.map(|page| Ok((page.display().to_string(), fs::read_to_string(&page)?))).collect()
}
