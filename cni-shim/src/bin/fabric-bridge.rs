//! `fabric-bridge`, as a runtime starts it or a conflist names it.

use std::process::ExitCode;

use fabric_cni::{bridge, process};

fn main() -> ExitCode {
    process::serve(bridge::answer)
}
