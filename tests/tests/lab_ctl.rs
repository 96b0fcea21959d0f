//! fabricctl in the Lab: where it finds the datastore, what it changes there, what its exit codes and formats say.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fabric_core::model::Family;
use fabric_tests::lab::exec::Output;
use fabric_tests::lab::{Lab, Node, wait_until};
use serde_json::Value;

/// How long a change may take on a busy machine.
const SOON: Duration = Duration::from_secs(60);

/// As an operator types it: without the variables that a node of the Lab has.
fn ctl(node: &Node, args: &[&str]) -> Result<Output> {
    node.exec(&[&["env", "-u", "FABRICD_ETCD_ENDPOINTS", "fabricctl"], args].concat())
}

fn says(node: &Node, args: &[&str]) -> Result<String> {
    let output = ctl(node, args)?;
    ensure!(output.success(), "{args:?}: {output:?}");
    Ok(output.stdout)
}

/// What is refused, and why.
fn refusal(node: &Node, args: &[&str]) -> Result<String> {
    let output = ctl(node, args)?;
    ensure!(output.status.code() == Some(1), "{args:?}: {output:?}");
    Ok(output.stderr)
}

/// The command behind the last `: ` of a message, run as it is, by a shell.
fn run_the_fix(node: &Node, told: &str) -> Result<String> {
    let (_, fix) = told.trim().rsplit_once(": ").context("a fix")?;
    ensure!(fix.starts_with("fabricctl "), "{told}");
    node.run(&["env", "-u", "FABRICD_ETCD_ENDPOINTS", "sh", "-c", fix])
}

#[test]
fn datastore_is_found_by_the_daemon_else_by_its_settings_files_and_flags_win() -> Result<()> {
    let lab = Lab::builder().start()?;
    let node = lab.node("node-1")?;
    let endpoints = lab.etcd().endpoints();
    ensure!(says(node, &["lease", "list"])?.contains("node-1"), "the daemon knows where etcd is");
    ensure!(says(node, &["network", "show"])?.contains("set by the daemon at /run/fabric/fabricd.sock"));

    node.stop_fabricd()?;
    for command in [&["lease", "list"][..], &["network", "show"], &["network", "set", "--mtu", "1400"]] {
        let told = refusal(node, command)?;
        ensure!(told.contains("etcd does not answer at http://127.0.0.1:2379"), "{told}");
        ensure!(told.contains("no daemon answers at /run/fabric/fabricd.sock") && told.contains("refused"), "{told}");
    }
    let flags = ["--etcd-endpoints", &endpoints];
    ensure!(says(node, &[&["lease", "list"], &flags[..]].concat())?.contains("node-1"));

    fs::create_dir_all(node.path("/etc/fabric")?)?;
    let file = node.path("/etc/fabric/fabricd.toml")?;
    fs::write(&file, format!("etcd_endpoints = ['{endpoints}']\n"))?;
    ensure!(says(node, &["lease", "list"])?.contains("node-1"));
    fs::write(node.path("/etc/default/fabricd")?, "FABRICD_ETCD_PREFIX=/other\n")?;
    let told = refusal(node, &["network", "show"])?;
    ensure!(told.contains("there is nothing at /other/config"), "the variables of the service win: {told}");
    fs::remove_file(node.path("/etc/default/fabricd")?)?;

    fs::write(&file, "etcd_endpoints = ['http://192.0.2.1:1']\n")?;
    let told = refusal(node, &["lease", "show", "node-1"])?;
    ensure!(told.contains("http://192.0.2.1:1 (set by /etc/fabric/fabricd.toml)"), "{told}");
    ensure!(says(node, &[&["lease", "list"], &flags[..]].concat())?.contains("node-1"), "flags win");
    fs::write(&file, "etcd_endpoint = 'x'\n")?;
    let told = refusal(node, &["lease", "list"])?;
    ensure!(told.contains("/etc/fabric/fabricd.toml: there is no setting \"etcd_endpoint\""), "{told}");
    let named = node.path("/run/other.toml")?;
    fs::write(&named, format!("etcd_endpoints = ['{endpoints}']\nsocket = '/run/other.sock'\n"))?;
    ensure!(says(node, &["lease", "list", "--config", "/run/other.toml"])?.contains("node-1"));
    // The socket is found the same way.
    fs::copy(&named, &file)?;
    ensure!(refusal(node, &["status"])?.contains("/run/other.sock"));
    fs::remove_file(&file)?;
    Ok(())
}

