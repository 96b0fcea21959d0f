//! Programs as filters of tc, where the kernel has no tcx (before 6.6).
//!
//! ```text
//!   eth0 ── qdisc clsact, one for all ─┬─ ingress ── filters by priority: those of others … ours ──► bridge, routes
//!                                      └─ egress  ── the same                                    ──► the wire
//! ```
//!
//! Ours are the `bpf` filters (direct action) of one priority, behind those that tc gives others by itself, of one of two
//! handles, with a program named `fabric_…`. What a program passes on (`TC_ACT_UNSPEC`) meets the next filter. The handle
//! says whose the qdisc is: with [`MADE`] it was made for the filter, and goes with the last one if nobody else's is there by
//! then. It lies in the kernel, beside what it speaks of, so no crash parts the two.
//!
//! `tc qdisc show`, `tc filter show dev eth0 ingress`.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};

use fabric_core::state::fast_path::{Hook, Place, Program};
use fabric_netlink::{Attributes, Frame, Refusal, Request, RequestSocket, attribute};

/// linux/rtnetlink.h.
const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
pub(super) const RTM_GETQDISC: u16 = 38;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;
/// `NLM_F_EXCL` and `NLM_F_CREATE`.
const EXCL: u16 = 0x200;
const CREATE: u16 = 0x400;

/// `struct tcmsg`: family, the interface's index, handle, parent, and priority and protocol of a filter.
pub(super) const TCMSG: usize = 20;
pub(super) const TCMSG_INDEX: usize = 4;
const TCMSG_HANDLE: usize = 8;
pub(super) const TCMSG_PARENT: usize = 12;
const TCMSG_INFO: usize = 16;
pub(super) const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_CHAIN: u16 = 11;

/// `TC_H_CLSACT`, which is `TC_H_INGRESS` too: an interface has one of the two.
pub(super) const PARENT_CLSACT: u32 = 0xffff_fff1;
/// The handle of either, and the parents of their filters (`TC_H_MIN_INGRESS`, `TC_H_MIN_EGRESS`).
const HANDLE_CLSACT: u32 = 0xffff_0000;
const PARENT_INGRESS: u32 = 0xffff_fff2;
const PARENT_EGRESS: u32 = 0xffff_fff3;
/// The kind of qdisc that has filters on both sides.
pub(super) const CLSACT: &str = "clsact";
/// The older one, which has them on receiving alone.
const INGRESS: &str = "ingress";

/// linux/pkt_cls.h.
const BPF: &str = "bpf";
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_FLAGS_GEN: u16 = 9;
const TCA_BPF_ID: u16 = 11;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
const TCA_CLS_FLAGS_SKIP_HW: u32 = 1;

/// tc gives 49152 and less by itself; people write small ones.
const PRIORITY: u16 = 64_177;
/// The filter's handle where the qdisc was made for it, and where it was there.
const MADE: u32 = 0xfab1;
const JOINED: u32 = 0xfab2;
/// What the names of our programs begin with.
const OURS: &str = "fabric_";

/// What the kernel takes for it, where it is built as modules.
const MODULES: &str = "does the kernel have all that it takes? Load it with: modprobe -a sch_ingress cls_bpf";

/// A filter at a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    hook: Hook,
    /// `None` for one of somebody else.
    ours: Option<Ours>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ours {
    /// The number of its program.
    program: u32,
    /// Whether the qdisc was made for it.
    made: bool,
}

/// Our filters, with the number of the program.
pub(super) fn ours(socket: &mut RequestSocket) -> io::Result<BTreeMap<Place, u32>> {
    let mut found = BTreeMap::new();
    for (ifindex, kind) in qdiscs(socket)? {
        found.extend(places(ifindex, &filters(socket, ifindex, &kind)?));
    }
    Ok(found)
}

/// Our filters at an interface that has a clsact, and whether anybody else has some.
pub(super) fn at_clsact(socket: &mut RequestSocket, ifindex: u32) -> io::Result<(BTreeMap<Place, u32>, bool)> {
    let found = filters(socket, ifindex, CLSACT)?;
    Ok((places(ifindex, &found).collect(), found.iter().any(|filter| filter.ours.is_none())))
}

