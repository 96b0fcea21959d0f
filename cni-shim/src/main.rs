//! The process around the library: environment and stdin in, one JSON object out.

use std::io::{self, Write};
use std::process::ExitCode;

use fabric_cni::exec::{DEADLINE, Processes};
use fabric_cni::request::Request;
use fabric_cni::verbs::answer;
use fabric_cni::version::SpecVersion;
use serde_json::Value;

fn main() -> ExitCode {
    let request = Request::read(|name| std::env::var_os(name), io::stdin().lock());
    // A request that can't be read doesn't say in which version to answer.
    let version = request.as_ref().map_or(SpecVersion::NEWEST, Request::version);
    match request.and_then(|request| answer(&request, &Processes { deadline: DEADLINE })) {
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
            let _ = writeln!(io::stderr(), "fabric-cni: cannot print the answer to stdout: {e}");
            ExitCode::FAILURE
        }
    }
}
