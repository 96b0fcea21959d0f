//! The versions of the CNI spec, and what changes in a result from one to the next.
//!
//! The runtime asks in one version; the delegate may know only older ones. So the delegate is called with the
//! highest version that both know, and results are converted, up on their way out, down where a `prevResult`
//! goes in. A result's form follows from the version that it is wanted in alone:
//!
//! | wanted in     | `ips[].version` | `mtu`, `socketPath`, `pciID` of interfaces; `mtu` … `scope` of routes |
//! |---------------|-----------------|------------------------------------------------------------------------|
//! | 0.3.x, 0.4.0  | "4" or "6"      | not known                                                              |
//! | 1.0.0         | gone            | not known                                                              |
//! | 1.1.0         | gone            | kept                                                                   |
//!
//! Before 0.3.0 results looked different (`ip4`, `ip6`), and no runtime alive asks for that.

use std::fmt;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// A version of the CNI spec that is spoken here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum SpecVersion {
    /// Interfaces and a list of addresses in the result.
    #[serde(rename = "0.3.0")]
    V0_3_0,
    /// The same, with errata.
    #[serde(rename = "0.3.1")]
    V0_3_1,
    /// CHECK; DEL gets `prevResult`.
    #[serde(rename = "0.4.0")]
    V0_4_0,
    /// `ips[].version` is gone.
    #[serde(rename = "1.0.0")]
    V1_0_0,
    /// GC and STATUS.
    #[serde(rename = "1.1.0")]
    V1_1_0,
}

impl SpecVersion {
    /// All of them, oldest first.
    pub const ALL: [Self; 5] = [Self::V0_3_0, Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];

    /// The newest.
    pub const NEWEST: Self = Self::V1_1_0;

    /// As the spec writes it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// The answer to VERSION, in the version that was asked in.
    #[must_use]
    pub fn spoken(asked: Self) -> Value {
        json!({ "cniVersion": asked.as_str(), "supportedVersions": Self::ALL.map(Self::as_str) })
    }

    /// The version written so; `None` when it isn't spoken here.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|version| version.as_str() == text)
    }
}

impl fmt::Display for SpecVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Why something is no CNI result.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a CNI result: {0}")]
pub struct Malformed(String);

/// Members of `interfaces` that 1.1.0 brought.
const NEW_IN_INTERFACES: [&str; 3] = ["mtu", "socketPath", "pciID"];

/// Members of `routes` that 1.1.0 brought.
const NEW_IN_ROUTES: [&str; 5] = ["mtu", "advmss", "priority", "table", "scope"];

/// Converts a result of any version since 0.3.0 to the form of version `to`. Unknown members stay as they are.
///
/// # Errors
/// When it isn't an object, or its lists aren't lists of objects, or an address is none.
pub fn convert(result: Value, to: SpecVersion) -> Result<Value, Malformed> {
    let Value::Object(mut result) = result else { return Err(Malformed("it is not an object".into())) };
    for ip in objects(&mut result, "ips")? {
        let family = family_of(ip)?;
        if to < SpecVersion::V1_0_0 {
            ip.insert("version".into(), family.into());
        } else {
            ip.remove("version");
        }
    }
    for (list, new) in [("interfaces", &NEW_IN_INTERFACES[..]), ("routes", &NEW_IN_ROUTES[..])] {
        for object in objects(&mut result, list)? {
            if to < SpecVersion::V1_1_0 {
                object.retain(|member, _| !new.contains(&member.as_str()));
            }
        }
    }
    result.insert("cniVersion".into(), to.as_str().into());
    Ok(Value::Object(result))
}

/// The objects of one of the result's lists. Some plugins print an empty list as `null`, which goes.
fn objects<'a>(
    result: &'a mut Map<String, Value>,
    list: &str,
) -> Result<impl Iterator<Item = &'a mut Map<String, Value>> + use<'a>, Malformed> {
    if result.get(list).is_some_and(Value::is_null) {
        result.remove(list);
    }
    let values = match result.get_mut(list) {
        None => &mut [],
        Some(Value::Array(values)) if values.iter().all(Value::is_object) => values.as_mut_slice(),
        Some(_) => return Err(Malformed(format!("{list} is not a list of objects"))),
    };
    Ok(values.iter_mut().filter_map(Value::as_object_mut))
}

