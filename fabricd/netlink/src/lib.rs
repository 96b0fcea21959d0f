//! Netlink (netlink(7), RFC 3549) as fabricd and its CNI plugin speak it: any family, blocking, in batches.
//!
//! ```text
//!   Attributes ──► Request ──┐                                   ┌──► Frame ──► attributes
//!                            ▼                                   │
//!                  RequestSocket::{write, transact, ask, dump}   │     EventSocket::wait
//!                            │  one send, one datagram           │  each frame by its sequence number
//!                            ▼                                   │
//!                  ────────────────────────  kernel  ────────────┴────────────
//! ```
//!
//! Nothing here knows what a message says. A family's messages are made and read by who uses them: `fabricd/src/kernel`
//! (rtnetlink, nftables) and `cni-shim/src/bridge` (rtnetlink). A message is a [`Request`] of a kind, flags and a body; a
//! body is a fixed header of the family (`struct nhmsg`, `nfgenmsg`, `genlmsghdr`) and [`Attributes`].
//!
//! The kernel's answers are data like any other: a frame or an attribute whose length lies ends the list that it is in.

mod answer;
mod attributes;
mod frame;
mod socket;

pub use self::answer::Refusal;
pub use self::attributes::{Attributes, attribute, attributes, pad};
pub use self::frame::{Frame, Request, frames};
pub use self::socket::{EventSocket, RECEIVE, RequestSocket, grow_receive_buffer, is_overrun, receive};
