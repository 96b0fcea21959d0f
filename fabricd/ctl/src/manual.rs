//! Manual pages and completions, of `fabricctl` and of `fabricd`: made from what `--help` says.

use std::fs;
use std::path::Path;

use anyhow::Context as _;
use clap::{Command, CommandFactory as _, ValueEnum};
use clap_complete::Shell;
use clap_mangen::Man;
use fabricd::command_line::command_line;

use crate::{Answer, Cli};

/// One of the programs.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Program {
    /// The command line tool.
    Fabricctl,
    /// The daemon.
    Fabricd,
}

impl Program {
    fn command(self) -> Command {
        match self {
            Self::Fabricctl => Cli::command(),
            Self::Fabricd => command_line(),
        }
    }

    /// That of its pages: commands for everybody, and for administrators (man(1)).
    fn section(self) -> &'static str {
        match self {
            Self::Fabricctl => "1",
            Self::Fabricd => "8",
        }
    }
}

/// The completion of a program for a shell.
pub fn completion(program: Program, shell: Shell) -> Answer {
    let mut command = program.command();
    let name = command.get_name().to_owned();
    let mut script = vec![];
    clap_complete::generate(shell, &mut command, name, &mut script);
    Answer::fine(String::from_utf8_lossy(&script).into_owned())
}

/// Writes the pages of both programs, one for each command, into `man1` and `man8` of a folder.
pub fn write(folder: &Path) -> anyhow::Result<Answer> {
    for program in [Program::Fabricctl, Program::Fabricd] {
        let folder = folder.join(format!("man{}", program.section()));
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let mut command = program.command().disable_help_subcommand(true);
        command.build();
        pages(&command, command.get_name(), program, &folder)?;
    }
    Ok(Answer::fine(String::new()))
}

fn pages(command: &Command, name: &str, program: Program, folder: &Path) -> anyhow::Result<()> {
    let page = Man::new(command.clone().name(name.to_owned())).section(program.section()).source("fabricd");
    let file = folder.join(format!("{name}.{}", program.section()));
    let mut text = vec![];
    page.render(&mut text)?;
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
        pages(below, &format!("{name}-{}", below.get_name()), program, folder)?;
    }
    Ok(())
}
