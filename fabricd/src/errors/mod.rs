//! How an error is told to a person: an errno by its name, with what to do about it, and causes once each.

mod chain;
pub mod errno;

pub use self::chain::chain;
