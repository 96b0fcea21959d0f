//! What the fake API server holds: objects of any kind by their path, every change of them, and who asked for what.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::selector::Selector;

/// The path of the namespaces: what is in one goes with it.
const NAMESPACES: &str = "/api/v1/namespaces";

/// A refusal: HTTP code, reason and message, as the real server words them.
pub(super) type Refusal = (u16, &'static str, String);

/// One change, for those who watch.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) collection: String,
    pub(super) revision: i64,
    before: Option<Value>,
    /// As it is now, or was last.
    object: Value,
    is_deleted: bool,
}

impl Change {
    /// The event as it goes over the wire to those who select: an object comes and goes with its labels and fields.
    pub(super) fn event(&self, selector: &Selector) -> Option<Value> {
        let was = self.before.as_ref().is_some_and(|before| selector.selects(before));
        let is = !self.is_deleted && selector.selects(&self.object);
        let event = match (was, is) {
            (false, false) => return None,
            (false, true) => "ADDED",
            (true, true) => "MODIFIED",
            (true, false) => "DELETED",
        };
        Some(json!({"type": event, "object": self.object}))
    }
}

/// All objects, and the history of their changes.
#[derive(Debug, Default)]
pub(super) struct Objects {
    /// By the path of their collection, then by name.
    collections: BTreeMap<String, BTreeMap<String, Value>>,
    history: Vec<Change>,
    revision: i64,
    /// Changes up to here are forgotten.
    compacted: i64,
}

impl Objects {
    pub(super) fn revision(&self) -> i64 {
        self.revision
    }

    /// Sets the revision back or forward, as an etcd that was restored does.
    pub(super) fn set_revision(&mut self, revision: i64) {
        (self.revision, self.compacted) = (revision, revision);
        self.history.clear();
    }

    pub(super) fn compact(&mut self) {
        self.compacted = self.revision;
        self.history.clear();
    }

    pub(super) fn get(&self, collection: &str, name: &str) -> Result<Value, Refusal> {
        let object = self.collections.get(collection).and_then(|objects| objects.get(name));
        object.cloned().ok_or_else(|| (404, "NotFound", format!("{collection}/{name} not found")))
    }

    /// A page of a list, from after an object, with where it ends if there is more.
    pub(super) fn page(
        &self,
        collection: &str,
        selector: &Selector,
        after: &str,
        limit: usize,
    ) -> (Vec<Value>, Option<String>) {
        let listed = self.collections.iter().filter(|(held, _)| is_in(held, collection));
        let all = listed
            .flat_map(|(held, objects)| objects.iter().map(move |(name, object)| (format!("{held}/{name}"), object)));
        let mut rest = all.filter(|(place, object)| place.as_str() > after && selector.selects(object)).peekable();
        let page: Vec<(String, &Value)> = rest.by_ref().take(limit).collect();
        let more = rest.peek().and_then(|_| page.last().map(|(place, _)| place.clone()));
        (page.into_iter().map(|(_, object)| object.clone()).collect(), more)
    }

    /// The changes of a collection after a revision.
    pub(super) fn since(&self, collection: &str, revision: i64) -> Result<Vec<Change>, Refusal> {
        if revision < self.compacted {
            return Err((410, "Expired", format!("too old resource version: {revision} ({})", self.compacted)));
        }
        let is_new = |change: &&Change| is_in(&change.collection, collection) && change.revision > revision;
        Ok(self.history.iter().filter(is_new).cloned().collect())
    }

    pub(super) fn create(&mut self, collection: &str, mut object: Value) -> Result<Value, Refusal> {
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        if self.get(collection, &name).is_ok() {
            return Err((409, "AlreadyExists", format!("{collection} \"{name}\" already exists")));
        }
        object["metadata"]["uid"] = json!(format!("{name}-{}", self.revision + 1));
        object["metadata"]["creationTimestamp"] = json!("2026-01-01T00:00:00Z");
        Ok(self.put(collection, &name, object, None))
    }

    pub(super) fn delete(&mut self, collection: &str, name: &str) -> Result<Value, Refusal> {
        let before = self.get(collection, name)?;
        let mut object = before.clone();
        self.collections.entry(collection.to_owned()).or_default().remove(name);
        if collection == NAMESPACES {
            let inside = format!("{NAMESPACES}/{name}/");
            self.collections.retain(|collection, _| !collection.starts_with(&inside));
        }
        self.note(collection, Some(before), &mut object, true);
        Ok(object)
    }

    /// Changes an object; of a Node's `status` only metadata and status, of a Node itself all but the status.
    pub(super) fn patch(
        &mut self,
        collection: &str,
        name: &str,
        patch: &Value,
        is_status: bool,
    ) -> Result<Value, Refusal> {
        let before = self.get(collection, name)?;
        let (seen, is) = (&patch["metadata"], &before["metadata"]);
        if !seen["uid"].is_null() && seen["uid"] != is["uid"] {
            return Err((422, "Invalid", format!("{name} is invalid: metadata.uid: field is immutable")));
        }
        if !seen["resourceVersion"].is_null() && seen["resourceVersion"] != is["resourceVersion"] {
            return Err((409, "Conflict", format!("{name}: the object has been modified")));
        }
        let mut after = before.clone();
        merge(&mut after, patch);
        let part = if is_status { "spec" } else { "status" };
        after[part] = before[part].clone();
        if !before["spec"]["podCIDR"].is_null() && after["spec"]["podCIDRs"] != before["spec"]["podCIDRs"] {
            return Err((422, "Invalid", format!("{name}: node updates may not change podCIDR")));
        }
        // What changes nothing is no new revision.
        if after == before { Ok(before) } else { Ok(self.put(collection, name, after, Some(before))) }
    }

    fn put(&mut self, collection: &str, name: &str, mut object: Value, before: Option<Value>) -> Value {
        self.note(collection, before, &mut object, false);
        self.collections.entry(collection.to_owned()).or_default().insert(name.to_owned(), object.clone());
        object
    }

    fn note(&mut self, collection: &str, before: Option<Value>, object: &mut Value, is_deleted: bool) {
        self.revision += 1;
        object["metadata"]["resourceVersion"] = json!(self.revision.to_string());
        let (collection, object) = (collection.to_owned(), object.clone());
        self.history.push(Change { collection, revision: self.revision, before, object, is_deleted });
    }
}

/// Whether what a collection holds is in another one: itself, or that of all namespaces.
fn is_in(held: &str, collection: &str) -> bool {
    held == collection
        || held.split_once("/namespaces/").is_some_and(|(group, rest)| {
            rest.split_once('/').is_some_and(|(_, kind)| collection == format!("{group}/{kind}"))
        })
}

/// A merge patch (RFC 7386), with what a strategic one does to conditions: they are merged by their type.
fn merge(object: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        object.clone_from(patch);
        return;
    };
    if !object.is_object() {
        *object = Value::Object(Map::new());
    }
    for (member, value) in patch {
        match (member.as_str(), value) {
            (_, Value::Null) => drop(object.as_object_mut().and_then(|object| object.remove(member))),
            ("conditions", Value::Array(changes)) => merge_conditions(&mut object[member], changes),
            _ => merge(&mut object[member], value),
        }
    }
}

fn merge_conditions(conditions: &mut Value, changes: &[Value]) {
    if !conditions.is_array() {
        *conditions = json!([]);
    }
    let Some(conditions) = conditions.as_array_mut() else { return };
    for change in changes {
        match conditions.iter_mut().find(|condition| condition["type"] == change["type"]) {
            Some(condition) => merge(condition, change),
            None => conditions.push(change.clone()),
        }
    }
}
