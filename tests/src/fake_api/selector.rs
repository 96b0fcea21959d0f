//! Which objects a list or a watch is about: `labelSelector` and `fieldSelector`, as far as `=`, `==`, `!=`, and labels that
//! are there or not.

use serde_json::Value;

/// One requirement: where, what has to be there (`None`: anything), and whether that is forbidden instead.
#[derive(Clone, Debug)]
struct Requirement {
    name: String,
    value: Option<String>,
    is_forbidden: bool,
}

/// The objects that a client selects; by default all.
#[derive(Clone, Debug, Default)]
pub(super) struct Selector {
    labels: Vec<Requirement>,
    fields: Vec<Requirement>,
}

impl Selector {
    /// From the members of a query.
    pub(super) fn new(labels: Option<&String>, fields: Option<&String>) -> Self {
        let parse = |text: Option<&String>| text.map(|text| text.split(',').map(Requirement::new).collect());
        Self { labels: parse(labels).unwrap_or_default(), fields: parse(fields).unwrap_or_default() }
    }

    /// Whether it selects an object.
    pub(super) fn selects(&self, object: &Value) -> bool {
        let label = |name: &str| object["metadata"]["labels"][name].as_str();
        let field = |path: &str| path.split('.').fold(object, |value, member| &value[member]).as_str();
        self.labels.iter().all(|it| it.is_met(label(&it.name)))
            && self.fields.iter().all(|it| it.is_met(field(&it.name)))
    }
}

impl Requirement {
    fn new(text: &str) -> Self {
        let (name, value, is_forbidden) = if let Some((name, value)) = text.split_once("!=") {
            (name, Some(value), true)
        } else if let Some((name, value)) = text.split_once('=') {
            (name, Some(value.trim_start_matches('=')), false)
        } else {
            (text.trim_start_matches('!'), None, text.starts_with('!'))
        };
        Self { name: name.to_owned(), value: value.map(str::to_owned), is_forbidden }
    }

    fn is_met(&self, is: Option<&str>) -> bool {
        let is_there = is.is_some_and(|is| self.value.as_deref().is_none_or(|value| is == value));
        is_there != self.is_forbidden
    }
}
