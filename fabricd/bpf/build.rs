//! Compiles the programs in `c/` for the kernel's eBPF, by clang.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

/// `CLANG` names another than the first in PATH.
const COMPILER: &str = "CLANG";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=c");
    println!("cargo::rerun-if-env-changed={COMPILER}");
    let object = PathBuf::from(env::var("OUT_DIR")?).join("fabric.o");
    let clang = env::var(COMPILER).unwrap_or_else(|_| "clang".to_owned());
    let mut compile = Command::new(&clang);
    // Of the fourth version of the instructions (kernel 6.6) nothing is needed.
    compile.args(["-target", "bpf", "-mcpu=v3", "-O2", "-std=gnu11", "-fno-strict-aliasing", "-fno-ident"]);
    compile.args(["-Wall", "-Wextra", "-Werror", "-c", "c/fabric.c", "-o"]).arg(&object);
    // Debian has <asm/types.h> by architecture; for eBPF clang looks in none of them. They are all the same.
    let headers = format!("/usr/include/{}-linux-gnu", env::consts::ARCH);
    if Path::new(&headers).is_dir() {
        compile.args(["-idirafter", &headers]);
    }
    let said = match compile.output() {
        Ok(said) => said,
        Err(error) => {
            return Err(format!("cannot run {clang}: {error}; it compiles the eBPF programs: {INSTALL}").into());
        }
    };
    match said.status.success() {
        true => Ok(()),
        false => {
            let words = String::from_utf8_lossy(&said.stderr);
            Err(format!("{clang} does not compile c/fabric.c; version 14 or later does: {INSTALL}\n{words}").into())
        }
    }
}

/// What to do where there is no clang, or none that does.
const INSTALL: &str = "apt install clang, dnf install clang, or CLANG=/path/to/clang";
