//! The command line of `fabricd`: the settings of the daemon, and its commands.

use clap::{Command, CommandFactory as _};

use crate::commands::install_cni::InstallCni;
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
