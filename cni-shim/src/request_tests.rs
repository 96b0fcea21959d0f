use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, Read};

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::conf::PluginConf;

const CONF: &str = r#"{"cniVersion":"1.0.0","name":"fabric","type":"fabric-cni"}"#;

fn environment_of(verb: &str) -> BTreeMap<&'static str, OsString> {
    [
        ("CNI_COMMAND", verb),
        ("CNI_CONTAINERID", "c1"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_NETNS", "/run/netns/pod"),
        ("CNI_PATH", "/opt/cni/bin:/usr/lib/cni"),
    ]
    .map(|(name, value)| (name, value.into()))
    .into()
}

fn read(env: &BTreeMap<&str, OsString>, stdin: &[u8]) -> Result<Request<PluginConf>, CniError> {
    Request::read(|name| env.get(name).cloned(), stdin)
}

fn error(env: &BTreeMap<&str, OsString>, stdin: &str) -> (u32, String) {
    let error = read(env, stdin.as_bytes()).expect_err(stdin);
    (error.code().number(), error.to_string())
}

#[test]
fn request_carries_all_that_the_runtime_said() {
    let Ok(Request::Call(call)) = read(&environment_of("ADD"), CONF.as_bytes()) else { panic!("a call") };
    let Action::Add(Attachment { id, netns }) = &call.action else { panic!("ADD") };
    assert_eq!(id.to_string(), "interface eth0 of container c1");
    assert_eq!(netns.as_deref(), Some("/run/netns/pod".as_ref()));
    assert_eq!(call.plugin_dirs, [PathBuf::from("/opt/cni/bin"), "/usr/lib/cni".into()]);
    assert_eq!(call.conf.node_file, PathBuf::from("/run/fabric/node.json"));
    assert_eq!(call.conf.state_dir, PathBuf::from("/var/lib/cni/fabric"));
}

#[test]
fn conflist_that_we_ship_is_understood() {
    let list: Value = serde_json::from_str(include_str!("../../deploy/cni/10-fabric.conflist")).expect("JSON");
    // A runtime takes the list's name and version into each plugin's configuration (spec, section 3).
    let mut conf = list["plugins"][0].clone();
    conf["name"] = list["name"].clone();
    conf["cniVersion"] = list["cniVersion"].clone();
    let request = read(&environment_of("ADD"), conf.to_string().as_bytes()).expect("understood");
    assert_eq!(request.version(), SpecVersion::V1_0_0);
}

#[test]
fn variables_that_the_spec_requires_are_missed_by_name() {
    for verb in Verb::ALL {
        for name in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"] {
            for absent in [None, Some("")] {
                let mut env = environment_of(verb.as_str());
                env.remove(name);
                env.extend(absent.map(|empty| (name, empty.into())));
                let told = read(&env, br#"{"cniVersion":"1.1.0"}"#).err().map(|e| e.to_string()).unwrap_or_default();
                assert_eq!(told.contains(name), verb.required().contains(&name), "{verb} without {name}: {told}");
            }
        }
    }
}

#[test]
fn command_that_is_none_is_refused() {
    let nothing = BTreeMap::new();
    assert_eq!(error(&nothing, "").0, 4);
    for verb in ["", "add", "UPDATE", "ADD "] {
        assert_eq!(error(&environment_of(verb), CONF).0, 4, "{verb}");
    }
}

#[test]
fn names_that_could_be_paths_are_refused() {
    for (name, values) in [
        ("CNI_CONTAINERID", &["../c1", "a/b", ".c1", "-c1", "c 1", "c1@x", "c:1", &"c".repeat(201)][..]),
        ("CNI_IFNAME", &["..", ".", "a/b", "a:b", "a b", "0123456789abcdef"]),
    ] {
        for value in values {
            let mut env = environment_of("DEL");
            env.insert(name, (*value).into());
            let (code, told) = error(&env, CONF);
            assert!(code == 4 && told.starts_with(name), "{name}={value}: {code} {told}");
        }
    }
    for network in ["../../etc", "a/b", "", ".versions", "a\u{0}b"] {
        let conf = json!({"cniVersion": "1.0.0", "name": network, "type": "fabric-cni"}).to_string();
        assert_eq!(error(&environment_of("DEL"), &conf).0, 7, "{network}");
    }
    for plugin in ["../../bin/sh", "/bin/sh", "", "fabric-cni"] {
        let conf = json!({"cniVersion": "1.0.0", "name": "n", "type": "fabric-cni", "delegate": {"type": plugin}});
        assert_eq!(error(&environment_of("ADD"), &conf.to_string()).0, 7, "{plugin}");
    }
}

