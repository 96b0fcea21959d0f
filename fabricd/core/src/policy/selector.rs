//! Label selectors: `metav1.LabelSelector`, as Kubernetes matches it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use super::json::object;
use super::labels::Labels;

/// Requirements that all must hold; without any it matches everything. Two that say the same are equal.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Selector(BTreeSet<Requirement>);

/// What one label must be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Requirement {
    key: Arc<str>,
    test: LabelTest,
}

/// A test on the value of one label.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LabelTest {
    /// One of these values.
    In(BTreeSet<Arc<str>>),
    /// None of these values; true also without the label.
    NotIn(BTreeSet<Arc<str>>),
    /// Any value.
    Exists,
    /// No such label.
    DoesNotExist,
}

impl Selector {
    /// Whether it matches everything.
    #[must_use]
    pub fn is_everything(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether labels are as it says.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|Requirement { key, test }| match (test, labels.get(key)) {
            (LabelTest::In(values), value) => value.is_some_and(|value| values.contains(value)),
            (LabelTest::NotIn(values), value) => value.is_none_or(|value| !values.contains(value)),
            (LabelTest::Exists, value) => value.is_some(),
            (LabelTest::DoesNotExist, value) => value.is_none(),
        })
    }

    /// Reads a selector.
    ///
    /// # Errors
    /// What of it can't be understood. It must not match anything then: without its unknown part it would match more.
    pub fn decode(json: &Value) -> Result<Self, String> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase", deny_unknown_fields)]
        struct Raw {
            #[serde(default)]
            match_labels: Option<BTreeMap<String, String>>,
            #[serde(default)]
            match_expressions: Option<Vec<Value>>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase", deny_unknown_fields)]
        struct Expression {
            key: String,
            operator: String,
            #[serde(default)]
            values: Option<Vec<String>>,
        }
        let raw: Raw = object(json)?;
        let labels = raw.match_labels.unwrap_or_default().into_iter();
        let mut requirements: BTreeSet<Requirement> = labels
            .map(|(key, value)| Requirement { key: key.into(), test: LabelTest::In([value.into()].into()) })
            .collect();
        for expression in raw.match_expressions.iter().flatten() {
            let Expression { key, operator, values } = object(expression)?;
            let values: BTreeSet<Arc<str>> = values.unwrap_or_default().into_iter().map(Into::into).collect();
            let test = match (operator.as_str(), values.is_empty()) {
                ("In", false) => LabelTest::In(values),
                ("NotIn", false) => LabelTest::NotIn(values),
                ("Exists", true) => LabelTest::Exists,
                ("DoesNotExist", true) => LabelTest::DoesNotExist,
                ("In" | "NotIn", true) => return Err(format!("operator {operator} of {key:?} needs values")),
                ("Exists" | "DoesNotExist", false) => return Err(format!("operator {operator} of {key:?} has values")),
                _ => return Err(format!("operator {operator:?} is none of In, NotIn, Exists, DoesNotExist")),
            };
            requirements.insert(Requirement { key: key.into(), test });
        }
        Ok(Self(requirements))
    }
}

impl fmt::Display for Selector {
    /// As `kubectl --selector` takes it; `<everything>` for the empty one.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_everything() {
            return f.write_str("<everything>");
        }
        for (at, Requirement { key, test }) in self.0.iter().enumerate() {
            f.write_str(if at == 0 { "" } else { "," })?;
            let list = |values: &BTreeSet<Arc<str>>| values.iter().map(|value| &**value).collect::<Vec<_>>().join(",");
            match test {
                LabelTest::In(values) if values.len() == 1 => write!(f, "{key}={}", list(values))?,
                LabelTest::In(values) => write!(f, "{key} in ({})", list(values))?,
                LabelTest::NotIn(values) => write!(f, "{key} notin ({})", list(values))?,
                LabelTest::Exists => write!(f, "{key}")?,
                LabelTest::DoesNotExist => write!(f, "!{key}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
    }

    #[test]
    fn operators_mean_what_kubernetes_says() {
        let (web, bare) = (labels(&[("app", "web"), ("tier", "front")]), labels(&[]));
        for (selector, of_web, of_bare) in [
            (json!({}), true, true),
            (json!({"matchLabels": {"app": "web", "tier": "front"}}), true, false),
            (json!({"matchLabels": {"app": "web", "tier": "back"}}), false, false),
            (json!({"matchExpressions": [{"key": "app", "operator": "In", "values": ["db", "web"]}]}), true, false),
            (json!({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["web"]}]}), false, true),
            (json!({"matchExpressions": [{"key": "app", "operator": "Exists"}]}), true, false),
            (json!({"matchExpressions": [{"key": "app", "operator": "DoesNotExist", "values": []}]}), false, true),
            (json!({"matchLabels": null, "matchExpressions": null}), true, true),
        ] {
            let decoded = Selector::decode(&selector).expect("readable");
            assert_eq!((decoded.matches(&web), decoded.matches(&bare)), (of_web, of_bare), "{selector}");
        }
    }

    #[test]
    fn two_ways_to_say_the_same_are_equal() {
        let one = Selector::decode(&json!({"matchLabels": {"app": "web"}})).expect("readable");
        let expression = json!({"key": "app", "operator": "In", "values": ["web", "web"]});
        let other = Selector::decode(&json!({"matchExpressions": [expression, expression]})).expect("readable");
        assert_eq!((one.to_string().as_str(), &one), ("app=web", &other));
    }

    #[test]
    fn selector_with_anything_unknown_is_refused() {
        for selector in [
            json!({"matchFields": {}}),
            json!({"matchLabels": {"app": 1}}),
            json!({"matchExpressions": [{"key": "app", "operator": "Gt", "values": ["1"]}]}),
            json!({"matchExpressions": [{"key": "app", "operator": "In"}]}),
            json!({"matchExpressions": [{"key": "app", "operator": "Exists", "values": ["x"]}]}),
            json!({"matchExpressions": [{"key": "app", "operator": "Exists", "ignoreCase": true}]}),
            json!([]),
            json!("app=web"),
        ] {
            assert!(Selector::decode(&selector).is_err(), "{selector}");
        }
    }
}
