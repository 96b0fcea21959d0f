//! The planned table of Services: against what was decided about them, by an interpreter of its rules, and what is told of it.

#![allow(clippy::unwrap_used, reason = "a test that unwraps says where it broke")]

mod changes;
mod cluster;
mod descriptions;
mod interpreter;
mod packets;
mod question;
