//! What `fabricd` does besides being the daemon: each a run that ends, or stays beside the daemon in a container of its own.

pub mod cleanup;
pub mod conflists;
pub mod install_cni;
pub mod leftovers;
pub mod stay;

use clap::{Command, CommandFactory as _};

use self::install_cni::InstallCni;
use crate::config::Config;
use crate::pki::Pki;
use crate::takeover::TakeoverArgs;

/// The daemon's own settings, beside the commands that `fabricd` has too: those are asked for by the first word alone,
/// before this, and stand here for `--help` and `help`.
#[must_use]
pub fn command_line() -> Command {
    let [takeover, giveback] = TakeoverArgs::commands();
    let commands = [Pki::command(), InstallCni::command(), takeover, giveback];
    Config::command().subcommands(commands).args_conflicts_with_subcommands(true)
}
