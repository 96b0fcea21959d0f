//! A real browser, Debian's headless Chromium, driven over a pipe by the DevTools protocol
//! (<https://chromedevtools.github.io/devtools-protocol/>): JSON, each message ended by a NUL.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long the browser may take for one thing.
const PATIENCE: Duration = Duration::from_secs(30);

/// One window. It ends with this value.
pub struct Browser {
    process: Child,
    to: ChildStdin,
    from: Receiver<Value>,
    session: Value,
    last: u64,
    _profile: TempDir,
}

impl Browser {
    /// Opens an empty window of this size, in pixels.
    ///
    /// # Errors
    /// There is no Chromium, or it doesn't speak.
    pub fn open(width: u32, height: u32) -> Result<Self> {
        let profile = tempfile::tempdir()?;
        let quiet = "--no-first-run --disable-background-networking --disable-component-update --disable-sync";
        // The protocol is spoken on descriptors 3 and 4.
        let line = format!(
            "exec chromium-headless-shell --remote-debugging-pipe --no-sandbox --disable-gpu --disable-quic {quiet} \
             --window-size={width},{height} --user-data-dir={} 3<&0 4>&1 0</dev/null 1>/dev/null 2>/dev/null",
            profile.path().display()
        );
        let mut process =
            Command::new("sh").args(["-c", &line]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let to = process.stdin.take().context("a pipe")?;
        let messages = BufReader::new(process.stdout.take().context("a pipe")?).split(0);
        let (tell, from) = channel();
        thread::spawn(move || {
            for message in messages.map_while(Result::ok) {
                let told = serde_json::from_slice(&message).map(|message| tell.send(message));
                if !matches!(told, Ok(Ok(()))) {
                    return;
                }
            }
        });
        let mut browser = Self { process, to, from, session: Value::Null, last: 0, _profile: profile };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }))?;
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        browser.session = browser.call("Target.attachToTarget", attach)?["sessionId"].take();
        Ok(browser)
    }

    /// Goes to an address.
    ///
    /// # Errors
    /// Nothing is there.
    pub fn visit(&mut self, url: &str) -> Result<()> {
        let went = self.call("Page.navigate", json!({ "url": url }))?;
        ensure!(went["errorText"].is_null(), "{url}: {went}");
        Ok(())
    }

    /// The value of an expression of JavaScript on the page.
    ///
    /// # Errors
    /// It throws, or the browser has ended.
    pub fn eval(&mut self, expression: &str) -> Result<Value> {
        let mut said = self.call("Runtime.evaluate", json!({ "expression": expression, "returnByValue": true }))?;
        ensure!(said["exceptionDetails"].is_null(), "{expression}: {}", said["exceptionDetails"]);
        Ok(said["result"]["value"].take())
    }

    /// Prefers `light` or `dark` from now on, as a person would.
    ///
    /// # Errors
    /// The browser has ended.
    pub fn prefer(&mut self, scheme: &str) -> Result<()> {
        let feature = json!({ "name": "prefers-color-scheme", "value": scheme });
        self.call("Emulation.setEmulatedMedia", json!({ "features": [feature] })).map(drop)
    }

    /// The whole page as a picture: PNG in base64.
    ///
    /// # Errors
    /// The browser has ended.
    pub fn picture(&mut self) -> Result<String> {
        let picture = self.call("Page.captureScreenshot", json!({ "captureBeyondViewport": true }))?;
        Ok(picture["data"].as_str().context("a picture")?.to_owned())
    }

    fn call(&mut self, method: &str, params: Value) -> Result<Value> {
        self.last += 1;
        let mut message = json!({ "id": self.last, "method": method, "params": params });
        if !self.session.is_null() {
            message["sessionId"] = self.session.clone();
        }
        let told = "the browser has ended, or was never there: make deps installs chromium-headless-shell";
        self.to.write_all(format!("{message}\0").as_bytes()).context(told)?;
        loop {
            let mut answer = self.from.recv_timeout(PATIENCE).with_context(|| format!("{method}: {told}"))?;
            if answer["id"] == self.last {
                ensure!(answer["error"].is_null(), "{method}: {}", answer["error"]);
                return Ok(answer["result"].take());
            }
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