#[test]
fn network_set_changes_one_key_and_says_what_running_nodes_do() -> Result<()> {
    let lab = Lab::builder().start()?;
    let node = lab.node("node-1")?;
    let put = r#"{"Network":"10.244.0.0/16","Theirs":7,"Backend":{"Type":"vxlan","DirectRouting":true}}"#;
    lab.etcd().ctl(&["put", "/coreos.com/network/config", put])?;
    let stored = || -> Result<Value> {
        let config = lab.etcd().ctl(&["get", "--print-value-only", "/coreos.com/network/config"])?;
        Ok(serde_json::from_str(&config)?)
    };

    let told = says(node, &["network", "set", "--mtu", "1400"])?;
    ensure!(told.contains("Running nodes apply it at once."), "{told}");
    let mut want: Value = serde_json::from_str(put)?;
    want["Backend"]["MTU"] = 1400.into();
    ensure!(stored()? == want, "{}", stored()?);
    wait_until("the device has the new MTU", SOON, || {
        ensure!(node.run(&["ip", "link", "show", "fabric.1"])?.contains("mtu 1350 "));
        Ok(())
    })?;
    ensure!(says(node, &["network", "set", "--mtu", "1400"])?.contains("says so already"));
    ensure!(ctl(node, &["network", "set"])?.status.code() == Some(2), "a key has to be given");
    ensure!(refusal(node, &["network", "set", "--mtu", "60"])?.contains("is not changed"));
    ensure!(refusal(node, &["network", "set", "--network", "10.99.0.0/16"])?.contains("overlaps"));
    ensure!(stored()? == want, "{}", stored()?);

    let told = says(node, &["network", "set", "--vni", "7"])?;
    ensure!(told.contains("Pending on running nodes") && told.contains("VNI: 1 → 7"), "{told}");
    wait_until("the change is pending, and the exit code says so", SOON, || {
        let status = ctl(node, &["status"])?;
        ensure!(status.status.code() == Some(4) && status.stdout.contains("Pending   VNI: 1 → 7"), "{status:?}");
        Ok(())
    })?;
    ensure!(says(node, &["network", "migrate"])?.contains("VNI: 1 → 7"));
    wait_until("it is applied", SOON, || {
        ensure!(ctl(node, &["status", "--wait", "60s"])?.status.code() == Some(0));
        node.run(&["ip", "link", "show", "fabric.7"]).map(drop)
    })
}

