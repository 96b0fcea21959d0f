//! Where the pods of this node are, from the host's side: host-local's file says which container has an address, the
//! attachment that `fabric-cni` saved says by which ports of the bridge.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use serde::Deserialize;

/// The pod that has an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPlace {
    /// The address.
    pub ip: IpAddr,
    /// Its container.
    pub container: String,
    /// The host's ends of its cables; `None` when there is no saved attachment of it.
    pub ports: Option<Vec<String>>,
}

/// The second line of a saved attachment.
#[derive(Deserialize)]
struct Attached {
    ports: Vec<String>,
}

/// All pods that have an address by host-local.
///
/// # Errors
/// When a folder can't be read.
pub fn all(addresses: &Path, attachments: &Path) -> io::Result<Vec<PodPlace>> {
    let mut places = vec![];
    for network in folders(addresses)? {
        for entry in fs::read_dir(addresses.join(&network))? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
            let Some(ip) = name else { continue };
            let (container, interface) = owner(&fs::read_to_string(&path)?);
            let saved = attachments.join(&network).join(format!("{container}@{interface}.json"));
            places.push(PodPlace { ip, ports: ports(&saved), container });
        }
    }
    Ok(places)
}

/// host-local writes the container and the interface on two lines.
fn owner(content: &str) -> (String, String) {
    let mut lines = content.lines().map(|line| line.trim().to_owned());
    (lines.next().unwrap_or_default(), lines.next().unwrap_or_default())
}

fn ports(saved: &Path) -> Option<Vec<String>> {
    let content = fs::read_to_string(saved).ok()?;
    let attached: Attached = serde_json::from_str(content.lines().nth(1)?).ok()?;
    Some(attached.ports)
}

fn folders(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        entries => entries?,
    };
    let names = entries.flatten().filter(|entry| entry.path().is_dir());
    Ok(names.filter_map(|entry| entry.file_name().into_string().ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_container_and_ports_come_together() {
        let dir = tempfile::tempdir().unwrap();
        let (addresses, attachments) = (dir.path().join("networks"), dir.path().join("fabric"));
        for (file, content) in [
            (addresses.join("fabric/10.244.1.7"), "c1\r\neth0"),
            (addresses.join("fabric/10.244.1.8"), "c2\r\neth0"),
            (addresses.join("fabric/last_reserved_ip.0"), "10.244.1.8"),
            (attachments.join("fabric/c1@eth0.json"), "{}\n{\"ports\":[\"veth1\"]}\n"),
        ] {
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, content).unwrap();
        }
        let mut found = all(&addresses, &attachments).unwrap();
        found.sort_by_key(|place| place.ip);
        assert_eq!((found[0].container.as_str(), found[0].ports.clone()), ("c1", Some(vec!["veth1".into()])));
        assert_eq!((found[1].container.as_str(), found[1].ports.clone()), ("c2", None));
        assert_eq!(all(Path::new("/nowhere"), Path::new("/nowhere")).unwrap(), []);
    }
}
