//! The settings of Services: see docs/services.md.

use clap::{Args, ValueEnum};

/// What is to be done about Services of Kubernetes.
#[derive(Clone, Debug, Args)]
pub struct ServicesArgs {
    /// Translate Services of Kubernetes, as kube-proxy does; it must not run on this node
    #[arg(long, env = "FABRICD_SERVICES", value_name = "SWITCH", default_value = "off")]
    pub services: Switch,
}

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Not done.
    Off,
    /// Done.
    On,
}
