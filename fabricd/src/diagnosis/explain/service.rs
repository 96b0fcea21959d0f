//! A destination that is a Service's address, which this node translates.

use std::net::{IpAddr, SocketAddr};

use fabric_core::services::plan::{Described, DescribedFrontend, Outcome};

use super::Hop;

/// What becomes of a pod's packet to an address of a Service, by port.
pub(super) fn hops(described: &Described, source: IpAddr, target: IpAddr) -> Vec<Hop> {
    let frontends = described.ports.iter().flat_map(|port| &port.frontends);
    frontends.filter(|frontend| frontend.key.ip == target).map(|frontend| hop(described, frontend, source)).collect()
}

fn hop(described: &Described, frontend: &DescribedFrontend, source: IpAddr) -> Hop {
    let (name, key) = (&described.service.name, frontend.key);
    let found = format!("{key} is {name}'s");
    if let Some(owner) = &frontend.taken_by {
        return Hop::doubtful("service", format!("{key} is {owner}'s, and {name} claims it too"), "change one of them");
    }
    if !frontend.is_programmed() {
        let kernel = frontend.kernel[0].as_ref().map_or_else(|| "not translated".to_owned(), Outcome::to_string);
        let should = format!("{}; it is written with the next pass: fabricctl service {name}", frontend.inside);
        return Hop::failed("service", format!("{found}: {kernel}"), should);
    }
    let (namespace, service) = (name.namespace(), name.name());
    let endpoints = format!(
        "an endpoint that takes connections; who doesn't, and why:\nfabricctl service {name}\n\
         kubectl -n {namespace} get endpointslices -l kubernetes.io/service-name={service}"
    );
    match &frontend.inside {
        Outcome::To(sockets) => {
            let (ip, port) = sockets[0];
            let to = SocketAddr::new(ip, port);
            let others = match sockets.len() - 1 {
                0 => String::new(),
                others => format!(" or one of {others} others"),
            };
            Hop::fine("service", format!("{found}: to {to}{others}; go on with: fabricctl explain {source} {ip}"))
        }
        Outcome::Rejected => Hop::failed("service", format!("{found}: rejected, as nobody serves"), endpoints),
        Outcome::Dropped => {
            Hop::failed("service", format!("{found}: dropped, as nobody serves on this node"), endpoints)
        }
    }
}
