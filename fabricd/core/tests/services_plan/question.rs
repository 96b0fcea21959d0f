//! A connection's first packet: what the rules make of it, and what it may become by the objects.

use std::collections::BTreeMap;

use fabric_core::model::Family;
use fabric_core::services::model::{Protocol, ServiceType};
use fabric_core::services::plan::Socket;
use fabric_core::services::{Answer, Frontend, Origin, backends, choose};
use fabric_core::state::nft::{Reject, ct_state, ct_status};
use proptest::prelude::*;

use crate::cluster::{HERE, Seed, balancer, ip, node, service, slice, vip};
use crate::interpreter::{Machine, Outcome, Packet};

/// Where a packet comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// A pod of this node, by its number.
    Pod(u8),
    /// A pod of another node.
    OtherPod,
    /// This host.
    Host,
    /// Beyond the cluster.
    Outside,
}

/// Where it is addressed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    ClusterIp,
    Balancer,
    NodePort,
}

#[derive(Clone, Copy, Debug)]
pub struct Question {
    pub service: u8,
    pub is_udp: bool,
    pub from: From,
    pub to: To,
    pub family: Family,
    pub wrong_port: bool,
}

pub fn question() -> impl Strategy<Value = Question> {
    let from =
        prop_oneof![(10..16_u8).prop_map(From::Pod), Just(From::OtherPod), Just(From::Host), Just(From::Outside)];
    let to = prop_oneof![Just(To::ClusterIp), Just(To::Balancer), Just(To::NodePort)];
    let wrong_port = prop::bool::weighted(0.05);
    (0..7_u8, any::<bool>(), from, to, any::<bool>(), wrong_port).prop_map(
        |(service, is_udp, from, to, is_v4, wrong_port)| {
            let family = if is_v4 { Family::V4 } else { Family::V6 };
            Question { service, is_udp, from, to, family, wrong_port }
        },
    )
}

/// What becomes of a connection's first packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// It goes there, and whether with another source.
    To(Socket, bool),
    Rejected,
    Dropped,
    /// Services have nothing to do with it.
    Passes,
}

impl Question {
    pub fn packet(&self) -> Packet {
        let source = match self.from {
            From::Pod(number) => ip(self.family, 1, number),
            From::OtherPod => ip(self.family, 2, 77),
            From::Host => node(self.family),
            From::Outside => ip(self.family, 198, 7),
        };
        let (protocol, port) = if self.is_udp { (Protocol::Udp, 53) } else { (Protocol::Tcp, 80) };
        let port = port + u16::from(self.wrong_port);
        let (target, port) = match self.to {
            To::ClusterIp => (vip(self.family, self.service), port),
            To::Balancer => (balancer(self.family, self.service), port),
            To::NodePort => (node(self.family), 30_000 + u16::from(self.service) * 10 + port % 7),
        };
        let (original, protocol) = ((target, port), protocol.number());
        Packet { source, target, protocol, port, original, ct_state: ct_state::NEW, ct_status: 0 }
    }

    /// What the rules make of it, chain by chain.
    pub fn delivery(&self, machine: &mut Machine<'_>) -> Delivery {
        let mut packet = self.packet();
        let is_host = self.from == From::Host;
        let hooks = if is_host { ["guard-output", "output"] } else { ["guard-prerouting", "prerouting"] };
        match machine.run(hooks[0], &packet) {
            Outcome::Dropped => return Delivery::Dropped,
            outcome => assert_eq!(outcome, Outcome::Passes),
        }
        let is_translated = match machine.run(hooks[1], &packet) {
            Outcome::Translated(ip, port) => {
                (packet.target, packet.port, packet.ct_status) = (ip, port, ct_status::DESTINATION_NAT);
                true
            }
            outcome => {
                assert_eq!(outcome, Outcome::Passes);
                false
            }
        };
        match machine.run(if is_host { "refuse-output" } else { "forward" }, &packet) {
            Outcome::Dropped => return Delivery::Dropped,
            Outcome::Rejected(Reject::PortUnreachable) => return Delivery::Rejected,
            outcome => assert_eq!(outcome, Outcome::Passes),
        }
        let is_masqueraded = machine.run("postrouting", &packet) == Outcome::Masqueraded;
        if is_translated { Delivery::To((packet.target, packet.port), is_masqueraded) } else { Delivery::Passes }
    }

    /// What it may become, by the objects.
    pub fn may(&self, seeds: &BTreeMap<u8, Seed>) -> Vec<Delivery> {
        let Some(seed) = seeds.get(&self.service) else { return vec![Delivery::Passes] };
        let service = service(self.service, seed);
        let exists = match self.to {
            To::ClusterIp => true,
            To::Balancer => service.kind == ServiceType::LoadBalancer,
            To::NodePort => service.kind != ServiceType::ClusterIp,
        };
        if !exists {
            return vec![Delivery::Passes];
        }
        let packet = self.packet();
        let has_port = match self.to {
            To::NodePort => service
                .ports
                .iter()
                .any(|of| of.node_port == Some(packet.port) && of.protocol.number() == packet.protocol),
            _ => !self.wrong_port,
        };
        if !has_port {
            return vec![if self.to == To::ClusterIp { Delivery::Rejected } else { Delivery::Passes }];
        }
        let port = &service.ports[usize::from(self.is_udp)];
        let slice = slice(self.service, self.family, seed);
        let backends = backends(&service, port, self.family, [&slice]);
        let choice = choose(&backends, HERE);
        let frontend = if self.to == To::ClusterIp { Frontend::ClusterIp } else { Frontend::External };
        let origin = if self.from == From::Outside { Origin::Outside } else { Origin::Inside };
        match choice.answer(service.policy(frontend, origin)) {
            Answer::Reject => vec![Delivery::Rejected],
            Answer::Drop => vec![Delivery::Dropped],
            Answer::To(list) => {
                let delivery = |backend: &fabric_core::services::Backend<'_>| {
                    let itself = backend.endpoint.ip == packet.source;
                    let answers_here = matches!(self.from, From::Pod(_)) || HERE.has(backend.endpoint);
                    Delivery::To(backend.socket(), itself || !answers_here)
                };
                list.iter().map(delivery).collect()
            }
        }
    }
}
