//! The checks of `fabricctl doctor` that look at the host's files. A file that is missing is no error: not every host has
//! them, and the daemon's container sees only those that are mounted.

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use super::Scene;
use super::certificates::not_after;
use super::checks::Finding;

/// A certificate should last longer than that, in seconds: 14 days.
const SOON: i64 = 14 * 24 * 3600;

fn read(scene: &Scene, path: &str) -> Option<String> {
    fs::read_to_string(scene.places.root.join(path)).ok().map(|text| text.trim().to_owned())
}

fn number(scene: &Scene, path: &str) -> Option<u64> {
    read(scene, path)?.parse().ok()
}

pub(super) fn kernel_version(scene: &Scene) -> Finding {
    let Some(release) = read(scene, "proc/sys/kernel/osrelease") else { return Finding::skipped("unknown") };
    let mut numbers = release.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let nexthops = scene.looked.observed.as_ref().is_none_or(|observed| observed.nexthop_objects);
    if version < (4, 18) {
        Finding::failed(release, "fabricd is not tested below 4.18: netlink can't be asked strictly")
    } else if !nexthops {
        Finding::warning(
            format!("{release} has no nexthop objects"),
            "kernel 5.3 or later: with plain routes, thousands of peers take seconds instead of milliseconds",
        )
    } else {
        Finding::fine(release)
    }
}

/// The kernel opens the port with the first device that is up: nobody else can have it then, and it can't be had while
/// somebody else has it.
pub(super) fn udp_port(scene: &Scene) -> Finding {
    let Some(port) = scene.view.network.map(|network| network.vxlan.port) else {
        return Finding::skipped("the network is not known yet");
    };
    let Some(observed) = &scene.looked.observed else { return Finding::skipped("the kernel can't be read") };
    if observed.ours.links.values().any(|link| link.up && link.port == port) {
        return Finding::fine(format!("the kernel listens at UDP port {port}"));
    }
    let local = format!(":{port:04X}");
    let taken = ["proc/net/udp", "proc/net/udp6"].into_iter().any(|file| {
        let table = read(scene, file).unwrap_or_default();
        table.lines().any(|line| line.split_whitespace().nth(1).is_some_and(|at| at.ends_with(&local)))
    });
    if taken {
        Finding::failed(
            format!("somebody else has UDP port {port}"),
            format!(
                "who: ss -ulpn sport = :{port}; end it, or choose another: fabricctl network init --force --port …"
            ),
        )
    } else {
        Finding::skipped("there is no VTEP yet")
    }
}

pub(super) fn forwarding(scene: &Scene) -> Finding {
    let Some(network) = scene.view.network else { return Finding::skipped("the network is not known yet") };
    for (file, family) in [
        ("proc/sys/net/ipv4/ip_forward", fabric_core::model::Family::V4),
        ("proc/sys/net/ipv6/conf/all/forwarding", fabric_core::model::Family::V6),
    ] {
        if network.spaces.get(family).is_some() && number(scene, file) == Some(0) {
            return Finding::failed(
                format!("{family} is not forwarded"),
                "fabricd sets it; who unsets it? grep -r forward /etc/sysctl*",
            );
        }
    }
    Finding::fine("for every family of the network")
}

/// Strict filtering (1) drops what comes in where answers would not go out: the highest of `all` and the device counts.
pub(super) fn rp_filter(scene: &Scene) -> Finding {
    let of = |dev: &str| number(scene, &format!("proc/sys/net/ipv4/conf/{dev}/rp_filter")).unwrap_or(0);
    let devices = scene.view.vteps.iter().flat_map(|end| [end.device.to_string(), end.underlay.to_string()]);
    let direct = scene.view.network.is_some_and(|network| network.vxlan.direct_routing);
    match devices.chain(scene.pod_bridges().iter().map(ToString::to_string)).find(|dev| of(dev).max(of("all")) == 1) {
        Some(dev) if direct => Finding::warning(
            format!("{dev} filters strictly, and with direct routing answers may go another way"),
            format!("sysctl -w net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.{dev}.rp_filter=2"),
        ),
        Some(dev) => {
            Finding::fine(format!("{dev} filters strictly, which is right as long as answers go the same way"))
        }
        None => Finding::fine("not strictly"),
    }
}

