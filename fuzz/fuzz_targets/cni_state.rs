//! What a crash, a full disk or a stranger leaves in the files of saved attachments and of addresses.
#![no_main]

use fabric_cni::host_local::holder;
use fabric_cni::state::Saved;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|content: &[u8]| {
    if let Some(saved) = Saved::decode(content) {
        assert!(!format!("{}@{}", saved.id.container, saved.id.ifname).contains('/'));
    }
    if let Ok(text) = std::str::from_utf8(content) {
        let _ = holder(text);
    }
});
