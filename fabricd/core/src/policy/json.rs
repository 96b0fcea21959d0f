//! What the JSON of a policy and of its selectors has in common.

use serde::de::DeserializeOwned;
use serde_json::Value;

/// Reads an object. A list would do for serde, member by member, and an empty one for an object without any.
pub(super) fn object<T: DeserializeOwned>(json: &Value) -> Result<T, String> {
    if !json.is_object() {
        return Err("it is no object".into());
    }
    T::deserialize(json).map_err(|error| error.to_string())
}
