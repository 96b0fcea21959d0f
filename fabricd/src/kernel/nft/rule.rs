//! A rule in a message: its expressions, and its comment, by which ours are known.

use fabric_core::state::nft::Rule;

use super::attributes::{Attributes, Values};
use super::expr::expressions;

/// What a rule says, behind where it is.
pub(super) fn with_rule(place: Attributes, rule: &Rule) -> Attributes {
    let comment = [rule.comment().as_bytes(), &[0]].concat();
    // A list of type, length and value of its own: NFTNL_UDATA_RULE_COMMENT is 0.
    let length = u8::try_from(comment.len()).expect("a comment is a few words");
    let userdata = [&[0, length], comment.as_slice()].concat();
    // NFTA_RULE_EXPRESSIONS, NFTA_RULE_USERDATA
    place.nested(4, |list| expressions(list, rule)).bytes(7, &userdata)
}

/// A rule's comment.
pub(in crate::kernel) fn comment<'a>(values: &Values<'a>) -> Option<&'a str> {
    // NFTA_RULE_USERDATA, of which type 0 is the comment: type, length, text and a zero.
    match values.bytes(7) {
        Some([0, length, text @ ..]) => {
            std::str::from_utf8(text.get(..usize::from(*length))?).ok().map(|text| text.trim_end_matches('\0'))
        }
        _ => None,
    }
}