#[test]
fn exit_code_is_4_when_a_peer_is_not_reached_and_status_names_it() -> Result<()> {
    let lab = Lab::builder().nodes(2).start()?;
    let node = lab.node("node-1")?;
    let status = wait_until("all is well", SOON, || {
        let (status, peers) = (ctl(node, &["status", "--wait"])?, ctl(node, &["peers"])?);
        ensure!(status.stdout.contains("Mesh      1 of 1 reachable\n"), "{status:?}");
        ensure!(status.status.code() == Some(0) && peers.status.code() == Some(0), "{status:?} {peers:?}");
        Ok(status.stdout)
    })?;
    // The README shows the same lines and columns.
    let readme = include_str!("../../README.md");
    let shape = |text: &str| -> Vec<String> {
        let lines =
            text.lines().skip_while(|line| !line.starts_with("Node  ")).take_while(|line| !line.starts_with("node-"));
        let words = |line: &str| -> Vec<String> { line.split_whitespace().map(str::to_owned).collect() };
        lines
            .flat_map(
                |line| if line.starts_with("PEER") { words(line) } else { words(line).into_iter().take(1).collect() },
            )
            .collect()
    };
    ensure!(shape(readme) == shape(&status), "{:?}\n{:?}", shape(readme), shape(&status));
    lab.node("node-2")?.power_off()?;
    wait_until("the peer is named, with since when", SOON, || {
        let (status, peers) = (ctl(node, &["status"])?, ctl(node, &["peers", "-o", "json"])?);
        ensure!(status.status.code() == Some(4) && peers.status.code() == Some(4), "{status:?} {peers:?}");
        ensure!(status.stdout.contains("Mesh      1 of 1 unreachable: node-2 "), "{status:?}");
        let peers: Value = serde_json::from_str(&peers.stdout)?;
        let peer = &peers["peers"][0];
        ensure!(peer["state"] == "programmed" && peer["mesh"] != "fine", "{peer}");
        ensure!(peer["mesh_since_seconds"].as_f64().is_some_and(|since| since >= 0.0), "{peer}");
        Ok(())
    })?;
    // On a narrow terminal too.
    let narrow = node.exec(&["env", "COLUMNS=40", "fabricctl", "peers"])?.stdout;
    ensure!(narrow.lines().any(|line| line.starts_with("node-2  programmed  ")), "{narrow}");

    lab.etcd().stop()?;
    wait_until("the datastore's absence counts", SOON, || {
        let status = ctl(node, &["status"])?;
        ensure!(status.status.code() == Some(4) && status.stdout.contains("NOT CONNECTED"), "{status:?}");
        Ok(())
    })
}

#[test]
fn every_command_prints_in_every_format() -> Result<()> {
    let lab = Lab::builder().nodes(2).start()?;
    let node = lab.node("node-1")?;
    node.add_pod("a")?;
    wait_until("the peer is known", SOON, || {
        ensure!(says(node, &["peers"])?.contains("node-2"));
        Ok(())
    })?;
    let (from, to) = ("10.244.60.2", "10.244.14.2");
    let commands: &[&[&str]] = &[
        &["status"],
        &["peers"],
        &["leases"],
        &["mesh"],
        &["doctor"],
        &["explain", from, to],
        &["top", "--once"],
        &["events"],
        &["plan"],
        &["log-level"],
        &["network", "show"],
        &["network", "init", "--network", "10.244.0.0/16"],
        &["network", "set", "--port", "8472"],
        &["network", "migrate"],
        &["lease", "list"],
        &["lease", "show", "node-2"],
        &["lease", "reserve", "node-9", "10.244.9.0/24"],
        &["lease", "unreserve", "node-9"],
        &["lease", "release", "node-9"],
        &["lease", "renumber", "--force"],
    ];
    for command in commands {
        for format in ["table", "wide", "json", "yaml"] {
            // Until a renumbered node has its lease again, and others their answers.
            wait_until(&format!("{command:?} prints {format}"), SOON, || {
                let output = ctl(node, &[*command, &["-o", format][..]].concat())?;
                ensure!(!output.stdout.is_empty(), "{output:?}");
                let values = serde_json::Deserializer::from_str(&output.stdout).into_iter::<Value>();
                let is_json = values.collect::<Result<Vec<_>, _>>().is_ok_and(|all| all.iter().all(|v| !v.is_string()));
                ensure!(is_json == (format == "json"), "{output:?}");
                Ok(())
            })?;
        }
    }
    // The last command gave up its lease, and another one comes when it comes.
    wait_until("both nodes have a lease", SOON, || {
        let list: Value = serde_json::from_str(&says(node, &["lease", "list", "-o", "json"])?)?;
        let (leases, capacity) = (&list["leases"], &list["capacity"][0]);
        let own = leases.as_array().and_then(|all| all.iter().find(|lease| lease["node"] == "node-1"));
        let own = own.with_context(|| format!("none of node-1 in {list:#}"))?;
        ensure!(own["epoch"].is_u64() && own["addresses_used"].is_u64() && own["addresses_free"].is_u64(), "{own}");
        ensure!(capacity["subnets"] == 255 && capacity["leased"] == 2, "{capacity}");
        Ok(())
    })
}

