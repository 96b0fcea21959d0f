//! What `WatchPeers` and `WatchLeases` tell: everything that is there, then every change.

use std::collections::BTreeMap;
use std::sync::Arc;

use fabric_core::record::LeaseKey;
use fabric_proto::v1::{ChangeType, LeaseEvent, PeerEvent};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::convert;
use crate::status::view::View;

/// How many changes wait for a reader; a slower one gets later states, never an older one.
const WAITING: usize = 256;

/// A stream of the changes of something.
pub type Changes<E> = ReceiverStream<Result<E, Status>>;

/// The peers.
pub fn peers(view: watch::Receiver<Arc<View>>) -> Changes<PeerEvent> {
    let list = |view: &View| view.peers().map(|lease| (lease.key, convert::peer(view, lease))).collect();
    watch_view(view, list, |kind, peer| PeerEvent { r#type: kind.into(), peer: Some(peer) })
}

/// The leases.
pub fn leases(view: watch::Receiver<Arc<View>>) -> Changes<LeaseEvent> {
    let list = |view: &View| {
        let leases = view.leases.iter().flat_map(|leases| leases.iter());
        leases.map(|lease| (lease.key, convert::lease_record(view, lease))).collect()
    };
    watch_view(view, list, |kind, lease| LeaseEvent { r#type: kind.into(), lease: Some(lease) })
}

fn watch_view<T, E>(
    mut view: watch::Receiver<Arc<View>>,
    list: impl Fn(&View) -> BTreeMap<LeaseKey, T> + Send + 'static,
    event: impl Fn(ChangeType, T) -> E + Send + 'static,
) -> Changes<E>
where
    T: Clone + PartialEq + Send + 'static,
    E: Send + 'static,
{
    let (to, from) = mpsc::channel(WAITING);
    tokio::spawn(async move {
        let mut known = BTreeMap::new();
        loop {
            let seen = view.borrow_and_update().clone();
            let now = list(&seen);
            for (kind, thing) in changes(&known, &now) {
                // Whoever watched has gone.
                if to.send(Ok(event(kind, thing))).await.is_err() {
                    return;
                }
            }
            known = now;
            tokio::select! {
                changed = view.changed() => if changed.is_err() { return },
                () = to.closed() => return,
            }
        }
    });
    ReceiverStream::new(from)
}

fn changes<K: Ord, T: Clone + PartialEq>(was: &BTreeMap<K, T>, now: &BTreeMap<K, T>) -> Vec<(ChangeType, T)> {
    let gone = was.iter().filter(|(key, _)| !now.contains_key(*key));
    let gone = gone.map(|(_, thing)| (ChangeType::Removed, thing.clone()));
    let others = now.iter().filter_map(|(key, thing)| match was.get(key) {
        None => Some((ChangeType::Added, thing.clone())),
        Some(before) if before != thing => Some((ChangeType::Changed, thing.clone())),
        Some(_) => None,
    });
    gone.chain(others).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_changes_and_goes_is_told_once() {
        let was = BTreeMap::from([("a", 1), ("b", 1), ("c", 1)]);
        let now = BTreeMap::from([("b", 2), ("c", 1), ("d", 1)]);
        let want = vec![(ChangeType::Removed, 1), (ChangeType::Changed, 2), (ChangeType::Added, 1)];
        assert_eq!(changes(&was, &now), want);
        assert_eq!(changes(&now, &now), vec![]);
    }
}
