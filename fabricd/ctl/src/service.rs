//! `fabricctl service`: Services of Kubernetes as this node translates them.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::bail;
use fabric_proto::Word as _;
use fabric_proto::v1::{ListServicesRequest, ListServicesResponse, Service, ServiceEndpoint, ServiceFrontend};

use crate::output::{Output, Screen, Severity};
use crate::table::{Cell, render};
use crate::{Answer, NOT_ALL_WELL, NOT_READY, daemon};

/// Shows all, or with a name those in full; exit code 3 while Services are not up to date, 4 when something is wrong with
/// one that is shown.
pub async fn show(socket: &Path, output: Output, name: Option<String>) -> anyhow::Result<Answer> {
    let request = ListServicesRequest { name: name.clone().unwrap_or_default() };
    let answer = daemon::connect(socket).await?.list_services(request).await;
    let answer = answer.map_err(|status| daemon::told(&status))?.into_inner();
    if let Some(name) = name.as_ref().filter(|_| answer.ready && answer.services.is_empty()) {
        bail!("no Service is called {name} or has it as its address; see them all with: fabricctl service");
    }
    let is_well = answer.services.iter().all(|service| service.problems.is_empty());
    let code = match (answer.ready, is_well) {
        (false, _) => NOT_READY,
        (true, false) => NOT_ALL_WELL,
        (true, true) => 0,
    };
    let text = output.show(&answer, |screen| match name {
        Some(_) => answer.services.iter().map(|service| in_full(screen, service)).collect::<Vec<_>>().join("\n"),
        None => list(screen, &answer),
    })?;
    let text = if answer.ready || output.is_data() {
        text
    } else {
        format!("{}: {}\n{text}", Screen::stdout().paint("not up to date", Severity::Bad), answer.reason)
    };
    Ok(Answer::well_if(code == 0, text, code))
}

/// All Services as a table, and what is wrong with them below it.
fn list(screen: &Screen, answer: &ListServicesResponse) -> String {
    let row = |service: &Service| -> [Cell; 6] {
        let severity = match (service.endpoints_used, service.endpoints) {
            (0, _) => Severity::Doubtful,
            _ => Severity::Plain,
        };
        [
            service.name.clone().into(),
            service.r#type.clone().into(),
            Cell::coloured(format!("{} of {}", service.endpoints_used, service.endpoints), severity),
            service.ports.join(" ").into(),
            service.addresses.join(" ").into(),
            match service.problems.len() {
                0 => Cell::default(),
                count => Cell::coloured(count.to_string(), Severity::Bad),
            },
        ]
    };
    let rows: Vec<[Cell; 6]> = answer.services.iter().map(row).collect();
    let mut text = render(screen, ["SERVICE", "TYPE", "ENDPOINTS", "PORTS", "ADDRESSES", "PROBLEMS"], &rows);
    for (place, warning) in answer.warnings.iter().enumerate() {
        let gap = if place == 0 { "\n" } else { "" };
        let _ = writeln!(text, "{gap}{}: {warning}", screen.paint("warning", Severity::Doubtful));
    }
    text
}

