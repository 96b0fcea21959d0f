//! The files of settings: TOML with the flags' names, and the `EnvironmentFile` that the packaged service is started with.
//! What they say becomes the flags' defaults, so that clap checks it by the same rules.

use std::path::Path;

use clap::{Arg, ArgAction};

use crate::config::ConfigError;

/// The flags that a file can't set.
const FLAGS_ONLY: [&str; 2] = ["config", "cleanup"];

/// The file's settings become the flags' defaults, so that clap checks them by the same rules.
pub(crate) fn with_file(mut command: clap::Command, file: &Path) -> Result<clap::Command, ConfigError> {
    let text = std::fs::read_to_string(file).map_err(|source| ConfigError::File { file: file.into(), source })?;
    let wrong = |reason: String| ConfigError::Setting { file: file.into(), reason };
    let table: toml::Table = text.parse().map_err(|e: toml::de::Error| wrong(e.to_string()))?;
    for (name, value) in table {
        let settable = |arg: &&Arg| arg.get_id() == name.as_str() && !FLAGS_ONLY.contains(&name.as_str());
        let Some(arg) = command.get_arguments().find(settable) else {
            let known = command.get_arguments().map(|arg| arg.get_id().as_str());
            let known: Vec<&str> =
                known.filter(|id| !FLAGS_ONLY.contains(id) && !["help", "version"].contains(id)).collect();
            return Err(wrong(format!("there is no setting {name:?}; there are {}", known.join(", "))));
        };
        let values = match value {
            toml::Value::Array(_) if !matches!(arg.get_action(), ArgAction::Append) => {
                return Err(wrong(format!("{name} takes one value, not a list")));
            }
            toml::Value::Array(values) => values.into_iter().map(scalar).collect::<Result<Vec<_>, _>>(),
            value => scalar(value).map(|value| vec![value]),
        };
        let values = values.map_err(|kind| wrong(format!("{name} is a {kind}; expected a string")))?;
        command = command.mut_arg(&name, |arg| arg.default_values(values));
    }
    Ok(command)
}

/// The same for variables. Those of other programs are left alone.
pub(crate) fn with_variables(mut command: clap::Command, variables: &[(String, String)]) -> clap::Command {
    for (name, value) in variables {
        let Some(arg) = command.get_arguments().find(|arg| arg.get_id() == name.as_str()) else { continue };
        let values: Vec<String> = match arg.get_value_delimiter() {
            Some(delimiter) => value.split(delimiter).map(str::to_owned).collect(),
            None => vec![value.clone()],
        };
        if !FLAGS_ONLY.contains(&name.as_str()) {
            command = command.mut_arg(name, |arg| arg.default_values(values));
        }
    }
    command
}

/// The `FABRICD_*` variables of an `EnvironmentFile` (systemd.exec(5)) by the settings' names: lines of `NAME=VALUE`, the
/// value quoted or not.
pub(crate) fn variables(text: &str) -> Vec<(String, String)> {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';']));
    let variables = lines.filter_map(|line| line.split_once('=')).filter_map(|(name, value)| {
        let value = value.trim();
        let quoted = |quote| value.strip_prefix(quote).and_then(|value: &str| value.strip_suffix(quote));
        let value = quoted('"').or_else(|| quoted('\'')).unwrap_or(value);
        Some((name.trim().strip_prefix("FABRICD_")?.to_lowercase(), value.to_owned()))
    });
    variables.collect()
}

fn scalar(value: toml::Value) -> Result<String, &'static str> {
    match value {
        toml::Value::String(text) => Ok(text),
        toml::Value::Integer(number) => Ok(number.to_string()),
        toml::Value::Boolean(value) => Ok(value.to_string()),
        other => Err(other.type_str()),
    }
}
