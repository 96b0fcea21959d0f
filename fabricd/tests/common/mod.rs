//! A command of `fabricd` that stays, as a container beside the daemon runs it.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Generous: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// It runs; killed at the latest when this is dropped.
pub struct Stays(Child);

impl Stays {
    /// Starts `fabricd` with these words, and these flags for paths.
    pub fn start(words: &[&str], paths: &[(&str, PathBuf)]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fabricd"));
        command.args(words).stdout(Stdio::null());
        for (flag, path) in paths {
            command.arg(flag).arg(path);
        }
        Self(command.spawn().expect("started"))
    }

    /// Tells it to end, and waits until it has, in good order.
    pub fn terminate(mut self) {
        kill(Pid::from_raw(i32::try_from(self.0.id()).expect("a pid")), Signal::SIGTERM).expect("it runs");
        assert!(self.0.wait().expect("waited for").success());
    }
}

impl Drop for Stays {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until `holds` is true.
pub fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what} never came true");
        #[expect(clippy::disallowed_methods, reason = "between two looks")]
        thread::sleep(Duration::from_millis(20));
    }
}
