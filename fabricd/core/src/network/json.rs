//! The network config's JSON, read as flannel reads it (`pkg/subnet/config.go`, Go's encoding/json): members by any case
//! of their letters, the last of several counts, `null` says nothing, unknown ones are passed over, and of a network's
//! address what lies behind the prefix is masked. Numbers are whole and without quotes there too.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::{BackendDocument, ConfigError, NetworkDocument};
use crate::model::{Family, PerFamily, Subnet};

/// The document, and the addresses of networks that are not written as their first address.
pub(super) fn read(json: &[u8]) -> Result<(NetworkDocument, PerFamily<IpAddr>), ConfigError> {
    let config = match serde_json::from_slice(json).map_err(|error| ConfigError::Json(error.to_string()))? {
        Json::Object(config) => config,
        Json::Other(other) => return Err(ConfigError::NoObject(other.to_string())),
    };
    let (v4, v6) = (config.network("Network", Family::V4)?, config.network("IPv6Network", Family::V6)?);
    let near = |found: Option<(IpAddr, Subnet)>, other: &str| {
        found.map_or_else(|| other.to_owned(), |(_, network)| network.gateway().to_string())
    };
    let document = NetworkDocument {
        enable_ipv4: config.truth("EnableIPv4", "EnableIPv4")?,
        enable_ipv6: config.truth("EnableIPv6", "EnableIPv6")?,
        enable_nftables: config.truth("EnableNFTables", "EnableNFTables")?,
        network: v4.map(|(_, network)| network),
        ipv6_network: v6.map(|(_, network)| network),
        subnet_len: config.number("SubnetLen", "SubnetLen", 24)?,
        ipv6_subnet_len: config.number("IPv6SubnetLen", "IPv6SubnetLen", 64)?,
        subnet_min: config.address::<Ipv4Addr>("SubnetMin", &near(v4, "10.244.1.0"))?,
        subnet_max: config.address::<Ipv4Addr>("SubnetMax", &near(v4, "10.244.255.0"))?,
        ipv6_subnet_min: config.address::<Ipv6Addr>("IPv6SubnetMin", &near(v6, "fd00:10:244:1::"))?,
        ipv6_subnet_max: config.address::<Ipv6Addr>("IPv6SubnetMax", &near(v6, "fd00:10:244:ffff::"))?,
        backend: config.last("Backend").map(backend).transpose()?,
    };
    let masked = [(Family::V4, v4), (Family::V6, v6)].into_iter();
    let masked = masked.filter_map(|(family, found)| Some((family, found?)));
    let masked = masked.filter(|(_, (ip, network))| *ip != network.base()).map(|(family, (ip, _))| (family, ip));
    Ok((document, masked.collect()))
}

