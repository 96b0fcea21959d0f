//! The checks of `fabricctl doctor` of programs that manage network interfaces: systemd-networkd, NetworkManager, udev.
//! They must leave alone the VXLAN devices, the bridge, and the host's ends of the pods' veths.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::Inspection;
use super::finding::{Finding, Problem, all};
use super::host_checks::{number, read};

/// systemd reads them in the order of the files' names; of two with one name that in the first folder counts.
const FOLDERS: [&str; 4] =
    ["etc/systemd/network", "run/systemd/network", "usr/lib/systemd/network", "lib/systemd/network"];

/// What the next pods' veths are called: by the plugin `bridge`, and by fabric-bridge.
const COMING: [&str; 2] = ["veth01234567", "veth0123456789a"];
/// Patterns of the VXLAN devices' names, and of those veths'. NetworkManager knows `*` and `?` only (NetworkManager.conf(5)).
const DEVICES: [&str; 4] = ["fabric.*", "fab.*", "fabric6.*", "fab6.*"];
const VETHS: [&str; 2] = ["veth????????", "veth???????????"];

/// What a packet of a pod passes on this host, by name, with the interface's kind.
fn interfaces(inspection: &Inspection) -> Vec<(String, &'static str)> {
    let mut all: Vec<(String, &'static str)> =
        inspection.view.vteps.iter().map(|end| (end.device.to_string(), "vxlan")).collect();
    all.extend(inspection.pod_bridges().iter().map(|name| (name.to_string(), "bridge")));
    let pods = inspection.addresses().map(|addresses| addresses.pods).unwrap_or_default();
    let attached = pods.into_iter().filter_map(|pod| pod.saved.attached);
    all.extend(attached.flat_map(|attached| attached.ports).map(|port| (port, "veth")));
    all.sort();
    all.dedup();
    all
}

/// Patterns that match what a packet of a pod passes, now and when more pods come, and nothing else of the host.
fn patterns(inspection: &Inspection) -> Vec<String> {
    let mut all: Vec<String> = DEVICES.iter().chain(&VETHS).map(ToString::to_string).collect();
    all.extend(inspection.pod_bridges().iter().map(ToString::to_string));
    for (name, _) in interfaces(inspection) {
        if !all.iter().any(|pattern| glob(pattern, &name)) {
            all.push(name);
        }
    }
    all
}

fn index(inspection: &Inspection, name: &str) -> Option<u64> {
    number(inspection, &format!("sys/class/net/{name}/ifindex"))
}

/// What is managed though it should not be, by the file that says so.
fn by_file(managed: impl Iterator<Item = (String, String)>) -> BTreeMap<String, Vec<String>> {
    let mut files: BTreeMap<String, Vec<String>> = BTreeMap::new();
    managed.for_each(|(file, name)| files.entry(file).or_default().push(name));
    files
}

pub(super) fn networkd(inspection: &Inspection) -> Finding {
    let root = &inspection.places.root;
    if !root.join("run/systemd/netif/state").exists() && !root.join("run/systemd/netif/links").exists() {
        return Finding::skipped("systemd-networkd doesn't run, or its files are not visible here");
    }
    let ours = interfaces(inspection);
    let managed = ours.iter().filter_map(|(name, _)| {
        let state = read(inspection, &format!("run/systemd/netif/links/{}", index(inspection, name)?))?;
        let value = |key: &str| state.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        let manages = matches!(value("ADMIN_STATE"), Some("configured" | "configuring" | "failed"));
        manages.then(|| (value("NETWORK_FILE").unwrap_or("a file that it doesn't name").to_owned(), name.clone()))
    });
    let managed = by_file(managed);
    let mut problems: Vec<Problem> = managed
        .iter()
        .map(|(file, names)| {
            Problem::failure(
                format!("it manages {} by {file}", all(names.iter().cloned())),
                unmanage(inspection, names),
            )
        })
        .collect();
    // What it will do when it is restarted, or when the next pod comes.
    let files = systemd_files(root, ".network");
    let coming = COMING.map(|name| (name.to_owned(), "veth"));
    let next = ours.iter().filter(|(name, _)| !managed.values().flatten().any(|known| known == name));
    let next = next.chain(&coming).filter_map(|(name, kind)| {
        let (file, text) = files.iter().find(|(_, text)| matches(text, name, kind))?;
        (!unmanaged(text)).then(|| (shown(root, file), name.clone()))
    });
    let next: Vec<(String, String)> = next.collect();
    for (file, names) in by_file(next.into_iter()) {
        if !managed.contains_key(&file) {
            let word = |name: String| if COMING.contains(&name.as_str()) { "veths of pods".into() } else { name };
            let mut names: Vec<String> = names.into_iter().map(word).collect();
            names.dedup();
            let names = all(names);
            problems.push(Problem::warning(
                format!("{file} matches {names}: it takes them over"),
                unmanage(inspection, &[]),
            ));
        }
    }
    problems.extend(foreign_routes(root));
    Finding::of(problems, "it leaves our devices and foreign routes alone")
}

/// The commands that keep it away, and put ports back that it took off the bridge.
fn unmanage(inspection: &Inspection, names: &[String]) -> String {
    let bridges = inspection.pod_bridges();
    let observed = inspection.snapshot.observed.as_ref();
    let on_bridge = |name: &str| {
        let ports = observed.iter().flat_map(|seen| bridges.iter().filter_map(|bridge| seen.bridges.get(bridge)));
        ports.flatten().any(|port| port.as_str() == name)
    };
    let mut lines = vec![
        "mkdir -p /etc/systemd/network".to_owned(),
        format!(
            "printf '[Match]\\nName={}\\n\\n[Link]\\nUnmanaged=yes\\n' > /etc/systemd/network/00-fabric.network",
            patterns(inspection).join(" ")
        ),
        "networkctl reload".to_owned(),
    ];
    let pods = inspection.addresses().map(|addresses| addresses.pods).unwrap_or_default();
    for pod in pods {
        let (Some(bridge), Some(attached)) = (pod.saved.bridge, pod.saved.attached) else { continue };
        for port in attached.ports.iter().filter(|port| names.contains(port) && !on_bridge(port)) {
            lines.push(format!("ip link set {port} master {bridge} up"));
        }
    }
    lines.join("\n")
}

/// The files with this ending in the order in which networkd and udev try them: the first that fits an interface decides.
fn systemd_files(root: &Path, ending: &str) -> Vec<(PathBuf, String)> {
    let mut files: BTreeMap<String, PathBuf> = BTreeMap::new();
    for folder in FOLDERS {
        for entry in fs::read_dir(root.join(folder)).into_iter().flatten().flatten() {
            if let Some(name) = entry.file_name().to_str().filter(|name| name.ends_with(ending)) {
                files.entry(name.to_owned()).or_insert_with(|| entry.path());
            }
        }
    }
    files.into_values().filter_map(|file| fs::read_to_string(&file).ok().map(|text| (file, text))).collect()
}

/// The file as it is called on the host.
fn shown(root: &Path, file: &Path) -> String {
    Path::new("/").join(file.strip_prefix(root).unwrap_or(file)).display().to_string()
}

/// The settings of one section, in their order.
fn section<'a>(text: &'a str, wanted: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
    let mut inside = false;
    text.lines().map(str::trim).filter_map(move |line| {
        if line.starts_with('[') {
            inside = line.trim_matches(['[', ']']) == wanted;
        }
        line.split_once('=').filter(|_| inside).map(|(key, value)| (key.trim(), value.trim()))
    })
}

