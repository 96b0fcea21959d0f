//! Output formats.

use std::io::IsTerminal as _;

use clap::{Args, ValueEnum};
use serde::Serialize;

/// The output format.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct OutputArg {
    /// Output format
    #[arg(short, long, default_value = "table")]
    pub output: Output,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Text, cut to the terminal's width.
    #[default]
    Table,
    /// Text, not cut.
    Wide,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
}

impl Output {
    /// Whether it is for programs.
    pub fn is_data(self) -> bool {
        matches!(self, Self::Json | Self::Yaml)
    }

    /// `value` in this format; `table` makes the text, for a terminal of the given width.
    pub fn show<T: Serialize>(self, value: &T, table: impl FnOnce(&Screen) -> String) -> anyhow::Result<String> {
        Ok(match self {
            Self::Table => table(&Screen::stdout()),
            Self::Wide => table(&Screen { width: None, ..Screen::stdout() }),
            Self::Json => serde_json::to_string_pretty(value)? + "\n",
            Self::Yaml => serde_saphyr::to_string(value)?,
        })
    }

    /// One of many values that are printed as they come: a line, or in YAML a document.
    pub fn show_next<T: Serialize>(self, value: &T, line: impl FnOnce(&Screen) -> String) -> anyhow::Result<String> {
        Ok(match self {
            Self::Json => serde_json::to_string(value)? + "\n",
            Self::Yaml => format!("---\n{}", serde_saphyr::to_string(value)?),
            Self::Table | Self::Wide => self.show(value, line)?,
        })
    }
}

/// What is printed on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Screen {
    /// How many characters a line has; any number when it is no terminal.
    pub width: Option<usize>,
    /// Whether colours are understood.
    pub colour: bool,
}

impl Screen {
    /// Standard output. `NO_COLOR` (no-color.org) is respected, and `COLUMNS` where it is no terminal.
    pub fn stdout() -> Self {
        if !std::io::stdout().is_terminal() {
            let columns = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
            return Self { width: columns.filter(|width| *width > 0), colour: false };
        }
        let width = rustix::termios::tcgetwinsize(std::io::stdout()).ok().map(|size| usize::from(size.ws_col));
        let colour = std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty());
        Self { width: width.filter(|width| *width > 0), colour }
    }

    /// `text` in the colour of `severity`.
    pub fn paint(&self, text: &str, severity: Severity) -> String {
        let code = match severity {
            Severity::Good => 32,
            Severity::Doubtful => 33,
            Severity::Bad => 31,
            Severity::Plain => return text.to_owned(),
        };
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// What a word means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Severity {
    /// Nothing in particular.
    #[default]
    Plain,
    /// All is well.
    Good,
    /// Needs attention.
    Doubtful,
    /// Broken.
    Bad,
}
