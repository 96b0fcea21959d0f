//! The binary as a runtime meets it: exit codes, one JSON object on stdout, whatever comes in.

use std::io::Write;
use std::process::{Command, Stdio};

use proptest::prelude::*;
use serde_json::Value;

fn shim(env: &[(&str, &str)], stdin: &[u8]) -> (Option<i32>, Value) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_fabric-cni"))
        .env_clear()
        .envs(env.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the shim starts");
    // It may refuse before it has read all.
    let _ = child.stdin.take().expect("piped").write_all(stdin);
    let output = child.wait_with_output().expect("it ends");
    (output.status.code(), serde_json::from_slice(&output.stdout).unwrap_or_default())
}

const ADD: [(&str, &str); 5] = [
    ("CNI_COMMAND", "ADD"),
    ("CNI_CONTAINERID", "c1"),
    ("CNI_IFNAME", "eth0"),
    ("CNI_NETNS", "/nowhere"),
    ("CNI_PATH", "/nowhere"),
];

#[test]
fn version_is_answered_with_exit_code_0() {
    let (code, answer) = shim(&[("CNI_COMMAND", "VERSION")], br#"{"cniVersion":"0.4.0"}"#);
    assert_eq!(code, Some(0));
    assert_eq!(answer["cniVersion"], "0.4.0");
    assert_eq!(answer["supportedVersions"].as_array().map(Vec::len), Some(5));
}

#[test]
fn every_refusal_is_an_error_object_and_exit_code_1() {
    let huge = vec![b' '; 3 << 20];
    for (env, stdin, want) in [
        (&[][..], &b""[..], 4),
        (&[("CNI_COMMAND", "ADD")], b"", 4),
        (&ADD, b"", 6),
        (&ADD, &huge, 6),
        (&ADD, br#"{"cniVersion":"7.0.0","name":"n","type":"fabric-cni"}"#, 1),
        (&ADD, br#"{"cniVersion":"1.0.0","name":"../n","type":"fabric-cni"}"#, 7),
        (&ADD, br#"{"cniVersion":"1.0.0","name":"n","type":"fabric-cni","nodeFile":"/nowhere","readyTimeout":0}"#, 11),
    ] {
        let (code, told) = shim(env, stdin);
        assert_eq!((code, &told["code"]), (Some(1), &want.into()), "{told}");
        assert!(told["msg"].is_string() && told["cniVersion"].is_string(), "{told}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn any_stdin_ends_in_an_error_object(stdin in prop::collection::vec(any::<u8>(), 0..2000)) {
        let (code, told) = shim(&ADD, &stdin);
        prop_assert_eq!(code, Some(1));
        prop_assert!(told["code"].is_u64());
    }
}
