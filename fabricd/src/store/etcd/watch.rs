//! Watches the store: a list, then every change after it, and again from the start when that breaks.
//!
//! ```text
//! list config and leases at revision R ──► publish ──► watch from R+1 ──► fold each batch in, publish ─┐
//!   ▲                                        │                               ▲                         │
//!   │                                        └── most leases gone? look      └─────────────────────────┘
//!   │                                            again before publishing it
//!   └── stream broken, history compacted, store replaced, config changed, most leases gone at once
//! ```
//!
//! A list is always right and takes milliseconds, so there is one way back for everything that can go wrong. Nothing is
//! ever published but a whole list, or one with events folded in; while the store can't be reached, the last set stays.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use etcd_client::{
    EventType, GetOptions, KeyValue, Txn, TxnOp, TxnOpResponse, WatchOptions, WatchResponse, WatchStream,
};
use fabric_core::leases::{Entry, Event, LeaseSet};
use fabric_core::model::Subnet;
use fabric_core::network::NetworkConfig;
use fabric_core::record::LeaseKey;
use futures::FutureExt as _;
use tokio::sync::watch::Receiver;
use tokio::time::{Instant, timeout};

use super::Store;
use super::connect::reason;
use super::identity::{Replaced, Seen};
use super::keys::KeyKind;
use crate::retry::{self, Look, Outage};
use crate::store::{Connection, Network, StoreError, publish};

/// The largest response that is taken, in bytes: 50,000 leases are about 15 MB.
pub(super) const MAX_RESPONSE: usize = 256 << 20;

/// A watch that says nothing for so long is asked whether it is still there.
const QUIET: Duration = Duration::from_secs(20);

/// What is done here, in errors.
const WATCH: &str = "watch the leases";

type Interrupted = retry::Interrupted<StoreError>;

impl From<StoreError> for Interrupted {
    fn from(error: StoreError) -> Self {
        Self::Failed(error)
    }
}

/// Config and leases at one revision.
struct Listing {
    config: Option<Vec<u8>>,
    entries: Vec<Entry>,
    /// Last parts of the reservations' keys, and the nodes.
    reservations: Vec<(String, Vec<u8>)>,
    revision: i64,
    /// The store that this came from.
    seen: Seen,
}

/// Watches the store until the task is dropped.
pub(super) async fn watch_for_ever(store: Arc<Store>) {
    let mut outage = Outage::new("leases");
    loop {
        let began = Instant::now();
        let Err(interrupted) = list_and_watch(&store, &mut outage).await;
        if let Interrupted::Failed(error) = &interrupted {
            publish(&store.connection, Connection::from(error));
        }
        outage.wait(began, &interrupted).await;
    }
}

async fn list_and_watch(store: &Store, outage: &mut Outage) -> Result<Infallible, Interrupted> {
    let mut replaced = store.connector.identity.replaced();
    let mut given_up = store.connector.given_up();
    let (mut set, seen) = list_and_publish(store, &mut replaced).await?;
    let mut stream = watch(store, set.revision() + 1).await?;
    loop {
        let response = tokio::select! {
            response = next(store, &mut stream) => response?,
            Ok(()) = replaced.changed() => return Err(was_replaced()),
            Ok(()) = given_up.changed() => return Err(Interrupted::Relist("the address that the watch was from has gone".into())),
        };
        let mut changes = take_in(store, &mut set, seen, &response)?;
        // What has come in meanwhile is folded in before anybody is told.
        while let Some(more) = stream.message().now_or_never() {
            changes += take_in(store, &mut set, seen, &more.map_err(broken)?.ok_or_else(ended)?)?;
        }
        if changes > 0 {
            publish_leases(store, &set)?;
        }
        outage.over();
        publish(&store.connection, Connection::Up);
    }
}

