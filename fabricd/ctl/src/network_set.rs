//! `fabricctl network set`: single keys of the network config change, and all others stay, also those that this version
//! doesn't know.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context as _, bail};
use clap::Args;
use fabric_core::model::Subnet;
use fabric_core::network::NetworkConfig;
use serde_json::{Map, Value, json};

use crate::Answer;
use crate::network_config::{Written, check_overlap, in_time, stored};
use crate::output::OutputArg;
use crate::settings::StoreArgs;

/// The keys.
#[derive(Debug, Default, Args)]
pub struct SetArgs {
    #[command(flatten)]
    keys: Keys,

    #[command(flatten)]
    form: OutputArg,

    /// The datastore.
    #[command(flatten)]
    store: StoreArgs,
}

#[derive(Debug, Default, Args)]
#[group(id = "keys", required = true, multiple = true)]
struct Keys {
    /// IPv4 addresses of all pods; "off" for no IPv4
    #[arg(long, value_name = "CIDR|off")]
    network: Option<Family>,

    /// IPv6 addresses of all pods; "off" for no IPv6
    #[arg(long, value_name = "CIDR|off")]
    ipv6_network: Option<Family>,

    /// Prefix length of a node's IPv4 subnet; 0 for the default
    #[arg(long, value_name = "BITS")]
    subnet_len: Option<u8>,

    /// Prefix length of a node's IPv6 subnet; 0 for the default
    #[arg(long, value_name = "BITS")]
    ipv6_subnet_len: Option<u8>,

    /// First IPv4 subnet to lease; 0.0.0.0 for the default
    #[arg(long, value_name = "IPV4")]
    subnet_min: Option<Ipv4Addr>,

    /// Last IPv4 subnet to lease; 0.0.0.0 for the default
    #[arg(long, value_name = "IPV4")]
    subnet_max: Option<Ipv4Addr>,

    /// First IPv6 subnet to lease; :: for the default
    #[arg(long, value_name = "IPV6")]
    ipv6_subnet_min: Option<Ipv6Addr>,

    /// Last IPv6 subnet to lease; :: for the default
    #[arg(long, value_name = "IPV6")]
    ipv6_subnet_max: Option<Ipv6Addr>,

    /// VXLAN network identifier
    #[arg(long, value_name = "NUMBER")]
    vni: Option<u32>,

    /// UDP port of VXLAN
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,

    /// MTU of the underlay in bytes; 0 for each interface's own
    #[arg(long, value_name = "BYTES")]
    mtu: Option<u32>,

    /// Route packets to peers on the same link directly, without VXLAN
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    direct_routing: Option<bool>,
}

/// An address family's network, or that it is off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    On(Subnet),
    Off,
}

impl FromStr for Family {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self::Off),
            cidr => cidr.parse().map(Self::On).map_err(|error| format!("{error}, or off")),
        }
    }
}

/// Changes the keys in one compare-and-swap on the config's revision.
///
/// # Errors
/// There is no config, the changed one can't work, somebody else changed it meanwhile, or etcd doesn't answer.
pub async fn set(SetArgs { keys, form, store }: SetArgs, socket: &Path) -> anyhow::Result<Answer> {
    let store = store.find(socket).await?;
    let before = stored(&store).await?;
    let key = store.config_key();
    let json = keys.change(&before.json).with_context(|| format!("{key} is not changed"))?;
    if json == before.json {
        let same = Written::new(key, &json, None);
        let text = form.output.show(&same, |_| format!("{} says so already: {}\n", same.key, same.config))?;
        return Ok(Answer::fine(text));
    }
    if keys.network.is_some() || keys.ipv6_network.is_some() {
        check_overlap(&NetworkConfig::decode(&json)?).await?;
    }
    in_time(&store, store.etcd("")?.network_replace(&before, &json)).await?;
    let written = Written::new(key, &json, Some(&before.json));
    Ok(Answer::fine(form.output.show(&written, |_| written.describe())?))
}

