//! [`SetFold`]: all objects of a kind, kept whole and published as a map: unknown until they were listed, then the latest.

use std::sync::Arc;

use fabric_core::cow_map::CowMap;
use fabric_core::services::sets::lacks_most_of;
use tokio::sync::Notify;
use tokio::sync::watch::{Receiver, Sender};

use super::client::ApiError;
use super::reflector::{Fold, Object};

/// How it stands with a watch: `None` before the first answer, then whether it runs.
pub type State = Option<Result<(), ApiError>>;

/// All objects of a kind.
pub trait Set: Sized + Send + Sync + 'static {
    /// The kind.
    type Object: Object;
    /// What is published of them.
    type All: Published;

    /// Those of a list, after what is known.
    #[must_use]
    fn listed(&self, objects: &[Self::Object]) -> Self;

    /// An empty one, where a list is each of its objects by itself; `None` where it depends on what is known.
    #[must_use]
    fn begin_list(&self) -> Option<Self> {
        None
    }

    /// The list that it began with is whole: from now on it changes little.
    fn end_list(&mut self) {}

    /// Takes in that one was created or changed; true when that matters.
    fn apply(&mut self, object: &Self::Object) -> bool;

    /// Takes in that one was deleted; true when that matters.
    fn remove(&mut self, object: &Self::Object) -> bool;

    /// All of them.
    fn all(&self) -> &Self::All;
}

/// All objects of a kind, as others see them. Cheap to clone.
pub trait Published: Clone + Send + Sync + 'static {
    /// Whether more than half of what was known is gone.
    fn lacks_most_of(&self, before: &Self) -> bool;
}

impl<K: Ord + Send + Sync + 'static, V: Send + Sync + 'static> Published for CowMap<K, V> {
    fn lacks_most_of(&self, before: &Self) -> bool {
        lacks_most_of(self, before)
    }
}

/// A set, and who is told of it.
pub struct SetFold<S: Set, C> {
    set: S,
    published: Sender<Option<S::All>>,
    told: WatchStatus<C>,
}

impl<S: Set, C> SetFold<S, C> {
    /// A set that nothing is known of yet.
    pub fn new(set: S, published: Sender<Option<S::All>>, told: WatchStatus<C>) -> Self {
        Self { set, published, told }
    }
}

impl<S: Set, C: Send + Sync + 'static> Fold for SetFold<S, C> {
    type Object = S::Object;

    fn listed(&self, objects: Vec<S::Object>, _revision: i64) -> Self {
        Self { set: self.set.listed(&objects), published: self.published.clone(), told: self.told.clone() }
    }

    fn begin_list(&self) -> Option<Self> {
        let set = self.set.begin_list()?;
        Some(Self { set, published: self.published.clone(), told: self.told.clone() })
    }

    fn end_list(&mut self) {
        self.set.end_list();
    }

    fn applied(&mut self, object: S::Object) -> bool {
        self.set.apply(&object)
    }

    fn deleted(&mut self, object: S::Object) -> bool {
        self.set.remove(&object)
    }

    fn would_lose_most(&self) -> bool {
        self.published.borrow().as_ref().is_some_and(|published| self.set.all().lacks_most_of(published))
    }

    fn publish(&mut self) {
        self.published.send_replace(Some(self.set.all().clone()));
    }

    fn connection_is(&mut self, state: Result<(), &ApiError>) {
        self.told.say(state);
    }
}

/// Who is told how it stands with a watch: one of several in a `C`.
pub struct WatchStatus<C> {
    connections: Sender<C>,
    state: fn(&mut C) -> &mut State,
    /// Who decides when the API server refuses.
    refused: Option<Arc<Notify>>,
}

impl<C> Clone for WatchStatus<C> {
    fn clone(&self) -> Self {
        Self { connections: self.connections.clone(), state: self.state, refused: self.refused.clone() }
    }
}

impl<C> WatchStatus<C> {
    /// Who reads this state among those of `connections`.
    pub fn new(connections: &Sender<C>, state: fn(&mut C) -> &mut State) -> Self {
        Self { connections: connections.clone(), state, refused: None }
    }

    /// And who decides when the API server refuses.
    #[must_use]
    pub fn refused(self, refused: &Arc<Notify>) -> Self {
        Self { refused: Some(Arc::clone(refused)), ..self }
    }

    /// All the states.
    #[must_use]
    pub fn subscribe(&self) -> Receiver<C> {
        self.connections.subscribe()
    }

    /// The watch runs, or why it doesn't.
    pub fn say(&self, state: Result<(), &ApiError>) {
        let new = Some(state.map_err(Clone::clone));
        self.connections.send_if_modified(|all| {
            let differs = *(self.state)(all) != new;
            (self.state)(all).clone_from(&new);
            differs
        });
        if let (Err(ApiError::Refused { .. }), Some(refused)) = (state, &self.refused) {
            refused.notify_one();
        }
    }
}