/// Whether a `.network` file's [Match] section fits an interface, by what is known of it: a key that isn't known here
/// (a MAC address, a path, a driver) is one that a virtual device doesn't have.
fn matches(text: &str, name: &str, kind: &str) -> bool {
    let mut keys = section(text, "Match").peekable();
    keys.peek().is_some()
        && keys.all(|(key, value)| match key {
            "Name" => any(value, &[name]),
            "Kind" => any(value, &[kind]),
            // A veth has no type of its own but that of Ethernet.
            "Type" => any(value, &[if kind == "veth" { "ether" } else { kind }]),
            "Virtualization" | "Host" | "KernelCommandLine" | "KernelVersion" | "Architecture" => true,
            _ => false,
        })
}

/// A list of patterns as systemd has them: a `!` before the first turns all of them round.
fn any(patterns: &str, names: &[&str]) -> bool {
    let (invert, patterns) = match patterns.strip_prefix('!') {
        Some(rest) => (true, rest),
        None => (false, patterns),
    };
    patterns.split_whitespace().any(|pattern| names.iter().any(|name| glob(pattern, name))) != invert
}

/// Shell patterns with `*`, `?` and sets such as `[0-9a-f]` or `[!x]`.
fn glob(pattern: &str, name: &str) -> bool {
    if let (Some((set, rest)), Some(first)) = (set(pattern), name.chars().next()) {
        return set.contains(first) && glob(rest, &name[first.len_utf8()..]);
    }
    match (pattern.chars().next(), name.chars().next()) {
        (None, None) => true,
        (Some('*'), _) => {
            let rest = &pattern[1..];
            glob(rest, name) || name.chars().next().is_some_and(|first| glob(pattern, &name[first.len_utf8()..]))
        }
        (Some('?'), Some(first)) => glob(&pattern[1..], &name[first.len_utf8()..]),
        (Some(wanted), Some(first)) if wanted == first => {
            glob(&pattern[wanted.len_utf8()..], &name[first.len_utf8()..])
        }
        _ => false,
    }
}

