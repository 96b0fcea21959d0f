//! `node.json`, which the CNI plugin reads.

#![no_main]

use fabric_core::handoff::NodeFile;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(file) = NodeFile::decode(data) {
        assert_eq!(NodeFile::decode(&file.encode()).expect("what we write can be read"), file);
    }
});