pub(super) fn br_netfilter(scene: &Scene) -> Finding {
    match number(scene, "proc/sys/net/bridge/bridge-nf-call-iptables") {
        Some(1) => Finding::fine("packets between pods of this node pass iptables"),
        Some(_) => Finding::warning(
            "bridge-nf-call-iptables is 0: a service's answer from a pod of the same node bypasses address translation",
            "sysctl -w net.bridge.bridge-nf-call-iptables=1, if kube-proxy uses iptables or IPVS",
        ),
        None => Finding::warning(
            "br_netfilter is not loaded: a pod doesn't reach a service whose pod is on the same node",
            "modprobe br_netfilter, if kube-proxy uses iptables or IPVS; without Kubernetes it is not needed",
        ),
    }
}

pub(super) fn conntrack(scene: &Scene) -> Finding {
    let count = number(scene, "proc/sys/net/netfilter/nf_conntrack_count");
    let most = number(scene, "proc/sys/net/netfilter/nf_conntrack_max");
    let Some((count, most)) = count.zip(most) else { return Finding::skipped("connections are not tracked") };
    let evidence = format!("{count} of {most}");
    if count * 10 < most * 9 {
        Finding::fine(evidence)
    } else {
        Finding::failed(
            evidence,
            "new connections are dropped when it is full: sysctl -w net.netfilter.nf_conntrack_max=…",
        )
    }
}

pub(super) fn networkd(scene: &Scene) -> Finding {
    let root = &scene.places.root;
    if !root.join("run/systemd/netif/state").exists() {
        return Finding::skipped("systemd-networkd doesn't run, or its files are not visible here");
    }
    for index in ours(scene) {
        let state = read(scene, &format!("run/systemd/netif/links/{index}")).unwrap_or_default();
        if state.lines().any(|line| matches!(line, "ADMIN_STATE=configured" | "ADMIN_STATE=configuring")) {
            return Finding::failed(
                format!("it manages the interface {index}, which is ours"),
                "a file in /etc/systemd/network with [Match] Name=fabric* and [Link] Unmanaged=yes",
            );
        }
    }
    let settings = ["etc/systemd/networkd.conf"].map(|file| root.join(file));
    let folders = ["etc", "run", "usr/lib"].map(|top| root.join(top).join("systemd/networkd.conf.d"));
    let more = folders.iter().flat_map(fs::read_dir).flatten().flatten().map(|entry| entry.path());
    let text: String = settings.into_iter().chain(more).filter_map(|file| fs::read_to_string(file).ok()).collect();
    let says_no = |name: &str| {
        text.lines()
            .filter_map(|line| line.trim().split_once('='))
            .any(|(key, value)| key.trim() == name && ["no", "false", "0", "off"].contains(&value.trim()))
    };
    match ["ManageForeignRoutes", "ManageForeignNextHops"].into_iter().find(|name| !says_no(name)) {
        None => Finding::fine("it is told to leave foreign routes alone"),
        Some(name) => Finding::warning(
            format!("{name} is on, as by default: when it restarts, it deletes our routes (they are repaired)"),
            "in /etc/systemd/networkd.conf.d/fabric.conf: [Network] ManageForeignRoutes=no ManageForeignNextHops=no",
        ),
    }
}

pub(super) fn network_manager(scene: &Scene) -> Finding {
    if !scene.places.root.join("run/NetworkManager").exists() {
        return Finding::skipped("NetworkManager doesn't run, or its files are not visible here");
    }
    let managed = |index: &u32| {
        let state = read(scene, &format!("run/NetworkManager/devices/{index}")).unwrap_or_default();
        state.lines().any(|line| line == "managed=true")
    };
    match ours(scene).into_iter().find(managed) {
        None => Finding::fine("it doesn't manage them"),
        Some(index) => Finding::failed(
            format!("it manages the interface {index}, which is ours"),
            "in /etc/NetworkManager/conf.d/fabric.conf: [keyfile] unmanaged-devices=interface-name:fabric*;interface-name:cni0",
        ),
    }
}

/// The default policy of systemd since 242 gives virtual devices an address of its own, unless it was set when they were
/// made, as ours is.
pub(super) fn udev(scene: &Scene) -> Finding {
    let files = ["etc/systemd/network", "run/systemd/network"].map(|dir| scene.places.root.join(dir));
    let forces = files.iter().flat_map(fs::read_dir).flatten().flatten().find(|entry| {
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        let sets = text.contains("MACAddressPolicy=persistent") || text.contains("MACAddressPolicy=random");
        sets && (text.contains("fabric") || text.contains("Driver=vxlan") || text.contains("Kind=vxlan"))
    });
    match forces {
        None => Finding::fine("no rule for our devices"),
        Some(entry) => Finding::failed(
            format!("{} gives them addresses", entry.path().display()),
            "MACAddressPolicy=none for Name=fabric*",
        ),
    }
}