/// A Service with its frontends and endpoints.
fn in_full(screen: &Screen, service: &Service) -> String {
    let mut facts =
        vec![service.r#type.clone(), format!("internal traffic policy {}", service.internal_traffic_policy)];
    if !service.external_traffic_policy.is_empty() {
        facts.push(format!("external traffic policy {}", service.external_traffic_policy));
    }
    if service.affinity_seconds > 0 {
        facts.push(format!("session affinity for {} s", service.affinity_seconds));
    }
    if !matches!(service.algorithm.as_str(), "" | "random") {
        facts.push(format!("endpoints by {}", service.algorithm));
    }
    if service.health_check_node_port > 0 {
        facts.push(format!("health check on port {}", service.health_check_node_port));
    }
    let mut text = format!("{}: {}\n\n", service.name, facts.join(", "));
    let frontends: Vec<[Cell; 5]> = service.frontends.iter().map(frontend).collect();
    text += &render(screen, ["FRONTEND", "KIND", "KERNEL", "FROM PODS AND NODES", "FROM OUTSIDE"], &frontends);
    let endpoints: Vec<[Cell; 5]> = service.endpoint_list.iter().map(endpoint).collect();
    text += "\n";
    text += &match endpoints.is_empty() {
        true => "no endpoint\n".to_owned(),
        false => render(screen, ["ENDPOINT", "PORT", "NODE", "TAKES CONNECTIONS", "WHY NOT"], &endpoints),
    };
    for (place, problem) in service.problems.iter().enumerate() {
        let gap = if place == 0 { "\n" } else { "" };
        let _ = writeln!(text, "{gap}{}: {problem}", screen.paint("problem", Severity::Bad));
    }
    text
}

fn frontend(frontend: &ServiceFrontend) -> [Cell; 5] {
    let kernel = match (frontend.taken_by.as_str(), frontend.programmed) {
        ("", true) => Cell::coloured("as it should be", Severity::Good),
        ("", false) => Cell::coloured("something else", Severity::Bad),
        (other, _) => Cell::coloured(format!("{other} has it"), Severity::Bad),
    };
    let outside = if frontend.outside == frontend.inside { "the same".to_owned() } else { frontend.outside.clone() };
    [
        format!("{}/{}", frontend.address, frontend.protocol).into(),
        frontend.kind().word().into(),
        kernel,
        frontend.inside.clone().into(),
        outside.into(),
    ]
}

fn endpoint(endpoint: &ServiceEndpoint) -> [Cell; 5] {
    let takes = match (endpoint.takes_inside, endpoint.takes_outside) {
        (false, false) => Cell::coloured("no", Severity::Doubtful),
        (true, true) => Cell::coloured("yes", Severity::Good),
        (true, false) if endpoint.reason.is_empty() => Cell::coloured("yes", Severity::Good),
        (true, false) => "from inside".into(),
        (false, true) => "from outside".into(),
    };
    let here = if endpoint.here { " (this node)" } else { "" };
    [
        format!("{}/{}", endpoint.address, endpoint.protocol).into(),
        endpoint.port.clone().into(),
        format!("{}{here}", endpoint.node).into(),
        takes,
        endpoint.reason.clone().into(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use fabric_proto::v1::ServiceAddressKind;

    #[test]
    fn service_in_full_says_who_takes_connections_and_why_others_do_not() {
        let frontend = ServiceFrontend {
            address: "10.96.0.10:80".into(),
            protocol: "tcp".into(),
            kind: ServiceAddressKind::ClusterIp.into(),
            inside: "to 10.244.1.2:8080".into(),
            outside: "to 10.244.1.2:8080".into(),
            programmed: true,
            ..ServiceFrontend::default()
        };
        let endpoint = |address: &str, takes: bool, reason: &str| ServiceEndpoint {
            address: address.into(),
            protocol: "tcp".into(),
            node: "node-1".into(),
            here: takes,
            takes_inside: takes,
            reason: reason.into(),
            ..ServiceEndpoint::default()
        };
        let service = Service {
            name: "default/web".into(),
            r#type: "ClusterIP".into(),
            internal_traffic_policy: "Cluster".into(),
            algorithm: "source-hash".into(),
            frontends: vec![frontend],
            endpoint_list: vec![endpoint("10.244.1.2:8080", true, ""), endpoint("10.244.1.3:8080", false, "not ready")],
            ..Service::default()
        };
        let told = in_full(&Screen::default(), &service);
        let want = "\
default/web: ClusterIP, internal traffic policy Cluster, endpoints by source-hash

FRONTEND           KIND        KERNEL           FROM PODS AND NODES  FROM OUTSIDE
10.96.0.10:80/tcp  cluster_ip  as it should be  to 10.244.1.2:8080   the same

ENDPOINT             NODE                TAKES CONNECTIONS  WHY NOT
10.244.1.2:8080/tcp  node-1 (this node)  yes
10.244.1.3:8080/tcp  node-1              no                 not ready
";
        assert_eq!(told, want, "{told}");
    }
}
