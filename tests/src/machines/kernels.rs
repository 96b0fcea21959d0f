//! The kernels that machines run: packages of Debian's, fetched by apt into a cache and packed for QEMU (`kernel.sh`).

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, anyhow, ensure};
use nix::fcntl::{Flock, FlockArg};

/// Which there are, where from.
const LIST: &str = include_str!("kernels.txt");

/// A kernel of the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The first two numbers of its version, as `6.1`.
    pub name: String,
    suite: String,
    package: String,
}

impl Kernel {
    /// All of the list, oldest first.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let line = |line: &str| {
            let mut words = line.split('#').next().unwrap_or_default().split_whitespace().map(str::to_owned);
            Some(Self { name: words.next()?, suite: words.next()?, package: words.next()? })
        };
        LIST.lines().filter_map(line).collect()
    }

    /// The one of this name, or the newest by the name `newest`.
    ///
    /// # Errors
    /// The list has none such: the error says which it has.
    pub fn named(name: &str) -> Result<Self> {
        let all = Self::all();
        let names: Vec<&str> = all.iter().map(|kernel| kernel.name.as_str()).collect();
        let unknown = || anyhow!("no kernel {name}; there are: {} (tests/src/machines/kernels.txt)", names.join(" "));
        let found = if name == "newest" { all.last() } else { all.iter().find(|kernel| kernel.name == name) };
        found.cloned().ok_or_else(unknown)
    }

    /// Fetches and packs it, if the cache lacks it: some 30 MB, half a minute. Tells on stdout that it does.
    ///
    /// # Errors
    /// The archive isn't reached, isn't signed by a known key, or has no such package any more.
    pub fn fetch(&self) -> Result<()> {
        fs::create_dir_all(cache()?)?;
        let lock = File::create(cache()?.join(format!("{}.lock", self.name)))?;
        let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
        let mut fetch = Command::new(script("kernel.sh"));
        fetch.arg(self.folder()?).args([&self.suite, &self.package]);
        tells(&mut fetch).with_context(|| format!("cannot fetch the kernel {}", self.name))
    }

    /// What `uname -r` says on it.
    ///
    /// # Errors
    /// It isn't fetched.
    pub fn release(&self) -> Result<String> {
        Ok(fs::read_to_string(self.file("release")?)?.trim().to_owned())
    }

    /// A file of it, as `kernel.sh` names them.
    ///
    /// # Errors
    /// There is no home folder.
    pub fn file(&self, name: &str) -> Result<PathBuf> {
        Ok(self.folder()?.join(name))
    }

    fn folder(&self) -> Result<PathBuf> {
        Ok(cache()?.join(&self.name))
    }
}

/// Where kernels are kept for later runs.
pub(super) fn cache() -> Result<PathBuf> {
    let home = env::var_os("HOME").context("where is the cache? HOME is not set")?;
    Ok(Path::new(&home).join(".cache/fabricd/machines"))
}

/// Runs a script that tells on stdout how far it is. Only errors are kept.
pub(super) fn tells(script: &mut Command) -> Result<()> {
    let running = script.stdin(Stdio::null()).stderr(Stdio::piped()).spawn();
    let output = running.and_then(Child::wait_with_output).with_context(|| format!("{:?}", script.get_program()))?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// A script beside this file.
pub(super) fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/machines").join(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_the_list_is_a_kernel_and_the_last_is_the_newest() {
        let lines = LIST.lines().filter(|line| !line.starts_with('#')).count();
        assert_eq!(Kernel::all().len(), lines);
        assert_eq!(Kernel::named("newest").ok(), Kernel::all().pop());
    }

    #[test]
    fn an_unknown_kernel_is_told_with_those_that_there_are() {
        let told = Kernel::named("2.4").map_err(|error| error.to_string());
        assert!(told.clone().is_err_and(|told| told.contains("no kernel 2.4; there are: 5.10 6.1 ")), "{told:?}");
    }
}