#[test]
fn stdin_that_is_no_configuration_is_refused_by_the_specs_code() {
    let with = |key: &str, value: Value| {
        let mut conf = json!({"cniVersion": "1.0.0", "name": "fabric", "type": "fabric-cni"});
        conf[key] = value;
        conf.to_string()
    };
    for (stdin, code) in [
        (String::new(), 6),
        ("{".into(), 6),
        ("[]".into(), 6),
        ("\u{0}".into(), 6),
        ("[".repeat(100_000), 6),
        ("{}".into(), 1),
        (with("cniVersion", "0.2.0".into()), 1),
        (with("cniVersion", "2.0.0".into()), 1),
        (with("cniVersion", 1.into()), 1),
        (with("name", Value::Null), 7),
        (with("type", 3.into()), 7),
        (with("nodeFile", "node.json".into()), 7),
        (with("stateDir", "../state".into()), 7),
        (with("dataDir", "".into()), 7),
        (with("delegate", "bridge".into()), 7),
        (with("delegate", json!({"type": 1})), 7),
        (with("ipam", json!({"type": "dhcp"})), 2),
        (with("delegate", json!({"ipam": {"subnet": "192.0.2.0/24"}})), 2),
        (with("delegate", json!({"ipam": {"type": "host-local", "ranges": []}})), 2),
        (with("delegate", json!({"ipam": "dhcp"})), 7),
        (with("readyTimeout", json!(-1)), 7),
        (with("delegate", json!({"name": "x"})), 2),
        (with("delegate", json!({"cniVersion": "0.1.0"})), 2),
    ] {
        let (got, told) = error(&environment_of("ADD"), &stdin);
        assert_eq!(got, code, "{stdin:.80}: {told}");
        assert!(told.len() < 400, "{told}");
    }
}

#[test]
fn unsupported_field_is_named_with_its_value() {
    let conf = json!({"cniVersion": "1.0.0", "name": "n", "type": "fabric-cni", "delegate": {"name": "x"}});
    let (_, told) = error(&environment_of("ADD"), &conf.to_string());
    assert_eq!(
        told,
        r#"delegate.name is "x", but can't be set: all networks of the node share one IPAM state, which is called so; take it out"#
    );
}

#[test]
fn endless_and_failing_stdin_end_in_an_error() {
    let env = environment_of("ADD");
    let read = |stdin: Box<dyn Read>| {
        let error = Request::<PluginConf>::read(|name| env.get(name).cloned(), stdin).expect_err("no configuration");
        error.code().number()
    };
    assert_eq!(read(Box::new(io::repeat(b' '))), 6);

    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::ConnectionReset.into())
        }
    }
    assert_eq!(read(Box::new(Broken)), 5);
}

#[test]
fn version_needs_nothing_but_the_question() {
    for stdin in ["", "{}", r#"{"cniVersion":"0.1.0"}"#] {
        let env = BTreeMap::from([("CNI_COMMAND", "VERSION".into())]);
        assert_eq!(read(&env, stdin.as_bytes()).expect(stdin).version(), SpecVersion::NEWEST);
        assert_eq!(error(&env, "nonsense").0, 6);
    }
}

proptest! {
    #[test]
    fn no_bytes_on_stdin_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), verb in 0..6_usize) {
        let _ = read(&environment_of(Verb::ALL[verb].as_str()), &bytes);
    }

    #[test]
    fn no_name_in_the_environment_leaves_its_folder(container in any::<String>(), ifname in any::<String>()) {
        let mut env = environment_of("DEL");
        env.insert("CNI_CONTAINERID", container.into());
        env.insert("CNI_IFNAME", ifname.into());
        if let Ok(Request::Call(call)) = read(&env, CONF.as_bytes()) {
            let Action::Del(pod) = &call.action else { panic!("DEL") };
            let name = format!("{}@{}.json", pod.id.container, pod.id.ifname);
            prop_assert!(!name.contains(['/', '\0']) && !name.starts_with('.') && name.len() <= 255);
        }
    }
}
