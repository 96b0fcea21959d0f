//! How two machines that have one node's name tell that they are two: one asks through the store, the other answers.
//!
//! A record says which run of a node wrote it, and not whether that run still lives. So a newcomer that finds a record
//! of another run in its name writes an [`Inquiry`] under the name; a daemon that lives and holds the record sees it in
//! its watch and writes its answer into it. No answer within some seconds is no proof by itself: what follows from
//! silence is decided in [`crate::lease`].

use std::net::IpAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::record::Instance;

/// The largest value that is looked at, in bytes; a real one has about 300.
const MAX_VALUE: usize = 4 * 1024;

/// One of two machines, as it describes itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Party {
    /// Which run of a node it is.
    #[serde(flatten)]
    pub instance: Instance,
    /// The underlay addresses that it publishes.
    pub addresses: Vec<IpAddr>,
    /// When its daemon started, in seconds of Unix time.
    pub since: i64,
}

/// A question to whoever holds the lease of a node's name, and the answer once there is one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inquiry {
    /// Chosen anew for each question: so an answer to an earlier one isn't taken for one to this.
    pub number: u64,
    /// Who asks.
    pub by: Party,
    /// Who holds the lease and lives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<Party>,
}

impl Inquiry {
    /// Reads what lies in the store; `None` for what is none.
    #[must_use]
    pub fn decode(value: &[u8]) -> Option<Self> {
        if value.len() > MAX_VALUE {
            return None;
        }
        serde_json::from_slice(value).ok()
    }

    /// The value as it is stored.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain members")
    }
}

/// As the API counts time.
#[must_use]
pub fn unix_millis(at: SystemTime) -> i64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// A time for people, to the minute.
#[must_use]
pub fn utc(unix_seconds: i64) -> String {
    let (days, seconds) = (unix_seconds.div_euclid(86_400), unix_seconds.rem_euclid(86_400));
    // Years begin in March here, so that the leap day is their last; 719,468 days are from 0000-03-01 to 1970-01-01.
    let days = days + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (year, month) = match month {
        ..=9 => (era * 400 + year, month + 3),
        _ => (era * 400 + year + 1, month - 9),
    };
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02} UTC", seconds / 3_600, seconds / 60 % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn party(boot: &str, ip: &str) -> Party {
        let instance = Instance { boot: boot.into(), netns: 7 };
        Party { instance, addresses: vec![ip.parse().expect("ip")], since: 1_790_000_000 }
    }

    #[test]
    fn questions_and_answers_come_back_as_they_were_and_other_values_are_none() {
        let asked = Inquiry { number: 9, by: party("b", "192.0.2.14"), answer: None };
        let answered = Inquiry { answer: Some(party("a", "2001:db8::13")), ..asked.clone() };
        for inquiry in [asked, answered] {
            assert_eq!(Inquiry::decode(&inquiry.encode()), Some(inquiry));
        }
        let large = [b"{".as_slice(), &vec![b' '; MAX_VALUE]].concat();
        for other in [&b""[..], b"null", b"node-1", br#"{"number":1}"#, &large] {
            assert_eq!(Inquiry::decode(other), None);
        }
    }

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00 UTC"),
            (951_782_399, "2000-02-28 23:59 UTC"),
            (951_782_400, "2000-02-29 00:00 UTC"),
            (1_709_251_199, "2024-02-29 23:59 UTC"),
            (1_767_225_599, "2025-12-31 23:59 UTC"),
            (-1, "1969-12-31 23:59 UTC"),
        ] {
            assert_eq!(utc(seconds), text);
        }
    }
}
