//! QEMU's monitor: a line of JSON for each command and each answer (QMP, docs/interop/qmp-spec.rst of QEMU).
//!
//! Of the crate `qapi` this would use two functions and none of its thousands of generated types.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// How long an answer or event may take: a device goes when the machine's kernel has let go of it.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to it.
#[derive(Debug)]
pub struct Monitor {
    stream: BufReader<UnixStream>,
}

impl Monitor {
    /// Connects.
    ///
    /// # Errors
    /// The machine is off.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).context("cannot reach QEMU's monitor; is the machine on?")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut monitor = Self { stream: BufReader::new(stream) };
        ensure!(monitor.line()?.get("QMP").is_some(), "QEMU's monitor does not speak QMP");
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Executes a command and returns what it returns.
    ///
    /// # Errors
    /// QEMU refuses.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments });
        writeln!(self.stream.get_mut(), "{line}")?;
        loop {
            let said = self.line()?;
            if let Some(error) = said.get("error") {
                bail!("QEMU refuses {command} {arguments}: {}", error["desc"]);
            }
            if let Some(returned) = said.get("return") {
                return Ok(returned.clone());
            }
        }
    }

    /// Waits for an event.
    ///
    /// # Errors
    /// It doesn't come within a minute.
    pub fn wait_for(&mut self, event: &str) -> Result<()> {
        while self.line().with_context(|| format!("waiting for {event}"))?["event"] != event {}
        Ok(())
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        ensure!(self.stream.read_line(&mut line)? > 0, "QEMU has ended");
        serde_json::from_str(&line).with_context(|| format!("QEMU's monitor says {line:?}"))
    }
}
