//! The words of the CNI spec that requests, configurations and saved attachments share: verbs, names, attachments.

use std::fmt;

use fabric_core::attachments::{IPAM_NETWORK, meant_container, told_container};
use fabric_core::model::IfName;
use serde::{Deserialize, Serialize};

use crate::error::{CniError, Code};
use crate::version::SpecVersion;

/// What the runtime may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Attach a container.
    Add,
    /// Detach it. Succeeds when there is nothing to detach.
    Del,
    /// Is it still attached as it was?
    Check,
    /// Detach all but those named.
    Gc,
    /// Could a container be attached now?
    Status,
    /// Which versions of the spec are spoken?
    Version,
}

impl Verb {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Add, Self::Del, Self::Check, Self::Gc, Self::Status, Self::Version];

    /// As `CNI_COMMAND` has it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }

    /// The first version of the spec that has it.
    #[must_use]
    pub fn since(self) -> SpecVersion {
        match self {
            Self::Add | Self::Del | Self::Version => SpecVersion::V0_3_0,
            Self::Check => SpecVersion::V0_4_0,
            Self::Gc | Self::Status => SpecVersion::V1_1_0,
        }
    }

    /// The variables that the spec requires for it, besides `CNI_COMMAND`.
    #[must_use]
    pub fn required(self) -> &'static [&'static str] {
        match self {
            Self::Add | Self::Check => &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"],
            Self::Del => &["CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"],
            Self::Gc | Self::Status => &["CNI_PATH"],
            Self::Version => &[],
        }
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A name as the spec allows for networks and containers, and as plugins are called: a letter or digit, then
/// letters, digits, `_`, `.` and `-`. So it is never a path, nor a hidden file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Identifier(String);

impl Identifier {
    /// Longest one, in bytes: with an interface's name and a suffix it is still a file name.
    const MAX: usize = 200;

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn is_fine(name: &str, longest: usize) -> bool {
        (1..=longest).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
            && name.as_bytes()[0].is_ascii_alphanumeric()
    }
}

impl TryFrom<String> for Identifier {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        Self::is_fine(&name, Self::MAX).then(|| Self(name.clone())).ok_or_else(|| {
            format!(
                "{name:.80?} is not a valid name: use 1 to {} letters, digits, '_', '.' or '-', a letter or digit first",
                Self::MAX
            )
        })
    }
}

impl From<Identifier> for String {
    fn from(name: Identifier) -> Self {
        name.0
    }
}

impl fmt::Display for Identifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// Which attachment: the spec's key, unique within a network.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AttachmentId {
    /// The container.
    #[serde(rename = "containerID")]
    pub container: Identifier,
    /// Its interface.
    pub ifname: IfName,
}

impl AttachmentId {
    /// The same as the delegate is told of an attachment to `network`: see [`told_container`].
    #[must_use]
    pub fn told(&self, network: &Identifier) -> Self {
        let container = told_container(network.as_str(), self.container.as_str());
        Self { container: Identifier(container), ifname: self.ifname }
    }

    /// The network and the attachment that the delegate was told so.
    #[must_use]
    pub fn meant(&self) -> (Identifier, Self) {
        let (network, container) = meant_container(self.container.as_str());
        let id = Self { container: Identifier(container.to_owned()), ifname: self.ifname };
        (Identifier(network.to_owned()), id)
    }

    /// The owner of an address by the two names in its file.
    #[must_use]
    pub fn owning(container: &str, ifname: &str) -> Option<Self> {
        // A name of each kind, and what goes between.
        let fine = Identifier::is_fine(container, 2 * Identifier::MAX + 8);
        fine.then(|| Some(Self { container: Identifier(container.to_owned()), ifname: ifname.parse().ok()? }))?
    }

    /// Refuses a container ID of the network [`IPAM_NETWORK`] that could be taken for one of another network.
    ///
    /// # Errors
    /// Code 7.
    pub fn refuse_ambiguous(&self, network: &Identifier) -> Result<(), CniError> {
        let (meant, _) = self.meant();
        if network.as_str() != IPAM_NETWORK || meant == *network {
            return Ok(());
        }
        let msg = format!(
            "container ID {} stands for one of the network {meant} in the IPAM state, so its address could not be told \
             from that one's; choose another container ID",
            self.container
        );
        Err(CniError::new(Code::InvalidConfig, msg))
    }
}

impl fmt::Display for AttachmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "interface {} of container {}", self.ifname, self.container)
    }
}
