//! What the pods of `make e2e` run. One file without a crate, so that it is built in a moment.
//!
//! ```text
//! probe                         does nothing: the process of a sandbox
//! probe serve                   answers each datagram and each line on port 5353, like a name server
//! probe ask udp|tcp ADDR COUNT  asks, each time from a new socket, and prints who answered
//! probe stream ADDR             asks without pause by both until its input ends, and prints what was lost
//! ```

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Result, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const PORT: u16 = 5353;
const PATIENCE: Duration = Duration::from_secs(5);
/// Of a stream: the time from one question to the next.
const PERIOD: Duration = Duration::from_millis(5);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let outcome = match args[..] {
        [] => loop {
            thread::park();
        },
        ["serve"] => serve(),
        ["ask", protocol, address, count] => ask(protocol, address, count),
        ["stream", address] => stream(address),
        _ => {
            eprintln!("probe: serve | ask udp|tcp ADDR COUNT | stream ADDR");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("probe: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Both families, or IPv4 where that is all there is.
fn everywhere() -> [SocketAddr; 2] {
    ["[::]", "0.0.0.0"].map(|ip| format!("{ip}:{PORT}").parse().expect("an address"))
}

/// Who answers and whom it saw: `n2 10.244.1.3`.
fn answer(from: SocketAddr) -> String {
    format!("{} {}\n", std::env::var("NODE").unwrap_or_default(), from.ip().to_canonical())
}

fn serve() -> Result<bool> {
    let listener = TcpListener::bind(&everywhere()[..])?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || converse(&stream));
        }
    });
    let socket = UdpSocket::bind(&everywhere()[..])?;
    let mut question = [0; 512];
    loop {
        let (length, from) = socket.recv_from(&mut question)?;
        let mut reply = question[..length].to_vec();
        reply.extend(answer(from).bytes());
        // One asker who is gone is no reason to end.
        let _ = socket.send_to(&reply, from);
    }
}

fn converse(stream: &TcpStream) -> Result<()> {
    let from = stream.peer_addr()?;
    for line in BufReader::new(stream).lines() {
        line?;
        (&mut &*stream).write_all(answer(from).as_bytes())?;
    }
    Ok(())
}

/// An address with a port, or without: then it is ours.
fn address(text: &str) -> Result<SocketAddr> {
    let ip = text.parse().map(|ip: IpAddr| SocketAddr::new(ip, PORT));
    ip.or_else(|_| text.parse()).map_err(|_| std::io::Error::other(format!("{text} is no address")))
}

fn udp(to: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

fn tcp(to: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn ask_by_udp(socket: &UdpSocket) -> Result<String> {
    socket.send(&[0; 8])?;
    let mut reply = [0; 512];
    let length = socket.recv(&mut reply)?;
    Ok(String::from_utf8_lossy(&reply[8..length]).into_owned())
}

fn ask_by_tcp(stream: &TcpStream) -> Result<String> {
    (&mut &*stream).write_all(b"?\n")?;
    let mut reply = String::new();
    BufReader::new(stream).read_line(&mut reply)?;
    if reply.is_empty() { Err(std::io::Error::other("the connection was closed")) } else { Ok(reply) }
}

fn ask(protocol: &str, to: &str, count: &str) -> Result<bool> {
    let to = address(to)?;
    let mut answers = BTreeSet::new();
    for _ in 0..count.parse().unwrap_or(1) {
        answers.insert(if protocol == "udp" { ask_by_udp(&udp(to)?)? } else { ask_by_tcp(&tcp(to)?)? });
    }
    for answer in answers {
        print!("{answer}");
    }
    Ok(true)
}

fn stream(to: &str) -> Result<bool> {
    static STOP: AtomicBool = AtomicBool::new(false);
    let to = address(to)?;
    let (socket, connection) = (udp(to)?, tcp(to)?);
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    println!("flows");

    let receiver = socket.try_clone()?;
    let received = thread::spawn(move || {
        let (mut numbers, mut reply) = (BTreeSet::new(), [0; 512]);
        let mut last = Instant::now();
        // A second longer than the sender, for what is under way.
        while !STOP.load(Ordering::Relaxed) || last.elapsed() < Duration::from_secs(1) {
            if let Ok(length) = receiver.recv(&mut reply) {
                if let Some(number) = reply[..length].first_chunk() {
                    numbers.insert(u64::from_be_bytes(*number));
                }
                last = Instant::now();
            }
        }
        numbers.len() as u64
    });
    let talk = thread::spawn(move || {
        let mut turns = 0_u64;
        while !STOP.load(Ordering::Relaxed) {
            if let Err(error) = ask_by_tcp(&connection) {
                return (turns, Some(error));
            }
            turns += 1;
            thread::sleep(PERIOD);
        }
        (turns, None)
    });
    thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut vec![]);
        STOP.store(true, Ordering::Relaxed);
    });

    let mut sent = 0_u64;
    while !STOP.load(Ordering::Relaxed) {
        // A refusal of this host's kernel counts as lost.
        let _ = socket.send(&sent.to_be_bytes());
        sent += 1;
        thread::sleep(PERIOD);
    }
    let received = received.join().expect("no panic");
    let (turns, broken) = talk.join().expect("no panic");
    println!(
        "{sent} datagrams, {} lost; {turns} turns on one connection, {}",
        sent - received,
        match &broken {
            None => "unbroken".to_owned(),
            Some(error) => format!("then broken: {error}"),
        }
    );
    Ok(sent == received && broken.is_none())
}
