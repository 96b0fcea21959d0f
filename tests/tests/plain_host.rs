//! The package on a plain host with systemd, installed by the script that provisions Vagrant's machines.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fabric_tests::deb;
use fabric_tests::lab::wait_until;
use fabric_tests::plain_host::PlainHost;
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);

const UPLINKS: [(&str, &str); 2] = [("eth0", "10.0.2.15"), ("eth1", "192.168.56.11")];

/// Packages are there already, all but ours.
const APT_GET: &str = r#"#!/bin/sh
for last; do :; done
case $last in *.deb) exec dpkg --install "$last" ;; esac
"#;

/// A machine as Vagrant makes it: the first interface is the same everywhere and has the default route.
fn machine() -> Result<PlainHost> {
    let host = PlainHost::boot()?;
    for (interface, address) in UPLINKS {
        host.run(&format!("ip link add {interface} type veth peer name cable-{interface}"))?;
        host.run(&format!("ip address add {address}/24 dev {interface}"))?;
        host.run(&format!("ip link set {interface} up && ip link set cable-{interface} up"))?;
    }
    host.run("ip route add default via 10.0.2.2")?;
    Ok(host)
}

/// The same with the package, installed by Vagrant's script, and a node that is ready.
fn node() -> Result<PlainHost> {
    let host = machine()?;
    let packages = host.root().join("packages");
    fs::create_dir(&packages)?;
    deb::build(&packages.join("fabricd_0_all.deb"), None)?;
    let apt_get = host.root().join("usr/local/sbin/apt-get");
    fs::write(&apt_get, APT_GET)?;
    fs::set_permissions(&apt_get, fs::Permissions::from_mode(0o755))?;
    fs::copy(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/vagrant/provision"), host.root().join("provision"))?;

    host.run("bash /provision 1 192.168.56.11 192.168.56.11")?;
    let log = || host.run("journalctl --no-pager --unit fabricd --unit fabric-cni").unwrap_or_default();
    let ready = wait_until("a ready node", SOON, || {
        let status = host.run("fabricctl status")?;
        ensure!(status.contains("State     ready"), "{status}");
        Ok(status)
    });
    let status = ready.with_context(log)?;
    ensure!(status.contains(", 192.168.56.11 on eth1"), "not by the interface that all machines share: {status}");
    Ok(host)
}

#[test]
fn package_is_installed_started_killed_upgraded_removed_and_purged() -> Result<()> {
    let host = node()?;
    let log = || host.run("journalctl --no-pager --unit fabricd --unit fabric-cni").unwrap_or_default();
    wait_until("CNI's configuration", SOON, || host.run("cat /etc/cni/net.d/10-fabric.conflist")).with_context(log)?;
    host.run("ls /opt/cni/bin/fabric-cni /opt/cni/bin/fabric-bridge /run/flannel/subnet.env")?;
    ensure!(host.run("systemd-analyze verify fabricd.service fabric-cni.service")?.is_empty());
    let told = log();
    ensure!(!["EROFS", "EACCES", "EPERM", "os error"].iter().any(|errno| told.contains(errno)), "{told}");
    host.run("nft list chain inet fabric postrouting | grep masquerade")?;
    // The sandbox leaves it what the mesh needs to tell a stale entry from a blocked port.
    host.run("grep 'CapEff:.*0000000000003000' /proc/$(systemctl show --property MainPID --value fabricd)/status")?;

    // Nor does it end the daemon that it makes every check of doctor's.
    let checks = host.run("fabricctl doctor -o json || true")?;
    let check = |id: &str| {
        let mut checks = checks.lines().filter_map(|check| serde_json::from_str::<Value>(check).ok());
        checks.find(|check| check["id"] == id)
    };
    ensure!(check("clock").is_some_and(|clock| clock["result"] != "failed"), "{checks}");
    ensure!(check("daemon").is_none() && check("disk").is_some(), "the daemon has not answered to the end: {checks}");
    ensure!(host.run("systemctl show --property NRestarts --value fabricd fabric-cni")? == "0\n\n0\n");

    // What comes along: manual, completions, examples.
    for page in ["man1/fabricctl", "man1/fabricctl-lease-list", "man8/fabricd", "man8/fabricd-pki-node"] {
        let number = &page[3..4];
        let shown = host.run(&format!("zcat /usr/share/man/{page}.{number}.gz"))?;
        let name = page.rsplit('/').next().unwrap_or_default();
        ensure!(shown.contains(&format!(".TH {name} {number}")), "{page}: {shown}");
    }
    for program in ["fabricd", "fabricctl"] {
        host.run(&format!("bash -n /usr/share/bash-completion/completions/{program}"))?;
        host.run(&format!("grep -q '#compdef {program}' /usr/share/zsh/vendor-completions/_{program}"))?;
        host.run(&format!("grep -q 'complete -c {program}' /usr/share/fish/vendor_completions.d/{program}.fish"))?;
    }
    host.run("ls /usr/share/doc/fabricd/examples/fabricd.toml /usr/share/doc/fabricd/docs/symptoms.md")?;

    // More often in ten seconds than systemd puts up with by itself. A start that failed meanwhile counts as one more.
    let restarts =
        || -> Result<u32> { Ok(host.run("systemctl show --property NRestarts --value fabricd")?.trim().parse()?) };
    for _ in 0..6 {
        let before = restarts()?;
        host.run("systemctl kill --kill-whom main --signal KILL fabricd")?;
        wait_until("the daemon to be started again", SOON, || {
            ensure!(restarts()? > before, "not yet");
            host.run("fabricctl status")
        })
        .with_context(log)?;
    }

    let units = "systemctl show --property MainPID --value fabricd fabric-cni";
    let (before, device) = (host.run(units)?, host.run("ip -details link show fabric.1")?);
    host.run("dpkg --install /packages/*.deb")?;
    ensure!(host.run(units)? != before, "an upgrade starts the new programs");
    host.run("systemctl is-active fabricd fabric-cni")?;
    ensure!(host.run("ip -details link show fabric.1")? == device);

    host.run("dpkg --remove fabricd")?;
    ensure!(!host.run("ps -e -o comm")?.contains("fabricd"));
    ensure!(host.run("ip -details link show fabric.1")? == device, "the network outlives the package");
    host.run("ls /run/fabric/node.json /opt/cni/bin/fabric-cni")?;

    host.run("ls /etc/fabric/fabricd.toml /etc/default/fabricd /var/lib/fabric/lease.state")?;
    host.run("dpkg --purge fabricd")?;
    host.run("! ls -d /etc/fabric /etc/default/fabricd /var/lib/fabric 2>/dev/null")?;
    Ok(())
}

/// The unit grants what everybody needs, the example what the fast path takes beside it. Programs of a daemon that had it
/// are taken away by one that hasn't: nobody else would keep them up to date.
#[test]
fn fast_path_is_there_with_the_units_drop_in_and_goes_with_it() -> Result<()> {
    let host = node()?;
    let log = || host.run("journalctl --no-pager --unit fabricd").unwrap_or_default();
    host.run("mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf")?;
    add_pod(&host, "a", "fabric-bridge")?;
    let restarted = |capabilities: &str, line: &str| -> Result<()> {
        host.run("systemctl daemon-reload && systemctl restart fabricd")?;
        let settled = wait_until(line, SOON, || {
            let status = host.run("fabricctl status")?;
            ensure!(status.contains("State     ready") && status.contains(line), "{status}");
            Ok(())
        });
        settled.with_context(log)?;
        let pid = "$(systemctl show --property MainPID --value fabricd)";
        host.run(&format!("grep 'CapEff:.*{capabilities}' /proc/{pid}/status"))?;
        Ok(())
    };
    host.run("install -D -t /etc/systemd/system/fabricd.service.d /usr/share/doc/fabricd/examples/fast-path.conf")?;
    restarted("000000c000003000", "FastPath  on")?;
    host.run("ls /sys/fs/bpf/fabric/*/links/*_ingress")?;
    host.run("rm -r /etc/systemd/system/fabricd.service.d")?;
    restarted("0000000000003000", "State     ready")?;
    wait_until("no program", SOON, || host.run("! ls -d /sys/fs/bpf/fabric")).with_context(log)?;
    Ok(())
}

/// Attaches a pod, by the plugin that makes the bridge's port, and gives the port's name.
fn add_pod(host: &PlainHost, name: &str, delegate: &str) -> Result<String> {
    host.run(&format!("ip netns add {name}"))?;
    let config = format!(
        r#"{{"cniVersion": "1.0.0", "name": "fabric", "type": "fabric-cni", "delegate": {{"type": "{delegate}"}}}}"#
    );
    let result = host.run(&format!(
        "echo '{config}' | CNI_COMMAND=ADD CNI_CONTAINERID={name} CNI_NETNS=/run/netns/{name} CNI_IFNAME=eth0 \
         CNI_PATH=/opt/cni/bin /opt/cni/bin/fabric-cni"
    ))?;
    let result: Value = serde_json::from_str(&result).with_context(|| result.clone())?;
    let ports = result["interfaces"].as_array().into_iter().flatten().filter_map(|port| port["name"].as_str());
    ports.into_iter().find(|port| port.starts_with("veth")).map(str::to_owned).context("a port")
}

/// What networkd says of an interface, once it has looked at it.
fn networkds_word(host: &PlainHost, interface: &str) -> Result<String> {
    host.run(&format!("cat /run/systemd/netif/links/$(cat /sys/class/net/{interface}/ifindex)"))
}

/// The commonest of such files: an image's default that asks for DHCP on whatever there is.
#[test]
fn pods_stay_on_the_bridge_when_networkd_is_told_to_manage_everything() -> Result<()> {
    let host = node()?;
    let ports = [add_pod(&host, "pod-a", "bridge")?, add_pod(&host, "pod-b", "fabric-bridge")?];
    let reached = || host.run("ip netns exec pod-b ping -c 1 -W 5 $(ip netns exec pod-a hostname -I)");
    reached()?;

    let folder = host.root().join("etc/systemd/network");
    fs::write(folder.join("zz-default.network"), "[Match]\nName=*\n[Network]\nDHCP=yes\n")?;
    for (interface, address) in UPLINKS {
        let file = folder.join(format!("10-{interface}.network"));
        fs::write(
            file,
            format!("[Match]\nName={interface}\n[Network]\nAddress={address}/24\nKeepConfiguration=yes\n"),
        )?;
    }
    // A port that none of the package's files names: so what happens to the others' like is seen.
    host.run("ip link add stray up type veth peer name stray-peer && ip link set stray master cni0")?;
    // As in a container: networkd then doesn't wait for udev, which isn't here.
    host.run("mount -o remount,bind,ro /sys && systemctl start systemd-networkd")?;
    let told = || host.run("journalctl --no-pager --unit systemd-networkd").unwrap_or_default();
    let is_port = |name: &str| -> Result<bool> {
        Ok(host
            .run("bridge link")?
            .lines()
            .any(|line| line.contains(&format!(" {name}")) && line.contains("master cni0")))
    };
    let taken = wait_until("networkd to take the port off the bridge that nobody keeps it from", SOON, || {
        ensure!(!is_port("stray")?, "it is still there");
        Ok(())
    });
    taken.with_context(told)?;
    for interface in ["fabric.1", "cni0", &ports[0], &ports[1]] {
        let word = wait_until("networkd's word", SOON, || networkds_word(&host, interface))?;
        ensure!(word.contains("ADMIN_STATE=unmanaged"), "{interface}: {word}");
    }
    ensure!(is_port(&ports[0])? && is_port(&ports[1])?);
    reached()?;
    ensure!(host.run("fabricctl status")?.contains("State     ready"));
    // doctor reads the same files, and finds that they are enough. Its exit code is about everything else.
    let checks = host.run("fabricctl doctor -o json || true")?;
    let mut checks = checks.lines().filter_map(|check| serde_json::from_str::<Value>(check).ok());
    let networkd = checks.find(|check| check["id"] == "networkd").context("its check of networkd")?;
    ensure!(networkd["result"] == "ok", "{networkd:#}");
    Ok(())
}

/// Names in the files for networkd, udev and NetworkManager: ours, and nobody else's.
#[test]
fn network_files_name_our_devices_and_nobody_elses() -> Result<()> {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/network");
    let of = |file: &str, key: &str| -> Result<String> {
        let text = fs::read_to_string(deploy.join(file))?;
        let line = text.lines().find_map(|line| line.strip_prefix(key).map(str::to_owned));
        line.with_context(|| format!("{file} has no {key}"))
    };
    let networkd = of("00-fabricd.network", "Name=")?;
    assert_eq!(of("00-fabricd.link", "OriginalName=")?, networkd);
    let manager = of("NetworkManager.conf", "unmanaged-devices+=")?.replace("interface-name:", "").replace(';', " ");
    // glob(7), as all of them match.
    let matches = |patterns: &str, name: &str| -> Result<bool> {
        let script = "set -f; for pattern in $1; do case $2 in $pattern) exit 0 ;; esac; done; exit 1";
        Ok(Command::new("sh").args(["-c", script, "sh", patterns, name]).status()?.success())
    };
    for name in
        ["fabric.1", "fabric.16777215", "fab.7", "fabric6.1", "fab6.1", "cni0", "veth0a1b2c3d", "veth0123456789a"]
    {
        ensure!(matches(&networkd, name)? && matches(&manager, name)?, "{name}");
    }
    for name in ["eth0", "fabric0", "docker0", "cni1", "flannel.1"] {
        ensure!(!matches(&networkd, name)? && !matches(&manager, name)?, "{name}");
    }
    // A person's own, and Docker's, which has 7 digits.
    for name in ["veth0", "veth-web", "veth1234abc"] {
        ensure!(!matches(&networkd, name)?, "{name}");
    }
    // NetworkManager has no sets: those with 8 or 11 characters after veth are all its patterns can say.
    ensure!(!manager.contains('['), "{manager}");
    for name in ["veth0", "veth1234abc"] {
        ensure!(!matches(&manager, name)?, "{name}");
    }
    Ok(())
}