#[test]
fn fixes_of_lease_commands_work_as_they_are_printed() -> Result<()> {
    let lab = Lab::builder().nodes(2).start()?;
    let (one, two) = (lab.node("node-1")?, lab.node("node-2")?);
    says(one, &["lease", "reserve", "node-9", "10.244.9.0/24"])?;
    let told = refusal(one, &["lease", "reserve", "node-8", "10.244.9.0/24"])?;
    ensure!(told.contains("10.244.9.0/24 is reserved for node-9"), "{told}");
    run_the_fix(one, &told)?;
    says(one, &["lease", "reserve", "node-8", "10.244.9.0/24"])?;

    let had = two.subnet()?;
    let told = refusal(one, &["lease", "reserve", "node-8", &had])?;
    ensure!(told.contains(&format!("node-2 holds {had}; run on node-2: ")), "{told}");
    run_the_fix(two, &told)?;
    wait_until("the subnet is free for it", SOON, || says(one, &["lease", "reserve", "node-8", &had]).map(drop))?;

    // Whoever lives takes its lease back, and is told of before.
    let had = wait_until("node-2 has another one", SOON, || two.subnet())?;
    wait_until("node-2 answers probes", SOON, || {
        ensure!(says(one, &["peers", "-o", "json"])?.contains("\"mesh\": \"fine\""));
        Ok(())
    })?;
    let released = ctl(one, &["lease", "release", "node-2"])?;
    ensure!(released.success() && released.stderr.contains("node-2 is alive"), "{released:?}");
    two.wait_holding(&had)?;
    let told = ctl(one, &["lease", "release", "node-7"])?;
    ensure!(told.stdout.contains("node-7 has no lease") && told.stderr.is_empty(), "{told:?}");
    Ok(())
}

/// The steps of a test, and its exit code.
fn connectivity(node: &Node, args: &[&str]) -> Result<(Option<i32>, Vec<Value>)> {
    let output = ctl(node, &[&["test", "--timeout", "1", "-o", "json"], args].concat())?;
    let steps = serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?;
    Ok((output.status.code(), steps))
}

/// What pods leave on a node: namespaces, veths and addresses.
fn traces(node: &Node) -> Result<String> {
    node.run(&["sh", "-c", "ls /run/netns; ls /sys/class/net; find /var/lib/cni -name '10.*' | sort"])
}

