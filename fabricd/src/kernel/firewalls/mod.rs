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
mod legacy;
mod nftables;
mod xt;

use std::io;
use std::sync::Arc;

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
    nftables: Firewall,
    legacy: Legacy,
    whole: Arc<Firewall>,
}

impl Reader {
    /// What there is now, in this thread's network namespace.
    pub(super) fn read(&mut self) -> io::Result<Arc<Firewall>> {
        let (nftables, legacy) = (self.read_nftables()?, self.legacy.read()?);
        if nftables || legacy {
            let mut whole = self.nftables.clone();
            whole.tables.extend(self.legacy.tables.iter().cloned());
            if *self.whole != whole {
                self.whole = Arc::new(whole);
            }
        }
        Ok(Arc::clone(&self.whole))
    }

    /// Whether the tables of nftables were read anew.
    fn read_nftables(&mut self) -> io::Result<bool> {
        if self.socket.is_none() {
            match RequestSocket::open(NETLINK_NETFILTER) {
                // A kernel without netfilter drops nothing.
                Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(false),
                socket => self.socket = Some(socket?),
            }
        }
        let Some(socket) = &mut self.socket else { return Ok(false) };
        let now = generation(socket)?;
        let anew = now.is_none() || now != self.read_at;
        if anew {
            // A generation that begins meanwhile is another than this.
            self.nftables = nftables::read(socket)?;
            self.read_at = now;
        }
        Ok(anew)
    }
}
