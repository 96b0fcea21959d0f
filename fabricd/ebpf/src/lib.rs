//! eBPF as fabricd and its CNI plugin use it: bpf(2), and the object file that `clang -target bpf` makes.
//!
//! ```text
//!   fabric.o ──► Object ──► Code::load(maps) ──► Program ──► Link::attach ──► tcx of an interface
//!                               ▲                   │             │
//!   Shape ──► Map::create ──────┘                   └─── pin ─────┴──► /sys/fs/bpf/…
//! ```
//!
//! Nothing here knows what a program does or what a map holds: values are bytes. Maps are made by who knows their
//! layout, not by the object file, so no BTF is read: neither the object's nor the kernel's, which is 5 MB to parse. What
//! is pinned below bpffs outlives the process; what isn't goes with its last descriptor.
//!
//! References are to `include/uapi/linux/bpf.h` and `kernel/bpf/syscall.c`.

mod link;
mod map;
mod object;
mod program;
mod sys;

pub use self::link::{Hook, Link, attached};
pub use self::map::{Kind, Map, Shape};
pub use self::object::{Code, MapUse, Object, ObjectError};
pub use self::program::{LoadError, Program, ProgramInfo, TestRun};

/// The most bytes of a name of a map or program that the kernel keeps (`BPF_OBJ_NAME_LEN`, less its end).
pub const NAME_LENGTH: usize = 15;