fn places(ifindex: u32, filters: &[Filter]) -> impl Iterator<Item = (Place, u32)> {
    let place = move |filter: &Filter| Some((Place { ifindex, hook: filter.hook }, filter.ours?.program));
    filters.iter().filter_map(place)
}

/// `tc filter replace dev eth0 ingress pref 64177 handle 0xfab1 bpf direct-action …`, with `tc qdisc add dev eth0 clsact`
/// where there is none. A program that is there is replaced in place: each packet meets the one or the other.
///
/// # Errors
/// The kernel's. `EBUSY` where an interface has the qdisc `ingress`, and there is no hook on sending.
pub(super) fn put(
    socket: &mut RequestSocket,
    place: Place,
    program: Program,
    loaded: &fabric_ebpf::Program,
) -> Result<(), Refusal> {
    let Place { ifindex, hook } = place;
    let write = |handle, flags| {
        let descriptor = loaded.as_fd().as_raw_fd().cast_unsigned();
        let options = |list: Attributes| {
            list.bytes(TCA_BPF_FD, &descriptor.to_ne_bytes())
                .text(TCA_BPF_NAME, &format!("{OURS}{}", program.role.as_str()))
                .bytes(TCA_BPF_FLAGS, &TCA_BPF_FLAG_ACT_DIRECT.to_ne_bytes())
                .bytes(TCA_BPF_FLAGS_GEN, &TCA_CLS_FLAGS_SKIP_HW.to_ne_bytes())
        };
        let body = filter(place, handle).nested(TCA_OPTIONS, options).into_bytes();
        Request::raw(RTM_NEWTFILTER, flags, body)
    };
    let Some(kind) = qdiscs(socket)?.remove(&ifindex) else {
        // In one call: nobody would know whose an empty one is.
        let [qdisc, filter] =
            both(socket.write(&[qdisc(RTM_NEWQDISC, EXCL | CREATE, ifindex), write(MADE, EXCL | CREATE)]));
        return match (qdisc, filter) {
            (Ok(()), Ok(())) => Ok(()),
            (Ok(()), Err(refusal)) => {
                remove_unused(socket, ifindex)?;
                Err(with_modules(refusal))
            }
            // Somebody made one at this moment: the next pass takes it as theirs.
            (Err(refusal), Ok(())) => {
                remove(socket, place)?;
                Err(refusal)
            }
            (Err(refusal), Err(_)) => Err(with_modules(refusal)),
        };
    };
    if kind == INGRESS && hook == Hook::Egress {
        let words = "the interface has the qdisc ingress in the place of clsact: see tc qdisc show, tc filter show";
        return Err(Refusal { error: io::Error::from_raw_os_error(libc::EBUSY), words: Some(words.to_owned()) });
    }
    let found = filters(socket, ifindex, &kind)?;
    let made = found.iter().any(|filter| filter.ours.is_some_and(|ours| ours.made));
    let is_there = found.iter().any(|filter| filter.hook == hook && filter.ours.is_some());
    let flags = if is_there { CREATE } else { EXCL | CREATE };
    one(socket.write(&[write(handle(made), flags)])).map_err(with_modules)
}

/// `tc filter del …`, and `tc qdisc del dev eth0 clsact` where we made it and nothing else is left in it. What is gone is no
/// error.
pub(super) fn remove(socket: &mut RequestSocket, Place { ifindex, hook }: Place) -> Result<(), Refusal> {
    let Some(kind) = qdiscs(socket)?.remove(&ifindex) else { return Ok(()) };
    let found = filters(socket, ifindex, &kind)?;
    let Some(ours) = found.iter().find_map(|filter| filter.ours.filter(|_| filter.hook == hook)) else { return Ok(()) };
    let body = filter(Place { ifindex, hook }, handle(ours.made)).into_bytes();
    gone(one(socket.write(&[Request::raw(RTM_DELTFILTER, 0, body)])))?;
    if ours.made { remove_unused(socket, ifindex) } else { Ok(()) }
}