impl Keys {
    /// The JSON with these keys changed, the very same bytes if they say so already.
    fn change(&self, before: &[u8]) -> anyhow::Result<Vec<u8>> {
        let Ok(Value::Object(mut config)) = serde_json::from_slice(before) else {
            bail!(
                "it is no JSON object: {}; write a whole one with fabricctl network init --force --network 10.244.0.0/16",
                String::from_utf8_lossy(before)
            );
        };
        let is = config.clone();
        for (family, enable, network) in
            [(self.network, "EnableIPv4", "Network"), (self.ipv6_network, "EnableIPv6", "IPv6Network")]
        {
            match family {
                None => {}
                Some(Family::On(subnet)) => {
                    put(&mut config, network, json!(subnet));
                    // IPv4 is on unless it is switched off.
                    if enable == "EnableIPv6" || config.contains_key(&spelled(&config, enable)) {
                        put(&mut config, enable, json!(true));
                    }
                }
                Some(Family::Off) => put(&mut config, enable, json!(false)),
            }
        }
        for (name, value) in [
            ("SubnetLen", self.subnet_len.map(|len| json!(len))),
            ("IPv6SubnetLen", self.ipv6_subnet_len.map(|len| json!(len))),
            ("SubnetMin", self.subnet_min.map(|ip| json!(ip))),
            ("SubnetMax", self.subnet_max.map(|ip| json!(ip))),
            ("IPv6SubnetMin", self.ipv6_subnet_min.map(|ip| json!(ip))),
            ("IPv6SubnetMax", self.ipv6_subnet_max.map(|ip| json!(ip))),
        ] {
            value.into_iter().for_each(|value| put(&mut config, name, value));
        }
        let of_backend = [
            ("VNI", self.vni.map(|vni| json!(vni))),
            ("Port", self.port.map(|port| json!(port))),
            ("MTU", self.mtu.map(|mtu| json!(mtu))),
            ("DirectRouting", self.direct_routing.map(|on| json!(on))),
        ];
        if of_backend.iter().any(|(_, value)| value.is_some()) {
            let name = spelled(&config, "Backend");
            let Some(Value::Object(backend)) = config.get_mut(&name) else {
                bail!(
                    "it has no Backend; write a whole one with fabricctl network init --force --network 10.244.0.0/16"
                );
            };
            for (name, value) in of_backend {
                value.into_iter().for_each(|value| put(backend, name, value));
            }
        }
        if config == is {
            return Ok(before.to_vec());
        }
        let json = serde_json::to_vec(&config)?;
        NetworkConfig::decode(&json)?;
        Ok(json)
    }
}

/// Sets a member. flannel's decoder doesn't mind upper and lower case, so neither does this.
fn put(object: &mut Map<String, Value>, name: &str, value: Value) {
    let spelled = spelled(object, name);
    object.retain(|key, _| !key.eq_ignore_ascii_case(name));
    object.insert(spelled, value);
}

/// The name of a member as the object spells it.
fn spelled(object: &Map<String, Value>, name: &str) -> String {
    let found = object.keys().find(|key| key.eq_ignore_ascii_case(name));
    found.map_or_else(|| name.to_owned(), Clone::clone)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = r#"{"Network":"10.244.0.0/16","subnetlen":25,"Theirs":{"x":[1]},
        "Backend":{"Type":"vxlan","VNI":7,"Port":4789,"DirectRouting":true,"Unknown":"y"}}"#;

    fn changed(before: &str, keys: Keys) -> Result<Value, String> {
        let json = keys.change(before.as_bytes()).map_err(|error| error.to_string())?;
        serde_json::from_slice(&json).map_err(|error| error.to_string())
    }

    #[test]
    fn one_key_changes_and_all_others_stay() {
        let mut want: Value = serde_json::from_str(BEFORE).unwrap();
        want["Backend"]["MTU"] = json!(1400);
        assert_eq!(changed(BEFORE, Keys { mtu: Some(1400), ..Keys::default() }), Ok(want.clone()));
        // As it is spelled there; a second spelling would be a second member.
        want = serde_json::from_str(BEFORE).unwrap();
        want["subnetlen"] = json!(26);
        assert_eq!(changed(BEFORE, Keys { subnet_len: Some(26), ..Keys::default() }), Ok(want));
        let off = changed(BEFORE, Keys { direct_routing: Some(false), ..Keys::default() }).unwrap();
        assert_eq!((&off["Backend"]["DirectRouting"], &off["Backend"]["Unknown"]), (&json!(false), &json!("y")));
    }

    #[test]
    fn family_goes_on_and_off_with_its_network() {
        let on = Keys { ipv6_network: Some("fd00:10:244::/48".parse().unwrap()), ..Keys::default() };
        let dual = changed(BEFORE, on).unwrap();
        assert_eq!((&dual["EnableIPv6"], &dual["IPv6Network"]), (&json!(true), &json!("fd00:10:244::/48")));
        let off = Keys { ipv6_network: Some(Family::Off), ..Keys::default() };
        let single = changed(&dual.to_string(), off).unwrap();
        assert_eq!((&single["EnableIPv6"], &single["IPv6Network"]), (&json!(false), &json!("fd00:10:244::/48")));
    }

    #[test]
    fn change_that_says_nothing_new_writes_the_same_bytes() {
        assert_eq!(Keys { vni: Some(7), ..Keys::default() }.change(BEFORE.as_bytes()).unwrap(), BEFORE.as_bytes());
    }

    #[test]
    fn change_that_cannot_work_is_refused() {
        for (before, keys, told) in [
            (BEFORE, Keys { vni: Some(0), ..Keys::default() }, "1 to 16777215"),
            (BEFORE, Keys { mtu: Some(60), ..Keys::default() }, "1350 to 65535"),
            (BEFORE, Keys { network: Some(Family::Off), ..Keys::default() }, "both false"),
            ("{", Keys { mtu: Some(1400), ..Keys::default() }, "network init --force"),
            (r#"{"Network":"10.244.0.0/16"}"#, Keys { mtu: Some(1400), ..Keys::default() }, "no Backend"),
        ] {
            let error = changed(before, keys).expect_err(told);
            assert!(error.contains(told), "{error}");
        }
        assert!("10.244.0.0/33".parse::<Family>().unwrap_err().ends_with("or off"));
    }
}
