//! The check of the pods' addresses: whether each is one pod's, kept for it, and given back when the pod is gone.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use fabric_core::attachments::{IPAM_NETWORK, Owner, told_container};

use super::Inspection;
use super::finding::Finding;
use crate::host::addresses::{Addresses, Entry};

pub(super) fn check(inspection: &Inspection) -> Finding {
    let addresses = match inspection.addresses() {
        Ok(addresses) => addresses,
        Err(why) => return Finding::skipped(why),
    };
    let own = inspection.view.holding.own.as_ref().map(|own| own.key.subnets());
    let in_ours = |ip: IpAddr| own.as_ref().is_some_and(|all| all.values().any(|subnet| subnet.contains(ip)));
    let folder = inspection.places.addresses.join(IPAM_NETWORK);

    if let Some((ip, owners)) = addresses.duplicates().iter().next() {
        let second = owners.last().expect("more than one");
        return Finding::failed(
            format!("{ip} is the address of {} and of {}", name(owners[0]), name(second)),
            format!("recreate one of the pods; the later one is usually {}", second.container),
        );
    }
    if let Some((ip, owner)) = addresses.unreserved().next() {
        let told = told_container(&owner.network, &owner.container);
        let file = folder.join(ip.to_string());
        return Finding::failed(
            format!("{ip} of {} is free by {}: the next pod may get it", name(owner), folder.display()),
            format!("mkdir -p {} && printf '{told}\\r\\n{}' > {}", folder.display(), owner.ifname, file.display()),
        );
    }
    let evidence = evidence(&addresses);
    if let Some(foreign) = addresses.foreign.iter().find(|entry| in_ours(entry.ip)) {
        return Finding::warning(
            format!(
                "{evidence}; {} of this node's subnet is taken by another plugin's network {}",
                foreign.ip,
                foreign.network()
            ),
            format!("give {0} a subnet of its own: grep -l '\"{0}\"' /etc/cni/net.d/*", foreign.network()),
        );
    }
    match addresses.leaked.first() {
        None => Finding::fine(evidence),
        Some(first) => {
            Finding::warning(format!("{evidence}, such as {}", first.file.display()), removal(&addresses.leaked))
        }
    }
}

/// How many there are of each kind.
fn evidence(addresses: &Addresses) -> String {
    let Addresses { attached, leaked, foreign, pods, unknown_ports, .. } = addresses;
    let mut words = format!("{} attached pods, {} addresses", pods.len(), attached.len());
    if !unknown_ports.is_empty() {
        words += &format!(", {} ports without a saved attachment", unknown_ports.len());
    }
    for (kind, entries) in [("leaked", leaked), ("of other networks", foreign)] {
        if !entries.is_empty() {
            words += &format!("; {} {kind}", entries.len());
        }
    }
    words
}

fn name(owner: &Owner) -> String {
    format!("{} of container {} ({})", owner.ifname, owner.container, owner.network)
}

/// A command that frees these addresses.
fn removal(entries: &[Entry]) -> String {
    let mut folders: BTreeMap<&Path, String> = BTreeMap::new();
    for entry in entries {
        let names = folders.entry(entry.file.parent().unwrap_or(Path::new("/"))).or_default();
        *names += &format!(" {}", entry.ip);
    }
    let commands = folders.iter().map(|(folder, names)| format!("(cd {} && rm -f{names})", folder.display()));
    commands.collect::<Vec<_>>().join("; ")
}
