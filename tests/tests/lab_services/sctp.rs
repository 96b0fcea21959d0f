//! SCTP through a Service, by the first two messages of an association: a kernel that tracks SCTP may have no sockets for it.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fabric_core::model::Family;
use fabric_tests::lab::spaces::Spaces;
use fabric_tests::lab::wait_until;
use fabric_tests::services::{V1, slices_of};
use rustix::net::{AddressFamily, SocketType, ipproto, socket};
use serde_json::json;

use crate::{Cluster, SOON, vip};

/// `INIT` and `INIT ACK` (RFC 9260 section 3.3).
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;

/// A message with one chunk of these types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Message {
    from: u16,
    to: u16,
    /// The verification tag: what the other end has asked for.
    tag: u32,
    chunk: u8,
    /// What this end asks for.
    initiate: u32,
}

impl Message {
    /// Its bytes behind an IP header, with their checksum.
    fn bytes(self) -> Vec<u8> {
        let mut bytes =
            [&self.from.to_be_bytes()[..], &self.to.to_be_bytes(), &self.tag.to_be_bytes(), &[0; 4]].concat();
        // Type, flags, length; the tag, a window, streams out and in, the first number.
        bytes.extend([self.chunk, 0, 0, 20]);
        bytes.extend(self.initiate.to_be_bytes());
        bytes.extend([0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]);
        let sum = crc32c(&bytes).to_le_bytes();
        bytes[8..12].copy_from_slice(&sum);
        bytes
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let mut zeroed = bytes.to_vec();
        zeroed.get_mut(8..12)?.fill(0);
        let short = |at: usize| Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
        let long = |at: usize| Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
        let is_whole = crc32c(&zeroed).to_le_bytes() == bytes[8..12];
        let message =
            Self { from: short(0)?, to: short(2)?, tag: long(4)?, chunk: *bytes.get(12)?, initiate: long(16)? };
        is_whole.then_some(message)
    }
}

/// RFC 9260 appendix A.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| if sum & 1 == 0 { sum >> 1 } else { sum >> 1 ^ 0x82f6_3b78 })
    })
}

/// Sends and hears SCTP in a pod.
struct Raw(UdpSocket);

impl Raw {
    fn new(place: &Spaces, family: Family) -> Result<Self> {
        let family = if family == Family::V4 { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = UdpSocket::from(place.run(|| Ok(socket(family, SocketType::RAW, Some(ipproto::SCTP))?))?);
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        Ok(Self(socket))
    }

    fn send(&self, to: IpAddr, message: Message) -> Result<()> {
        self.0.send_to(&message.bytes(), SocketAddr::new(to, 0))?;
        Ok(())
    }

    /// The next message, and whom it is from.
    fn hear(&self) -> Result<(IpAddr, Message)> {
        let mut buffer = [0; 256];
        let (length, from) = self.0.recv_from(&mut buffer)?;
        // Of IPv4 the header is there too.
        let header = if from.is_ipv4() { usize::from(buffer[0] & 0x0f) * 4 } else { 0 };
        let message = Message::read(&buffer[header..length]).context("no whole message")?;
        Ok((from.ip(), message))
    }
}

#[test]
fn checksum_is_that_of_the_standard() {
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
}

#[test]
fn association_begins_with_an_endpoint_and_its_answer_comes_from_the_service() -> Result<()> {
    let cluster = Cluster::start()?;
    let port = |number: u16| json!([{"name": "s", "port": number, "protocol": "SCTP"}]);
    cluster.serve("signalling", 10, &["c"], &json!({"ports": port(2905)}));
    for (family, name) in Family::ALL.into_iter().zip(["signalling-v4", "signalling-v6"]) {
        cluster.api.change(&slices_of(V1), name, &json!({"ports": port(12_905)}));
        let (client, server) = (cluster.pod("a"), cluster.pod("c"));
        let (asks, answers) = (Raw::new(&client.network()?, family)?, Raw::new(&server.network()?, family)?);
        let init = Message { from: 40_000, to: 2905, tag: 0, chunk: INIT, initiate: 7 };
        let (from, heard) = wait_until("the endpoint hears it", SOON, || {
            asks.send(vip(family, 10), init)?;
            answers.hear()
        })?;
        ensure!(from == client.ip(family)? && heard == Message { to: 12_905, ..init }, "{from} {heard:?}");
        let answer = Message { from: 12_905, to: 40_000, tag: 7, chunk: INIT_ACK, initiate: 9 };
        answers.send(from, answer)?;
        let heard = asks.hear()?;
        assert_eq!(heard, (vip(family, 10), Message { from: 2905, ..answer }));
    }
    Ok(())
}
