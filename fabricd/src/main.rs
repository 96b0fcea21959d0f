//! `fabricd`: reads the settings, sets up the log, and runs the daemon.

use std::io::IsTerminal as _;
use std::process::ExitCode;

use fabricd::config::{Config, ConfigError, LogFormat};
use fabricd::daemon;
use fabricd::install_cni::InstallCni;
use fabricd::pki::Pki;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    if let Some(install) = InstallCni::asked(std::env::args_os()) {
        return match install.run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&format!("{error:#}")),
        };
    }
    if let Some(pki) = Pki::asked(std::env::args_os()) {
        return match pki.run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&format!("{error:#}")),
        };
    }
    let config = match Config::load(std::env::args_os()) {
        Ok(config) => config,
        Err(ConfigError::Flags(error)) => error.exit(),
        Err(error) => return fail(&error),
    };
    let filter = match EnvFilter::try_new(directives(&config.log_level)) {
        Ok(filter) => filter,
        Err(error) => {
            return fail(&format!("--log-level {}: {error}; as in info or warn,fabricd=debug", config.log_level));
        }
    };
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match config.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    // Two workers are plenty: what takes time is the kernel's work, and that has a thread of its own.
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error),
    };
    let outcome = runtime
        .block_on(async { if config.cleanup { daemon::cleanup(config).await } else { daemon::run(config).await } });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&format!("{error:#}")),
    }
}

/// A bare level is ours: the libraries below (HTTP/2, gRPC) only have errors to tell, their word for every frame or
/// broken connection drowns the rest.
fn directives(level: &str) -> String {
    if level.contains(['=', ',']) { level.to_owned() } else { format!("error,fabricd={level}") }
}

fn fail(error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("fabricd: {error}");
    ExitCode::FAILURE
}
