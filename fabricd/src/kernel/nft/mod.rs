//! nftables over netlink: our tables written in transactions, read back, and watched.
//!
//! ```text
//!   Ops ── encode (expr) ──► one datagram: begin, …, end ──► kernel ──► events ── watch ──► read again
//!   FoundRuleset ◄── read ◄── dumps of our tables alone ◄──────────┘
//! ```
//!
//! What we wrote ourselves is known without reading it again; the events of our own transactions are passed over.

mod attributes;
mod docker_user;
pub(super) mod drops;
mod encode;
mod expr;
mod kube_proxy;
mod read;
mod rule;
pub(super) mod service;
pub(super) mod uapi;
pub(super) mod watch;

pub(super) use self::attributes::{Attributes, Nfnetlink, Values};
pub(super) use self::read::{concerned, generation, lacks_nftables};
pub(super) use self::rule::comment;

use std::collections::BTreeMap;
use std::io;

use fabric_core::diff::nft::Op;
use fabric_core::state::docker_user::DockerUser;
use fabric_core::state::nft::{FoundTable, Section, TableKey};
use fabric_netlink::{Refusal, RequestSocket};
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::Dropped;

/// The kernel's packet filter.
pub(super) struct Filter {
    /// `None` when the kernel has no netfilter.
    socket: Option<RequestSocket>,
    /// At which generation of the kernel's rules each of our tables was last read.
    read_at: BTreeMap<TableKey, u32>,
    /// What the rules of those tables have dropped whose counters are read along.
    dropped: BTreeMap<TableKey, Dropped>,
    others: Others,
}

/// Chains of others that matter beside what they drop.
#[derive(Default)]
pub(super) struct Others {
    /// At which generation of the kernel's rules they were last read.
    read_at: Option<u32>,
    /// Chains that are there for rules of ours.
    pub(super) docker_user: Vec<DockerUser>,
    /// Whether kube-proxy's rules are here.
    pub(super) kube_proxy: bool,
}

impl Filter {
    /// Opens the one of this thread's network namespace.
    pub(super) fn open() -> io::Result<Self> {
        let socket = match RequestSocket::open(NETLINK_NETFILTER) {
            Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => None,
            socket => Some(socket?),
        };
        let (read_at, dropped) = (BTreeMap::new(), BTreeMap::new());
        Ok(Self { socket, read_at, dropped, others: Others::default() })
    }

    /// The netlink port that our transactions come from.
    pub(super) fn port(&self) -> Option<u32> {
        self.socket.as_ref().map(RequestSocket::port)
    }

    /// What is there of one of our tables; the outer `None` when nobody has written a rule since it was last read.
    pub(super) fn read(&mut self, table: TableKey) -> io::Result<Option<Option<FoundTable>>> {
        let Some(socket) = &mut self.socket else { return Ok(Some(None)) };
        let counts = table.section() == Section::Filter;
        let now = generation(socket)?;
        if now.is_some() && now.as_ref() == self.read_at.get(&table) {
            if counts {
                self.dropped.insert(table, read::dropped(socket, table)?);
            }
            return Ok(None);
        }
        // A generation that begins meanwhile is another than this.
        let (found, dropped) = read::table(socket, table)?;
        if counts {
            self.dropped.insert(table, dropped);
        }
        self.read_at.extend(now.map(|now| (table, now)));
        Ok(Some(found))
    }

    /// What our tables had dropped when they were last read.
    pub(super) fn dropped(&self) -> Dropped {
        let mut sums = Dropped::new();
        for (reason, count) in self.dropped.values().flatten() {
            let sum = sums.entry(reason.clone()).or_default();
            sum.packets += count.packets;
            sum.bytes += count.bytes;
        }
        sums
    }

    /// What is there of others, read again when anybody has written a rule since.
    pub(super) fn others(&mut self) -> io::Result<&Others> {
        let Some(socket) = &mut self.socket else { return Ok(&self.others) };
        let now = generation(socket)?;
        if now.is_none() || now != self.others.read_at {
            self.others = Others {
                docker_user: docker_user::chains(socket)?,
                kube_proxy: kube_proxy::is_here(socket),
                read_at: now,
            };
        }
        Ok(&self.others)
    }

    /// Whether kube-proxy's rules are here.
    pub(super) fn has_kube_proxy(&mut self) -> bool {
        self.socket.as_mut().is_some_and(kube_proxy::is_here)
    }

    /// Removes kube-proxy's rules, and says in words which there were.
    pub(super) fn remove_kube_proxy(&mut self) -> io::Result<Vec<String>> {
        self.socket.as_mut().map_or_else(|| Ok(vec![]), kube_proxy::remove)
    }

    /// Who else owns one of our tables (`flags owner`), in words with the way out.
    pub(super) fn owner(&mut self) -> Option<String> {
        let socket = self.socket.as_mut()?;
        let mine = socket.port();
        read::owners(socket).into_iter().find(|(_, port)| *port != mine).map(|(table, port)| {
            format!(
                "the table {table} is owned by another program, with the netlink port {port} (mostly its process id: \
                 ps -p {port}); end it, and the table goes with it"
            )
        })
    }

    /// Writes steps as one transaction: all or nothing. More than 1,000 elements are several, of which the first that is
    /// refused is the last.
    pub(super) fn write(&mut self, ops: &[&Op]) -> Result<(), Refusal> {
        match &mut self.socket {
            Some(socket) => encode::transactions(ops).try_for_each(|batch| socket.transact(&batch)),
            None => Err(io::Error::from_raw_os_error(libc::EPROTONOSUPPORT).into()),
        }
    }
}
