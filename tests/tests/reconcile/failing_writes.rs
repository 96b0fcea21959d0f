//! Writes that the kernel refuses or doesn't answer: what stands on them is left out, all others go on, and nothing new comes
//! up before the packet filter.

use std::time::Duration;

use fabric_core::diff::{Key, Op, routing};
use fabric_core::handoff::Readiness;
use fabric_core::model::Subnet;
use fabric_core::state::{Sysctl, Via};
use fabric_tests::fake_kernel::{Tables, Write};
use tokio::time::sleep;

use crate::node::{DUAL, DUAL_PEER, Host, V4, V4_PEER, dev, stays_silent};

/// What a kernel may answer.
const ERRNOS: [i32; 22] = [
    libc::EPERM,
    libc::ENOENT,
    libc::ESRCH,
    libc::EINTR,
    libc::EIO,
    libc::EAGAIN,
    libc::ENOMEM,
    libc::EACCES,
    libc::EBUSY,
    libc::EEXIST,
    libc::ENODEV,
    libc::EINVAL,
    libc::ENOSPC,
    libc::EROFS,
    libc::EMSGSIZE,
    libc::EOPNOTSUPP,
    libc::EADDRINUSE,
    libc::EADDRNOTAVAIL,
    libc::ENETDOWN,
    libc::ENETUNREACH,
    libc::ENOBUFS,
    libc::EHOSTUNREACH,
];

