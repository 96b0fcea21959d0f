//! Services in the API's words.

use std::net::SocketAddr;

use fabric_core::model::Family;
use fabric_core::services::model::{Policy, ServicePort, ServiceType};
use fabric_core::services::plan::{AddressKind, Described, DescribedFrontend, DescribedPort, Outcome, Socket};
use fabric_proto::v1;

use super::convert::number;

/// A Service, with its frontends and endpoints each if `in_full`.
#[must_use]
pub fn service(described: &Described, in_full: bool) -> v1::Service {
    let Described { service, ports } = described;
    let endpoints = || ports.iter().flat_map(|port| &port.endpoints);
    let used = endpoints().filter(|endpoint| endpoint.takes_inside || endpoint.takes_outside).count();
    let in_full = in_full.then_some(ports).into_iter().flatten();
    let of_port = |port: &'_ DescribedPort| port.frontends.iter().map(|of| frontend(port, of)).collect::<Vec<_>>();
    v1::Service {
        name: service.name.to_string(),
        r#type: type_word(service.kind).to_owned(),
        addresses: Family::ALL
            .into_iter()
            .flat_map(|family| service.addresses(family))
            .map(|ip| ip.to_string())
            .collect(),
        ports: service.ports.iter().map(port_word).collect(),
        endpoints_used: number(used),
        endpoints: number(endpoints().count()),
        internal_traffic_policy: policy_word(service.internal).to_owned(),
        external_traffic_policy: match service.is_external() {
            true => policy_word(service.external).to_owned(),
            false => String::new(),
        },
        algorithm: service.algorithm.word().to_owned(),
        affinity_seconds: service.affinity.unwrap_or_default(),
        health_check_node_port: service.health_check_port.unwrap_or_default().into(),
        problems: problems(described),
        frontends: in_full.clone().flat_map(of_port).collect(),
        endpoint_list: in_full.flat_map(endpoints_of).collect(),
    }
}

/// What is wrong with a Service.
#[must_use]
pub fn problems(described: &Described) -> Vec<String> {
    let frontends = || described.ports.iter().flat_map(|port| &port.frontends);
    let taken = frontends().filter_map(|frontend| {
        let owner = frontend.taken_by.as_ref()?;
        Some(format!("the Service {owner} has {} too, and keeps it; change this one", frontend.key))
    });
    let differs = described.differences().map(|frontend| {
        let found = |outcome: &Option<Outcome>| outcome.as_ref().map_or_else(|| "not translated".to_owned(), Outcome::to_string);
        let [inside, outside] = &frontend.kernel;
        format!(
            "{}: the kernel has {} (from outside: {}), and should have {} (from outside: {}); it is written with the next \
             pass, or the warnings say why not",
            frontend.key,
            found(inside),
            found(outside),
            frontend.inside,
            frontend.outside
        )
    });
    described.service.refused.iter().cloned().chain(taken).chain(differs).collect()
}

fn frontend(port: &DescribedPort, frontend: &DescribedFrontend) -> v1::ServiceFrontend {
    let is_programmed = frontend.is_programmed();
    let found = |outcome: &Option<Outcome>| {
        outcome.as_ref().filter(|_| !is_programmed).map(Outcome::to_string).unwrap_or_default()
    };
    let kind = match frontend.kind {
        AddressKind::ClusterIp => v1::ServiceAddressKind::ClusterIp,
        AddressKind::ExternalIp => v1::ServiceAddressKind::ExternalIp,
        AddressKind::LoadBalancer => v1::ServiceAddressKind::LoadBalancer,
        AddressKind::NodePort => v1::ServiceAddressKind::NodePort,
    };
    v1::ServiceFrontend {
        port: port.name.to_string(),
        address: socket_word((frontend.key.ip, frontend.key.port)),
        protocol: port.protocol.to_string(),
        kind: kind.into(),
        taken_by: frontend.taken_by.as_ref().map(ToString::to_string).unwrap_or_default(),
        inside: frontend.inside.to_string(),
        outside: frontend.outside.to_string(),
        programmed: is_programmed,
        kernel_inside: found(&frontend.kernel[0]),
        kernel_outside: found(&frontend.kernel[1]),
    }
}

fn endpoints_of(port: &DescribedPort) -> impl Iterator<Item = v1::ServiceEndpoint> {
    port.endpoints.iter().map(|endpoint| v1::ServiceEndpoint {
        port: port.name.to_string(),
        address: socket_word(endpoint.socket),
        protocol: port.protocol.to_string(),
        node: endpoint.node.as_deref().unwrap_or_default().to_owned(),
        here: endpoint.is_here,
        takes_inside: endpoint.takes_inside,
        takes_outside: endpoint.takes_outside,
        reason: endpoint.unused.map(|unused| unused.to_string()).unwrap_or_default(),
    })
}

fn socket_word((ip, port): Socket) -> String {
    SocketAddr::new(ip, port).to_string()
}

fn port_word(port: &ServicePort) -> String {
    match port.node_port {
        Some(node_port) => format!("{}:{node_port}/{}", port.port, port.protocol),
        None => format!("{}/{}", port.port, port.protocol),
    }
}

const fn policy_word(policy: Policy) -> &'static str {
    match policy {
        Policy::Cluster => "Cluster",
        Policy::Local => "Local",
    }
}

const fn type_word(kind: ServiceType) -> &'static str {
    match kind {
        ServiceType::ClusterIp => "ClusterIP",
        ServiceType::NodePort => "NodePort",
        ServiceType::LoadBalancer => "LoadBalancer",
    }
}

/// All that is told, each Service with its frontends and endpoints if `in_full`.
#[must_use]
pub fn answer(
    status: &crate::status::section::SectionStatus,
    described: &[Described],
    in_full: bool,
) -> v1::ListServicesResponse {
    v1::ListServicesResponse {
        ready: status.ready.is_ok(),
        reason: status.ready.clone().err().unwrap_or_default(),
        warnings: status.warnings.clone(),
        services: described.iter().map(|described| service(described, in_full)).collect(),
    }
}