fn family_of(ip: &Map<String, Value>) -> Result<&'static str, Malformed> {
    let address = ip.get("address").and_then(Value::as_str).unwrap_or_default();
    match address.contains('/').then(|| address.parse()) {
        Some(Ok(IpNetwork::V4(_))) => Ok("4"),
        Some(Ok(IpNetwork::V6(_))) => Ok("6"),
        _ => Err(Malformed(format!("an address in ips is {address:.80?}, not one such as 10.244.3.2/24"))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn newest_result() -> Value {
        json!({
            "cniVersion": "1.1.0",
            "interfaces": [{"name": "cni0", "mac": "02:42:c0:00:02:07", "mtu": 1450},
                           {"name": "eth0", "sandbox": "/run/netns/pod", "pciID": "0", "socketPath": "/s"}],
            "ips": [{"interface": 1, "address": "10.244.3.2/24", "gateway": "10.244.3.1"},
                    {"interface": 1, "address": "fd00:10:244:3::2/64"}],
            "routes": [{"dst": "10.244.0.0/16", "mtu": 1450, "advmss": 1, "priority": 1, "table": 1, "scope": 0}],
            "dns": {},
        })
    }

    #[test]
    fn result_has_the_form_of_the_version_that_it_is_wanted_in() {
        for to in SpecVersion::ALL {
            let result = convert(newest_result(), to).expect("valid");
            assert_eq!(result["cniVersion"], to.as_str());
            let family = |index: usize| result["ips"][index].get("version").and_then(Value::as_str);
            let want = if to < SpecVersion::V1_0_0 { [Some("4"), Some("6")] } else { [None, None] };
            assert_eq!([family(0), family(1)], want, "{to}");
            let news = result.to_string().matches(r#""mtu""#).count();
            assert_eq!(news, if to < SpecVersion::V1_1_0 { 0 } else { 2 }, "{to}");
            assert_eq!(result["ips"][0]["gateway"], "10.244.3.1");
        }
    }

    #[test]
    fn way_down_and_up_again_loses_only_what_the_lower_version_cannot_say() {
        for low in SpecVersion::ALL {
            let below = convert(newest_result(), SpecVersion::V1_0_0.min(low)).expect("valid");
            let again = convert(below, SpecVersion::V1_0_0).expect("valid");
            assert_eq!(again, convert(newest_result(), SpecVersion::V1_0_0).expect("valid"), "{low}");
        }
    }

    #[test]
    fn what_is_no_result_is_refused_with_the_reason() {
        for (result, reason) in [
            (json!([]), "not an object"),
            (json!({"ips": 3}), "ips is not a list"),
            (json!({"ips": [3]}), "ips is not a list"),
            (json!({"ips": [{}]}), "an address in ips"),
            (json!({"ips": [{"address": "10.0.0.1"}]}), "10.0.0.1"),
            (json!({"routes": {}}), "routes is not a list"),
        ] {
            let error = convert(result, SpecVersion::NEWEST).expect_err(reason);
            assert!(error.to_string().contains(reason), "{error}");
        }
        assert_eq!(convert(json!({"ips": null}), SpecVersion::V1_0_0), Ok(json!({"cniVersion": "1.0.0"})));
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<i64>().prop_map(Value::from),
            "[0-9./:a-f]{0,20}".prop_map(Value::from)
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            let key = prop_oneof![Just("ips"), Just("address"), Just("routes"), Just("interfaces"), Just("version")];
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::hash_map(key.prop_map(String::from), inner, 0..4)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn conversion_of_any_json_ends_and_a_second_one_changes_nothing(json in any_json(), to in 0..5_usize) {
            let to = SpecVersion::ALL[to];
            if let Ok(once) = convert(json, to) {
                prop_assert_eq!(convert(once.clone(), to), Ok(once));
            }
        }
    }
}
