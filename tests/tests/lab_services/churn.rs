//! Streams and new connections, while endpoints change up to a hundred times a second and the daemon is killed at any moment.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use fabric_core::model::Family;
use fabric_tests::lab::spaces::Spaces;
use fabric_tests::lab::{By, ask, wait_until};
use fabric_tests::services::{V1, slices_of};
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::json;

use crate::{Cluster, SOON, answered_by, at, vip};

/// As many changes of endpoints are made, a hundred in a second where the machine keeps up.
const CHANGES: u32 = 600;
const BETWEEN: Duration = Duration::from_millis(10);
/// Room for thousands of datagrams, so that a busy machine loses none in a socket.
const BUFFER: usize = 4 << 20;
/// How long the last answers may be under way.
const PATIENCE: Duration = Duration::from_secs(5);

/// The port at which pods answer datagrams by their name and the datagram.
const ECHO: u16 = 7;

/// Ends when it is dropped.
struct Running(Arc<AtomicBool>, Vec<JoinHandle<()>>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        self.1.drain(..).for_each(|thread| drop(thread.join()));
    }
}

fn udp(place: &Spaces, at: SocketAddr) -> Result<UdpSocket> {
    let socket = place.run(|| Ok(UdpSocket::bind(at)?))?;
    setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    Ok(socket)
}

