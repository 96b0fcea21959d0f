//! The settings of the packet filter: see docs/security.md.

use std::str::FromStr;

use clap::Args;
use fabric_core::model::Subnet;
use fabric_core::plan::filter::FilterOptions;

/// What the packet filter is to do.
#[derive(Clone, Debug, Args)]
pub struct FilterArgs {
    /// Masquerade (SNAT) pod traffic that leaves the cluster network
    #[arg(
        long,
        env = "FABRICD_IP_MASQ",
        value_name = "BOOL",
        num_args = 0..=1,
        require_equals = true,
        default_value = "false",
        default_missing_value = "true"
    )]
    pub ip_masq: bool,

    /// Destinations beyond the network that are to see the pods' own addresses; "nodes" are all nodes of the cluster
    #[arg(long, env = "FABRICD_NO_MASQUERADE_TO", value_name = "CIDR|nodes", value_delimiter = ',')]
    pub no_masquerade_to: Vec<Exception>,

    /// Decapsulate only what comes from a peer and, inside, from that peer's subnet
    #[arg(long, env = "FABRICD_CHECK_SENDERS", value_name = "BOOL", default_value = "true", action = clap::ArgAction::Set)]
    pub check_senders: bool,

    /// Underlay addresses besides the peers' published ones that may send too (NAT, a node with several addresses)
    #[arg(long, env = "FABRICD_ALLOW_SENDER", value_name = "IP|CIDR", value_delimiter = ',', value_parser = parse_net)]
    pub allow_sender: Vec<Subnet>,

    /// Let pods use no addresses but their node's, send no router advertisements, and not speak VXLAN
    #[arg(long, env = "FABRICD_CHECK_PODS", value_name = "BOOL", default_value = "true", action = clap::ArgAction::Set)]
    pub check_pods: bool,

    /// Insert ACCEPT rules for pod traffic into DOCKER-USER while Docker drops forwarded packets [default: true]
    #[arg(long, env = "FABRICD_DOCKER_USER_RULES", value_name = "BOOL", action = clap::ArgAction::Set)]
    pub docker_user_rules: Option<bool>,

    /// The earlier name of --docker-user-rules
    #[arg(long, env = "FABRICD_OPEN_DOORS", value_name = "BOOL", action = clap::ArgAction::Set, hide = true)]
    pub open_doors: Option<bool>,

    /// Keep encapsulated packets out of connection tracking
    #[arg(long, env = "FABRICD_NOTRACK", value_name = "BOOL", default_value = "true", action = clap::ArgAction::Set)]
    pub notrack: bool,
}

/// A destination that is excepted from masquerade.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exception {
    /// All nodes of the cluster.
    Nodes,
    /// Addresses.
    Net(Subnet),
}

impl FromStr for Exception {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "nodes" { Ok(Self::Nodes) } else { parse_net(text).map(Self::Net) }
    }
}

fn parse_net(text: &str) -> Result<Subnet, String> {
    let one = text.parse().map(Subnet::host);
    one.or_else(|_| text.parse()).map_err(|_| "expected an address or a prefix, as in 198.51.100.0/24".to_owned())
}

impl FilterArgs {
    /// These settings as the planner takes them.
    #[must_use]
    pub fn options(&self) -> FilterOptions {
        let nets = self.no_masquerade_to.iter();
        FilterOptions {
            masquerade: self.ip_masq,
            no_masquerade_to: nets
                .filter_map(|e| if let Exception::Net(net) = e { Some(*net) } else { None })
                .collect(),
            no_masquerade_to_nodes: self.no_masquerade_to.contains(&Exception::Nodes),
            check_senders: self.check_senders,
            senders: self.allow_sender.clone(),
            notrack: self.notrack,
            check_pods: self.check_pods,
            docker_user_rules: self.docker_user_rules.or(self.open_doors).unwrap_or(true),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        filter: FilterArgs,
    }

    #[test]
    fn rules_in_docker_user_are_switched_off_by_the_flag_and_by_its_earlier_name() {
        let on = |args: &[&str]| {
            let program = Program::try_parse_from([&["fabricd"], args].concat()).expect("valid");
            program.filter.options().docker_user_rules
        };
        assert!(on(&[]));
        assert!(!on(&["--docker-user-rules=false"]));
        assert!(!on(&["--open-doors=false"]));
        assert!(on(&["--open-doors=false", "--docker-user-rules=true"]), "the present name counts");
    }
}
