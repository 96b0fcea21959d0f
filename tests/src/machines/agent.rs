//! Commands on a machine, by the agent that listens on its virtio console (`agent.sh`): scripts there, exit codes back.

use std::io::{BufRead as _, BufReader, ErrorKind, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// After how long without an answer a script is sent again: the agent runs it once.
const AGAIN: Duration = Duration::from_secs(10);

/// How a script went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its exit code.
    pub code: i32,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
}

/// Runs a script of sh and waits for its end.
///
/// # Errors
/// It doesn't end within `limit`, or the machine goes off meanwhile.
pub fn run(socket: &Path, script: &str, limit: Duration) -> Result<Answer> {
    let stream = UnixStream::connect(socket).context("cannot reach the agent; is the machine on?")?;
    // An answer to an earlier script, whose asker gave up, may come first: ours is known by its number.
    let number = UNIX_EPOCH.elapsed()?.as_nanos().to_string();
    // On a line of its own, whatever is left of one before.
    let question = format!("\n{number} {}\n", STANDARD.encode(format!("set -e\n{script}\n")));
    stream.set_read_timeout(Some(Duration::from_millis(200)))?;
    let (began, mut asked) = (Instant::now(), None::<Instant>);
    let (mut stream, mut line) = (BufReader::new(stream), Vec::new());
    loop {
        if asked.is_none_or(|at| at.elapsed() > AGAIN) {
            stream.get_mut().write_all(question.as_bytes())?;
            asked = Some(Instant::now());
        }
        match stream.read_until(b'\n', &mut line) {
            Ok(_) if line.last() != Some(&b'\n') => bail!("the machine went off"),
            Ok(_) => {
                if let Some(answer) = answer(&String::from_utf8_lossy(&line), &number)? {
                    return Ok(answer);
                }
                line.clear();
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                ensure!(began.elapsed() < limit, "no answer within {limit:?}");
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// `NUMBER CODE STDOUT STDERR .`, if it is the answer with this number.
fn answer(line: &str, number: &str) -> Result<Option<Answer>> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [of, code, stdout, stderr, "."] = words[..] else { return Ok(None) };
    if of != number {
        return Ok(None);
    }
    let decoded = |word: &str| Ok::<_, anyhow::Error>(String::from_utf8_lossy(&STANDARD.decode(word)?).into_owned());
    let text = |word: &str| if word == "-" { Ok(String::new()) } else { decoded(word) };
    Ok(Some(Answer { code: code.parse()?, stdout: text(stdout)?, stderr: text(stderr)? }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_known_by_its_number() -> Result<()> {
        let expected = Answer { code: 3, stdout: "out\n".into(), stderr: String::new() };
        assert_eq!(answer("17 3 b3V0Cg== - .\r\n", "17")?, Some(expected));
        assert_eq!(answer("16 3 b3V0Cg== - .\r\n", "17")?, None);
        assert_eq!(answer("whatever the kernel says\r\n", "17")?, None);
        Ok(())
    }
}
