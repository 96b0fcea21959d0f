//! The checks of `fabricctl doctor` that look at the host's files. A file that is missing is no error: not every host has
//! them, and the daemon's container sees only those that are mounted.

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use fabric_core::model::Family;

use super::Inspection;
use super::certificates::not_after;
use super::finding::{Finding, Problem};

/// A certificate should last longer than that, in seconds: 14 days.
const SOON: i64 = 14 * 24 * 3600;

pub(super) fn read(inspection: &Inspection, path: &str) -> Option<String> {
    fs::read_to_string(inspection.places.root.join(path)).ok().map(|text| text.trim().to_owned())
}

pub(super) fn number(inspection: &Inspection, path: &str) -> Option<u64> {
    read(inspection, path)?.parse().ok()
}

pub(super) fn kernel_version(inspection: &Inspection) -> Finding {
    let Some(release) = read(inspection, "proc/sys/kernel/osrelease") else { return Finding::skipped("unknown") };
    let mut numbers = release.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let nexthops = inspection.snapshot.observed.as_ref().is_none_or(|observed| observed.nexthop_objects);
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

pub(super) fn forwarding(inspection: &Inspection) -> Finding {
    let Some(network) = inspection.view.network else { return Finding::skipped("the network is not known yet") };
    let settings = [
        (Family::V4, "proc/sys/net/ipv4/ip_forward", "net.ipv4.ip_forward"),
        (Family::V6, "proc/sys/net/ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding"),
    ];
    let off = settings
        .into_iter()
        .filter(|(family, file, _)| network.spaces.get(*family).is_some() && number(inspection, file) == Some(0));
    let problems = off.map(|(family, _, setting)| {
        Problem::failure(
            format!("{family} is not forwarded"),
            format!(
                "fabricd sets it again; this shows who may unset it\nsysctl -w {setting}=1\ngrep -rs forward \
                 /etc/sysctl.conf /etc/sysctl.d /usr/lib/sysctl.d"
            ),
        )
    });
    Finding::of(problems.collect(), "on for every family of the network")
}

/// Strict filtering (1) drops what comes in where answers would not go out: the highest of `all` and the device counts.
pub(super) fn rp_filter(inspection: &Inspection) -> Finding {
    let of = |dev: &str| number(inspection, &format!("proc/sys/net/ipv4/conf/{dev}/rp_filter")).unwrap_or(0);
    let devices = inspection.view.vteps.iter().flat_map(|end| [end.device.to_string(), end.underlay.to_string()]);
    let direct = inspection.view.network.is_some_and(|network| network.vxlan.direct_routing);
    match devices
        .chain(inspection.pod_bridges().iter().map(ToString::to_string))
        .find(|dev| of(dev).max(of("all")) == 1)
    {
        Some(dev) if direct => Finding::warning(
            format!("{dev} filters strictly, and with direct routing answers may take another path"),
            // By slashes: a name may have a dot, as fabric.1 and eth0.100 have.
            format!("sysctl -w net/ipv4/conf/all/rp_filter=0 net/ipv4/conf/{dev}/rp_filter=2"),
        ),
        Some(dev) => {
            Finding::fine(format!("{dev} filters strictly, which is right as long as answers take the same path"))
        }
        None => Finding::fine("not strict"),
    }
}

pub(super) fn br_netfilter(inspection: &Inspection) -> Finding {
    match number(inspection, "proc/sys/net/bridge/bridge-nf-call-iptables") {
        Some(1) => Finding::fine("packets between pods of this node pass iptables"),
        Some(_) => Finding::warning(
            "bridge-nf-call-iptables is 0: a service's answer from a pod of the same node bypasses address translation",
            "if kube-proxy uses iptables or IPVS:\nsysctl -w net.bridge.bridge-nf-call-iptables=1",
        ),
        None => Finding::warning(
            "br_netfilter is not loaded: a pod doesn't reach a service whose pod is on the same node",
            "if kube-proxy uses iptables or IPVS (without Kubernetes it is not needed):\nmodprobe br_netfilter",
        ),
    }
}

pub(super) fn conntrack(inspection: &Inspection) -> Finding {
    let count = number(inspection, "proc/sys/net/netfilter/nf_conntrack_count");
    let most = number(inspection, "proc/sys/net/netfilter/nf_conntrack_max");
    let Some((count, most)) = count.zip(most) else { return Finding::skipped("connections are not tracked") };
    let evidence = format!("{count} of {most}");
    if count * 10 < most * 9 {
        Finding::fine(evidence)
    } else {
        Finding::failed(
            evidence,
            format!(
                "new connections are dropped when it is full:\nsysctl -w net.netfilter.nf_conntrack_max={}",
                most * 2
            ),
        )
    }
}

pub(super) fn clock(inspection: &Inspection) -> Finding {
    if inspection.places.root != Path::new("/") {
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
            "leases are not affected (they use the monotonic clock), certificates are: run chrony or systemd-timesyncd",
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

const RENEW: &str = "renew it with fabricd pki (docs/pki.md); it is used from the next connection on";

/// Seconds in words, whole days.
fn days(seconds: i64) -> String {
    match seconds / 86400 {
        0 => "less than a day".into(),
        1 => "1 day".into(),
        days => format!("{days} days"),
    }
}

pub(super) fn certificates(inspection: &Inspection) -> Finding {
    if inspection.places.certificates.is_empty() {
        return Finding::skipped("none are used");
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs().try_into().unwrap_or(0));
    let mut problems = vec![];
    let mut first: Option<(i64, &Path)> = None;
    for file in &inspection.places.certificates {
        let ends = fs::read_to_string(file).map_err(|error| error.to_string());
        let ends = ends.and_then(|pem| not_after(&pem).ok_or_else(|| "no certificate in it".to_owned()));
        let shown = file.display();
        match ends.map(|ends| ends - now) {
            Err(why) => problems.push(Problem::failure(format!("{shown}: {why}"), RENEW)),
            Ok(left @ ..0) => {
                problems.push(Problem::failure(format!("{shown} expired {} ago", days(-left)), RENEW));
            }
            Ok(left @ 0..SOON) => {
                problems.push(Problem::warning(format!("{shown} expires in {}", days(left)), RENEW));
            }
            Ok(left) if first.is_none_or(|(before, _)| left < before) => first = Some((left, file)),
            Ok(_) => {}
        }
    }
    let fine = first.map(|(left, file)| format!("the first to expire is {}, in {}", file.display(), days(left)));
    Finding::of(problems, fine.unwrap_or_default())
}

pub(super) fn disk(inspection: &Inspection) -> Finding {
    // It comes with the first pod.
    let Some(dir) = inspection.places.addresses.ancestors().find(|dir| dir.exists()) else {
        return Finding::skipped(format!("{} is not visible here", inspection.places.addresses.display()));
    };
    match nix::sys::statvfs::statvfs(dir) {
        Err(error) => Finding::skipped(format!("{}: {error}", dir.display())),
        Ok(fs) => {
            let free = fs.blocks_available() * fs.fragment_size() / (1 << 20);
            if free < 16 || (fs.files() > 0 && fs.files_available() < 1000) {
                Finding::failed(
                    format!("{} MiB and {} files are left at {}", free, fs.files_available(), dir.display()),
                    "no pod can be added without room for its files:\ndf -h; df -i",
                )
            } else {
                Finding::fine(format!("{free} MiB at {}", dir.display()))
            }
        }
    }
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
