//! What was shown on which kernel, and the paths that fabricd took there.
//!
//! Tests note it in `target/debug/machines.json` as they pass. `machines record` keeps that beside this file, as `record.json`, and
//! renders it into docs/kernels.md.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::beside_programs;
use super::kernels::{Kernel, script};

/// Where the page has what is rendered.
const BEGIN: &str = "<!-- recorded by make test-machines, rendered by make kernels -->\n";
const END: &str = "<!-- the end of what is recorded -->\n";

/// Every kernel, by its name in `kernels.txt`.
pub type Record = BTreeMap<String, Seen>;

/// What was seen on one kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Seen {
    /// Debian's package, and its version.
    pub package: String,
    /// By what IPv4 peers are routed to.
    pub routes: String,
    /// Where the programs of `--fast-path=on` are attached, or why there are none.
    pub fast_path: String,
    /// The tables of the packet filter.
    pub packet_filter: String,
    /// Modules of the kernel that take part.
    pub modules: BTreeSet<String>,
    /// The functions, in `tests/tests/machines`, whose name is what was shown.
    pub shown: BTreeSet<String>,
}

/// Adds to what is noted of a kernel.
///
/// # Errors
/// The file can't be read or written, or the kernel isn't fetched.
pub fn note(kernel: &Kernel, change: impl FnOnce(&mut Seen)) -> Result<()> {
    let file = noted()?;
    let lock = File::create(file.with_extension("lock"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    let mut record = if file.exists() { read(&file)? } else { Record::new() };
    let seen = record.entry(kernel.name.clone()).or_default();
    fs::read_to_string(kernel.file("package")?)?.trim().clone_into(&mut seen.package);
    change(seen);
    fs::write(file, serde_json::to_string_pretty(&record)? + "\n")?;
    Ok(())
}

/// Keeps what tests have noted, and renders it into the page.
///
/// # Errors
/// Nothing is noted of a kernel of the list, or a file can't be written.
pub fn keep() -> Result<()> {
    let noted = noted()?;
    let record = read(&noted).context("nothing is noted: run `make test-machines`")?;
    for Kernel { name, .. } in Kernel::all() {
        ensure!(record.contains_key(&name), "nothing was run on {name}: run `make test-machines`");
    }
    fs::copy(noted, script("record.json"))?;
    fs::write(page(), in_page(&fs::read_to_string(page())?, &record)?)?;
    Ok(())
}

/// What tests have noted since the file was removed.
fn noted() -> Result<PathBuf> {
    beside_programs("machines.json")
}

fn page() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/kernels.md")
}

fn read(file: &Path) -> Result<Record> {
    let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
    serde_json::from_str(&text).with_context(|| file.display().to_string())
}

/// The page with this record in place of what it has.
fn in_page(page: &str, record: &Record) -> Result<String> {
    let (head, rest) = page.split_once(BEGIN).context("docs/kernels.md has no place for what is recorded")?;
    let (_, tail) = rest.split_once(END).context("docs/kernels.md has no end of what is recorded")?;
    Ok(format!("{head}{BEGIN}\n{}\n{END}{tail}", rendered(record)))
}

/// Two tables with a column for each kernel: paths, and what was shown.
fn rendered(record: &Record) -> String {
    let kernels: Vec<(Kernel, Seen)> = Kernel::all()
        .into_iter()
        .map(|kernel| (kernel.clone(), record.get(&kernel.name).cloned().unwrap_or_default()))
        .collect();
    let row = |head: &str, cell: &dyn Fn(&Kernel, &Seen) -> String| {
        let cells: Vec<String> = kernels.iter().map(|(kernel, seen)| cell(kernel, seen)).collect();
        format!("| {head} | {} |\n", cells.join(" | "))
    };
    let names = |head| row(head, &|kernel, _| kernel.name.clone()) + &"|---".repeat(kernels.len() + 1) + "|\n";
    let paths = [
        names("kernel"),
        row("Debian's package", &|_, seen| seen.package.replacen(' ', "<br>", 1)),
        row("IPv4 routes", &|_, seen| seen.routes.clone()),
        row("fast path, when it is on", &|_, seen| seen.fast_path.clone()),
        row("packet filter", &|_, seen| seen.packet_filter.clone()),
        row("modules loaded", &|_, seen| seen.modules.iter().cloned().collect::<Vec<_>>().join(" ")),
    ];
    let all: BTreeSet<&String> = kernels.iter().flat_map(|(_, seen)| &seen.shown).collect();
    let shown = all.into_iter().map(|name| {
        row(&name.replace('_', " "), &|_, seen| if seen.shown.contains(name) { "yes" } else { "" }.to_owned())
    });
    format!("{}\n{}{}", paths.concat(), names("shown"), shown.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn committed() -> Result<Record> {
        read(&script("record.json"))
    }

    #[test]
    fn the_page_shows_what_is_recorded() -> Result<()> {
        let page = fs::read_to_string(page())?;
        assert!(in_page(&page, &committed()?)? == page, "docs/kernels.md is not what is recorded: run `make kernels`");
        Ok(())
    }

    #[test]
    fn every_kernel_of_the_list_is_recorded_with_its_paths_and_no_other() -> Result<()> {
        let record = committed()?;
        let names: BTreeSet<&String> = record.keys().collect();
        let list = Kernel::all();
        assert_eq!(names, list.iter().map(|kernel| &kernel.name).collect());
        for (name, seen) in &record {
            let paths = [&seen.package, &seen.routes, &seen.fast_path, &seen.packet_filter];
            assert!(paths.iter().all(|path| !path.is_empty()) && !seen.modules.is_empty(), "{name}: {seen:?}");
        }
        Ok(())
    }

    #[test]
    fn all_that_is_recorded_as_shown_is_a_function_of_the_tests() -> Result<()> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/machines");
        let sources =
            fs::read_dir(folder)?.map(|file| Ok(fs::read_to_string(file?.path())?)).collect::<Result<String>>()?;
        for name in committed()?.values().flat_map(|seen| &seen.shown) {
            assert!(sources.contains(&format!("fn {name}(")), "no test shows that {name}: run `make test-machines`");
        }
        Ok(())
    }

    #[test]
    fn what_is_recorded_replaces_what_the_page_has() -> Result<()> {
        let shown = |name: &str| Seen { shown: [name.to_owned()].into(), ..Seen::default() };
        let record = [("5.10".to_owned(), shown("it_runs")), ("6.1".to_owned(), shown("it_runs"))].into();
        let page = in_page(&format!("before\n{BEGIN}old\n{END}after\n"), &record)?;
        assert!(page.starts_with("before\n") && page.ends_with("after\n") && !page.contains("old"), "{page}");
        assert!(page.contains("| it runs | yes | yes |  |  |\n"), "{page}");
        assert!(in_page("no marks", &record).is_err());
        Ok(())
    }
}
