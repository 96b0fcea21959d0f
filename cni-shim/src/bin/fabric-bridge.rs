//! `fabric-bridge`, as a runtime starts it or a conflist names it; `loopback` where it has that name.

use std::path::Path;
use std::process::ExitCode;

use fabric_cni::bridge::loopback;
use fabric_cni::{bridge, process};

fn main() -> ExitCode {
    let called = std::env::args_os().next().unwrap_or_default();
    if Path::new(&called).file_name().is_some_and(|name| name == loopback::NAME) {
        process::serve(loopback::answer)
    } else {
        process::serve(bridge::answer)
    }
}
