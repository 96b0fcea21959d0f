use std::fs::{self, OpenOptions};
use std::thread;
use std::time::Duration;

use fabric_core::handoff::NotReady;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::error::{CniError, Code};
use crate::request::Request;
use crate::testing::{ALL_VERSIONS, Fault, NO_BRIDGE, Node};
use crate::verbs::answer;

fn code(outcome: Result<Option<Value>, CniError>) -> u32 {
    outcome.expect_err("an error").code().number()
}

#[test]
fn every_verb_exists_from_the_version_that_the_spec_gave_it() {
    // Rows: spec 1.1.0, "CNI operations", and the history of CHECK (0.4.0), GC and STATUS (1.1.0).
    for (verb, served) in [
        ("ADD", [true, true, true, true, true]),
        ("DEL", [true, true, true, true, true]),
        ("CHECK", [false, false, true, true, true]),
        ("GC", [false, false, false, false, true]),
        ("STATUS", [false, false, false, false, true]),
        ("VERSION", [true, true, true, true, true]),
    ] {
        for (version, served) in ALL_VERSIONS.into_iter().zip(served) {
            let node = Node::new();
            let mut conf = node.conf(version);
            if verb == "CHECK" {
                conf["prevResult"] = node.add();
            }
            conf["cni.dev/valid-attachments"] = json!([]);
            let outcome = node.ask(verb, &conf);
            match (served, outcome) {
                (false, Err(e)) => assert_eq!(e.code(), Code::IncompatibleVersion, "{verb} {version}: {e}"),
                (true, Ok(answer)) => {
                    assert_eq!(answer.is_some(), matches!(verb, "ADD" | "VERSION"), "{verb} {version}");
                    if let Some(answer) = answer {
                        assert_eq!(answer["cniVersion"], version, "{verb}");
                    }
                }
                (_, outcome) => panic!("{verb} {version}: {outcome:?}"),
            }
        }
    }
}

#[test]
fn result_is_in_the_requested_version_whatever_the_delegate_speaks() {
    for speaks in [&["0.3.1"][..], &["0.4.0"], &["0.4.0", "1.0.0"], &["1.0.0", "1.1.0"]] {
        for version in ALL_VERSIONS {
            let mut node = Node::new();
            node.bridge.speaks = speaks.to_vec();
            let outcome = node.ask("ADD", &node.conf(version));
            if speaks.iter().all(|known| *known > version) {
                assert_eq!(code(outcome), 1, "{speaks:?} {version}");
                continue;
            }
            let result = outcome.expect("ADD succeeds").expect("a result");
            assert_eq!(result["cniVersion"], version);
            assert_eq!(result["ips"][0].get("version").is_some(), version < "1.0.0", "{speaks:?} {version}");
            let spoken = node.last_config()["cniVersion"].clone();
            assert_eq!(spoken, **speaks.iter().rfind(|known| **known <= version).expect("one"));
        }
    }
}

#[test]
fn version_names_all_and_is_answered_in_any() {
    let node = Node::new();
    let answer = node.ask("VERSION", &json!({"cniVersion": "9.9.9"})).expect("an answer").expect("printed");
    assert_eq!(answer, json!({"cniVersion": "1.1.0", "supportedVersions": ALL_VERSIONS}));
}

