//! Reads the chains of others that packets of ours meet: see [`fabric_core::firewall`].
//!
//! ```text
//! nftables (netlink) ── nftables (expressions, xt) ──┐
//!                                                    ├──► Firewall
//! iptables-legacy (getsockopt) ── legacy (xt) ───────┘
//! ```
//!
//! Of nftables the base chains are listed, and of those on the hooks in question only the chains are read that are
//! reached from them: never the nat tables, where kube-proxy has its thousands. They are read again when the kernel's
//! generation of rules is another. Of iptables-legacy, which tells nobody of changes, the bytes are read at each audit,
//! and parsed when they are others. [`bridge_nf`] tells whether those chains see what passes between ports of a bridge.

pub(super) mod bridge_nf;
mod expressions;
pub(super) mod legacy;
mod nftables;
pub(super) mod xt;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fabric_core::firewall::Firewall;
use fabric_netlink::RequestSocket;
use netlink_sys::protocols::NETLINK_NETFILTER;

use self::legacy::Legacy;
use super::nft::generation;

/// The reader, and what it has read.
#[derive(Default)]
pub(super) struct Reader {
    socket: Option<RequestSocket>,
    /// At which generation of the kernel's rules the tables of nftables were read.
    read_at: Option<u32>,
    took: Duration,
    legacy: Legacy,
    /// All there is, once: thousands of chains take megabytes.
    whole: Arc<Firewall>,
}

impl Reader {
    /// What there is now, in this thread's network namespace.
    pub(super) fn read(&mut self) -> io::Result<Arc<Firewall>> {
        let (nftables, legacy) = (self.read_nftables()?, self.legacy.read()?);
        if nftables.is_some() || legacy {
            let mut whole = nftables.unwrap_or_else(|| {
                let mut known = Firewall::clone(&self.whole);
                known.tables.retain(|table| !table.kind.is_legacy());
                known
            });
            whole.tables.extend(self.legacy.tables.iter().cloned());
            if *self.whole != whole {
                self.whole = Arc::new(whole);
            }
        }
        Ok(Arc::clone(&self.whole))
    }

    /// How long the last reading of nftables' chains took.
    pub(super) fn took(&self) -> Duration {
        self.took
    }

    /// The tables of nftables, unless they are those that were read before.
    fn read_nftables(&mut self) -> io::Result<Option<Firewall>> {
        if self.socket.is_none() {
            match RequestSocket::open(NETLINK_NETFILTER) {
                // A kernel without netfilter drops nothing.
                Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(None),
                socket => self.socket = Some(socket?),
            }
        }
        let Some(socket) = &mut self.socket else { return Ok(None) };
        let (now, began) = (generation(socket)?, Instant::now());
        if now.is_some() && now == self.read_at {
            return Ok(None);
        }
        // A generation that begins meanwhile is another than this.
        let found = nftables::read(socket)?;
        (self.read_at, self.took) = (now, began.elapsed());
        Ok(Some(found))
    }
}
