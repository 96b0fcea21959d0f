//! `fabricctl events`: what happened on this node.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fabric_proto::Word as _;
use fabric_proto::v1::{Event, WatchEventsRequest};
use time::OffsetDateTime;

use crate::output::{Output, Screen, Severity};
use crate::table::span;
use crate::{Answer, daemon, print};

/// Prints the events that are remembered, and with `follow` those that come.
pub async fn show(socket: &Path, output: Output, follow: bool) -> anyhow::Result<Answer> {
    let mut events = daemon::connect(socket).await?.watch_events(WatchEventsRequest { follow }).await?.into_inner();
    let mut last = None;
    while let Some(event) = events.message().await? {
        let missed = last.map_or(0, |last| event.number.saturating_sub(last + 1));
        if missed > 0 {
            eprintln!("fabricctl: {missed} events were missed");
        }
        last = Some(event.number);
        let clock = if output == Output::Wide { clock(event.unix_millis) + "  " } else { String::new() };
        let line = output.show_next(&event, |screen| clock + &line(screen, &event, SystemTime::now()))?;
        if !print(&line) {
            break;
        }
    }
    Ok(Answer::fine(String::new()))
}

/// An event in one line.
pub fn line(screen: &Screen, event: &Event, now: SystemTime) -> String {
    let ago = format!("{} ago", ago(event.unix_millis, now));
    let subject = if event.subject.is_empty() { String::new() } else { format!("{} ", event.subject) };
    let severity = if event.warning { Severity::Doubtful } else { Severity::Plain };
    let said = screen.paint(&format!("{subject}{}", event.message), severity);
    format!("{ago:>12}  {:10} {said}\n", event.kind().word())
}

/// When something was, by the clock, in UTC: as logs have it.
pub fn clock(unix_millis: i64) -> String {
    let Ok(then) = OffsetDateTime::from_unix_timestamp(unix_millis.div_euclid(1000)) else { return String::new() };
    format!("{}T{:02}:{:02}:{:02}Z", then.date(), then.hour(), then.minute(), then.second())
}

/// How long something is past.
pub fn ago(unix_millis: i64, now: SystemTime) -> String {
    let then = UNIX_EPOCH + Duration::from_millis(unix_millis.try_into().unwrap_or(0));
    let seconds = now.duration_since(then).map_or(0, |since| since.as_secs());
    span(seconds.try_into().unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fabric_proto::v1::EventKind;

    #[test]
    fn clock_is_utc() {
        assert_eq!(clock(1_000_000_000_999), "2001-09-09T01:46:40Z");
    }

    #[test]
    fn event_is_a_line() {
        let event = Event {
            number: 7,
            unix_millis: 1_000_000,
            kind: EventKind::Peer.into(),
            subject: "node-2".into(),
            message: "added: 10.244.2.0/24".into(),
            warning: false,
        };
        let now = UNIX_EPOCH + Duration::from_secs(1_060);
        assert_eq!(line(&Screen::default(), &event, now), "    60 s ago  peer       node-2 added: 10.244.2.0/24\n");
    }
}