/// What may stand for one character.
struct Set<'a> {
    negated: bool,
    members: &'a str,
}

/// The set that a pattern begins with, and what follows it.
fn set(pattern: &str) -> Option<(Set<'_>, &str)> {
    let inside = pattern.strip_prefix('[')?;
    let (negated, inside) = inside.strip_prefix(['!', '^']).map_or((false, inside), |inside| (true, inside));
    // A bracket that comes first is a member.
    let end = inside.char_indices().skip(1).find(|(_, c)| *c == ']')?.0;
    Some((Set { negated, members: &inside[..end] }, &inside[end + 1..]))
}

impl Set<'_> {
    fn contains(&self, wanted: char) -> bool {
        let members: Vec<char> = self.members.chars().collect();
        let range = |at: usize| members.get(at + 1).filter(|c| **c == '-').and_then(|_| members.get(at + 2));
        let (mut at, mut found) = (0, false);
        while let Some(first) = members.get(at) {
            let last = range(at);
            found |= (*first..=*last.unwrap_or(first)).contains(&wanted);
            at += if last.is_some() { 3 } else { 1 };
        }
        found != self.negated
    }
}

fn unmanaged(text: &str) -> bool {
    section(text, "Link").any(|(key, value)| key == "Unmanaged" && ["yes", "true", "1", "on"].contains(&value))
}

/// At its restart networkd deletes routes and nexthop objects that it doesn't know, unless it is told not to.
fn foreign_routes(root: &Path) -> Option<Problem> {
    let tops = ["etc", "run", "usr/lib", "lib"];
    let settings = tops.map(|top| root.join(top).join("systemd/networkd.conf"));
    let folders = tops.map(|top| root.join(top).join("systemd/networkd.conf.d"));
    let more = folders.iter().flat_map(fs::read_dir).flatten().flatten().map(|entry| entry.path());
    let text: String = settings.into_iter().chain(more).filter_map(|file| fs::read_to_string(file).ok()).collect();
    let says_no = |name: &str| {
        text.lines()
            .filter_map(|line| line.trim().split_once('='))
            .any(|(key, value)| key.trim() == name && ["no", "false", "0", "off"].contains(&value.trim()))
    };
    let name = ["ManageForeignRoutes", "ManageForeignNextHops"].into_iter().find(|name| !says_no(name))?;
    Some(Problem::warning(
        format!("{name} is on, as by default: when it restarts, it deletes our routes (they are repaired)"),
        "mkdir -p /etc/systemd/networkd.conf.d\n\
         printf '[Network]\\nManageForeignRoutes=no\\nManageForeignNextHops=no\\n' > \
         /etc/systemd/networkd.conf.d/fabric.conf",
    ))
}

