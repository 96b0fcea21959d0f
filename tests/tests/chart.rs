//! The Helm chart, as far as it can be judged without helm: values, schema and templates speak of the same things. What it
//! renders is `make helm`'s to compare.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use regex::Regex;
use serde_json::Value;

fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/helm/fabricd")
}

fn read(file: &str) -> Result<String> {
    std::fs::read_to_string(chart().join(file)).with_context(|| file.to_owned())
}

fn values() -> Result<Value> {
    Ok(serde_saphyr::from_str(&read("values.yaml")?)?)
}

fn schema() -> Result<Value> {
    Ok(serde_json::from_str(&read("values.schema.json")?)?)
}

/// As much of JSON schema as ours uses, so that a word which isn't known here is noticed.
fn check(value: &Value, schema: &Value, at: &str) -> Result<()> {
    let schema = schema.as_object().with_context(|| format!("{at} has no schema"))?;
    for (word, wanted) in schema {
        let fits = match word.as_str() {
            "$schema" | "title" | "additionalProperties" | "propertyNames" | "required" => true,
            "type" => match wanted {
                Value::String(one) => is_a(value, one),
                several => several.as_array().into_iter().flatten().filter_map(Value::as_str).any(|t| is_a(value, t)),
            },
            "enum" => wanted.as_array().is_some_and(|all| all.contains(value)),
            "pattern" => Regex::new(wanted.as_str().unwrap_or("("))?.is_match(value.as_str().unwrap_or_default()),
            "minLength" => value.as_str().map(str::len) >= wanted.as_u64().and_then(|length| length.try_into().ok()),
            "minimum" => value.as_i64() >= wanted.as_i64(),
            "maximum" => value.as_i64() <= wanted.as_i64(),
            "items" => {
                let each = value.as_array().into_iter().flatten();
                each.map(|item| check(item, wanted, at)).collect::<Result<Vec<()>>>().map(|_| true)?
            }
            "properties" => {
                let all = wanted.as_object().context("properties")?;
                let given = value.as_object().into_iter().flatten();
                for (name, value) in given.filter_map(|(name, value)| Some((all.get_key_value(name)?, value))) {
                    check(value, name.1, &format!("{at}.{}", name.0))?;
                }
                true
            }
            unknown => bail!("{at}: this test knows no {unknown}"),
        };
        ensure!(fits, "{at} is {value}, its schema wants {word} {wanted}");
    }
    Ok(())
}

fn is_a(value: &Value, kind: &str) -> bool {
    match kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64(),
        "number" => value.is_number(),
        _ => false,
    }
}

/// What has a meaning of its own: the members of objects that take no others, else the objects themselves.
fn leaves(schema: &Value, at: &str) -> BTreeSet<String> {
    let members = schema["properties"].as_object().filter(|_| schema["additionalProperties"] == false);
    match members {
        None => BTreeSet::from([at.to_owned()]),
        Some(members) => {
            let below =
                |(name, schema): (&String, &Value)| leaves(schema, format!("{at}.{name}").trim_start_matches('.'));
            members.iter().filter(|(name, _)| *name != "global").flat_map(below).collect()
        }
    }
}

#[test]
fn values_fit_their_schema() -> Result<()> {
    let (values, schema) = (values()?, schema()?);
    check(&values, &schema, "")?;
    for leaf in leaves(&schema, "") {
        let pointer = format!("/{}", leaf.replace('.', "/"));
        ensure!(values.pointer(&pointer).is_some(), "{leaf} has a schema and no default");
    }
    let known = leaves(&schema, "");
    let top = |leaf: &str| leaf.split('.').next().unwrap_or_default().to_owned();
    let tops: BTreeSet<String> = known.iter().map(|leaf| top(leaf)).collect();
    let given: BTreeSet<String> = values.as_object().into_iter().flatten().map(|(name, _)| name.clone()).collect();
    assert_eq!(given, tops);
    Ok(())
}

#[test]
fn what_is_no_value_is_refused() -> Result<()> {
    let schema = schema()?;
    for (change, told) in [
        (r#"{"store": "consul"}"#, ".store is \"consul\""),
        (r#"{"network": {"vni": 0}}"#, ".network.vni is 0"),
        (r#"{"network": {"port": 70000}}"#, ".network.port is 70000"),
        (r#"{"ipMasq": "yes"}"#, ".ipMasq is \"yes\""),
        (r#"{"etcd": {"endpoints": ["192.0.2.10:2379"]}}"#, ".etcd.endpoints is"),
        (r#"{"cniConf": {"name": "fabric.txt"}}"#, ".cniConf.name is"),
    ] {
        let error = check(&serde_json::from_str(change)?, &schema, "").expect_err(change).to_string();
        assert!(error.contains(told), "{change}: {error}");
    }
    for at in ["", "/properties/network", "/properties/api", "/properties/cniConf", "/properties/serviceAccount"] {
        let closed = schema.pointer(at).is_some_and(|part| part["additionalProperties"] == false);
        ensure!(closed, "{at} takes what nobody reads");
    }
    Ok(())
}

#[test]
fn templates_use_each_value_and_no_other() -> Result<()> {
    let mut text = String::new();
    for template in std::fs::read_dir(chart().join("templates"))? {
        text += &std::fs::read_to_string(template?.path())?;
    }
    let used: BTreeSet<String> =
        Regex::new(r"\.Values\.([A-Za-z0-9.]+)")?.captures_iter(&text).map(|found| found[1].to_owned()).collect();
    let known = leaves(&schema()?, "");
    for value in &known {
        ensure!(used.contains(value), "no template uses {value}");
    }
    for value in &used {
        ensure!(known.contains(value), "a template uses {value}, which values.schema.json hasn't");
    }
    Ok(())
}

#[test]
fn what_users_of_other_charts_look_for_is_there_and_in_the_readme() -> Result<()> {
    let (known, readme) = (leaves(&schema()?, ""), read("README.md")?);
    for value in [
        "affinity",
        "alerts.enabled",
        "cniBinDir",
        "cniConf.install",
        "cniConf.name",
        "cniConfDir",
        "dashboard.enabled",
        "extraArgs",
        "extraEnv",
        "fastPath",
        "imagePullSecrets",
        "ipMasq",
        "network.directRouting",
        "network.mtu",
        "network.port",
        "network.vni",
        "networkPolicy",
        "nodeSelector",
        "podAnnotations",
        "podLabels",
        "podMonitor.enabled",
        "priorityClassName",
        "resources",
        "serviceAccount.annotations",
        "serviceAccount.create",
        "serviceAccount.name",
        "services.apiServer.host",
        "services.apiServer.port",
        "services.enabled",
        "tolerations",
        "updateStrategy",
    ] {
        ensure!(known.contains(value), "there is no {value}");
        let whole = ["network.", "cniConf.", "services."].iter().any(|group| value.starts_with(group));
        let name = if whole { value } else { value.split('.').next().unwrap_or(value) };
        ensure!(readme.contains(&format!("`{name}`")), "the README doesn't name {name}");
    }
    assert_eq!(values()?["ipMasq"], true, "pods reach the outside unless told otherwise");
    Ok(())
}

#[test]
fn chart_is_of_this_version() -> Result<()> {
    let chart: Value = serde_saphyr::from_str(&read("Chart.yaml")?)?;
    for key in ["version", "appVersion"] {
        assert_eq!(chart[key], env!("CARGO_PKG_VERSION"), "{key}");
    }
    Ok(())
}
