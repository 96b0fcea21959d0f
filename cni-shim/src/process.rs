//! The process around a plugin: environment and stdin in, one JSON object out.

use std::io::{self, Write};
use std::process::ExitCode;

use serde_json::Value;

use crate::conf::Conf;
use crate::error::CniError;
use crate::request::Request;
use crate::version::SpecVersion;

/// Reads the request, has it answered, and prints the answer.
pub fn serve<C: Conf>(answer: impl FnOnce(&Request<C>) -> Result<Option<Value>, CniError>) -> ExitCode {
    let request = Request::read(|name| std::env::var_os(name), io::stdin().lock());
    // Where nothing tells in which version to answer.
    let version = request.as_ref().map_or(SpecVersion::NEWEST, Request::version);
    match request.and_then(|request| answer(&request)) {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(result)) => print(&result, ExitCode::SUCCESS),
        Err(error) => print(&error.to_json(version), ExitCode::FAILURE),
    }
}

/// Prints what the runtime is to read. A runtime that no longer listens takes this for a failed request.
fn print(json: &Value, code: ExitCode) -> ExitCode {
    match writeln!(io::stdout().lock(), "{json}") {
        Ok(()) => code,
        Err(e) => {
            // Where even stderr is closed nobody is left to be told.
            let _ = writeln!(io::stderr(), "cannot print the answer to stdout: {e}");
            ExitCode::FAILURE
        }
    }
}
