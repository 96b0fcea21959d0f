//! The package on a plain host with systemd, installed by the script that provisions Vagrant's machines.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fabric_tests::lab::{binaries, wait_until};
use fabric_tests::plain_host::PlainHost;

const SOON: Duration = Duration::from_secs(60);

/// Packages are there already, all but ours.
const APT_GET: &str = r#"#!/bin/sh
for last; do :; done
case $last in *.deb) exec dpkg --install "$last" ;; esac
"#;

/// The package, of the programs of this build.
fn package(to: &Path) -> Result<()> {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    let mut build = Command::new(deploy.join("deb/build"));
    build.env("PROGRAMS", binaries::folder()?).env("OUT", to).env("DPKG_DEB_COMPRESSOR_TYPE", "none");
    let output = build.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A machine as Vagrant makes it: the first interface is the same everywhere and has the default route.
fn machine() -> Result<PlainHost> {
    let host = PlainHost::boot()?;
    for (interface, address) in [("eth0", "10.0.2.15"), ("eth1", "192.168.56.11")] {
        host.run(&format!("ip link add {interface} type veth peer name cable-{interface}"))?;
        host.run(&format!("ip address add {address}/24 dev {interface}"))?;
        host.run(&format!("ip link set {interface} up && ip link set cable-{interface} up"))?;
    }
    host.run("ip route add default via 10.0.2.2")?;
    Ok(host)
}

#[test]
fn package_is_installed_started_killed_upgraded_and_removed() -> Result<()> {
    let host = machine()?;
    let packages = host.root().join("packages");
    fs::create_dir(&packages)?;
    package(&packages.join("fabricd_0_all.deb"))?;
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
    ensure!(status.contains("from 192.168.56.11 on eth1"), "not by the interface that all machines share: {status}");
    wait_until("CNI's configuration", SOON, || host.run("cat /etc/cni/net.d/10-fabric.conflist")).with_context(log)?;
    host.run("ls /opt/cni/bin/fabric-cni /opt/cni/bin/fabric-bridge /run/flannel/subnet.env")?;
    ensure!(host.run("systemd-analyze verify fabricd.service fabric-cni.service")?.is_empty());
    let told = log();
    ensure!(!told.contains("os error 30") && !told.contains("os error 13") && !told.contains("os error 1)"), "{told}");

    // More often in ten seconds than systemd puts up with by itself.
    for time in 1..=6 {
        host.run("systemctl kill --signal KILL fabricd")?;
        let restarted = format!("systemctl show --property NRestarts --value fabricd | grep -x {time}");
        wait_until("the daemon to be started again", SOON, || host.run(&format!("{restarted} && fabricctl status")))
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
    Ok(())
}
