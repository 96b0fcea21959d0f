//! A kernel without tcx, as those before 6.6 are: BPF_LINK_CREATE answers EINVAL.
//!
//! The kernel below is newer, so a seccomp filter (seccomp(2)) answers in its place: for one thread and all that it starts.
//! So the program under test finds out by itself, as it does on an old kernel.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};

/// `BPF_LINK_CREATE`.
const LINK_CREATE: u32 = 28;
/// Where `struct seccomp_data` has the number of the system call, and the lower half of its first argument.
const NUMBER: u32 = 0;
const FIRST_ARGUMENT: u32 = 16;
/// Of classic BPF: load a word, jump if it is equal, return.
const LOAD: u16 = 0x20;
const JUMP_IF: u16 = 0x15;
const RETURN: u16 = 0x06;
/// `SECCOMP_RET_ERRNO` and `SECCOMP_RET_ALLOW`.
const REFUSE: u32 = 0x0005_0000;
const ALLOW: u32 = 0x7fff_0000;

/// This thread, and all that it starts from now on, has a kernel without tcx.
///
/// # Errors
/// What the system says: it takes root.
#[expect(unsafe_code, reason = "no crate that is linked sets seccomp filters")]
pub fn take_away() -> io::Result<()> {
    let step = |code, k| libc::sock_filter { code, jt: 0, jf: 0, k };
    let bpf = u32::try_from(libc::SYS_bpf).expect("a number of a system call");
    let unless = |k, skipped| libc::sock_filter { code: JUMP_IF, jt: 0, jf: skipped, k };
    let refuse = step(RETURN, REFUSE | libc::EINVAL.cast_unsigned());
    let mut steps = [
        step(LOAD, NUMBER),
        unless(bpf, 3),
        step(LOAD, FIRST_ARGUMENT),
        unless(LINK_CREATE, 1),
        refuse,
        step(RETURN, ALLOW),
    ];
    let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    // SAFETY: the kernel copies the program, which lives until this returns, and writes to nothing.
    match unsafe {
        libc::prctl(libc::PR_SET_SECCOMP, libc::c_ulong::from(libc::SECCOMP_MODE_FILTER), &raw const program)
    } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Becomes another program, which has a kernel without tcx.
///
/// # Errors
/// It takes root, or there is no such program.
pub fn run_without(command: &[OsString]) -> Result<()> {
    let (program, arguments) = command.split_first().context("no command")?;
    take_away().context("cannot set a seccomp filter; is this root?")?;
    Err(Command::new(program).args(arguments).exec()).with_context(|| format!("cannot run {}", program.display()))
}
