//! The kernel's answer to a request: an error number, 0 for success, and maybe its own words (extended acknowledgements).

use std::fmt;
use std::io;

use netlink_packet_core::NLMSG_ERROR;

use crate::attributes::attribute;
use crate::frame::{Frame, frames};

/// `NLM_F_CAPPED`: of our message the header alone is quoted.
const CAPPED: u16 = 0x100;
/// `NLM_F_ACK_TLVS`: attributes follow.
const ACK_TLVS: u16 = 0x200;
/// `NLMSGERR_ATTR_MSG`: the kernel's words about a refusal.
const ATTR_MSG: u16 = 1;
/// Bytes of the error number, and of the quoted message's header behind it.
const NUMBER: usize = 4;
const QUOTED_HEADER: usize = 16;

/// The kernel's no, or the system's, if it came no further.
#[derive(Debug)]
pub struct Refusal {
    /// The error number.
    pub error: io::Error,
    /// The kernel's own words (`NLMSGERR_ATTR_MSG`), or what else is known of the reason.
    pub words: Option<String>,
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self { error, words: None }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)?;
        self.words.as_ref().map_or(Ok(()), |words| write!(f, " ({words})"))
    }
}

impl std::error::Error for Refusal {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

/// What a frame says about the write that it answers; `None` from one that is no answer.
pub(crate) fn verdict(frame: &Frame<'_>) -> Option<Result<(), Refusal>> {
    (frame.kind == NLMSG_ERROR)
        .then(|| errno(frame.body).map_err(|error| Refusal { error, words: words(frame).map(str::to_owned) }))
}

/// The error number that opens the body of `NLMSG_ERROR` and `NLMSG_DONE`, negative; 0 is success.
pub(crate) fn errno(body: &[u8]) -> io::Result<()> {
    match body.first_chunk().map(|number| i32::from_ne_bytes(*number)) {
        Some(code) if code < 0 => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        _ => Ok(()),
    }
}

/// The kernel's words: they follow the error number and the quoted message.
fn words<'a>(frame: &Frame<'a>) -> Option<&'a str> {
    if frame.flags & ACK_TLVS == 0 {
        return None;
    }
    let quoted = frames(frame.body.get(NUMBER..)?).next().map_or(0, |quoted| quoted.body.len());
    let body = if frame.flags & CAPPED == 0 { quoted.next_multiple_of(4) } else { 0 };
    let text = attribute(frame.body.get(NUMBER + QUOTED_HEADER + body..)?, ATTR_MSG)?;
    std::str::from_utf8(text).ok().map(|text| text.trim_end_matches('\0'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::attributes::Attributes;
    use crate::frame::Request;

    const EINVAL: i32 = 22;

    fn answer(flags: u16, body: &[u8]) -> Frame<'_> {
        Frame { kind: NLMSG_ERROR, flags, sequence: 1, port: 0, body }
    }

    #[test]
    fn the_kernels_words_are_found_behind_a_capped_message() {
        let mut body = (-EINVAL).to_ne_bytes().to_vec();
        // A capped quotation says how long the message was, and has its header alone.
        body.extend([36, 0, 0, 0, 104, 0, 5, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        body.extend(Attributes::default().text(ATTR_MSG, "none").into_bytes());
        assert_eq!(words(&answer(CAPPED | ACK_TLVS, &body)), Some("none"));
        assert_eq!(words(&answer(CAPPED, &body)), None);
        assert_eq!(errno(&body).map_err(|e| e.raw_os_error()), Err(Some(EINVAL)));
    }

    #[test]
    fn the_kernels_words_are_found_behind_a_message_that_is_quoted_whole() {
        let mut body = (-EINVAL).to_ne_bytes().to_vec();
        Request::raw(104, 0, vec![1, 2, 3, 4, 5]).put(1, 0, &mut body);
        body.extend(Attributes::default().bytes(2, &[0; 4]).text(ATTR_MSG, "no such device").into_bytes());
        let refused = verdict(&answer(ACK_TLVS, &body)).expect("an answer").expect_err("a refusal");
        assert_eq!(refused.to_string(), "Invalid argument (os error 22) (no such device)");
    }

    #[test]
    fn an_acknowledgement_is_no_refusal_and_an_event_no_answer() {
        assert!(matches!(verdict(&answer(0, &[0; 20])), Some(Ok(()))));
        assert!(verdict(&Frame { kind: 16, ..answer(0, &[0; 20]) }).is_none());
    }

    #[test]
    fn answer_without_a_whole_number_refuses_nothing() {
        for length in 0..4 {
            assert!(errno(&[0xff; 4][..length]).is_ok(), "{length} bytes");
        }
        assert_eq!(errno(&i32::MIN.to_ne_bytes()).map_err(|e| e.raw_os_error()), Err(Some(i32::MAX)));
    }

    proptest! {
        #[test]
        fn any_bytes_may_be_an_answer(flags in any::<u16>(), body in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = verdict(&answer(flags, &body));
        }
    }
}