fn backend(json: &Json) -> Result<BackendDocument, ConfigError> {
    let Json::Object(backend) = json else {
        return Err(wrong("Backend", json, r#"it must be an object, as in "Backend": {"Type": "vxlan"}"#.into()));
    };
    let kind = match backend.last("Type") {
        Some(Json::Other(Value::String(kind))) => kind.clone(),
        Some(other) => return Err(wrong("Backend.Type", other, r#"use "Backend": {"Type": "vxlan"}"#.into())),
        None => String::new(),
    };
    Ok(BackendDocument {
        kind,
        vni: backend.number("VNI", "Backend.VNI", 1)?,
        port: backend.number("Port", "Backend.Port", super::DEFAULT_PORT.into())?,
        mtu: backend.number("MTU", "Backend.MTU", 1500)?,
        gbp: backend.truth("GBP", "Backend.GBP")?,
        learning: backend.truth("Learning", "Backend.Learning")?,
        direct_routing: backend.truth("DirectRouting", "Backend.DirectRouting")?,
    })
}

/// An object, or anything else. Objects keep the order of their members, since the last of several counts.
enum Json {
    Object(Members),
    Other(Value),
}

struct Members(Vec<(String, Json)>);

impl Members {
    /// The member of this name, if it says anything.
    fn last(&self, name: &str) -> Option<&Json> {
        let says =
            |(key, json): &&(String, Json)| key.eq_ignore_ascii_case(name) && !matches!(json, Json::Other(Value::Null));
        self.0.iter().rfind(says).map(|(_, json)| json)
    }

    fn truth(&self, name: &str, shown: &'static str) -> Result<Option<bool>, ConfigError> {
        match self.last(name) {
            None => Ok(None),
            Some(Json::Other(Value::Bool(value))) => Ok(Some(*value)),
            Some(other) => {
                let meant = other.to_string().trim_matches('"').eq_ignore_ascii_case("true");
                Err(wrong(shown, other, format!("it must be true or false without quotes, as in \"{name}\": {meant}")))
            }
        }
    }

    /// A number that `N` holds; `usual` is for the example.
    fn number<N: TryFrom<u64>>(&self, name: &str, shown: &'static str, usual: u64) -> Result<Option<N>, ConfigError> {
        let Some(json) = self.last(name) else { return Ok(None) };
        if let Json::Other(Value::Number(number)) = json
            && let Some(number) = number.as_u64()
        {
            let small = || wrong(shown, json, format!("it is too large; use a number such as \"{name}\": {usual}"));
            return N::try_from(number).map(Some).map_err(|_| small());
        }
        // What was meant, as far as that shows.
        let meant = json.to_string().trim_matches('"').parse().ok().filter(|number: &f64| *number >= 0.0);
        let meant = meant.map_or_else(|| usual.to_string(), |number| number.trunc().to_string());
        Err(wrong(shown, json, format!("it must be a whole number without quotes, as in \"{name}\": {meant}")))
    }

    fn address<A: FromStr>(&self, name: &'static str, example: &str) -> Result<Option<A>, ConfigError> {
        let Some(json) = self.last(name) else { return Ok(None) };
        let text = if let Json::Other(Value::String(text)) = json { text.parse().ok() } else { None };
        let reason = || format!("it must be an address of the network, as in \"{name}\": \"{example}\"");
        text.map(Some).ok_or_else(|| wrong(name, json, reason()))
    }

    /// A network: its address as it is written, and what is meant.
    fn network(&self, name: &'static str, family: Family) -> Result<Option<(IpAddr, Subnet)>, ConfigError> {
        let Some(json) = self.last(name) else { return Ok(None) };
        let text = if let Json::Other(Value::String(text)) = json { text.as_str() } else { "" };
        let (ip, length) = text.split_once('/').unwrap_or((text, ""));
        let ip: Option<IpAddr> = ip.parse().ok();
        let digits = Some(length).filter(|length| length.bytes().all(|byte| byte.is_ascii_digit()));
        let network = ip.zip(digits.and_then(|length| length.parse().ok()));
        let network = network.and_then(|(ip, length)| Some((ip, Subnet::holding(ip, length).ok()?)));
        network.map(Some).ok_or_else(|| {
            let usual = match family {
                Family::V4 => 16,
                Family::V6 => 48,
            };
            let example = ip.and_then(|ip| Subnet::holding(ip, usual).ok());
            let example =
                example.map_or_else(|| super::members(family).example.to_owned(), |network| network.to_string());
            let reason = format!("it must be an address and a prefix length, as in \"{name}\": \"{example}\"");
            wrong(name, json, reason)
        })
    }
}

fn wrong(member: &'static str, json: &Json, reason: String) -> ConfigError {
    ConfigError::Member { member, value: json.to_string(), reason }
}

impl fmt::Display for Json {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Object(_) => f.write_str("an object"),
            Self::Other(Value::Array(_)) => f.write_str("a list"),
            Self::Other(value) => value.fmt(f),
        }
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(JsonVisitor)
    }
}

struct JsonVisitor;

impl<'de> Visitor<'de> for JsonVisitor {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
        let mut members = vec![];
        while let Some(member) = map.next_entry()? {
            members.push(member);
        }
        Ok(Json::Object(Members(members)))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Json, A::Error> {
        while list.next_element::<Json>()?.is_some() {}
        Ok(Json::Other(Value::Array(vec![])))
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Json, E> {
        Ok(Json::Other(value.into()))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Json, E> {
        Ok(Json::Other(value.into()))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Json, E> {
        Ok(Json::Other(value.into()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Json, E> {
        Ok(Json::Other(value.into()))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Json, E> {
        Ok(Json::Other(value.into()))
    }

    fn visit_unit<E: Error>(self) -> Result<Json, E> {
        Ok(Json::Other(Value::Null))
    }
}