fn is_silence(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// Answers datagrams in a pod.
fn echo(place: &Spaces, name: &'static str, at: SocketAddr) -> Result<Running> {
    let (socket, end) = (udp(place, at)?, Arc::new(AtomicBool::new(false)));
    let ended = Arc::clone(&end);
    let thread = thread::spawn(move || {
        let mut buffer = [0; 64];
        while !ended.load(Ordering::Relaxed) {
            let Ok((length, client)) = socket.recv_from(&mut buffer) else { continue };
            // A client that is gone needs no answer.
            let _ = socket.send_to(&[name.as_bytes(), &buffer[..length]].concat(), client);
        }
    });
    Ok(Running(end, vec![thread]))
}

/// A thousand numbered datagrams a second from one port, until it is told to end; says how many were sent.
fn stream(
    place: &Spaces,
    target: SocketAddr,
    only: &'static str,
    end: &Arc<AtomicBool>,
) -> Result<JoinHandle<Result<u64>>> {
    let any: IpAddr = if target.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
    let socket = udp(place, (any, 0).into())?;
    place.run(|| Ok(socket.connect(target)?))?;
    let (sender, end) = (socket.try_clone()?, Arc::clone(end));
    let sent = thread::spawn(move || -> Result<u64> {
        let began = Instant::now();
        let mut sent = 0_u64;
        while !end.load(Ordering::Relaxed) {
            if u128::from(sent) > began.elapsed().as_millis() {
                thread::sleep(Duration::from_millis(1));
                continue;
            }
            sender.send(format!(" {sent}").as_bytes())?;
            sent += 1;
        }
        Ok(sent)
    });
    Ok(thread::spawn(move || {
        let (mut answered, mut buffer, mut last) = (HashSet::new(), [0; 64], Instant::now());
        loop {
            let is_over = sent.is_finished();
            match socket.recv(&mut buffer) {
                Ok(length) => {
                    let answer = String::from_utf8_lossy(&buffer[..length]).into_owned();
                    let number = answer.strip_prefix(only).map(str::to_owned);
                    ensure!(number.is_some_and(|number| answered.insert(number)), "{target}: {answer:?}");
                    last = Instant::now();
                }
                Err(error) if is_silence(&error) && (!is_over || last.elapsed() < PATIENCE) => {}
                Err(error) if is_silence(&error) => break,
                Err(error) => return Err(error.into()),
            }
        }
        let sent = sent.join().expect("the sender ends")?;
        ensure!(answered.len() as u64 == sent, "{target}: {} of {sent} datagrams were answered", answered.len());
        Ok(sent)
    }))
}

/// Whether a datagram is answered.
fn is_answered(place: &Spaces, target: SocketAddr) -> Result<()> {
    let any: IpAddr = if target.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
    let socket = udp(place, (any, 0).into())?;
    place.run(|| Ok(socket.connect(target)?))?;
    socket.send(b" first")?;
    socket.recv(&mut [0; 64])?;
    Ok(())
}

/// One connection after the other, each answered by one of these, until it is told to end; says how many there were.
fn connect(
    place: Spaces,
    target: SocketAddr,
    among: [&'static str; 2],
    end: &Arc<AtomicBool>,
) -> JoinHandle<Result<u64>> {
    let end = Arc::clone(end);
    thread::spawn(move || {
        let mut connections = 0;
        while !end.load(Ordering::Relaxed) {
            let answer = ask(&place, By::Tcp, target)?;
            ensure!(
                answer.name().is_some_and(|name| among.contains(&name)),
                "{target}: {answer:?} is none of {among:?}"
            );
            connections += 1;
        }
        Ok(connections)
    })
}

#[test]
fn no_datagram_and_no_connection_is_lost_or_led_astray_while_endpoints_change_and_the_daemon_is_killed() -> Result<()> {
    let cluster = Cluster::start()?;
    let ports = json!([
        {"name": "http", "port": 80, "protocol": "TCP"}, {"name": "echo", "port": ECHO, "protocol": "UDP"},
    ]);
    let mut echoes = vec![];
    for (service, number, first) in [("web", 10, "a"), ("other", 11, "b")] {
        cluster.serve(service, number, &[first], &json!({"ports": ports}));
        for family in Family::ALL {
            let of_slice = json!([
                {"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "echo", "port": ECHO, "protocol": "UDP"},
            ]);
            let slice = format!("{service}-{family:?}").to_lowercase();
            cluster.api.change(&slices_of(V1), &slice, &json!({"ports": of_slice}));
            let pod = cluster.pod(first);
            echoes.push(echo(&pod.network()?, first, (pod.ip(family)?, ECHO).into())?);
        }
    }
    let end = Arc::new(AtomicBool::new(false));
    let (mut streams, mut connections) = (vec![], vec![]);
    for (client, family) in [("c", Family::V4), ("d", Family::V6)] {
        let place = || cluster.pod(client).network();
        for (number, first, among) in [(10, "a", ["a", "c"]), (11, "b", ["b", "d"])] {
            answered_by(&place()?, By::Tcp, at(vip(family, number), By::Tcp), &[first])?;
            let echoed = SocketAddr::new(vip(family, number), ECHO);
            wait_until(&format!("{echoed} is translated"), SOON, || is_answered(&place()?, echoed))?;
            streams.push(stream(&place()?, echoed, first, &end)?);
            connections.push(connect(place()?, at(vip(family, number), By::Tcp), among, &end));
        }
    }

    let (node, began) = (&cluster.nodes[1], Instant::now());
    let (mut random, mut next_kill, mut kills) = (0x2026_1129_u32, 40, 0);
    for change in 0..CHANGES {
        // The first endpoint of each stays, the other one comes and goes.
        let is_there = change % 2 == 0;
        cluster.change("web", if is_there { &["a", "c"] } else { &["a"] });
        cluster.change("other", if is_there { &["b"] } else { &["b", "d"] });
        if change == next_kill {
            node.kill_fabricd()?;
            cluster.start_fabricd(node)?;
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (next_kill, kills) = (change + 40 + (random >> 16) % 80, kills + 1);
        }
        thread::sleep((BETWEEN * (change + 1)).saturating_sub(began.elapsed()));
    }
    assert!(kills >= 4, "{kills}");
    end.store(true, Ordering::Relaxed);
    let ended = |threads: Vec<JoinHandle<Result<u64>>>| -> Result<Vec<u64>> {
        threads.into_iter().map(|thread| thread.join().expect("it ends")).collect()
    };
    let (datagrams, connections) = (ended(streams)?, ended(connections)?);
    assert!(
        datagrams.iter().all(|sent| *sent > 1000) && connections.iter().all(|all| *all > 10),
        "{datagrams:?} {connections:?}"
    );
    println!("{kills} kills in {:?}; {datagrams:?} datagrams, {connections:?} connections", began.elapsed());
    // And what is planned last is what is there.
    node.wait_ready()?;
    cluster.change("web", &["c"]);
    answered_by(&cluster.pod("d").network()?, By::Tcp, at(vip(Family::V4, 10), By::Tcp), &["c"])
}
