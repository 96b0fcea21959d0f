//! Pods that start while the daemon is dead, slow or crashing.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fabric_core::policy::Conn;
use fabric_tests::lab::spaces::Spaces;
use fabric_tests::lab::{Node, Pod, wait_until};
use fabric_tests::policies::pods_of;

use crate::{PORTS, SOON, Sender, Server, connects, open_and_closed, start_fabricd};

#[test]
fn pod_that_is_attached_without_a_daemon_sends_nothing_that_is_forbidden() -> Result<()> {
    let cluster = open_and_closed()?;
    let node = &cluster.nodes[0];
    let target = cluster.add_pod(node, "open", "target")?;
    let server = Server::start(&target)?;
    let to = target.ips()[0];
    node.kill_fabricd()?;
    let closed = cluster.add_pod(node, "closed", "web")?;
    let sender = Sender::start(&closed, SocketAddr::new(to, PORTS[1]))?;
    let free = cluster.add_pod(node, "open", "web")?;
    let conn = |from: &Pod| Conn { src: from.ips()[0], dst: to, protocol: 17, port: PORTS[0] };
    assert!(!connects(&free, &conn(&free))?, "nobody has applied its policies");
    assert!(
        !connects(&target, &Conn { src: to, dst: free.ips()[0], protocol: 6, port: 1 })?,
        "nor may others reach it"
    );
    node.run(&["ping", "-c1", "-W5", &free.ips()[0].to_string()]).context("its own node reaches it")?;
    assert_eq!(server.heard(), [0, 0]);
    cluster.start_fabricd(node)?;
    wait_until("the pod that no policy selects is known", SOON, || {
        ensure!(connects(&free, &conn(&free))?, "it is closed");
        Ok(())
    })?;
    drop(sender);
    let [free_sent, closed_sent] = server.heard();
    assert!(free_sent > 0 && closed_sent == 0, "{closed_sent} forbidden packets");
    assert!(!connects(&closed, &conn(&closed))?);
    Ok(())
}

/// How many pods are started: `POD_STARTS=1000` takes the better part of an hour.
fn starts() -> usize {
    std::env::var("POD_STARTS").ok().and_then(|count| count.parse().ok()).unwrap_or(8)
}

/// Sends from a pod as soon as it has a network namespace, before its ADD ends.
fn send_early(node: &Arc<Node>, pod: &str, to: SocketAddr) -> Sender {
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, node, netns) = (Arc::clone(&stop), Arc::clone(node), format!("/run/netns/{pod}"));
    thread::spawn(move || {
        let any: IpAddr = if to.is_ipv4() { [0, 0, 0, 0].into() } else { [0_u16; 8].into() };
        let open = || Spaces::of_network(&node.path(&netns)?)?.run(|| Ok(UdpSocket::bind((any, 0))?));
        let mut socket = None;
        while !stopped.load(Ordering::Relaxed) {
            match &socket {
                None => socket = open().ok(),
                // Without an address it is refused.
                Some(socket) => drop(socket.send_to(b"!", to)),
            }
            thread::sleep(Duration::from_millis(1));
        }
    });
    Sender(stop)
}

#[test]
fn pods_that_start_while_the_daemon_is_stopped_slow_or_crashing_send_nothing_that_is_forbidden() -> Result<()> {
    let cluster = open_and_closed()?;
    let node = &cluster.nodes[0];
    let conflist = "/etc/cni/net.d/10-fabric.conflist";
    node.run(&["sed", "-i", r#"s/"type": *"fabric-cni"/&, "policyTimeout": 1/"#, conflist])?;
    let target = cluster.add_pod(node, "open", "target")?;
    let server = Server::start(&target)?;
    let [allowed, forbidden] = PORTS.map(|port| SocketAddr::new(target.ips()[0], port));
    for start in 0..starts() {
        let name = format!("web-{start}");
        match start % 4 {
            0 => node.kill_fabricd()?,
            1 => node.freeze_fabricd()?,
            _ => {}
        }
        let sender = send_early(node, &format!("closed-{name}"), forbidden);
        // … or crashes while the pod is added.
        let (crashing, env) = (Arc::clone(node), cluster.env.clone());
        let crash = (start % 4 == 2).then(|| {
            thread::spawn(move || {
                (0..3).try_for_each(|_| {
                    crashing.kill_fabricd()?;
                    start_fabricd(&crashing, &[], &env)
                })
            })
        });
        let closed = cluster.add_pod(node, "closed", &name)?;
        crash.map_or(Ok(()), |crash| crash.join().expect("it does not panic"))?;
        assert_eq!(server.heard()[1], 0, "start {start}: forbidden packets");
        match start % 4 {
            0 => cluster.start_fabricd(node)?,
            1 => node.thaw_fabricd()?,
            _ => {}
        }
        // Its policies are applied, and then it is gone: the next one may have its address.
        let applied = format!("/run/fabric/policy-applied/closed-{name}-");
        wait_until("the policies of the pod are applied", SOON, || {
            node.run(&["sh", "-c", &format!("ls {applied}*")])?;
            Ok(())
        })?;
        assert_eq!(server.heard()[1], 0, "start {start}: forbidden packets");
        drop(sender);
        closed.del()?;
        cluster.api.delete(&pods_of("closed"), &name);
    }
    // The same by a pod that may: else nothing has been shown.
    let sender = send_early(node, "open-web", allowed);
    let _web = cluster.add_pod(node, "open", "web")?;
    wait_until("what is allowed arrives", SOON, || {
        ensure!(server.heard()[0] > 0, "it doesn't");
        Ok(())
    })?;
    drop(sender);
    Ok(())
}
