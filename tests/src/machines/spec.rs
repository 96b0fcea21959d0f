//! What a machine is to be: `6.1`, or `newest,memory=512,nics=2,clock=+3600,hostname=other`, or `debian`.

use std::str::FromStr;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::kernels::Kernel;

/// What a machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum System {
    /// `init.sh`, tools of this machine, and the programs of this build.
    Programs,
    /// A Debian with systemd, as Vagrant's users have it (see [`super::debian`]).
    Debian,
}

/// A machine that is wanted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// The kernel's name in `kernels.txt`. One that isn't there is told when the machine is added.
    pub kernel: String,
    /// Its memory in MiB.
    pub memory: u32,
    /// Network interfaces, eth0 and so on, all on the underlay; only eth0 has addresses. On a Debian eth0 is a NAT of the
    /// machine's own instead.
    pub nics: u8,
    /// How many seconds its clock is ahead; behind, if negative.
    pub clock: i64,
    /// Its host name, if that isn't the machine's own.
    pub hostname: Option<String>,
    /// What it runs.
    pub system: System,
}

impl Spec {
    /// A machine with this kernel of the list, and all else as usual.
    #[must_use]
    pub fn kernel(name: &str) -> Self {
        let kernel = Kernel::named(name).map_or_else(|_| name.to_owned(), |kernel| kernel.name);
        Self { kernel, memory: 320, nics: 1, clock: 0, hostname: None, system: System::Programs }
    }

    /// What a machine of this kind is called.
    #[must_use]
    pub(super) fn name(&self) -> String {
        match self.system {
            System::Programs => format!("linux-{}", self.kernel),
            System::Debian => "debian".to_owned(),
        }
    }

    /// A machine as Vagrant makes it: Debian bookworm with its kernel, and two network interfaces.
    #[must_use]
    pub fn debian() -> Self {
        Self { memory: 640, nics: 2, system: System::Debian, ..Self::kernel("6.1") }
    }
}

impl FromStr for Spec {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut words = text.split(',');
        let mut spec = match words.next().unwrap_or_default() {
            "debian" => Self::debian(),
            kernel => Self::kernel(&Kernel::named(kernel)?.name),
        };
        for word in words {
            let (name, value) = word.split_once('=').with_context(|| format!("{word:?} is not NAME=VALUE"))?;
            let number = || value.parse::<i64>().with_context(|| format!("{name} takes a number, not {value:?}"));
            match name {
                "memory" => spec.memory = number()?.try_into().context("memory is in MiB")?,
                "nics" => spec.nics = number()?.try_into().context("nics goes from 1 to 8")?,
                "clock" => spec.clock = number()?,
                "hostname" => spec.hostname = Some(value.to_owned()),
                _ => bail!("{name} is unknown: there are memory, nics, clock and hostname"),
            }
        }
        Ok(spec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_is_a_kernel_and_what_differs() -> Result<()> {
        let spec: Spec = "6.1,memory=512,nics=2,clock=-3600,hostname=twin".parse()?;
        let hostname = Some("twin".to_owned());
        assert_eq!(
            spec,
            Spec { kernel: "6.1".into(), memory: 512, nics: 2, clock: -3600, hostname, system: System::Programs }
        );
        assert_eq!("newest".parse::<Spec>()?.kernel, Kernel::named("newest")?.name);
        assert_eq!("debian,memory=512".parse::<Spec>()?, Spec { memory: 512, ..Spec::debian() });
        Ok(())
    }

    #[test]
    fn what_a_spec_can_not_be_is_told_with_what_it_can() {
        for (text, told) in [
            ("2.4", "no kernel 2.4; there are: 5.10"),
            ("6.1,disk=4", "disk is unknown: there are memory, nics, clock and hostname"),
            ("6.1,memory=much", "memory takes a number, not \"much\""),
            ("6.1,512", "\"512\" is not NAME=VALUE"),
        ] {
            assert!(text.parse::<Spec>().is_err_and(|error| error.to_string().starts_with(told)), "{text}");
        }
    }
}