#[test]
fn connectivity_is_tested_by_a_pod_that_leaves_nothing() -> Result<()> {
    let lab = Lab::builder().nodes(2).start()?;
    let (node, other) = (lab.node("node-1")?, lab.node("node-2")?);
    let pod = other.add_pod("a")?.ip(Family::V4)?.to_string();
    let (outside, result) = (lab.etcd().endpoints(), |steps: &[Value], step: &str| -> Result<Value> {
        let found = steps.iter().find(|found| found["step"] == step);
        Ok(found.with_context(|| format!("no step {step} in {steps:#?}"))?.clone())
    });
    let outside = outside.trim_start_matches("http://");
    // cni0 comes with the first pod, and stays.
    node.add_pod("first")?;
    let before = traces(node)?;

    wait_until("every step but those outside is ok", SOON, || {
        let (code, steps) = connectivity(node, &["--outside", "off", "--to", &pod])?;
        ensure!(code == Some(0), "{steps:#?}");
        for step in ["attach", "gateway", "peer node-2", "ping", "detach"] {
            ensure!(result(&steps, step)?["result"] == "ok", "{steps:#?}");
        }
        Ok(())
    })?;
    ensure!(traces(node)? == before, "{before}\n{}", traces(node)?);

    // The way out needs masquerade, and the node itself has one.
    node.stop_fabricd()?;
    node.start_fabricd_with(&["--ip-masq=false"], &[])?;
    node.wait_ready()?;
    wait_until("the way out is missing", SOON, || {
        let (code, steps) = connectivity(node, &["--outside", outside])?;
        let step = result(&steps, "outside")?;
        ensure!(code == Some(4) && step["result"] == "failed", "{step}");
        ensure!(step["detail"].as_str().is_some_and(|told| told.contains("--ip-masq")), "{step}");
        Ok(())
    })?;
    node.stop_fabricd()?;
    node.start_fabricd_with(&["--ip-masq=true"], &[])?;
    node.wait_ready()?;
    wait_until("there is a way out", SOON, || {
        let (code, steps) = connectivity(node, &["--outside", outside])?;
        ensure!(code == Some(0) && result(&steps, "outside")?["result"] == "ok", "{steps:#?}");
        Ok(())
    })?;

    // What a peer's firewall rejects is said in words.
    let reject = "table inet theirs {\nchain in {\ntype filter hook input priority 0; policy accept;\n\
                  iifname fabric.1 icmp type echo-request reject with icmpx type admin-prohibited\n}\n}\n";
    other.command(&["nft", "-f", "-"])?.stdin(reject).run()?;
    let (code, steps) = connectivity(node, &["--outside", "off"])?;
    let step = result(&steps, "peer node-2")?;
    ensure!(code == Some(4) && step["result"] == "failed", "{step}");
    ensure!(step["detail"].as_str().is_some_and(|told| told.contains("administratively prohibited")), "{step}");
    ensure!(traces(node)? == before, "{before}\n{}", traces(node)?);

    // A config of another network that the runtime takes first: what its pods reach says nothing of this one.
    let theirs = r#"{"cniVersion": "1.0.0", "name": "theirs", "plugins": [{"type": "bridge", "bridge": "theirs0",
        "isGateway": true, "ipam": {"type": "host-local", "subnet": "192.0.2.0/24", "dataDir": "/run/theirs"}}]}"#;
    node.command(&["tee", "/etc/cni/net.d/05-theirs.conflist"])?.stdin(theirs).run()?;
    let (code, steps) = connectivity(node, &["--outside", "off"])?;
    let step = result(&steps, "attach")?;
    ensure!(code == Some(4) && step["result"] == "failed", "{step}");
    let told = step["detail"].as_str().unwrap_or_default();
    ensure!(told.starts_with("192.0.2.2 by /etc/cni/net.d/05-theirs.conflist is not of this node's"), "{told}");
    node.run(&["rm", "/etc/cni/net.d/05-theirs.conflist"])?;
    node.run(&["ip", "link", "del", "theirs0"])?;

    // A plugin that is missing is told once, though what ADD left is DEL's to remove.
    node.run(&["mv", "/opt/cni/bin/fabric-cni", "/run/fabric-cni"])?;
    let (_, steps) = connectivity(node, &["--outside", "off"])?;
    let told = result(&steps, "attach")?["detail"].as_str().unwrap_or_default().to_owned();
    ensure!(
        told.starts_with("the CNI plugin fabric-cni is not in ") && told.matches("fabric-cni").count() == 1,
        "{told}"
    );
    node.run(&["mv", "/run/fabric-cni", "/opt/cni/bin/fabric-cni"])?;
    ensure!(traces(node)? == before, "{before}\n{}", traces(node)?);

    // One that was killed leaves its pod to the next, and without a daemon what can be tested is.
    node.run(&["ip", "netns", "add", "fabric-test-999999"])?;
    node.kill_fabricd()?;
    let (_, steps) = connectivity(node, &["--outside", "off"])?;
    ensure!(
        result(&steps, "peers")?["result"] == "skipped" && result(&steps, "gateway")?["result"] == "ok",
        "{steps:#?}"
    );
    ensure!(traces(node)? == before, "{before}\n{}", traces(node)?);
    // Nothing to attach by: an error.
    node.run(&["rm", "-r", "/etc/cni/net.d"])?;
    ensure!(refusal(node, &["test"])?.contains("/etc/cni/net.d"));
    Ok(())
}
