//! What comes out of a netlink socket: frames, and attributes within attributes.
#![no_main]

use fabric_netlink::{attributes, frames};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|datagram: &[u8]| {
    for frame in frames(datagram) {
        for (_, value) in attributes(frame.body) {
            assert!(attributes(value).map(|(_, inner)| 4 + inner.len()).sum::<usize>() <= value.len());
        }
    }
});
