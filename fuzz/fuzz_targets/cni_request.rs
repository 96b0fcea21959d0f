//! A runtime's request: the environment and stdin, of both plugins. The input is NUL-separated: verb, container,
//! interface, `CNI_ARGS`, stdin.
#![no_main]

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use fabric_cni::bridge::BridgeConf;
use fabric_cni::conf::PluginConf;
use fabric_cni::request::{Action, Request};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let mut parts = input.splitn(5, |byte| *byte == 0);
    let mut part = || parts.next().unwrap_or_default();
    let (verb, container, ifname, args, stdin) = (part(), part(), part(), part(), part());
    let env = |name: &str| {
        let value: &[u8] = match name {
            "CNI_COMMAND" => verb,
            "CNI_CONTAINERID" => container,
            "CNI_IFNAME" => ifname,
            "CNI_ARGS" => args,
            "CNI_NETNS" => b"/run/netns/pod",
            "CNI_PATH" => b"/opt/cni/bin",
            _ => return None,
        };
        Some(OsString::from_vec(value.to_vec()))
    };
    if let Ok(Request::Call(call)) = Request::<BridgeConf>::read(env, stdin) {
        let _ = (call.conf.wished_ips(&call.args), call.conf.wished_mac(&call.args));
    }
    if let Ok(Request::Call(call)) = Request::<PluginConf>::read(env, stdin)
        && let Action::Add(pod) | Action::Del(pod) | Action::Check(pod, _) = &call.action
    {
        let name = format!("{}@{}.json", pod.id.container, pod.id.ifname);
        assert!(!name.contains(['/', '\0']) && !name.starts_with('.') && name.len() <= 255);
    }
});
