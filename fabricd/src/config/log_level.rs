//! [`LogLevel`]: what is logged, and how that is changed while the daemon runs.

use std::io::IsTerminal as _;
use std::sync::{Arc, Mutex, PoisonError};

use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::reload::{self, Handle};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Registry, fmt};

use crate::config::LogFormat;

/// What is logged.
#[derive(Clone, Debug)]
pub struct LogLevel {
    words: Arc<Mutex<String>>,
    filter: Handle<EnvFilter, Registry>,
}

impl LogLevel {
    /// Begins to log, to standard error.
    ///
    /// # Errors
    /// When `level` is none, with an example; or when this process logs already.
    pub fn start(format: LogFormat, level: &str) -> Result<Self, String> {
        let (layer, filter) = reload::Layer::new(parse(level)?);
        let lines = fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
        let lines = match format {
            LogFormat::Text => lines.boxed(),
            LogFormat::Json => lines.json().boxed(),
        };
        tracing_subscriber::registry().with(layer).with(lines).try_init().map_err(|error| error.to_string())?;
        Ok(Self { words: Arc::new(Mutex::new(level.to_owned())), filter })
    }

    /// What is logged, as it was told.
    #[must_use]
    pub fn get(&self) -> String {
        self.words.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Logs this from now on.
    ///
    /// # Errors
    /// When `level` is none, with an example.
    pub fn set(&self, level: &str) -> Result<(), String> {
        self.filter.reload(parse(level)?).map_err(|error| error.to_string())?;
        level.clone_into(&mut self.words.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(())
    }
}

/// A bare level is ours: the libraries below (HTTP/2, gRPC) only have errors to tell, their word for every frame or
/// broken connection drowns the rest.
fn parse(level: &str) -> Result<EnvFilter, String> {
    let directives = if level.contains(['=', ',']) { level.to_owned() } else { format!("error,fabricd={level}") };
    EnvFilter::try_new(directives)
        .map_err(|error| format!("{level:?} is no log level: {error}; as in info or warn,fabricd=debug"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn level_changes_while_running_and_nonsense_changes_nothing() {
        let level = LogLevel::start(LogFormat::Json, "warn").unwrap();
        assert!(!tracing::enabled!(target: "fabricd", tracing::Level::DEBUG));
        level.set("debug").unwrap();
        assert!(tracing::enabled!(target: "fabricd", tracing::Level::DEBUG));
        assert!(!tracing::enabled!(target: "h2", tracing::Level::WARN));
        let error = level.set("loud").unwrap_err();
        assert!(error.starts_with("\"loud\" is no log level"), "{error}");
        assert_eq!(level.get(), "debug");
    }
}
