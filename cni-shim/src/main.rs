//! `fabric-cni`, as a runtime starts it.

use std::process::ExitCode;

use fabric_cni::exec::{DEADLINE, Processes};
use fabric_cni::process::serve;
use fabric_cni::verbs::answer;

fn main() -> ExitCode {
    serve(|request| answer(request, &Processes { deadline: DEADLINE }))
}
