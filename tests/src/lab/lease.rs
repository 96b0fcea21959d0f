//! What a node of the lab says about its lease, and what lies in etcd for it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{Lab, Node, wait_until};

/// What the keys of all leases begin with.
pub const SUBNETS: &str = "/coreos.com/network/subnets/";

/// How long a change may take on a busy machine.
const SOON: Duration = Duration::from_secs(40);

/// The key of a subnet, as in 10.244.3.0-24 under [`SUBNETS`].
#[must_use]
pub fn key(subnet: &str) -> String {
    format!("{SUBNETS}{}", subnet.replace('/', "-"))
}

/// A record as flannel writes it for a node with this underlay address and this end of its MAC address.
#[must_use]
pub fn flannels_record(ip: &str, mac: u8) -> String {
    format!(
        r#"{{"PublicIP":"{ip}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:42:c0:00:07:{mac:02x}"}}}}"#
    )
}

impl Node {
    /// What `fabricctl status -o json` prints, also of a node that is not ready.
    ///
    /// # Errors
    /// fabricd doesn't answer.
    pub fn status_or_not(&self) -> Result<Value> {
        let shown = self.exec(&["fabricctl", "status", "-o", "json"])?;
        serde_json::from_str(&shown.stdout).with_context(|| shown.stderr.clone())
    }

    /// The IPv4 subnet that it acts as the owner of, as in 10.244.3.0/24.
    ///
    /// # Errors
    /// It has none, or fabricd doesn't answer.
    pub fn subnet(&self) -> Result<String> {
        Ok(self.status_or_not()?["lease"]["subnets"][0].as_str().context("no lease")?.to_owned())
    }

    /// Why it isn't ready; nothing when it is.
    ///
    /// # Errors
    /// fabricd doesn't answer.
    pub fn trouble(&self) -> Result<String> {
        Ok(self.status_or_not()?["reason"].as_str().unwrap_or_default().to_owned())
    }

    /// Waits until it isn't ready for this reason.
    ///
    /// # Errors
    /// It doesn't say so: the error has what it says.
    pub fn wait_trouble(&self, words: &str) -> Result<String> {
        wait_until(&format!("{} says {words:?}", self.name), SOON, || {
            let trouble = self.trouble()?;
            ensure!(trouble.contains(words), "it says {trouble:?}\n{}", self.log_tail("fabricd"));
            Ok(trouble)
        })
    }

    /// Waits until it is ready and has this subnet.
    ///
    /// # Errors
    /// It doesn't get so.
    pub fn wait_holding(&self, subnet: &str) -> Result<()> {
        wait_until(&format!("{} holds {subnet}", self.name), SOON, || {
            let (trouble, has) = (self.trouble()?, self.subnet()?);
            ensure!(
                trouble.is_empty() && has == subnet,
                "it has {has} and says {trouble:?}\n{}",
                self.log_tail("fabricd")
            );
            Ok(())
        })
    }

    /// A pod that the node must refuse; gives the reason.
    ///
    /// # Errors
    /// It was taken in.
    pub fn refuses_pod(self: &Arc<Self>, name: &str) -> Result<String> {
        match self.add_pod(name) {
            Ok(_) => anyhow::bail!("{} has handed out an address", self.name),
            Err(refused) => Ok(format!("{refused:#}")),
        }
    }

    /// How many peers it has routes to.
    ///
    /// # Errors
    /// It is off.
    pub fn routes(&self) -> Result<usize> {
        Ok(self.run(&["ip", "route", "show", "dev", "fabric.1", "proto", "250"])?.lines().count())
    }
}

impl Lab {
    /// The record of a subnet, as etcd has it; nothing when there is none.
    ///
    /// # Errors
    /// etcd doesn't answer.
    pub fn record(&self, subnet: &str) -> Result<String> {
        self.etcd().ctl(&["get", "--print-value-only", &key(subnet)])
    }

    /// etcd's revision.
    ///
    /// # Errors
    /// etcd doesn't answer.
    pub fn revision(&self) -> Result<i64> {
        let answer: Value = serde_json::from_str(&self.etcd().ctl(&["get", "-w", "json", "nothing"])?)?;
        answer["header"]["revision"].as_i64().context("no revision")
    }

    /// The lease of etcd's that a subnet's record hangs on.
    ///
    /// # Errors
    /// There is no such record, or it hangs on none.
    pub fn etcd_lease(&self, subnet: &str) -> Result<i64> {
        let found: Value = serde_json::from_str(&self.etcd().ctl(&["get", "-w", "json", &key(subnet)])?)?;
        found["kvs"][0]["lease"].as_i64().with_context(|| format!("{subnet} hangs on no lease"))
    }
}
