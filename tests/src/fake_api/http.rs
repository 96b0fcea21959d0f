//! The fake API server's HTTP: what is asked for, and the answer in the server's words.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State as Extract;
use axum::http::{Method, StatusCode, Uri, header};
use axum::response::{IntoResponse as _, Response};
use futures::Stream;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, sleep_until};

use super::objects::{Objects, Refusal};
use super::selector::Selector;
use super::{Fault, State};

pub(super) fn router(state: Arc<State>) -> Router {
    Router::new().fallback(answer).with_state(state)
}

async fn answer(Extract(state): Extract<Arc<State>>, method: Method, uri: Uri, body: Bytes) -> Response {
    let fault = *state.fault.borrow();
    match fault {
        Fault::None | Fault::BreaksWatches(_) => {}
        Fault::Refuses(code) => return refuse((code, "Fault", "told to refuse".into())),
        Fault::Slow(delay) => sleep(delay).await,
        Fault::Hangs => std::future::pending().await,
    }
    if state.lacks(uri.path()) {
        return refuse((404, "NotFound", "the server could not find the requested resource".into()));
    }
    let query = query(&uri);
    if method == Method::GET {
        let (collection, name, _) = path(uri.path());
        if state.forbidden().contains(&collection) {
            let verb = if query.contains_key("watch") { "watch" } else { name.map_or("list", |_| "get") };
            return refuse((403, "Forbidden", forbidden(verb, &collection)));
        }
        return match (query.get("watch").map(String::as_str), path(uri.path())) {
            (Some("true" | "1"), (collection, None, _)) => watch(state, collection, &query),
            (_, (collection, None, _)) => {
                if number(&query, "limit") != Some(1) {
                    *state.lists().entry(collection.clone()).or_default() += 1;
                }
                list(&state.objects(), &collection, &query)
            }
            (_, (collection, Some(name), _)) => one(state.objects().get(&collection, &name)),
        };
    }
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    state.writes().push((method.to_string(), uri.path().to_owned(), body.clone()));
    let answer = match (method, path(uri.path())) {
        (Method::POST, (collection, None, _)) => state.objects().create(&collection, body),
        (Method::PATCH, (collection, Some(name), is_status)) => {
            state.objects().patch(&collection, &name, &body, is_status)
        }
        (Method::DELETE, (collection, Some(name), _)) => state.objects().delete(&collection, &name),
        (method, _) => Err((405, "MethodNotAllowed", format!("{method} {uri}"))),
    };
    state.tell();
    one(answer)
}

/// RBAC's words: `staging/src/k8s.io/apiserver/pkg/endpoints/handlers/responsewriters/errors.go`.
fn forbidden(verb: &str, collection: &str) -> String {
    let resource = collection.rsplit('/').next().unwrap_or_default();
    format!(
        "{resource} is forbidden: User \"system:serviceaccount:fabric-system:fabricd\" cannot {verb} resource \"{resource}\" \
         in API group \"\" at the cluster scope"
    )
}

/// The collection, the object in it, and whether its status is meant. Paths are `/api/v1/nodes/…`,
/// `/api/v1/namespaces/NS/secrets/…`, and with a group `/apis/discovery.k8s.io/v1/…`.
fn path(path: &str) -> (String, Option<String>, bool) {
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    let version = if parts.first() == Some(&"apis") { 3 } else { 2 };
    // A namespace is an object itself, and holds collections.
    let is_inside = parts.get(version) == Some(&"namespaces") && parts.len() > version + 2;
    let length = if is_inside { version + 3 } else { version + 1 };
    let (collection, rest) = parts.split_at(length.min(parts.len()));
    (format!("/{}", collection.join("/")), rest.first().map(ToString::to_string), rest.get(1) == Some(&"status"))
}

fn query(uri: &Uri) -> BTreeMap<String, String> {
    form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes()).into_owned().collect()
}

fn selector(query: &BTreeMap<String, String>) -> Selector {
    Selector::new(query.get("labelSelector"), query.get("fieldSelector"))
}

fn number(query: &BTreeMap<String, String>, key: &str) -> Option<i64> {
    query.get(key).and_then(|value| value.parse().ok())
}

