//! A node that changes hands between flannel and fabricd, cut off: killed in the middle of each step, gone on with or turned
//! round, under traffic.

use std::cell::RefCell;
use std::time::Duration;

use anyhow::{Result, ensure};
use fabric_tests::handover::{
    Cluster, Traffic, add_foreign_rules, all_addresses_differ, foreign_rules, give_back, hand_to_fabricd,
    hand_to_flannel, nothing_of_ours_is_left, take_over, the_record_is_flannels,
};
use fabric_tests::lab::Families;
use fabric_tests::lab::exec::Exec;
use fabric_tests::lab::flannel::{Flannel, Options};

/// How long after a step was printed it is cut off at most, in powers of two of milliseconds: longer than most take.
const MIDDLE: u32 = 6;

/// How the steps begin, of which some have several lines.
const STEPS: [&str; 9] = [
    "ip link set",
    "# f",
    "ip route del",
    "iptables-restore",
    "ip nexthop flush",
    "write ",
    "mv ",
    "rm node.json",
    "rm /etc",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum To {
    Fabricd,
    Flannel,
}

impl To {
    fn command(self) -> &'static str {
        if self == Self::Fabricd { "takeover" } else { "giveback" }
    }

    /// Ends one daemon and starts the other, which flanneld can't before the device has its name: before the first step it
    /// isn't.
    fn prepare(self, flannel: &Flannel, nth: usize) -> Result<()> {
        match self {
            Self::Fabricd => hand_to_fabricd(flannel),
            Self::Flannel if nth == 0 => flannel.node.stop_fabricd(),
            Self::Flannel => hand_to_flannel(flannel),
        }
    }

    fn finish(self, flannel: &Flannel) -> Result<()> {
        if self == Self::Fabricd { take_over(flannel, None) } else { give_back(flannel) }
    }
}

/// Runs it and kills it so much after it has printed the `nth` step that it takes, from 0: in that step or in one of those
/// that follow, or it has just ended. Returns how that step begins; `None` when it doesn't take so many.
fn cut_off(flannel: &Flannel, to: To, nth: usize, delay: Duration) -> Result<Option<String>> {
    let seen = RefCell::new(vec![]);
    let is_it = |line: &str| {
        let is_step = STEPS.iter().any(|step| line.starts_with(step));
        if is_step {
            seen.borrow_mut().push(line.to_owned());
        }
        is_step && seen.borrow().len() == nth + 1
    };
    let run = flannel.fabricd(&[to.command(), "--wait", "45"])?;
    let ended = run.kill_after_line(is_it, delay)?;
    ensure!(ended.success() || ended.status.code().is_none(), "{ended:?}");
    Ok(seen.into_inner().into_iter().nth(nth))
}

/// Less than so many powers of two of milliseconds, and shorter ones as often as longer ones: steps differ so on machines that
/// differ.
fn some_time(random: &mut fastrand::Rng, most: u32) -> Duration {
    Duration::from_micros(random.u64(0..1_000) << random.u32(0..=most))
}

fn seed() -> Result<u64> {
    let seed = std::env::var("FLANNEL_SEED").map_or(Ok(1), |seed| seed.parse())?;
    println!("FLANNEL_SEED={seed}");
    Ok(seed)
}

/// Each step is cut off in its middle, again and again until it is done all the same; there and back.
#[test]
fn a_takeover_and_a_giveback_that_are_killed_in_each_step_get_there() -> Result<()> {
    let cluster = Cluster::start(Families::V4, Options::default())?;
    let (flannel, node) = (&cluster.flannels[0], &cluster.flannels[0].node);
    add_foreign_rules(node, true)?;
    let foreign = foreign_rules(node)?;
    let (pods, far) = cluster.pods(node)?;
    let traffic = Traffic::start(&cluster.lab, &pods, &far)?;
    let mut random = fastrand::Rng::with_seed(seed()?);
    let mut of_ours = vec![];

    for to in [To::Fabricd, To::Flannel] {
        let (mut cuts, mut steps, mut tries) = (0, vec![], 0);
        to.prepare(flannel, cuts)?;
        // As soon as it has begun for the first time, and then later and later until it is done.
        let delay = |tries: u32, random: &mut fastrand::Rng| match tries {
            0 => Duration::ZERO,
            _ => some_time(random, tries.min(MIDDLE)),
        };
        while let Some(step) = cut_off(flannel, to, 0, delay(tries, &mut random))? {
            cuts += 1;
            tries = if steps.last() == Some(&step) { tries + 1 } else { 0 };
            steps.push(step);
            to.prepare(flannel, cuts)?;
            ensure!(cuts < 300, "it never gets there: {steps:#?}");
        }
        steps.dedup();
        // On a busy machine a kill may come late, after several of them.
        ensure!(steps.len() >= 2, "cut off in these steps only: {steps:#?}");
        to.finish(flannel)?;
        traffic.is_masqueraded()?;
        ensure!(foreign_rules(node)? == foreign, "{:#?}", foreign_rules(node)?);
        of_ours.extend([node.add_pod(&format!("{}-1", to.command()))?, node.add_pod(&format!("{}-2", to.command()))?]);
        all_addresses_differ(pods.iter().chain(&of_ours))?;
    }
    nothing_of_ours_is_left(node)?;
    the_record_is_flannels(node)?;
    traffic.stop()?;
    for pod in of_ours {
        pod.del()?;
    }
    Ok(())
}

