//! `fabricd`: reads the settings, sets up the log, and runs the daemon.

use std::process::ExitCode;

use fabricd::command_line::command_line;
use fabricd::commands::cleanup::cleanup;
use fabricd::commands::install_cni::InstallCni;
use fabricd::config::log_level::LogLevel;
use fabricd::config::{Config, ConfigError};
use fabricd::daemon;
use fabricd::errors::chain;
use fabricd::pki::Pki;
use fabricd::takeover::TakeoverArgs;

fn main() -> ExitCode {
    if let Some(install) = InstallCni::asked(std::env::args_os()) {
        return match install.run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&chain(&error)),
        };
    }
    if let Some(pki) = Pki::asked(std::env::args_os()) {
        return match pki.run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&chain(&error)),
        };
    }
    if let Some((takeover, direction)) = TakeoverArgs::asked(std::env::args_os()) {
        return match takeover.run(direction) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&chain(&error)),
        };
    }
    let config = match Config::load(command_line(), std::env::args_os()) {
        Ok(config) => config,
        Err(ConfigError::Flags(error)) => error.exit(),
        Err(error) => return fail(&error),
    };
    let log_level = match LogLevel::start(config.log_format, &config.log_level) {
        Ok(level) => level,
        Err(error) => return fail(&format!("--log-level: {error}")),
    };
    // One thread is plenty, and the least memory: what takes time is the kernel's work, and that has threads of its own.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error),
    };
    let outcome = runtime
        .block_on(async { if config.cleanup { cleanup(config).await } else { daemon::run(config, log_level).await } });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&chain(&error)),
    }
}

fn fail(error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("fabricd: {error}");
    ExitCode::FAILURE
}
