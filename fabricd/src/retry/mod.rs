//! Trying again: the delays between attempts ([`Backoff`]), what the log hears of a source that is away ([`Outage`]), and
//! the second look at a source that shows most of what was known as gone ([`Look`]).

mod backoff;
mod outage;
mod second_look;

pub use self::backoff::Backoff;
pub use self::outage::{Interrupted, Outage};
pub use self::second_look::Look;
