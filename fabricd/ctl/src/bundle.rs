//! `fabricctl doctor --bundle`: an archive of all that helps others to look for what is wrong, without secrets.
//!
//! What the daemon shows (JSON), what the host's own tools show (text), the log's end, settings and versions. A tool that
//! isn't there, or fails, is told in its file. Of settings the files and `FABRICD_*` variables are taken: they name files
//! with keys and passwords, and hold none; credentials in URLs are left out all the same.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;
use fabric_proto::v1::{
    Check, GetKernelStateRequest, GetMeshRequest, GetStatusRequest, ListLeasesRequest, WatchEventsRequest,
};
use regex::Regex;
use serde::Serialize;

use crate::daemon;

/// What is asked of the host, and the file that it goes to.
const COMMANDS: [(&str, &[&str]); 25] = [
    ("ip-link", &["ip", "-d", "-s", "link", "show"]),
    ("ip-address", &["ip", "address", "show"]),
    ("ip-route-4", &["ip", "-4", "route", "show", "table", "all"]),
    ("ip-route-6", &["ip", "-6", "route", "show", "table", "all"]),
    ("ip-rule-4", &["ip", "-4", "rule", "show"]),
    ("ip-rule-6", &["ip", "-6", "rule", "show"]),
    ("ip-nexthop", &["ip", "nexthop", "show"]),
    ("ip-neighbour", &["ip", "neighbour", "show"]),
    ("bridge-fdb", &["bridge", "fdb", "show"]),
    ("bridge-link", &["bridge", "-d", "link", "show"]),
    ("nft-ruleset", &["nft", "-a", "list", "ruleset"]),
    ("iptables-save", &["iptables-save", "-c"]),
    ("ip6tables-save", &["ip6tables-save", "-c"]),
    ("iptables-legacy-save", &["iptables-legacy-save", "-c"]),
    ("ip6tables-legacy-save", &["ip6tables-legacy-save", "-c"]),
    ("sockets", &["ss", "-ulpn"]),
    ("sysctl", &["sysctl", "net.ipv4", "net.ipv6.conf", "net.core", "net.bridge", "net.netfilter"]),
    ("networkctl", &["networkctl", "--no-pager", "list"]),
    ("cni-configurations", &["ls", "-l", "/etc/cni/net.d", "/opt/cni/bin"]),
    ("pod-addresses", &["ls", "-lR", "/var/lib/cni"]),
    ("disk", &["df", "-h"]),
    ("unit", &["systemctl", "status", "--no-pager", "-n", "0", "fabricd", "fabric-cni"]),
    ("journal", &["journalctl", "-u", "fabricd", "-u", "fabric-cni", "-n", "2000", "--no-pager"]),
    ("log", &["tail", "-n", "2000", "/var/log/fabricd.log"]),
    ("kernel", &["uname", "-a"]),
];

/// Files that are taken as they are.
const FILES: [(&str, &str); 7] = [
    ("node.json", "/run/fabric/node.json"),
    ("subnet.env", "/run/flannel/subnet.env"),
    ("settings.toml", "/etc/fabric/fabricd.toml"),
    ("settings.env", "/etc/default/fabricd"),
    ("fabric.conflist", "/etc/cni/net.d/10-fabric.conflist"),
    ("os-release", "/etc/os-release"),
    ("modules", "/proc/modules"),
];

/// Writes it. What the daemon shows is left out when it doesn't answer.
pub async fn pack(socket: Option<&Path>, file: &Path, checks: &[Check]) -> anyhow::Result<()> {
    let told = || format!("cannot write {}", file.display());
    let mut archive = Archive(tar::Builder::new(File::create(file).with_context(told)?));
    archive.json("checks.json", &checks)?;
    if let Some(socket) = socket {
        daemon_shows(socket, &mut archive).await?;
    }
    for (name, command) in COMMANDS {
        archive.text(&format!("host/{name}.txt"), &output(command))?;
    }
    for (name, path) in FILES {
        if let Ok(text) = std::fs::read_to_string(path) {
            archive.text(&format!("files/{name}"), &without_credentials(&text))?;
        }
    }
    archive.text("files/process", &without_credentials(&process()))?;
    archive.text("version", concat!("fabricctl ", env!("CARGO_PKG_VERSION"), "\n"))?;
    archive.0.into_inner().and_then(|file| file.sync_all()).with_context(told)
}

