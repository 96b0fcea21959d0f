//! TCP connections, DNS queries, and what a test pod of a cluster runs: `fabricctl probe`.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs as _, UdpSocket};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Subcommand;
use serde::{Deserialize, Serialize};

use super::Step;
use crate::Answer;

/// How long is waited between two tries.
const PAUSE: Duration = Duration::from_millis(200);
/// The port of DNS.
const DNS: u16 = 53;

/// What a test pod runs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Tell everybody who connects a name
    Serve {
        /// The name
        #[arg(long)]
        name: String,
        /// Addresses to listen on
        #[arg(long, value_delimiter = ',', required = true)]
        listen: Vec<IpAddr>,
        /// TCP port
        #[arg(long)]
        port: u16,
    },
    /// Try what a plan says, and report in JSON
    Run {
        /// The plan, in JSON
        #[arg(long)]
        plan: String,
        /// File for the report, besides standard output
        #[arg(long)]
        report: Option<PathBuf>,
    },
}

/// What a test pod tries.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Plan {
    /// The node that it runs on.
    pub from: String,
    /// Seconds that a step may take.
    pub timeout: u64,
    /// Servers to connect to.
    pub servers: Vec<Server>,
    /// Name to look up.
    pub dns: Option<String>,
    /// Host and port outside to connect to.
    pub outside: Option<String>,
}

/// A server to connect to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Server {
    /// What is tested by it.
    pub step: String,
    /// Where it listens.
    pub at: String,
    /// The name that it has to tell; any, if it is empty.
    pub name: String,
}

/// Runs one of the commands.
///
/// # Errors
/// It can't listen, or the report can't be written.
pub fn run(command: Command) -> anyhow::Result<Answer> {
    match command {
        Command::Serve { name, listen, port } => serve(&name, &listen, port),
        Command::Run { plan, report } => {
            let plan: Plan = serde_json::from_str(&plan).context("the plan is none")?;
            let steps = serde_json::to_string(&carry_out(&plan))?;
            if let Some(file) = report {
                std::fs::write(&file, &steps).with_context(|| format!("cannot write {}", file.display()))?;
            }
            Ok(Answer::fine(steps + "\n"))
        }
    }
}

fn serve(name: &str, listen: &[IpAddr], port: u16) -> anyhow::Result<Answer> {
    let bind =
        |ip: &IpAddr| TcpListener::bind((*ip, port)).with_context(|| format!("cannot listen on {ip}, port {port}"));
    let listeners = listen.iter().map(bind).collect::<anyhow::Result<Vec<_>>>()?;
    thread::scope(|scope| {
        for listener in &listeners {
            scope.spawn(move || {
                // Who has gone again has not lost anything.
                listener.incoming().flatten().for_each(|mut client| drop(writeln!(client, "{name}")));
            });
        }
    });
    bail!("no connections can be taken any more")
}

fn carry_out(plan: &Plan) -> Vec<Step> {
    let patience = Duration::from_secs(plan.timeout);
    let mut steps = vec![];
    for Server { step, at, name } in &plan.servers {
        steps.push(Step::new(step, at, until(patience, || hear(at, name, patience))));
    }
    if let Some(name) = &plan.dns {
        steps.push(Step::new("dns", name, until(patience, || resolve(name))));
    }
    if let Some(outside) = &plan.outside {
        steps.push(Step::new("outside", outside, connect(outside, patience).map(|(_, took)| millis(took))));
    }
    steps.iter_mut().for_each(|step| step.from.clone_from(&plan.from));
    steps
}

/// Tries again: a server, a Service or a record may need a moment.
fn until(patience: Duration, attempt: impl Fn() -> Result<String, String>) -> Result<String, String> {
    let begin = Instant::now();
    loop {
        let outcome = attempt();
        if outcome.is_ok() || begin.elapsed() >= patience {
            return outcome;
        }
        #[expect(clippy::disallowed_methods, reason = "the pod that probes does nothing else meanwhile")]
        thread::sleep(PAUSE);
    }
}

/// Connects to a server, and hears its name.
fn hear(at: &str, name: &str, patience: Duration) -> Result<String, String> {
    let (stream, took) = connect(at, patience)?;
    stream.set_read_timeout(Some(patience)).map_err(|error| error.to_string())?;
    let mut told = String::new();
    let heard = BufReader::new(stream).read_line(&mut told);
    heard.map_err(|error| format!("connected, and nothing came: {}", reason(&error, patience)))?;
    match told.trim_end() {
        told if name.is_empty() || told == name => Ok(format!("{}, answered by {told}", millis(took))),
        told => Err(format!("answered by {told:?} instead of {name}: two pods with one address?")),
    }
}