/// Begins in one direction, is killed in the middle of each step in turn, and goes back.
fn is_turned_round(cluster: &Cluster, flannel: &Flannel, from: To, to: To) -> Result<()> {
    let node = &flannel.node;
    let (pods, far) = cluster.pods(node)?;
    let more = node.add_pod("a3")?;
    let traffic = Traffic::start(&cluster.lab, &pods, &far)?;
    let mut random = fastrand::Rng::with_seed(seed()?);
    let (mut new, mut turns) = (vec![], 0);
    for nth in 0.. {
        to.prepare(flannel, nth)?;
        // What begins with the rename is a step shorter when it is done.
        let left = if to == To::Flannel { nth.saturating_sub(1) } else { nth };
        if cut_off(flannel, to, left, some_time(&mut random, MIDDLE))?.is_none() {
            break;
        }
        from.finish(flannel)?;
        traffic.is_masqueraded()?;
        if from == To::Flannel {
            nothing_of_ours_is_left(node)?;
            the_record_is_flannels(node)?;
        }
        new.push(node.add_pod(&format!("n{nth}"))?);
        all_addresses_differ(pods.iter().chain([&more]).chain(&new))?;
        // Not more of them each time: each may be a step.
        if new.len() > 2 {
            new.remove(0).del()?;
        }
        turns += 1;
    }
    ensure!(turns >= 5, "turned round {turns} times only");
    to.finish(flannel)?;
    traffic.is_masqueraded()?;
    traffic.stop()?;
    for pod in pods.into_iter().chain([more]).chain(new) {
        pod.del()?;
    }
    let held = node.run(&["find", "/var/lib/cni/networks", "/var/lib/cni/flannel", "-type", "f"])?;
    let is_kept = |file: &str| file.ends_with("/lock") || file.contains("/last_reserved_ip");
    ensure!(held.lines().all(is_kept), "{held}");
    Ok(())
}

#[test]
fn a_takeover_that_is_killed_in_any_step_can_be_turned_round() -> Result<()> {
    let cluster = Cluster::start(Families::V4, Options { masquerade: true, ..Options::default() })?;
    add_foreign_rules(&cluster.flannels[0].node, true)?;
    is_turned_round(&cluster, &cluster.flannels[0], To::Flannel, To::Fabricd)
}

#[test]
fn a_giveback_of_a_node_born_with_us_that_is_killed_in_any_step_can_be_turned_round() -> Result<()> {
    let options = Options { masquerade: true, ..Options::default() };
    let cluster = Cluster::start(Families::V4, options)?;
    let flannel = Flannel::install_on(&cluster.lab, &cluster.ours, options)?;
    is_turned_round(&cluster, &flannel, To::Fabricd, To::Flannel)
}

/// Two at once; a store that is away in the middle; a conflist of ours that is somebody's; a daemon that doesn't come.
#[test]
fn what_happens_in_the_middle_of_a_takeover_is_told_and_the_next_run_goes_on() -> Result<()> {
    let cluster = Cluster::start(Families::V4, Options { masquerade: true, ..Options::default() })?;
    let (flannel, node) = (&cluster.flannels[0], &cluster.flannels[0].node);
    let (pods, far) = cluster.pods(node)?;
    let traffic = Traffic::start(&cluster.lab, &pods, &far)?;
    flannel.stop()?;

    // Nobody starts fabricd.
    let late = flannel.fabricd(&["takeover", "--wait", "1"])?.output()?;
    ensure!(!late.success() && late.stderr.contains("fabricd has not taken this node within 1 s"), "{late:?}");
    ensure!(late.stderr.contains("or turn round: fabricd giveback"), "{late:?}");
    // flanneld, started by mistake, would end with "Link not found": its device has another name.
    ensure!(node.exec(&["ip", "link", "show", "flannel.1"]).is_ok_and(|output| !output.success()));

    // While one waits there is no second.
    let second = RefCell::new(Ok(()));
    let meanwhile = |line: &str| {
        if line.starts_with("# fabricd claims") {
            *second.borrow_mut() = flannel.fabricd(&["takeover"]).and_then(Exec::output).and_then(|second| {
                let words = "another takeover or giveback has locked /run/fabric";
                ensure!(!second.success() && second.stderr.contains(words), "{second:?}");
                hand_to_fabricd(flannel)
            });
        }
        false
    };
    let told = flannel.fabricd(&["takeover", "--wait", "45"])?.kill_after_line(meanwhile, Duration::ZERO)?.ok()?;
    second.into_inner()?;
    ensure!(told.contains("this node is fabricd's"), "{told}");

    // The store goes away; what is flannel's conflist by then is a file that can't be moved back.
    node.stop_fabricd()?;
    cluster.lab.etcd().freeze()?;
    let away = flannel.fabricd(&["giveback"])?.output()?;
    ensure!(!away.success() && away.stderr.contains("the store does not answer"), "{away:?}");
    cluster.lab.etcd().thaw()?;
    give_back(flannel)?;
    the_record_is_flannels(node)?;

    // Somebody's file has our conflist's name: the step is refused, the node works, and it goes on with another name.
    flannel.stop()?;
    let file = node.path("/etc/cni/net.d/10-fabric.conflist")?;
    std::fs::write(&file, r#"{"cniVersion":"1.0.0","name":"theirs","plugins":[{"type":"bridge"}]}"#)?;
    hand_to_fabricd(flannel)?;
    let foreign = flannel.fabricd(&["takeover", "--wait", "45"])?.output()?;
    ensure!(!foreign.success() && foreign.stderr.contains("10-fabric.conflist is not ours"), "{foreign:?}");
    let told = flannel.fabricd(&["takeover", "--wait", "45", "--conf-name", "05-fabric.conflist"])?.run()?;
    ensure!(told.contains("this node is fabricd's"), "{told}");
    std::fs::remove_file(&file)?;
    traffic.stop()
}
