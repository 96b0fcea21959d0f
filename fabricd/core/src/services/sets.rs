//! [`ServiceSet`] and [`SliceSet`]: all Services, and all slices by Service. What they hold depends on the objects alone: a
//! list, or any order of changes that leads to the same objects, is the same set.

use std::collections::HashMap;
use std::sync::Arc;

use super::model::{ObjectName, Service, Slice};
use super::objects::{Metadata, ServiceObject, SliceObject};
use crate::cow_map::CowMap;
use crate::interner::Interner;

/// As many have to be known before it matters that most are gone.
const FEW: usize = 4;

/// All Services that have an address here.
#[derive(Debug, Default)]
pub struct ServiceSet {
    services: Services,
    names: Interner<str>,
}

/// Services by name. Cheap to clone.
pub type Services = CowMap<ObjectName, Arc<Service>>;

impl ServiceSet {
    /// Those of a list.
    #[must_use]
    pub fn listed<'a>(objects: impl IntoIterator<Item = &'a ServiceObject>) -> Self {
        let mut names = Interner::default();
        let services = objects.into_iter().filter_map(|object| Service::read(object, &mut names));
        let services = services.map(|service| (service.name.clone(), Arc::new(service))).collect();
        Self { services, names }
    }

    /// Takes in that a Service was created or changed; true when that matters.
    pub fn apply(&mut self, object: &ServiceObject) -> bool {
        match Service::read(object, &mut self.names) {
            Some(service) => put(&mut self.services, service.name.clone(), service),
            None => self.remove(&object.metadata),
        }
    }

    /// Takes in that a Service was deleted; true when that matters.
    pub fn remove(&mut self, metadata: &Metadata) -> bool {
        self.services.remove(&metadata.into()).is_some()
    }

    /// Takes as little memory as it can, after many changes.
    pub fn compact(&mut self) {
        self.services.compact();
    }

    /// The Services.
    #[must_use]
    pub fn services(&self) -> &Services {
        &self.services
    }
}

/// All slices, by the Service that they belong to.
#[derive(Debug, Default)]
pub struct SliceSet {
    slices: Slices,
    /// The Service of each slice.
    services: HashMap<ObjectName, ObjectName>,
    names: Interner<str>,
}

/// Slices by Service. Cheap to clone.
pub type Slices = CowMap<SliceKey, Arc<Slice>>;

/// The name of a slice behind that of its Service, so that those of a Service lie side by side.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SliceKey {
    /// The Service.
    pub service: ObjectName,
    /// The slice.
    pub slice: ObjectName,
}

impl SliceSet {
    /// Those of a list.
    #[must_use]
    pub fn listed<'a>(objects: impl IntoIterator<Item = &'a SliceObject>) -> Self {
        let mut names = Interner::default();
        let slices: Vec<Slice> = objects.into_iter().filter_map(|object| Slice::read(object, &mut names)).collect();
        let services = slices.iter().map(|slice| (slice.name.clone(), slice.service.clone())).collect();
        let slices = slices.into_iter().map(|slice| (key(&slice), Arc::new(slice))).collect();
        Self { slices, services, names }
    }

    /// Takes in that a slice was created or changed; true when that matters.
    pub fn apply(&mut self, object: &SliceObject) -> bool {
        let Some(slice) = Slice::read(object, &mut self.names) else { return self.remove(&object.metadata) };
        let moved = self.services.get(&slice.name).is_some_and(|service| *service != slice.service);
        if moved {
            self.remove(&object.metadata);
        }
        self.services.insert(slice.name.clone(), slice.service.clone());
        put(&mut self.slices, key(&slice), slice) || moved
    }

    /// Takes in that a slice was deleted; true when that matters.
    pub fn remove(&mut self, metadata: &Metadata) -> bool {
        let slice = ObjectName::from(metadata);
        let Some(service) = self.services.remove(&slice) else { return false };
        self.slices.remove(&SliceKey { service, slice }).is_some()
    }

    /// Takes as little memory as it can, after many changes.
    pub fn compact(&mut self) {
        self.slices.compact();
        self.services.shrink_to_fit();
    }

    /// The slices.
    #[must_use]
    pub fn slices(&self) -> &Slices {
        &self.slices
    }
}

/// The slices of a Service.
pub fn of_service<'a>(slices: &'a Slices, service: &ObjectName) -> impl Iterator<Item = &'a Arc<Slice>> {
    let first = SliceKey { service: service.clone(), slice: ObjectName::new("", "") };
    let service = service.clone();
    slices.starting_at(&first).take_while(move |(key, _)| key.service == service).map(|(_, slice)| slice)
}

/// True when more than half of what was known is gone; of a few, any number may go.
#[must_use]
pub fn lacks_most_of<K: Ord, V>(is: &CowMap<K, V>, was: &CowMap<K, V>) -> bool {
    let gone = is.changes(was, |_, _| true).filter(|(_, is)| is.is_none()).count();
    was.len() >= FEW && gone * 2 > was.len()
}

fn key(slice: &Slice) -> SliceKey {
    SliceKey { service: slice.service.clone(), slice: slice.name.clone() }
}

/// Puts a value in; true when it differs from the one before.
fn put<K: Ord + Clone, V: PartialEq>(map: &mut CowMap<K, Arc<V>>, key: K, value: V) -> bool {
    let value = Arc::new(value);
    map.insert(key, Arc::clone(&value)).is_none_or(|before| before != value)
}