/// Reads config and leases at one revision, by a linearizable read: one transaction with four ranges.
async fn list(store: &Store) -> Result<Listing, StoreError> {
    let ranges = Txn::new().and_then([
        TxnOp::get(store.keys.config(), None),
        TxnOp::get(store.keys.subnets(), Some(GetOptions::new().with_prefix())),
        TxnOp::get(store.keys.reservations(), Some(GetOptions::new().with_prefix())),
        TxnOp::get(store.keys.inquiries(), Some(GetOptions::new().with_prefix())),
    ]);
    let (response, seen) = store
        .connector
        .ask("list the leases", |client| {
            let (mut kv, ranges) = (client.kv_client().max_decoding_message_size(MAX_RESPONSE), ranges.clone());
            async move { kv.txn(ranges).await }
        })
        .await?;
    let revision = response.header().map_or(0, etcd_client::ResponseHeader::revision);
    let mut ranges = response.op_responses().into_iter().map(|range| match range {
        TxnOpResponse::Get(mut range) => range.take_kvs(),
        _ => Vec::new(),
    });
    let config = ranges.next().unwrap_or_default().into_iter().next().map(|kv| kv.value().to_vec());
    let lease = |kv: &KeyValue| match store.keys.kind(kv.key()) {
        KeyKind::Lease(key) => Some(entry(key, kv)),
        _ => None,
    };
    let entries = ranges.next().unwrap_or_default().iter().filter_map(lease).collect();
    let reservation = |kv: KeyValue| match store.keys.kind(kv.key()) {
        KeyKind::Reservation(key) => Some((key, kv.into_key_value().1)),
        _ => None,
    };
    let reservations = ranges.next().unwrap_or_default().into_iter().filter_map(reservation).collect();
    for asked in ranges.next().unwrap_or_default() {
        if let KeyKind::Inquiry(name) = store.keys.kind(asked.key()) {
            store.asked(&name, Some(asked.value()));
        }
    }
    Ok(Listing { config, entries, reservations, revision, seen })
}

fn entry(key: String, kv: &KeyValue) -> Entry {
    let (create_revision, mod_revision) = (kv.create_revision(), kv.mod_revision());
    Entry { key, value: kv.value().to_vec(), create_revision, mod_revision }
}

/// Lists and publishes; most leases being gone is published only when a second look shows the same.
async fn list_and_publish(store: &Store, replaced: &mut Receiver<u64>) -> Result<(LeaseSet, Seen), StoreError> {
    let before = store.leases.borrow().clone().or_else(|| store.remembered.clone()).unwrap_or_default();
    let first = look(store, &before, replaced).await?;
    let (mut set, seen) = if first.loses_most {
        first.hold_back().await;
        look(store, &before, replaced).await?.believe()
    } else {
        first.found
    };
    if !set.departed().is_empty() {
        let guards = store.guards_without_record().await?;
        set.forget_departed(|subnet| guards.iter().any(|(guarded, _)| *guarded == subnet));
    }
    publish(&store.leases, Some(Arc::new(set.clone())));
    store.listed_of.store(seen.generation, Ordering::Release);
    Ok((set, seen))
}

/// Lists config and leases, and publishes the config. What was replaced before the list is not news after it.
async fn look(
    store: &Store,
    before: &LeaseSet,
    replaced: &mut Receiver<u64>,
) -> Result<Look<(LeaseSet, Seen)>, StoreError> {
    let listing = list(store).await?;
    replaced.mark_unchanged();
    publish_network(store, listing.config.as_deref());
    let mut set = LeaseSet::snapshot(before, listing.entries, listing.revision);
    for (key, node) in &listing.reservations {
        set.reserve(key, Some(node), listing.revision);
    }
    let (left, loses_most) = (set.len(), set.lacks_most_of(before));
    Ok(Look { kind: "leases", found: (set, listing.seen), left, loses_most })
}

/// Watches everything under the prefix from `revision` on.
async fn watch(store: &Store, revision: i64) -> Result<WatchStream, StoreError> {
    let options = WatchOptions::new().with_prefix().with_start_revision(revision);
    let prefix = store.keys.all();
    store
        .connector
        .send(WATCH, |client| {
            let (prefix, options) = (prefix.clone(), options.clone());
            async move { client.watch_client().max_decoding_message_size(MAX_RESPONSE).watch(prefix, Some(options)).await }
        })
        .await
}

