//! The fabric on kernels of its own: machines by QEMU. `make test-machines` runs all of it, `SHORT=1` what is in [`short`].
//!
//! A processor that is emulated is slow, so a lab is used for many checks, and limits are what only a fault exceeds.

mod debian;
mod fabric;
mod fast_path;
mod hardware;
mod identity;
mod kernels;
mod modules;
mod short;
