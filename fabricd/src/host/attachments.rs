//! Which pod is behind a port of the bridge: read from what `fabric-cni` remembers of each pod, whenever that changes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use fabric_core::attachments::{Owner, SavedAttachment, SavedPod};
use fabric_core::handoff::Attached;
use fabric_core::model::IfName;
use fabric_core::plan::filter::Pod;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::sync::watch;
use tracing::warn;

use crate::host::addresses;
use crate::kernel::Observed;
use crate::retry::Backoff;

/// The pods that are attached, as far as the filter needs to know them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachedPods {
    /// The bridges that they are attached to.
    pub bridges: BTreeSet<IfName>,
    /// Each by its port.
    pub ports: BTreeMap<IfName, Pod>,
    /// All attachments whose addresses are known, whatever they are attached to.
    pub attachments: BTreeMap<Owner, AttachedPod>,
}

/// An attachment, as far as network policies need to know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachedPod {
    /// Its addresses.
    pub ips: BTreeSet<IpAddr>,
    /// The pod of Kubernetes that it is, if that is known.
    pub pod: Option<SavedPod>,
}

impl Default for AttachedPods {
    /// No pod yet, and the bridge that the first one makes.
    fn default() -> Self {
        Self::of(&BTreeMap::new())
    }
}

impl AttachedPods {
    fn of(saved: &BTreeMap<Owner, SavedAttachment>) -> Self {
        let attached = saved.values().filter_map(|saved| saved.attached.as_ref());
        let with_addresses = saved.iter().filter(|(_, saved)| !saved.ips().is_empty());
        let attachment = |(owner, saved): (&Owner, &SavedAttachment)| {
            (owner.clone(), AttachedPod { ips: saved.ips().iter().copied().collect(), pod: saved.pod.clone() })
        };
        Self {
            bridges: addresses::bridges_of(saved.values()),
            ports: attached.flat_map(pods).collect(),
            attachments: with_addresses.map(attachment).collect(),
        }
    }

    /// The ports of their bridges.
    #[must_use]
    pub fn ports_of(&self, observed: &Observed) -> BTreeSet<IfName> {
        self.bridges.iter().filter_map(|bridge| observed.bridges.get(bridge)).flatten().copied().collect()
    }
}

/// How long at most until a folder that can't be watched is read again.
const RETRY: Duration = Duration::from_secs(10);

/// Watches the attachments below `dir`, a folder for each network. What can't be read is no pod: its port stays open
/// for every address of this node.
#[must_use]
pub fn watch_attachments(dir: PathBuf) -> watch::Receiver<Arc<AttachedPods>> {
    let (sender, receiver) = watch::channel(Arc::default());
    // It waits in the kernel, so it has a thread of its own; that ends with the process.
    thread::spawn(move || {
        let mut retry = Backoff::new(Duration::from_millis(500), RETRY);
        while !sender.is_closed() {
            let began = Instant::now();
            if let Err(error) = publish_all(&dir, &sender) {
                retry.lasted(began.elapsed());
                if retry.attempts() == 0 {
                    warn!(dir = %dir.display(), %error, "cannot watch which pod is behind a port, trying again");
                }
                #[expect(clippy::disallowed_methods, reason = "on a thread of its own")]
                thread::sleep(retry.delay());
            }
        }
    });
    receiver
}

/// Reads everything anew after each change, until something fails or nobody listens.
fn publish_all(dir: &Path, sender: &watch::Sender<Arc<AttachedPods>>) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let changes = Inotify::init(InitFlags::IN_CLOEXEC)?;
    let written = AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_MODIFY
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_DELETE_SELF;
    while !sender.is_closed() {
        // First watched, then read, so that nothing happens in between. Watching twice is watching once.
        changes.add_watch(dir, written)?;
        for network in fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<PathBuf>>>()? {
            if network.is_dir() {
                changes.add_watch(&network, written)?;
            }
        }
        let pods = Arc::new(AttachedPods::of(&addresses::attachments(dir)?));
        sender.send_if_modified(|current| {
            let differs = *current != pods;
            *current = pods;
            differs
        });
        changes.read_events()?;
    }
    Ok(())
}

fn pods(attached: &Attached) -> Vec<(IfName, Pod)> {
    let ips: BTreeSet<_> = attached.ips.iter().copied().collect();
    let Some(mac) = attached.mac.filter(|_| !ips.is_empty()) else { return vec![] };
    let ports = attached.ports.iter().filter_map(|port| port.parse().ok());
    ports.map(|port| (port, Pod { mac, ips: ips.clone() })).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST_LINE: &str = "{}\n";
    const POD: &str = r#"{"ports":["veth7"],"mac":"02:42:c0:00:02:07","ips":["10.244.3.7","fd00:3::7"]}"#;

    #[test]
    fn pods_are_looked_for_on_the_bridges_that_their_attachments_name() {
        let names = |pods: &AttachedPods| pods.bridges.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(names(&AttachedPods::default()), ["cni0"]);
        let owner = |container: &str| Owner { network: "n".into(), container: container.into(), ifname: "eth0".into() };
        let saved =
            |bridge: &str| SavedAttachment::decode(format!(r#"{{"config":{{"bridge":"{bridge}"}}}}"#).as_bytes());
        let pods = AttachedPods::of(&[(owner("c1"), saved("br-pods")), (owner("c2"), saved("br-2"))].into());
        assert_eq!(names(&pods), ["br-2", "br-pods"]);
    }

    #[tokio::test]
    async fn pods_that_come_and_go_are_heard_of() {
        let dir = tempfile::tempdir().expect("a folder");
        let mut ports = watch_attachments(dir.path().join("fabric"));
        let network = dir.path().join("fabric/pods");
        fs::create_dir_all(&network).expect("a folder");
        let file = network.join("c1@eth0.json");
        fs::write(&file, FIRST_LINE).expect("written");
        fs::write(network.join("c2@eth0.json"), "garbage").expect("written");
        fs::write(
            network.join("c3@eth0.json"),
            FIRST_LINE.to_owned() + &POD.replace("veth7", "not a port's name at all"),
        )
        .expect("written");
        fs::write(&file, FIRST_LINE.to_owned() + POD).expect("written");
        let known = ports.wait_for(|pods| !pods.ports.is_empty()).await.expect("watched").clone();
        let pod = &known.ports[&"veth7".parse().expect("valid")];
        assert_eq!((known.ports.len(), pod.mac.to_string(), pod.ips.len()), (1, "02:42:c0:00:02:07".to_owned(), 2));
        fs::remove_file(file).expect("removed");
        ports.wait_for(|pods| pods.ports.is_empty()).await.expect("watched");
    }
}