async fn daemon_shows(socket: &Path, archive: &mut Archive) -> anyhow::Result<()> {
    let mut client = daemon::connect(socket).await?;
    archive.json("status.json", &client.get_status(GetStatusRequest {}).await?.into_inner())?;
    archive.json("leases.json", &client.list_leases(ListLeasesRequest {}).await?.into_inner())?;
    archive.json("mesh.json", &client.get_mesh(GetMeshRequest {}).await?.into_inner())?;
    let kernel = client.get_kernel_state(GetKernelStateRequest { entries: true }).await?.into_inner();
    archive.json("kernel.json", &kernel)?;
    let mut stream = client.watch_events(WatchEventsRequest { follow: false }).await?.into_inner();
    let mut events = vec![];
    while let Some(event) = stream.message().await? {
        events.push(event);
    }
    archive.json("events.json", &events)
}

struct Archive(tar::Builder<File>);

impl Archive {
    fn json<T: Serialize + ?Sized>(&mut self, name: &str, value: &T) -> anyhow::Result<()> {
        self.add(name, &serde_json::to_vec_pretty(value)?)
    }

    fn text(&mut self, name: &str, text: &str) -> anyhow::Result<()> {
        self.add(name, text.as_bytes())
    }

    fn add(&mut self, name: &str, content: &[u8]) -> anyhow::Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len().try_into()?);
        header.set_mode(0o600);
        header.set_mtime(std::time::UNIX_EPOCH.elapsed()?.as_secs());
        Ok(self.0.append_data(&mut header, format!("fabricd/{name}"), content)?)
    }
}

fn output(command: &[&str]) -> String {
    let shown = command.join(" ");
    match Command::new(command[0]).args(&command[1..]).output() {
        Err(error) => format!("$ {shown}\n{error}\n"),
        Ok(output) => {
            let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            format!("$ {shown}\n{out}{err}")
        }
    }
}

/// The daemon's command line and its `FABRICD_*` variables, by /proc; of each fabricd that is seen from here.
fn process() -> String {
    let mut text = String::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let read = |file: &str| std::fs::read_to_string(entry.path().join(file)).unwrap_or_default();
        if read("comm").trim() == "fabricd" {
            text += &format!("{}\n", read("cmdline").replace('\0', " "));
            let environment = read("environ");
            let ours = environment.split('\0').filter(|variable| variable.starts_with("FABRICD_"));
            ours.for_each(|variable| text += &format!("  {variable}\n"));
        }
    }
    text
}

/// Without the user and password of URLs, and without what a setting says that is called a password, token or secret.
fn without_credentials(text: &str) -> String {
    let url = Regex::new(r"://[^/@\s]+@").expect("a valid expression");
    let value =
        Regex::new(r#"(?im)^(\s*"?[\w-]*(?:password|token|secret)"?\s*[=:]\s*).+$"#).expect("a valid expression");
    value.replace_all(&url.replace_all(text, "://(left out)@"), "${1}(left out)").into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_left_out_and_names_of_files_stay() {
        let text = "etcd_endpoints = [\"https://root:hunter2@192.0.2.1:2379\"]\netcd_password = \"hunter2\"\n\
                    etcd_password_file = \"/etc/fabric/password\"\n  \"token\": \"hunter2\"\n";
        let left = without_credentials(text);
        assert!(!left.contains("hunter2"), "{left}");
        assert!(left.contains("192.0.2.1:2379") && left.contains("/etc/fabric/password"), "{left}");
    }

    #[test]
    fn tool_that_is_missing_is_told() {
        assert!(output(&["no-such-tool", "-x"]).starts_with("$ no-such-tool -x\nNo such file"));
        assert_eq!(output(&["echo", "hello"]), "$ echo hello\nhello\n");
    }
}