pub(super) fn network_manager(inspection: &Inspection) -> Finding {
    if !inspection.places.root.join("run/NetworkManager").exists() {
        return Finding::skipped("NetworkManager doesn't run, or its files are not visible here");
    }
    let managed = interfaces(inspection).into_iter().filter(|(name, _)| {
        let state =
            index(inspection, name).and_then(|index| read(inspection, &format!("run/NetworkManager/devices/{index}")));
        state.is_some_and(|state| state.lines().any(|line| line == "managed=true"))
    });
    let managed: Vec<String> = managed.map(|(name, _)| name).collect();
    if managed.is_empty() {
        return Finding::fine("it doesn't manage our devices");
    }
    Finding::failed(
        format!("it manages {}", all(managed)),
        // `=` would end what the host's own files keep from it, such as the underlay interface.
        format!(
            "mkdir -p /etc/NetworkManager/conf.d\n\
             printf '[keyfile]\\nunmanaged-devices+={}\\n' > /etc/NetworkManager/conf.d/fabric.conf\n\
             systemctl reload NetworkManager",
            patterns(inspection).iter().map(|name| format!("interface-name:{name}")).collect::<Vec<_>>().join(";")
        ),
    )
}

/// The default policy of systemd since 242 gives virtual devices an address of its own, unless it was set when they were
/// made, as ours is.
pub(super) fn udev(inspection: &Inspection) -> Finding {
    let root = &inspection.places.root;
    let names_ours = |text: &str| ["fabric", "Driver=vxlan", "Kind=vxlan"].iter().any(|word| text.contains(word));
    let sets = |text: &str| ["persistent", "random"].iter().any(|by| text.contains(&format!("MACAddressPolicy={by}")));
    let first = systemd_files(root, ".link").into_iter().find(|(_, text)| names_ours(text));
    let problems = first.filter(|(_, text)| sets(text)).map(|(file, _)| {
        Problem::failure(
            format!("{} gives our devices other MAC addresses", shown(root, &file)),
            "printf '[Match]\\nOriginalName=fabric* fab.* fab6.*\\n\\n[Link]\\nMACAddressPolicy=none\\n' > \
             /etc/systemd/network/00-fabric.link",
        )
    });
    Finding::of(problems.into_iter().collect(), "no link file gives our devices other MAC addresses")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn match_sections_are_judged_as_networkd_does() {
        for (text, name, kind, want) in [
            ("[Match]\nName=*\n", "veth1", "veth", true),
            ("[Match]\nName=en* veth*\n", "veth1", "veth", true),
            ("[Match]\nName=en*\n", "veth1", "veth", false),
            ("[Match]\nName=!en* eth0\n", "veth1", "veth", true),
            ("[Match]\nName=!veth*\n", "veth1", "veth", false),
            ("[Match]\nType=ether\n", "veth1", "veth", true),
            ("[Match]\nType=ether\n", "cni0", "bridge", false),
            ("[Match]\nType=ether\nKind=!*\n", "veth1", "veth", false),
            ("[Match]\nKind=bridge\n", "cni0", "bridge", true),
            ("[Match]\nName=*\nMACAddress=02:00:00:00:00:01\n", "veth1", "veth", false),
            ("[Match]\n\n[Network]\nDHCP=yes\n", "veth1", "veth", false),
            ("[Match]\nName=fabric.?\n", "fabric.1", "vxlan", true),
            ("[Match]\nName=veth[0-9a-f][!x]\n", "vethc1", "veth", true),
            ("[Match]\nName=veth[0-9a-f][!x]\n", "vethg1", "veth", false),
            ("[Match]\nName=veth[0-9a-f][!x]\n", "vethcx", "veth", false),
            ("[Match]\nName=veth[]a-]\n", "veth]", "veth", true),
            ("[Match]\nName=veth[0\n", "veth0", "veth", false),
        ] {
            assert_eq!(matches(text, name, kind), want, "{text} {name}");
        }
    }
}