fn list(objects: &Objects, collection: &str, query: &BTreeMap<String, String>) -> Response {
    let limit = number(query, "limit").and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX);
    let after = query.get("continue").map(String::as_str).unwrap_or_default();
    let (items, more) = objects.page(collection, &selector(query), after, limit);
    let metadata = json!({"resourceVersion": objects.revision().to_string(), "continue": more.unwrap_or_default()});
    json_of(StatusCode::OK, &json!({"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items}))
}

fn watch(state: Arc<State>, collection: String, query: &BTreeMap<String, String>) -> Response {
    let from = number(query, "resourceVersion").unwrap_or_default();
    let seconds = number(query, "timeoutSeconds").and_then(|seconds| u64::try_from(seconds).ok()).unwrap_or(300);
    let bookmarks = query.get("allowWatchBookmarks").is_some_and(|wanted| wanted == "true");
    let end = Instant::now() + Duration::from_secs(seconds);
    state.watches.send_modify(|begun| begun.push((collection.clone(), from)));
    Body::from_stream(events(state, (collection, selector(query)), from, bookmarks, end)).into_response()
}

/// The events of a watch, each a line, until its time is over or its history is forgotten.
fn events(
    state: Arc<State>,
    of: (String, Selector),
    from: i64,
    wants_bookmarks: bool,
    end: Instant,
) -> impl Stream<Item = Result<Bytes, std::convert::Infallible>> {
    let (news, mut bookmarks) = (state.news.subscribe(), state.bookmarks.subscribe());
    bookmarks.mark_unchanged();
    let begin = Some((state, news, bookmarks, from));
    futures::stream::unfold(begin, move |watching| {
        let (collection, selector) = of.clone();
        async move {
            let (state, mut news, mut bookmarks, mut from) = watching?;
            loop {
                news.mark_unchanged();
                let (changes, now) = {
                    let objects = state.objects();
                    (objects.since(&collection, from), objects.revision())
                };
                match changes {
                    Err(refusal) => return Some((line(&json!({"type": "ERROR", "object": status(&refusal)})), None)),
                    Ok(changes) if !changes.is_empty() => {
                        from = changes.last().map_or(from, |change| change.revision);
                        let events = changes.iter().filter_map(|change| change.event(&selector));
                        let mut lines: Vec<u8> = events.flat_map(|event| wire(&event)).collect();
                        let Fault::BreaksWatches(code) = *state.fault.borrow() else {
                            return Some((Ok(Bytes::from(lines)), Some((state, news, bookmarks, from))));
                        };
                        let refusal = status(&(code, "Fault", "told to break".into()));
                        lines.extend(wire(&json!({"type": "ERROR", "object": refusal})));
                        return Some((Ok(Bytes::from(lines)), None));
                    }
                    Ok(_) => {}
                }
                tokio::select! {
                    // Else a bookmark could name the revision of before the last change.
                    biased;
                    changed = news.changed() => changed.ok()?,
                    changed = bookmarks.changed(), if wants_bookmarks => {
                        changed.ok()?;
                        from = now.max(from);
                        let object = json!({"kind": "Node", "apiVersion": "v1", "metadata": {"resourceVersion": from.to_string()}});
                        let bookmark = line(&json!({"type": "BOOKMARK", "object": object}));
                        return Some((bookmark, None));
                    }
                    () = sleep_until(end) => return None,
                }
            }
        }
    })
}

fn wire(event: &Value) -> Vec<u8> {
    format!("{event}\n").into_bytes()
}

fn line(event: &Value) -> Result<Bytes, std::convert::Infallible> {
    Ok(Bytes::from(wire(event)))
}

fn one(answer: Result<Value, Refusal>) -> Response {
    match answer {
        Ok(object) => json_of(StatusCode::OK, &object),
        Err(refusal) => refuse(refusal),
    }
}

fn refuse(refusal: Refusal) -> Response {
    json_of(StatusCode::from_u16(refusal.0).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), &status(&refusal))
}

fn status((code, reason, message): &Refusal) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "code": code, "reason": reason, "message": message,
    })
}

fn json_of(code: StatusCode, value: &Value) -> Response {
    (code, [(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}