fn remove_unused(socket: &mut RequestSocket, ifindex: u32) -> Result<(), Refusal> {
    if !filters(socket, ifindex, CLSACT)?.is_empty() {
        return Ok(());
    }
    gone(one(socket.write(&[qdisc(RTM_DELQDISC, 0, ifindex)])))
}

fn handle(made: bool) -> u32 {
    if made { MADE } else { JOINED }
}

fn one(results: Vec<Result<(), Refusal>>) -> Result<(), Refusal> {
    results.into_iter().collect()
}

fn both(results: Vec<Result<(), Refusal>>) -> [Result<(), Refusal>; 2] {
    let none = || Err(io::Error::from_raw_os_error(libc::ENOBUFS).into());
    let mut results = results.into_iter();
    std::array::from_fn(|_| results.next().unwrap_or_else(none))
}

/// With its interface it goes by itself.
fn gone(result: Result<(), Refusal>) -> Result<(), Refusal> {
    result.or_else(|refusal| match refusal.error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV) => Ok(()),
        _ => Err(refusal),
    })
}

fn with_modules(refusal: Refusal) -> Refusal {
    let lacks = matches!(refusal.error.raw_os_error(), Some(libc::ENOENT | libc::EOPNOTSUPP));
    let words = lacks.then(|| refusal.words.iter().map(String::as_str).chain([MODULES]).collect::<Vec<_>>().join("; "));
    Refusal { words: words.or(refusal.words), error: refusal.error }
}

fn message(ifindex: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    [0, ifindex, handle, parent, info].into_iter().flat_map(u32::to_ne_bytes).collect()
}

fn qdisc(kind: u16, flags: u16, ifindex: u32) -> Request {
    let body =
        Attributes::behind(message(ifindex, HANDLE_CLSACT, PARENT_CLSACT, 0)).text(TCA_KIND, CLSACT).into_bytes();
    Request::raw(kind, flags, body)
}

fn filter(Place { ifindex, hook }: Place, handle: u32) -> Attributes {
    // `ETH_P_ALL`.
    let info = u32::from(PRIORITY) << 16 | u32::from(3_u16.to_be());
    Attributes::behind(message(ifindex, handle, parent(hook), info)).text(TCA_KIND, BPF)
}

fn parent(hook: Hook) -> u32 {
    match hook {
        Hook::Ingress => PARENT_INGRESS,
        Hook::Egress => PARENT_EGRESS,
    }
}

pub(super) fn number(frame: &Frame<'_>, at: usize) -> Option<u32> {
    frame.body.get(at..)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

pub(super) fn kind(frame: &Frame<'_>) -> Option<String> {
    let kind = attribute(frame.body.get(TCMSG..)?, TCA_KIND)?;
    Some(std::str::from_utf8(kind).ok()?.trim_end_matches('\0').to_owned())
}

/// The interfaces with a clsact or ingress qdisc.
fn qdiscs(socket: &mut RequestSocket) -> io::Result<BTreeMap<u32, String>> {
    let of = |frame: &Frame<'_>| {
        let is_it = number(frame, TCMSG_PARENT)? == PARENT_CLSACT;
        Some((number(frame, TCMSG_INDEX)?, kind(frame)?)).filter(|_| is_it)
    };
    Ok(socket.dump(&Request::raw(RTM_GETQDISC, 0, vec![0; TCMSG]), of)?.into_iter().collect())
}

/// All that is at the hooks of a clsact or ingress qdisc.
fn filters(socket: &mut RequestSocket, ifindex: u32, kind: &str) -> io::Result<Vec<Filter>> {
    let hooks: &[Hook] = if kind == CLSACT { &[Hook::Ingress, Hook::Egress] } else { &[Hook::Ingress] };
    let mut found = vec![];
    for hook in hooks {
        let question = Request::raw(RTM_GETTFILTER, 0, message(ifindex, 0, parent(*hook), 0));
        found.extend(socket.dump(&question, |frame| decode(frame, *hook))?);
    }
    Ok(found)
}