pub(super) fn clock(scene: &Scene) -> Finding {
    if scene.places.root != Path::new("/") {
        return Finding::skipped("this is not the host's root");
    }
    judge_clock(clock_error())
}

fn judge_clock(error: Option<Option<f64>>) -> Finding {
    match error {
        None => Finding::skipped("the kernel doesn't tell"),
        Some(None) => Finding::fine("synchronised"),
        Some(Some(error)) => Finding::warning(
            format!("not synchronised, wrong by up to {error:.1} s"),
            "leases don't mind (their clock is monotonic), certificates do: run chrony or systemd-timesyncd",
        ),
    }
}

/// How wrong the clock may be, in seconds, unless it is synchronised (adjtimex(2)).
#[expect(unsafe_code, reason = "no crate in use offers adjtimex")]
fn clock_error() -> Option<Option<f64>> {
    // SAFETY: zero is a valid value of every field, and means to change nothing.
    let mut clock: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes to a struct of the type that it expects.
    let state = unsafe { libc::adjtimex(&raw mut clock) };
    let error = std::time::Duration::from_micros(clock.maxerror.try_into().unwrap_or(0)).as_secs_f64();
    match state {
        ..0 => None,
        libc::TIME_ERROR => Some(Some(error)),
        _ => Some(None),
    }
}

pub(super) fn certificates(scene: &Scene) -> Finding {
    if scene.places.certificates.is_empty() {
        return Finding::skipped("none are used");
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs().try_into().unwrap_or(0));
    let mut first: Option<(i64, &Path)> = None;
    for file in &scene.places.certificates {
        let ends = fs::read_to_string(file).map_err(|error| error.to_string());
        let ends = ends.and_then(|pem| not_after(&pem).ok_or_else(|| "no certificate in it".to_owned()));
        match ends {
            Err(why) => return Finding::failed(format!("{}: {why}", file.display()), "renew it"),
            Ok(ends) if first.is_none_or(|(before, _)| ends < before) => first = Some((ends, file)),
            Ok(_) => {}
        }
    }
    let (ends, file) = first.expect("there is one");
    let (left, file) = (ends - now, file.display());
    match left {
        ..0 => Finding::failed(format!("{file} ended {} days ago", -left / 86400), "renew it, and restart fabricd"),
        0..SOON => Finding::warning(format!("{file} ends in {} days", left / 86400), "renew it, and restart fabricd"),
        _ => Finding::fine(format!("the first to end is {file}, in {} days", left / 86400)),
    }
}

pub(super) fn disk(scene: &Scene) -> Finding {
    let dir = &scene.places.addresses;
    match nix::sys::statvfs::statvfs(dir) {
        Err(error) => Finding::skipped(format!("{}: {error}", dir.display())),
        Ok(fs) => {
            let free = fs.blocks_available() * fs.fragment_size() / (1 << 20);
            if free < 16 || (fs.files() > 0 && fs.files_available() < 1000) {
                Finding::failed(
                    format!("{} MiB and {} files are left at {}", free, fs.files_available(), dir.display()),
                    "no pod can be added without room for its files: df -h; df -i",
                )
            } else {
                Finding::fine(format!("{free} MiB at {}", dir.display()))
            }
        }
    }
}

/// The interface indexes of our devices.
fn ours(scene: &Scene) -> Vec<u32> {
    let index = |name: &str| number(scene, &format!("sys/class/net/{name}/ifindex"))?.try_into().ok();
    scene.view.vteps.iter().filter_map(|end| index(end.device.as_str())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnosis::Outcome;

    #[test]
    fn clock_that_nobody_keeps_right_is_a_warning_with_how_wrong_it_may_be() {
        let outcomes = [None, Some(None), Some(Some(16.0))].map(|error| judge_clock(error).outcome);
        assert_eq!(outcomes, [Outcome::Skipped, Outcome::Fine, Outcome::Warning]);
        assert_eq!(judge_clock(Some(Some(16.04))).evidence, "not synchronised, wrong by up to 16.0 s");
    }
}