/// The next response. A watch that is silent is asked for its progress, which it must answer: one on a member that
/// lost its memory would stay silent for ever.
async fn next(store: &Store, stream: &mut WatchStream) -> Result<WatchResponse, Interrupted> {
    let message = match timeout(QUIET, stream.message()).await {
        Ok(message) => message,
        Err(_) => {
            stream.request_progress().await.map_err(broken)?;
            let answer = timeout(store.connector.limit(), stream.message()).await;
            answer.map_err(|_| Interrupted::Relist("the watch is silent".into()))?
        }
    };
    message.map_err(broken)?.ok_or_else(ended)
}

fn broken(error: etcd_client::Error) -> Interrupted {
    Interrupted::Relist(format!("the watch broke: {}", reason(&error)))
}

fn was_replaced() -> Interrupted {
    Interrupted::Relist("the store was replaced".into())
}

fn ended() -> Interrupted {
    Interrupted::Relist("the store ended the watch".into())
}

/// Folds one response in; gives how many changes of leases it had.
fn take_in(store: &Store, set: &mut LeaseSet, seen: Seen, response: &WatchResponse) -> Result<usize, Interrupted> {
    if let Some(header) = response.header() {
        store.connector.identity.check_cluster(seen, header).map_err(|Replaced| was_replaced())?;
    }
    if response.canceled() {
        return Err(match response.compact_revision() {
            0 => StoreError::Refused { operation: WATCH, reason: response.cancel_reason().to_owned() }.into(),
            revision => Interrupted::Relist(format!("history before revision {revision} was compacted")),
        });
    }
    // What was given back took its guards along, in the same transaction.
    let deleted_guard = |event: &etcd_client::Event| {
        let kv = event.kv().filter(|_| event.event_type() == EventType::Delete)?;
        Some((kv.mod_revision(), store.keys.guarded(kv.key())?))
    };
    let deleted_guards: BTreeSet<(i64, Subnet)> = response.events().iter().filter_map(deleted_guard).collect();
    let mut changes = 0;
    for event in response.events() {
        let Some(kv) = event.kv() else { continue };
        let deleted = event.event_type() == EventType::Delete;
        let change = match store.keys.kind(kv.key()) {
            KeyKind::Config => {
                publish_network(store, (!deleted).then(|| kv.value()));
                // A claim has to be decided on a set that is younger than the config.
                return Err(Interrupted::Relist("the network config changed".into()));
            }
            KeyKind::Lease(key) if deleted => {
                let subnets = LeaseKey::decode(&key).map(|key| *key.subnets()).unwrap_or_default();
                let given_back = subnets.values().any(|s| deleted_guards.contains(&(kv.mod_revision(), *s)));
                Event::Delete { key, given_back }
            }
            KeyKind::Lease(key) => Event::Put(entry(key, kv)),
            KeyKind::Reservation(key) => {
                set.reserve(&key, (!deleted).then(|| kv.value()), kv.mod_revision());
                changes += 1;
                continue;
            }
            KeyKind::Inquiry(name) => {
                store.asked(&name, (!deleted).then(|| kv.value()));
                continue;
            }
            KeyKind::Other => continue,
        };
        // Not the header's revision: while a watch catches up, that is ahead of the events.
        set.apply(change, kv.mod_revision());
        changes += 1;
    }
    if !set.departed().is_empty() && !deleted_guards.is_empty() {
        set.forget_departed(|subnet| deleted_guards.iter().all(|(_, deleted)| *deleted != subnet));
        changes += 1;
    }
    Ok(changes)
}

/// Publishes a set with events folded in, unless they removed most of it: then a list has to confirm it.
fn publish_leases(store: &Store, set: &LeaseSet) -> Result<(), Interrupted> {
    let suspicious = store.leases.borrow().as_ref().is_some_and(|before| set.lacks_most_of(before));
    if suspicious {
        return Err(Interrupted::Relist("most leases were removed at once".into()));
    }
    publish(&store.leases, Some(Arc::new(set.clone())));
    Ok(())
}

fn publish_network(store: &Store, config: Option<&[u8]>) {
    let network = match config.map(NetworkConfig::decode) {
        None => Network::Missing,
        Some(Ok(config)) => Network::Valid(config),
        Some(Err(error)) => Network::Invalid(error),
    };
    publish(&store.network, network);
}