#[test]
fn add_is_refused_until_the_node_is_ready_and_leaves_nothing() {
    let node = Node::new();
    for (label, content, reason) in [
        ("missing", None, "No such file"),
        ("empty", Some(""), "not a node file"),
        ("newer", Some(r#"{"version": 99}"#), "version 99 is newer"),
    ] {
        let _ = fs::remove_file(node.path("node.json"));
        if let Some(content) = content {
            fs::write(node.path("node.json"), content).expect("a file");
        }
        let error = node.ask("ADD", &node.conf("1.0.0")).expect_err(label);
        assert_eq!(error.code(), Code::TryAgainLater, "{label}");
        assert!(error.to_string().contains(reason), "{label}: {error}");
        assert_eq!(code(node.ask("STATUS", &node.conf("1.1.0"))), 50, "{label}");
    }
    for (trouble, reason) in [(NotReady::Starting, "still starting"), (NotReady::Quarantine, "in quarantine")] {
        node.not_ready(trouble);
        let error = node.ask("ADD", &node.conf("1.0.0")).expect_err("not ready");
        assert_eq!(error.code(), Code::TryAgainLater);
        assert!(error.to_string().contains(reason) && error.to_string().contains("node-2"), "{error}");
        let unavailable = node.ask("STATUS", &node.conf("1.1.0")).expect_err("not ready");
        assert_eq!((unavailable.code(), unavailable.to_string()), (Code::NotAvailable, error.to_string()));
    }
    assert_eq!(node.delegated(), [""; 0]);
    node.assert_clean();
    node.write_node_file(fabric_core::handoff::Readiness::Ready);
    node.add();
}

#[test]
fn add_waits_for_the_node_to_become_ready_even_if_its_folder_does_not_exist_yet() {
    let node = Node::new();
    fs::remove_file(node.path("node.json")).expect("removed");
    let mut conf = node.conf("1.0.0");
    conf["readyTimeout"] = 30.into();
    conf["nodeFile"] = json!(node.path("run/fabric/node.json"));
    let folder = node.path("run/fabric");
    thread::scope(|scope| {
        scope.spawn(|| {
            fs::create_dir_all(&folder).expect("a folder");
            let ready = crate::testing::node_file(fabric_core::handoff::Readiness::Ready).encode();
            fs::write(folder.join(".draft"), ready).expect("a file");
            fs::rename(folder.join(".draft"), folder.join("node.json")).expect("renamed");
        });
        node.ask("ADD", &conf).expect("ADD succeeds");
    });
}

#[test]
fn add_that_waited_in_vain_says_why_and_leaves_nothing() {
    let node = Node::new();
    node.not_ready(NotReady::Starting);
    let mut conf = node.conf("1.0.0");
    conf["readyTimeout"] = 1.into();
    assert_eq!(code(node.ask("ADD", &conf)), 11);
    assert_eq!(node.delegated(), [""; 0]);
    node.assert_clean();
}

#[test]
fn second_add_is_an_error_and_the_first_attachment_stays() {
    let node = Node::new();
    node.add();
    assert_eq!(code(node.ask("ADD", &node.conf("1.0.0"))), 103);
    assert_eq!(node.delegated(), ["ADD"]);
    assert_eq!(node.bridge.ipam.borrow().len(), 1);
    node.ask("DEL", &node.conf("1.0.0")).expect("DEL succeeds");
    node.assert_clean();
}

#[test]
fn failed_add_undoes_itself() {
    let bridges_error = json!({"code": 11, "msg": "no IP addresses", "details": "in range set"}).to_string();
    for (fault, code, says) in [
        (Fault::Says(bridges_error), 11, "bridge ADD: no IP addresses"),
        (Fault::Says("panic: oh".into()), 102, "exit code 1 and no CNI error"),
        (Fault::Says(r#"{"code":0,"msg":""}"#.into()), 102, "exit code 1 and no CNI error"),
        (Fault::DiesOf(9), 102, "killed by signal 9"),
        (Fault::Hangs, 101, "did not end within 45s"),
        (Fault::Answers(String::new()), 102, "EOF"),
        (Fault::Answers(r#"{"cniVersion":"0.2.0","ip4":{}}"#.into()), 102, "cniVersion is 0.2.0"),
        (Fault::Answers(r#"{"cniVersion":"1.0.0","ips":[{"address":"x"}]}"#.into()), 102, "an address in ips"),
    ] {
        let mut node = Node::new();
        node.bridge.faults.insert("ADD", fault);
        let error = node.ask("ADD", &node.conf("1.0.0")).expect_err(says);
        assert_eq!(error.code().number(), code, "{error}");
        assert!(error.to_string().contains(says), "{error}");
        assert_eq!(node.delegated(), ["ADD", "DEL"]);
        node.assert_clean();
    }
}

#[test]
fn failed_add_whose_cleaning_fails_is_left_to_del() {
    let mut node = Node::new();
    node.bridge.faults.extend([("ADD", Fault::Hangs), ("DEL", Fault::Hangs)]);
    let error = node.ask("ADD", &node.conf("1.0.0")).expect_err("hangs");
    let details = error.to_json(crate::version::SpecVersion::V1_0_0)["details"].to_string();
    assert!(details.contains("DEL has to finish it"), "{details}");
    assert!(node.state_file().exists());
    node.bridge.faults.clear();
    node.ask("DEL", &node.conf("1.0.0")).expect("DEL succeeds");
    node.assert_clean();
}

#[test]
fn attachment_is_on_disk_before_the_delegate_runs_and_says_what_it_was_told() {
    let node = Node::new();
    node.add();
    let file = fs::read_to_string(node.state_file()).expect("a file");
    let saved: Value = serde_json::from_str(file.lines().next().expect("a line")).expect("JSON");
    let mut told = node.last_config();
    told.as_object_mut().expect("an object").remove("cniVersion");
    assert_eq!((&saved["containerID"], &saved["ifname"], &saved["config"]), (&"c1".into(), &"eth0".into(), &told));
}

#[test]
fn del_uses_what_was_saved_even_if_subnet_and_configuration_have_changed() {
    let node = Node::new();
    node.add();
    fs::remove_file(node.path("node.json")).expect("removed");
    let mut conf = node.conf("1.0.0");
    conf["delegate"] = json!({"bridge": "other0"});
    node.ask("DEL", &conf).expect("DEL succeeds");
    let told = node.last_config();
    assert_eq!(
        (&told["bridge"], &told["ipam"]["ranges"][0][0]["subnet"]),
        (&NO_BRIDGE.into(), &"10.244.3.0/24".into())
    );
}

#[test]
fn del_frees_the_address_without_state_daemon_or_node_file_and_any_number_of_times() {
    for broken in [None, Some(""), Some("{\"containerID\":\"c1\",\"ifna"), Some("\0\0\0"), Some("[]")] {
        let node = Node::new();
        node.add();
        fs::remove_file(node.path("node.json")).expect("removed");
        match broken {
            None => fs::remove_file(node.state_file()).expect("removed"),
            Some(content) => fs::write(node.state_file(), content).expect("a file"),
        }
        for _ in 0..3 {
            node.ask("DEL", &node.conf("1.0.0")).expect("DEL succeeds");
            node.assert_clean();
        }
        let told = node.last_config();
        assert_eq!((&told["name"], &told["ipam"]["type"]), (&"fabric".into(), &"host-local".into()));
    }
}

#[test]
fn del_hides_a_namespace_that_is_gone_and_a_result_that_is_none() {
    let node = Node::new();
    node.add();
    let mut conf = node.conf("1.0.0");
    conf["prevResult"] = json!("nonsense");
    node.ask("DEL", &conf).expect("DEL succeeds");
    assert!(node.last_config().get("prevResult").is_none());
    assert!(super::namespace(&node.path("state")).is_none());
    assert!(super::namespace(&node.path("nothing")).is_none());
    assert!(super::namespace("/proc/self/ns/net".as_ref()).is_some());
}

#[test]
fn del_that_fails_can_be_repeated() {
    let mut node = Node::new();
    node.add();
    node.bridge.faults.insert("DEL", Fault::Says(r#"{"code":999,"msg":"busy"}"#.into()));
    assert_eq!(code(node.ask("DEL", &node.conf("1.0.0"))), 999);
    assert!(node.state_file().exists());
    node.bridge.faults.clear();
    node.ask("DEL", &node.conf("1.0.0")).expect("DEL succeeds");
    node.assert_clean();
}

#[test]
fn del_waits_for_the_delegate_of_an_add_that_was_killed() {
    let node = Node::new();
    node.add();
    let held = OpenOptions::new().read(true).open(node.state_file()).expect("a file");
    held.lock().expect("locked");
    let orphan = thread::spawn(move || {
        #[expect(clippy::disallowed_methods, reason = "how long an orphan holds the lock")]
        thread::sleep(Duration::from_millis(200));
        drop(held);
    });
    let begin = std::time::Instant::now();
    node.ask("DEL", &node.conf("1.0.0")).expect("DEL succeeds");
    assert!(begin.elapsed() >= Duration::from_millis(150), "it did not wait");
    orphan.join().expect("ended");
    node.assert_clean();
}

#[test]
fn check_passes_the_result_on_in_the_delegates_version() {
    let mut node = Node::new();
    let result = node.add();
    let mut conf = node.conf("1.1.0");
    assert_eq!(code(node.ask("CHECK", &conf)), 7);
    conf["prevResult"] = result;
    conf["prevResult"]["interfaces"][0]["mtu"] = 1430.into();
    node.ask("CHECK", &conf).expect("CHECK succeeds");
    let told = node.last_config();
    assert_eq!((&told["cniVersion"], &told["prevResult"]["cniVersion"]), (&"1.0.0".into(), &"1.0.0".into()));
    assert!(told["prevResult"]["interfaces"][0].get("mtu").is_none());

    node.bridge.faults.insert("CHECK", Fault::Says(r#"{"code":999,"msg":"no route"}"#.into()));
    assert_eq!(code(node.ask("CHECK", &conf)), 999);
    assert_eq!(code(node.ask_about("c2", "CHECK", &conf)), 104);
}

#[test]
fn gc_detaches_all_but_those_named_and_those_in_the_making() {
    let node = Node::new();
    for container in ["c1", "c2", "c3"] {
        node.ask_about(container, "ADD", &node.conf("1.0.0")).expect("ADD succeeds");
    }
    let draft = node.path("state/fabric/.c9@eth0.1");
    fs::write(&draft, "").expect("a file");
    let in_the_making = fs::File::open(node.path("state/fabric/c3@eth0.json")).expect("a file");
    in_the_making.lock().expect("locked");
    let mut conf = node.conf("1.1.0");
    assert_eq!(code(node.ask("GC", &conf)), 7, "without a list nothing may be taken for invalid");
    conf["cni.dev/valid-attachments"] = json!([{"containerID": "c1", "ifname": "eth0"}]);
    fs::remove_file(node.path("node.json")).expect("removed");
    node.ask("GC", &conf).expect("GC succeeds");

    let left: Vec<_> = node.bridge.ipam.borrow().keys().map(|(container, _)| container.clone()).collect();
    assert_eq!(left, ["c1", "c3"]);
    assert!(!draft.exists());
    // c1 lives at the same path, so c2's saved namespace is not its own any more.
    let env = node.bridge.seen.borrow().iter().rfind(|seen| seen.verb == "DEL").expect("a DEL").env.clone();
    assert_eq!(env["CNI_NETNS"], "");

    drop(in_the_making);
    conf["cni.dev/valid-attachments"] = Value::Null;
    node.ask("GC", &conf).expect("GC succeeds");
    node.assert_clean();
}

#[test]
fn gc_and_status_go_on_only_to_a_delegate_that_knows_them() {
    for (speaks, seen) in [(&["1.0.0"][..], &[][..]), (&["1.0.0", "1.1.0"], &["STATUS", "GC"])] {
        let mut node = Node::new();
        node.bridge.speaks = speaks.to_vec();
        let mut conf = node.conf("1.1.0");
        conf["cni.dev/attachments"] = json!([]);
        node.ask("STATUS", &conf).expect("ready");
        node.ask("GC", &conf).expect("GC succeeds");
        assert_eq!(node.delegated(), seen);
    }
}

#[test]
fn full_or_read_only_disk_refuses_the_add_and_attaches_nothing() {
    let node = Node::new();
    // A file where the folder should be stands for any disk that refuses: root is refused by nothing else.
    fs::write(node.path("state"), "").expect("a file");
    let error = node.ask("ADD", &node.conf("1.0.0")).expect_err("no folder");
    assert_eq!(error.code(), Code::Io, "{error}");
    assert_eq!(node.delegated(), [""; 0]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn del_succeeds_over_any_state_file(content in prop::collection::vec(any::<u8>(), 0..300)) {
        let node = Node::new();
        node.add();
        fs::write(node.state_file(), content).expect("a file");
        node.ask("DEL", &node.conf("1.0.0")).expect("DEL succeeds");
        node.assert_clean();
    }
}

/// ADD of the pod `shop/web` as a runtime of Kubernetes asks for it.
fn add_of_kubernetes(node: &Node, conf: &Value) -> Value {
    let env = |name: &str| {
        Some(match name {
            "CNI_COMMAND" => "ADD".into(),
            "CNI_CONTAINERID" => "c1".into(),
            "CNI_IFNAME" => "eth0".into(),
            "CNI_NETNS" => "/proc/self/ns/net".into(),
            "CNI_PATH" => node.path("bin").into(),
            "CNI_ARGS" => "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID=u1".into(),
            _ => return None,
        })
    };
    let request = Request::read(env, conf.to_string().as_bytes()).expect("a request");
    answer(&request, &node.bridge).expect("ADD succeeds").expect("a result")
}

#[test]
fn pod_of_kubernetes_is_saved_with_its_name() {
    let node = Node::new();
    add_of_kubernetes(&node, &node.conf("1.0.0"));
    let saved = fabric_core::attachments::SavedAttachment::decode(&fs::read(node.state_file()).expect("saved"));
    let pod = saved.pod.expect("named");
    assert_eq!((&*pod.namespace, &*pod.name, pod.uid.as_deref()), ("shop", "web", Some("u1")));
}

#[test]
fn add_waits_for_the_pods_network_policies_where_they_are_on() {
    let node = Node::new();
    let mut conf = node.conf("1.0.0");
    conf["policyTimeout"] = json!(30);
    fs::create_dir(node.path("policy-applied")).expect("a folder");
    let (state, applied) = (node.state_file(), node.path("policy-applied/c1@eth0"));
    let daemon = thread::spawn(move || {
        while fs::read(&state).is_ok_and(|saved| saved.iter().filter(|byte| **byte == b'\n').count() == 0)
            || !state.exists()
        {
            thread::yield_now();
        }
        fs::write(applied, "").expect("written");
    });
    add_of_kubernetes(&node, &conf);
    assert!(node.path("policy-applied/c1@eth0").exists(), "it came back before");
    daemon.join().expect("it ends");
}

#[test]
fn add_ends_though_network_policies_are_late_or_nobody_is_to_wait() {
    for timeout in [0, 1] {
        let node = Node::new();
        let mut conf = node.conf("1.0.0");
        conf["policyTimeout"] = json!(timeout);
        fs::create_dir(node.path("policy-applied")).expect("a folder");
        add_of_kubernetes(&node, &conf);
    }
}
