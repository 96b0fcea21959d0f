//! Numbers of nf_tables (linux/netfilter/nf_tables.h, linux/netfilter/nfnetlink.h): kinds of messages, flags, widths.

use fabric_core::state::nft::{ChainKind, Datatype, TableFamily};

/// `NFNL_SUBSYS_NFTABLES`: whose message it is, and whose batch.
pub(super) const SUBSYSTEM: u16 = 10;

/// `NFT_MSG_*`.
pub(super) const NEW_TABLE: u16 = 0;
pub(super) const GET_TABLE: u16 = 1;
pub(super) const DELETE_TABLE: u16 = 2;
pub(super) const NEW_CHAIN: u16 = 3;
pub(in crate::kernel) const GET_CHAIN: u16 = 4;
pub(super) const DELETE_CHAIN: u16 = 5;
pub(super) const NEW_RULE: u16 = 6;
pub(in crate::kernel) const GET_RULE: u16 = 7;
pub(super) const DELETE_RULES: u16 = 8;
pub(super) const NEW_SET: u16 = 9;
pub(in crate::kernel) const GET_SET: u16 = 10;
pub(super) const DELETE_SET: u16 = 11;
pub(super) const NEW_ELEMENTS: u16 = 12;
pub(in crate::kernel) const GET_ELEMENTS: u16 = 13;
pub(super) const DELETE_ELEMENTS: u16 = 14;
/// The end of a transaction, which names no table.
pub(super) const NEW_GENERATION: u16 = 15;
pub(super) const GET_GENERATION: u16 = 16;

/// `NFNL_MSG_BATCH_BEGIN`, `NFNL_MSG_BATCH_END`: what is between happens as one, or not at all.
pub(super) const BATCH_BEGIN: u16 = 16;
pub(super) const BATCH_END: u16 = 17;

/// `NF_DROP`, `NF_ACCEPT`.
pub(in crate::kernel) const DROP: u32 = 0;
pub(super) const ACCEPT: u32 = 1;

/// `NFT_SET_INTERVAL`, `NFT_SET_MAP`, `NFT_SET_TIMEOUT`, `NFT_SET_EVAL`, `NFT_SET_CONCAT`.
pub(in crate::kernel) const INTERVAL: u32 = 0x04;
pub(super) const MAP: u32 = 0x08;
pub(super) const TIMEOUT: u32 = 0x10;
pub(in crate::kernel) const DYNAMIC: u32 = 0x20;
pub(in crate::kernel) const CONCATENATED: u32 = 0x80;
/// `NFT_SET_ELEM_INTERVAL_END`, `NFT_SET_ELEM_CATCHALL`.
pub(in crate::kernel) const INTERVAL_END: u32 = 1;
pub(in crate::kernel) const CATCH_ALL: u32 = 2;
/// `NFT_DATA_VERDICT`: the type of a verdict map's data.
pub(super) const VERDICT_DATA: u32 = 0xffff_ff00;

/// `NFTA_DATA_VALUE`, `NFTA_DATA_VERDICT`.
pub(super) const DATA_VALUE: u16 = 1;
pub(super) const DATA_VERDICT: u16 = 2;
/// `NFTA_LIST_ELEM`.
pub(super) const LIST_ELEMENT: u16 = 1;

/// Bits of one field in a key's type, which is for `nft` to print by.
pub(super) const TYPE_BITS: u32 = 6;

/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_*`.
pub(in crate::kernel) const fn message(kind: u16) -> u16 {
    SUBSYSTEM << 8 | kind
}

/// `NFPROTO_INET`, `NFPROTO_BRIDGE`.
pub(super) const fn nfproto(family: TableFamily) -> u8 {
    match family {
        TableFamily::Inet => 1,
        TableFamily::Bridge => 7,
    }
}

/// The kernel's word for a kind of chain.
pub(super) fn chain_kind(kind: ChainKind) -> &'static str {
    match kind {
        ChainKind::Filter => "filter",
        ChainKind::Nat => "nat",
    }
}

/// What `nft` calls `TYPE_IPADDR`, `TYPE_IP6ADDR`, `TYPE_ETHERADDR`, `TYPE_INET_PROTOCOL`, `TYPE_INET_SERVICE`, `TYPE_MARK`
/// and `TYPE_IFNAME`; the kernel only keeps it.
pub(super) fn datatype(field: Datatype) -> u32 {
    match field {
        Datatype::V4 => 7,
        Datatype::V6 => 8,
        Datatype::Mac => 9,
        Datatype::Protocol => 12,
        Datatype::Port => 13,
        Datatype::Number => 19,
        Datatype::Interface => 41,
    }
}