/// Connects by TCP from the namespace of this thread, and tells how long that took.
pub(super) fn connect(at: &str, patience: Duration) -> Result<(TcpStream, Duration), String> {
    let address = at.to_socket_addrs().map_err(|error| format!("cannot look it up: {error}"))?.next();
    let address = address.ok_or_else(|| "the name has no address".to_owned())?;
    let begin = Instant::now();
    let stream = TcpStream::connect_timeout(&address, patience).map_err(|error| reason(&error, patience))?;
    Ok((stream, begin.elapsed()))
}

fn reason(error: &std::io::Error, patience: Duration) -> String {
    match error.kind() {
        std::io::ErrorKind::TimedOut | std::io::ErrorKind::WouldBlock => {
            format!("no answer in {} s", patience.as_secs())
        }
        std::io::ErrorKind::ConnectionRefused => "connection refused, by it or by a firewall".into(),
        std::io::ErrorKind::NetworkUnreachable | std::io::ErrorKind::HostUnreachable => {
            "there is no route, or a router refused".into()
        }
        _ => format!("cannot connect: {error}"),
    }
}

/// Looks a name up as every program of the pod does.
fn resolve(name: &str) -> Result<String, String> {
    let begin = Instant::now();
    let found = (name, 0).to_socket_addrs().map_err(|error| format!("cannot look it up: {error}"))?;
    let found: Vec<String> = found.map(|address| address.ip().to_string()).collect();
    if found.is_empty() {
        Err("the name has no address".into())
    } else {
        Ok(format!("{} in {}", found.join(" "), millis(begin.elapsed())))
    }
}

/// Asks a DNS server for the IPv4 addresses of a name (RFC 1035), from the namespace of this thread. Gives the code of the
/// answer, in words.
pub(super) fn query(server: IpAddr, name: &str, patience: Duration) -> Result<(&'static str, Duration), String> {
    let question = question(name)?;
    let local: SocketAddr = (if server.is_ipv4() { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) }, 0).into();
    let socket = UdpSocket::bind(local).map_err(|error| format!("cannot open a socket: {error}"))?;
    let each = patience / 2;
    socket.set_read_timeout(Some(each)).map_err(|error| error.to_string())?;
    let mut last = String::new();
    // A single lost packet is no finding.
    for _ in 0..2 {
        let begin = Instant::now();
        let mut answer = [0; 512];
        let exchange =
            socket.connect((server, DNS)).and_then(|()| socket.send(&question)).and_then(|_| socket.recv(&mut answer));
        match exchange {
            Ok(4..) if answer[..2] == question[..2] && answer[2] >= 128 => {
                return Ok((code(answer[3] & 15), begin.elapsed()));
            }
            Ok(_) => "what came is no answer".clone_into(&mut last),
            Err(error) => last = reason(&error, patience),
        }
    }
    Err(last)
}

fn question(name: &str) -> Result<Vec<u8>, String> {
    // An id that nobody else has, recursion wanted, one question.
    let mut packet = vec![0x5f, u8::try_from(std::process::id() % 256).unwrap_or(1), 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.trim_end_matches('.').split('.') {
        let length = u8::try_from(label.len()).ok().filter(|length| (1..64).contains(length));
        packet.push(length.ok_or_else(|| format!("{name:?} is no name"))?);
        packet.extend(label.as_bytes());
    }
    packet.extend([0, 0, 1, 0, 1]);
    Ok(packet)
}

fn code(code: u8) -> &'static str {
    match code {
        0 => "NOERROR",
        2 => "SERVFAIL",
        3 => "NXDOMAIN",
        5 => "REFUSED",
        _ => "an error",
    }
}

/// A time as people read it.
pub(super) fn millis(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test::Outcome;

    #[test]
    fn plan_is_carried_out_against_a_server_that_tells_its_name() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap().to_string();
        thread::spawn(move || listener.incoming().flatten().for_each(|mut client| drop(writeln!(client, "n2"))));
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let server = |step: &str, at: &str, name: &str| Server { step: step.into(), at: at.into(), name: name.into() };
        let plan = Plan {
            from: "n1".into(),
            timeout: 1,
            servers: vec![
                server("pod", &at, "n2"),
                server("service", &at, ""),
                server("pod", &at, "n3"),
                server("pod", &closed, "n4"),
            ],
            dns: Some("localhost".into()),
            outside: Some(at.clone()),
        };
        let steps = carry_out(&serde_json::from_str(&serde_json::to_string(&plan).unwrap()).unwrap());
        let results: Vec<_> = steps.iter().map(|step| step.result).collect();
        let (ok, failed) = (Outcome::Ok, Outcome::Failed);
        assert_eq!(results, [ok, ok, failed, failed, ok, ok], "{steps:?}");
        assert!(steps[2].detail.contains("instead of n3") && steps[3].detail.contains("refused"), "{steps:?}");
    }

    #[test]
    fn question_is_what_a_server_understands() {
        let packet = question("example.com").unwrap();
        assert_eq!(&packet[12..], b"\x07example\x03com\x00\x00\x01\x00\x01");
        assert!(question("a..b").is_err() && question("").is_err());
    }
}
