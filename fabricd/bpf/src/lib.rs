//! The eBPF programs that carry pods' packets past most of the kernel: their object file, and the layout of their maps.
//!
//! | what | where |
//! |---|---|
//! | programs, in C | `c/fabric.c`: `fabric_pod_out`, `fabric_wire_in`, `fabric_pod_in` |
//! | keys, values, names | [`abi`], and the same in `c/fabric.h` |
//! | which way a packet took, and why | [`Reason`] |
//! | the same decisions in Rust, to ask and to compare | [`model`] |
//!
//! The kernel's own path stays whole. A program takes a packet only when it understands all of it; everything else goes
//! on to the next program of the hook and then to bridge, routes, packet filter and VXLAN device, as without us. So the
//! programs decide nothing that those don't, and to remove them costs speed alone.
//!
//! They are built by `clang -target bpf` from `build.rs`. They use structures of the kernel's user interface alone: no CO-RE,
//! no BTF of the kernel.

pub mod abi;
pub mod model;
mod reason;

pub use reason::{Path, Program, Reason};

/// The object file: each program is a section of its own, named as [`Program::name`] says, without calls and variables.
/// Maps are undefined but for their names ([`abi::Map::name`]).
pub static OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/fabric.o"));

/// The one that is never attached. It answers [`NEXT`] to a packet of IPv4 where the kernel can do what [`Program::PodOut`]
/// does.
pub const PROBE: &str = "fabric_probe";

/// What programs answer for packets that they leave to others: `TCX_NEXT` and `TC_ACT_UNSPEC`.
pub const NEXT: i32 = -1;
