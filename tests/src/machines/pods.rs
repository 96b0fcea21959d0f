//! Pods on machines: network namespaces there, attached by the CNI call that a runtime makes.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use fabric_core::model::Family;
use serde_json::{Value, json};

use super::agent::Answer;
use super::vm::Vm;
use crate::lab::cni::{self, INTERFACE, PLUGINS};

/// Where a pod serves its file.
const HTTP: u16 = 8080;

/// Which plugin makes a pod's interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plugin {
    /// The standard `bridge` with `host-local`.
    Bridge,
    /// Ours.
    FabricBridge,
}

/// A pod on a machine.
#[derive(Clone, Debug)]
pub struct VmPod {
    /// The machine.
    pub vm: Arc<Vm>,
    /// Its name: that of its namespace.
    pub name: String,
    ips: Vec<IpAddr>,
}

impl Vm {
    /// Makes a pod by an ADD of fabric-cni with this plugin.
    ///
    /// # Errors
    /// There is one of this name, or a plugin refuses: the error shows what it says.
    pub fn add_pod(self: &Arc<Self>, name: &str, plugin: Plugin) -> Result<VmPod> {
        let mut config = json!({ "cniVersion": "1.0.0", "name": "fabric", "type": "fabric-cni" });
        if plugin == Plugin::FabricBridge {
            config["delegate"] = json!({ "type": "fabric-bridge" });
        }
        // Never used twice, or what an earlier pod of this name left would stand in the way.
        let container = format!("{name}-{:08x}", UNIX_EPOCH.elapsed()?.as_nanos());
        let script = format!(
            "ip netns add {name}\nip -n {name} link set lo up\n\
             export CNI_COMMAND=ADD CNI_CONTAINERID={container} CNI_NETNS=/run/netns/{name}\n\
             export CNI_IFNAME={INTERFACE} CNI_PATH={PLUGINS}\necho '{config}' | {PLUGINS}/fabric-cni"
        );
        let added = self.run(&script)?;
        let result: Value = serde_json::from_str(&added).with_context(|| format!("what ADD printed: {added}"))?;
        let ips = cni::addresses(&result)?;
        Ok(VmPod { vm: Arc::clone(self), name: name.to_owned(), ips })
    }
}

impl VmPod {
    /// Its address of a family.
    ///
    /// # Errors
    /// It has none.
    pub fn ip(&self, family: Family) -> Result<IpAddr> {
        let found = self.ips.iter().find(|ip| Family::of(**ip) == family).copied();
        found.with_context(|| format!("pod {} on {} has no {family:?} address", self.name, self.vm.name))
    }

    /// Runs a script in its network namespace.
    ///
    /// # Errors
    /// As [`Vm::exec`].
    pub fn exec(&self, script: &str) -> Result<Answer> {
        self.vm.exec(&format!("ip netns exec {} sh -ec '{script}'", self.name))
    }

    /// Sends a UDP packet from it, or from an address that isn't its own. Nobody tells whether it arrives.
    ///
    /// # Errors
    /// As [`Vm::exec`].
    pub fn send_udp(&self, from: Option<IpAddr>, to: SocketAddr, payload: &[u8]) -> Result<()> {
        let (target, port) = (to.ip(), to.port());
        let (take, give) = from.map_or_else(Default::default, |ip| {
            let flags = if ip.is_ipv6() { "nodad" } else { "" };
            let take = format!("ip address add {ip} dev lo {flags}; ip route add {target} dev {INTERFACE} src {ip}");
            (take, format!("ip route del {target} dev {INTERFACE}; ip address del {ip} dev lo"))
        });
        let payload = STANDARD.encode(payload);
        let sent = self
            .exec(&format!("{take}\necho {payload} | base64 -d | bash -c \"cat >/dev/udp/{target}/{port}\"\n{give}"))?;
        ensure!(sent.code == 0, "{} cannot send to {to}: {sent:?}", self.name);
        Ok(())
    }

    /// Serves a file of random bytes by HTTP until the pod goes, and returns its sum.
    ///
    /// # Errors
    /// As [`Vm::exec`].
    pub fn serves_a_file(&self, bytes: u32) -> Result<String> {
        let folder = format!("/run/served-{}", self.name);
        let served = self.exec(&format!(
            "mkdir {folder}; head -c {bytes} /dev/urandom >{folder}/file\n\
             httpd -p \"[::]:{HTTP}\" -h {folder} </dev/null >/dev/null 2>&1\nsha256sum <{folder}/file"
        ))?;
        ensure!(served.code == 0, "{} serves nothing: {served:?}", self.name);
        Ok(served.stdout)
    }

    /// The sum of the file that another pod serves, as it arrives here.
    ///
    /// # Errors
    /// As [`Vm::exec`].
    pub fn fetches_from(&self, ip: IpAddr) -> Result<String> {
        let host = SocketAddr::new(ip, HTTP);
        Ok(self.exec(&format!("timeout 100 wget -q -O - http://{host}/file | sha256sum"))?.stdout)
    }

    /// Pings an address from it three times with packets of the full size, which may not be cut, and expects every answer.
    ///
    /// # Errors
    /// One is missing.
    pub fn reaches(&self, ip: IpAddr) -> Result<()> {
        // A route may take less than the interface.
        let mtu = self.exec(&format!(
            "mtu=$(ip -o route get {ip} | grep -o \"mtu [0-9]*\" | cut -d \" \" -f 2)
             echo ${{mtu:-$(cat /sys/class/net/{INTERFACE}/mtu)}}"
        ))?;
        let mtu = mtu.stdout;
        let headers = if ip.is_ipv4() { 20 + 8 } else { 40 + 8 };
        let size = mtu.trim().parse::<u32>().with_context(|| format!("an MTU of {mtu:?}"))? - headers;
        // The first may wait for a neighbour to be found.
        let answer = self.exec(&format!("ping -q -c 1 -w 20 {ip}; ping -q -M do -s {size} -i 0.3 -c 3 -W 20 {ip}"))?;
        let all = answer.code == 0 && answer.stdout.contains("3 received");
        ensure!(all, "{} on {} does not reach {ip}:\n{}{}", self.name, self.vm.name, answer.stdout, answer.stderr);
        Ok(())
    }
}
