//! [`backends`]: what all slices of a Service amount to for one of its ports.
//!
//! A slice has at most 1,000 endpoints, so a Service may have several, and while the controller moves an endpoint from one
//! to another a watch shows it in both: every endpoint of any slice counts, and each once.

use std::cmp::Ordering;
use std::net::IpAddr;

use super::model::{Endpoint, Service, ServicePort, Slice};
use crate::model::Family;

/// An endpoint of a Service's port.
#[derive(Clone, Copy, Debug)]
pub struct Backend<'a> {
    /// Its port.
    pub port: u16,
    /// The endpoint.
    pub endpoint: &'a Endpoint,
    /// The slice that it is of.
    slice: &'a Slice,
}

impl Backend<'_> {
    /// Where connections are sent.
    #[must_use]
    pub fn socket(&self) -> (IpAddr, u16) {
        (self.endpoint.ip, self.port)
    }

    /// Which of two entries for one address and port counts. Of one pod it is that of the newer slice; of two pods, one of
    /// which got the address of the other, that of the ready one.
    fn precedence(&self, other: &Self) -> Ordering {
        let age = || (self.slice.revision, &self.slice.name).cmp(&(other.slice.revision, &other.slice.name));
        if self.endpoint.pod == other.endpoint.pod {
            return age();
        }
        let use_ = |endpoint: &Endpoint| (endpoint.ready, endpoint.serving, !endpoint.terminating);
        use_(self.endpoint).cmp(&use_(other.endpoint)).then_with(age)
    }
}

/// The endpoints of a port in a family, by address and port, each once. Of the slices that are given, only those of this
/// family matter.
#[must_use]
pub fn backends<'a>(
    service: &Service,
    port: &ServicePort,
    family: Family,
    slices: impl IntoIterator<Item = &'a Slice>,
) -> Vec<Backend<'a>> {
    let mut all: Vec<Backend<'a>> = vec![];
    for slice in slices.into_iter().filter(|slice| slice.family == family) {
        let ports = slice.ports.iter().filter(|of| of.name == port.name && of.protocol == port.protocol);
        for target in ports.map(|of| of.port) {
            all.extend(slice.endpoints.iter().map(|endpoint| Backend { port: target, endpoint, slice }));
        }
    }
    // What is sent to an address of the Service would come back here for ever.
    all.retain(|backend| !service.addresses(family).any(|vip| vip == backend.endpoint.ip));
    // First by pod, so that of each pod the newest entry is left, and then among these.
    all.sort_by(|a, b| (a.socket(), a.endpoint.pod).cmp(&(b.socket(), b.endpoint.pod)).then_with(|| b.precedence(a)));
    all.dedup_by_key(|backend| (backend.socket(), backend.endpoint.pod));
    all.sort_by(|a, b| a.socket().cmp(&b.socket()).then_with(|| b.precedence(a)));
    all.dedup_by_key(|backend| backend.socket());
    all
}
