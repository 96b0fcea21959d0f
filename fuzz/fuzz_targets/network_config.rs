//! The network config: whatever is accepted can be cut into subnets.

#![no_main]

use fabric_core::lease::alloc::{Taken, choose};
use fabric_core::network::NetworkConfig;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(config) = NetworkConfig::decode(data) else { return };
    for space in config.spaces.values() {
        let first = choose(space, &Taken::default(), None, 0).expect("an accepted space has a subnet");
        assert!(space.admits(first) && space.network.covers(first));
    }
});
