//! A fresh network namespace for a test: made by a thread of its own, gone with it.

use std::future::Future;
use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, unshare};

/// Runs `test` in a network namespace that holds nothing but a loopback interface, which is up. Processes and threads
/// started in it live there too; the namespace goes with the last of them.
///
/// # Panics
/// When a namespace can't be made (it takes root): a privileged test that can't run has failed. Or when `test` does.
pub fn in_netns<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    let in_namespace = || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace of its own; is this root?");
        ip("link set lo up");
        test()
    };
    thread::scope(|scope| scope.spawn(in_namespace).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// As [`in_netns`], for an async test: on a runtime whose threads are all in the namespace.
///
/// # Panics
/// As [`in_netns`], or when no runtime can be made.
pub fn in_netns_async<T: Send, F: Future<Output = T>>(test: impl FnOnce() -> F + Send) -> T {
    in_netns(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(test())
    })
}

/// Runs `ip ARGUMENTS` in the namespace of this thread; words are split at white space.
///
/// # Panics
/// When it fails.
pub fn ip(arguments: &str) -> String {
    run("ip", arguments)
}

/// Runs `command ARGUMENTS` in the namespace of this thread and returns what it printed.
///
/// # Panics
/// When it fails.
pub fn run(command: &str, arguments: &str) -> String {
    let output = Command::new(command).args(arguments.split_whitespace()).output();
    let output = output.unwrap_or_else(|error| panic!("{command}: {error}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command} {arguments}: {stderr}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