/// `None` for what only says that there are filters of one kind and priority: each of them follows.
fn decode(frame: &Frame<'_>, hook: Hook) -> Option<Filter> {
    let (handle, info) = (number(frame, TCMSG_HANDLE)?, number(frame, TCMSG_INFO)?);
    let is_ours = kind(frame)? == BPF && info >> 16 == u32::from(PRIORITY);
    if is_ours && handle == 0 {
        return None;
    }
    let attributes = frame.body.get(TCMSG..)?;
    let options = attribute(attributes, TCA_OPTIONS).unwrap_or_default();
    let is_first_chain = attribute(attributes, TCA_CHAIN).is_none_or(|chain| chain.iter().all(|byte| *byte == 0));
    let is_named = attribute(options, TCA_BPF_NAME).is_some_and(|name| name.starts_with(OURS.as_bytes()));
    let program = attribute(options, TCA_BPF_ID).and_then(|id| id.first_chunk()).map(|id| u32::from_ne_bytes(*id));
    let is_ours = is_ours && is_first_chain && is_named && matches!(handle, MADE | JOINED);
    Some(Filter { hook, ours: program.filter(|_| is_ours).map(|program| Ours { program, made: handle == MADE }) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message of the kernel's about a filter: its handle, priority, kind, name and chain.
    fn told(handle: u32, priority: u32, kind: &str, name: Option<&str>, chain: Option<u32>) -> Option<Filter> {
        let mut body = Attributes::behind(message(7, handle, PARENT_INGRESS, priority << 16)).text(TCA_KIND, kind);
        if let Some(chain) = chain {
            body = body.bytes(TCA_CHAIN, &chain.to_ne_bytes());
        }
        if let Some(name) = name {
            body =
                body.nested(TCA_OPTIONS, |list| list.text(TCA_BPF_NAME, name).bytes(TCA_BPF_ID, &9_u32.to_ne_bytes()));
        }
        let body = body.into_bytes();
        decode(&Frame { kind: RTM_NEWTFILTER, flags: 0, sequence: 0, port: 0, body: &body }, Hook::Ingress)
    }

    #[test]
    fn ours_are_told_from_those_of_others_by_priority_handle_and_name() {
        let ours = |made| Some(Filter { hook: Hook::Ingress, ours: Some(Ours { program: 9, made }) });
        let others = Some(Filter { hook: Hook::Ingress, ours: None });
        let (priority, name) = (PRIORITY.into(), Some("fabric_pod_out"));
        assert_eq!(told(MADE, priority, BPF, name, None), ours(true));
        assert_eq!(told(JOINED, priority, BPF, name, Some(0)), ours(false));
        assert_eq!(told(0, priority, BPF, None, None), None, "that there are some");
        for of_others in [
            told(MADE, 1, BPF, name, None),
            told(1, priority, BPF, name, None),
            told(MADE, priority, "flower", name, None),
            told(MADE, priority, BPF, Some("cil_from_netdev"), None),
            told(MADE, priority, BPF, name, Some(3)),
            told(0, 1, BPF, None, None),
        ] {
            assert_eq!(of_others, others);
        }
    }

    #[test]
    fn modules_are_named_where_the_kernel_lacks_the_qdisc_or_the_filter() {
        let told = |errno, words: Option<&str>| {
            let error = io::Error::from_raw_os_error(errno);
            with_modules(Refusal { error, words: words.map(str::to_owned) }).words
        };
        let unknown = "Specified qdisc kind is unknown";
        assert_eq!(told(libc::ENOENT, Some(unknown)), Some(format!("{unknown}; {MODULES}")));
        assert_eq!(told(libc::EINVAL, Some(unknown)).as_deref(), Some(unknown));
        assert_eq!(told(libc::EINVAL, None), None);
    }
}
