//! The probes of several peers at once, by one socket: what costs at rest is each waking, and each socket, not each packet.
//!
//! The socket isn't connected. Whose answer comes is told by where it comes from and by its token; that a peer's kernel has
//! nobody who listens, by the address in the socket's error queue (`IP_RECVERR`, ip(7)). It is another socket for each
//! batch, hence another port: so the probes of a peer take all paths that the underlay has, one after the other.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg};
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout};

use super::probe::{ANSWER, Answer, Packet, QUESTION, Size, is_own_firewall, tells_errors};
use super::{PATIENCE, PORT};

/// One packet of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    /// Who is asked. Nobody is asked twice in a batch.
    pub to: IpAddr,
    /// How large the packet is.
    pub size: Size,
    /// The number of the probe.
    pub number: u32,
}

/// Sends all of them from `from`, and waits for what comes back: one answer for each, in their order.
pub async fn ask(from: IpAddr, questions: &[Question]) -> Vec<Answer> {
    let mut batch = Batch { from, asked: Vec::with_capacity(questions.len()) };
    // Without a socket there is no answer.
    if let Ok(socket) = batch.send(questions) {
        let _ = timeout(PATIENCE, batch.receive(&socket)).await;
    }
    let answers = batch.asked.iter().map(|asked| asked.answer.unwrap_or(Answer::Nothing));
    answers.chain(std::iter::repeat(Answer::Nothing)).take(questions.len()).collect()
}

struct Batch {
    from: IpAddr,
    asked: Vec<Asked>,
}

struct Asked {
    to: IpAddr,
    token: u64,
    at: Instant,
    /// `None` as long as something may come.
    answer: Option<Answer>,
}

impl Batch {
    fn send(&mut self, questions: &[Question]) -> io::Result<UdpSocket> {
        let socket = tells_errors(self.from)?;
        let mut packet = vec![];
        for Question { to, size, number } in questions {
            let token = fastrand::u64(..);
            let question = Packet { kind: QUESTION, flags: 0, token, number: *number, arrived: 0 };
            question.put(size.payload(self.from), &mut packet);
            let send = || socket.send_to(&packet, SocketAddr::new(*to, PORT)).map(drop);
            let at = Instant::now();
            // What an earlier packet has met is told first.
            let sent = send().or_else(|_| {
                self.hear_errors(&socket);
                send()
            });
            let answer = sent.err().map(|e| if is_own_firewall(&e) { Answer::NotSent } else { Answer::Nothing });
            self.asked.push(Asked { to: *to, token, at, answer });
        }
        UdpSocket::from_std(socket)
    }

    /// Takes answers until there is one for each.
    async fn receive(&mut self, socket: &UdpSocket) {
        let mut buffer = [0; 64];
        while self.asked.iter().any(|asked| asked.answer.is_none()) {
            match socket.recv_from(&mut buffer).await {
                Ok((length, from)) => self.hear(&buffer[..length], from),
                Err(_) => self.hear_errors(socket),
            }
        }
    }

    fn hear(&mut self, bytes: &[u8], from: SocketAddr) {
        let Some(packet) = Packet::parse(bytes).filter(|packet| packet.kind == ANSWER && from.port() == PORT) else {
            return;
        };
        let of = |asked: &&mut Asked| asked.to == from.ip() && asked.token == packet.token;
        if let Some(asked) = self.asked.iter_mut().find(of) {
            asked.answer = Some(Answer::Daemon { rtt: asked.at.elapsed(), arrived: packet.arrived });
        }
    }

    /// What ICMP said of our packets: the error queue, up to its end.
    fn hear_errors(&mut self, socket: &impl AsRawFd) {
        let (mut buffer, mut space) = ([0; 64], nix::cmsg_space!([u8; 128]));
        loop {
            let mut parts = [io::IoSliceMut::new(&mut buffer)];
            let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
            let Ok(told) = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut space[..]), flags)
            else {
                return;
            };
            let Some(to) = told.address.as_ref().and_then(address) else { continue };
            let errors = told.cmsgs().into_iter().flatten().filter_map(|message| match message {
                ControlMessageOwned::Ipv4RecvErr(error, _) | ControlMessageOwned::Ipv6RecvErr(error, _) => {
                    Some(error.ee_errno)
                }
                _ => None,
            });
            let Some(error) = errors.last().and_then(|number| i32::try_from(number).ok()) else { continue };
            let Some(asked) = self.asked.iter_mut().find(|asked| asked.to == to && asked.answer.is_none()) else {
                continue;
            };
            match error {
                libc::ECONNREFUSED => asked.answer = Some(Answer::Kernel(asked.at.elapsed())),
                // A router that has no path yet may have one for the answer to what is on its way.
                libc::EHOSTUNREACH | libc::ENETUNREACH => {}
                // Such as a router's word that the packet was too large.
                _ => asked.answer = Some(Answer::Nothing),
            }
        }
    }
}

fn address(of: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = of.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
    v4.or_else(|| of.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::probe::{ReceivedProbes, answer};
    use super::*;

    #[tokio::test]
    async fn each_of_a_batch_gets_its_own_answer() {
        let us: IpAddr = "127.9.5.1".parse().unwrap();
        let [daemon, mute, kernel, other]: [IpAddr; 4] =
            ["127.9.5.2", "127.9.5.3", "127.9.5.4", "127.9.5.5"].map(|ip| ip.parse().unwrap());
        let received = Arc::new(ReceivedProbes::default());
        received.set_peers([us]);
        let answering: Vec<_> = [daemon, other]
            .map(|at| {
                let received = Arc::clone(&received);
                tokio::spawn(async move { answer(at, &received).await })
            })
            .into();
        let _silent = std::net::UdpSocket::bind((mute, PORT)).expect("an address of the loopback");
        tokio::task::yield_now().await;
        // The kernels' refusals come while others are still to be sent.
        let sizes = [Size::Small, Size::Packet(1450)];
        for size in sizes {
            let question = |to| Question { to, size, number: 7 };
            let answers = ask(us, &[kernel, daemon, mute, other].map(question)).await;
            let found = answers.iter().map(|answer| match answer {
                Answer::Daemon { arrived, .. } => format!("daemon {}", arrived & 1),
                Answer::Kernel(_) => "kernel".into(),
                other => format!("{other:?}"),
            });
            assert_eq!(found.collect::<Vec<_>>(), ["kernel", "daemon 1", "Nothing", "daemon 1"], "{size:?}");
        }
        answering.iter().for_each(tokio::task::JoinHandle::abort);
    }

    #[tokio::test]
    async fn nobody_answers_where_no_packet_can_be_sent_from() {
        let (from, to) = ("192.0.2.1".parse().unwrap(), "127.9.5.2".parse().unwrap());
        let question = Question { to, size: Size::Small, number: 1 };
        assert_eq!(ask(from, &[question, question]).await, [Answer::Nothing; 2]);
    }
}