#[tokio::test(start_paused = true)]
async fn every_write_may_fail_with_every_errno_and_the_node_converges_then_falls_silent() {
    let host = Host::new(DUAL, &[DUAL_PEER]);
    host.start().ready().await;
    let steps: Vec<Op> = host.kernel.writes().into_iter().map(|write| write.op).collect();
    let done = host.kernel.tables();
    let of_filter = steps.iter().filter(|op| is_filter(op)).count();
    assert!(steps.len() - of_filter >= 13 && of_filter >= 8, "{steps:?}");
    // Sets, chains, and only then what takes packets.
    assert!(steps.is_sorted_by_key(Op::stage), "{steps:?}");

    for errno in ERRNOS {
        for victim in &steps {
            let host = Host::new(DUAL, &[DUAL_PEER]);
            let key = victim.key();
            host.kernel.fail(errno, move |op| op.key() == key);
            let mut daemon = host.start();
            daemon
                .until("troubled", |view| {
                    view.leases.is_some()
                        && (view.readiness != Readiness::Ready || !view.troubles.is_empty())
                        && view.holding.own.is_some()
                })
                .await;
            sleep(Duration::from_secs(20)).await;
            let writes = host.kernel.writes();
            assert!(writes.iter().any(|write| write.result == Err(errno)), "{victim} never failed");
            no_step_stands_on_a_failed_one(&writes, &victim.key());
            assert_eq!(bystanders(&host.kernel.tables(), victim), bystanders(&done, victim), "{victim}: {errno}");

            host.kernel.heal();
            daemon.ready().await;
            assert_eq!(host.kernel.tables().observed().ours, done.observed().ours, "after {victim}: {errno}");
            assert_eq!(host.kernel.tables().filter, done.filter, "after {victim}: {errno}");
            stays_silent(&host.kernel).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn every_filter_write_may_fail_with_every_errno_and_no_new_device_comes_up_before_it_is_written() {
    let reference = Host::new(DUAL, &[DUAL_PEER]);
    reference.start().ready().await;
    let done = reference.kernel.tables();
    let ours = |tables: &Tables| tables.links.keys().filter(|name| name.as_str().starts_with("fabric")).count();
    assert_eq!(ours(&done), 2);
    for errno in ERRNOS {
        let host = Host::new(DUAL, &[DUAL_PEER]);
        host.kernel.fail(errno, is_filter);
        let mut daemon = host.start();
        let reason = daemon.refusing("left out while the packet filter can't be written").await;
        assert!(reason.contains("--check-senders=false") && !reason.contains("os error"), "{reason}");
        assert!(reason.len() < 800, "{reason}");
        sleep(Duration::from_secs(20)).await;
        let refused = host.kernel.writes().iter().filter(|write| write.result == Err(errno)).count();
        assert!(refused > 1, "{errno} never came");
        let tables = host.kernel.tables();
        assert_eq!((ours(&tables), tables.routes.len(), tables.filter.len()), (0, 0, 0), "{errno}");
        let view = daemon.view.borrow().clone();
        assert_eq!(view.troubles.len(), 1, "the peer is not programmed");

        host.kernel.heal();
        daemon.ready().await;
        assert_eq!(host.kernel.tables().observed().ours, done.observed().ours, "after {errno}");
        assert_eq!(host.kernel.tables().filter, done.filter, "after {errno}");
        stays_silent(&host.kernel).await;

        // What stands goes on, whatever becomes of its filter.
        let standing = host.kernel.tables();
        host.kernel.fail(errno, is_filter);
        host.kernel.edit(|tables| tables.filter.clear());
        let reason = daemon.refusing("nft add set").await;
        assert!(!reason.contains("left out"), "{reason}");
        sleep(Duration::from_secs(20)).await;
        let now = host.kernel.tables();
        assert_eq!((now.links, now.routes, now.fdb), (standing.links, standing.routes, standing.fdb), "{errno}");
        // But one that is set down stays down, and one that is deleted doesn't come back.
        host.kernel.edit(|tables| tables.set_down(&dev("fabric6.1")));
        daemon.refusing("ip link set fabric6.1 up: left out while").await;
        host.kernel.edit(|tables| tables.delete_link(&dev("fabric.1")));
        daemon.refusing("ip link add fabric.1").await;
        sleep(Duration::from_secs(20)).await;
        assert!(!host.kernel.tables().links.contains_key(&dev("fabric.1")));
        host.kernel.heal();
        daemon.ready().await;
        assert_eq!(host.kernel.tables().observed().ours, done.observed().ours, "after {errno}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_filter_that_judges_senders_is_enough_for_a_new_device() {
    let host = Host::new(V4, &[V4_PEER]);
    let mut daemon = host.start();
    daemon.ready().await;
    // Another peer can't be let in, and the device is gone: it comes back for those that are members.
    host.kernel.fail(libc::ENOMEM, is_filter);
    let another = V4_PEER.1.replace("192.0.2.2", "192.0.2.3").replace("02:42:c0:00:02:02", "02:42:c0:00:02:03");
    host.cluster.put("subnets/10.244.3.0-24", another.as_bytes());
    daemon.refusing("nft add element").await;
    host.kernel.edit(|tables| tables.delete_link(&dev("fabric.1")));
    sleep(Duration::from_secs(20)).await;
    assert!(host.kernel.tables().links.contains_key(&dev("fabric.1")));
}

#[tokio::test(start_paused = true)]
async fn without_checking_senders_a_device_waits_for_no_filter() {
    let mut host = Host::new(V4, &[V4_PEER]);
    host.filter.check_senders = false;
    host.kernel.fail(libc::EOPNOTSUPP, is_filter);
    let mut daemon = host.start();
    let reason = daemon.refusing("modprobe -a nf_tables").await;
    assert!(!reason.contains("left out"), "{reason}");
    assert!(host.kernel.tables().links.contains_key(&dev("fabric.1")));
}

#[tokio::test(start_paused = true)]
async fn a_start_that_waits_for_the_kernel_tells_so_with_the_lease_that_it_holds() {
    let host = Host::new(V4, &[V4_PEER]);
    host.kernel.stall(true);
    let mut daemon = host.start();
    daemon.refusing("writing the packet filter for 9 s: the kernel has not answered yet").await;
    assert!(daemon.view.borrow().holding.own.is_some(), "{:?}", daemon.view.borrow().holding);
    host.kernel.stall(false);
    daemon.ready().await;

    // Once the data plane stands, a kernel that is busy is no reason to say that it doesn't.
    host.kernel.stall(true);
    host.cluster.put("subnets/10.244.3.0-24", V4_PEER.1.replace("192.0.2.2", "192.0.2.3").as_bytes());
    sleep(Duration::from_secs(60)).await;
    assert_eq!(daemon.view.borrow().readiness, Readiness::Ready);
}

/// Nothing was written that needs what failed.
fn no_step_stands_on_a_failed_one(writes: &[Write], failed: &Key) {
    for write in writes {
        assert!(!write.op.needs().contains(failed), "{} was tried although {failed:?} had failed", write.op);
    }
}

fn is_filter(op: &Op) -> bool {
    matches!(op, Op::Filter(_))
}

/// The entries of the family that the victim is not of: they must not suffer. Without its filter no device comes up.
fn bystanders(tables: &Tables, victim: &Op) -> Vec<(Subnet, Via)> {
    if is_filter(victim) {
        return vec![];
    }
    let v6 = victim.to_string().contains("fabric6.")
        || victim.to_string().contains("fd00:")
        || matches!(victim, Op::Routing(routing::Op::Sysctl(Sysctl::Ipv6Forward, _)));
    let routes = tables.routes.iter().map(|(dst, (_, via))| (*dst, via.clone()));
    routes.filter(|(dst, _)| dst.base().is_ipv6() != v6).collect()
}
