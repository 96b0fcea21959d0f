//! A lease as it may stand in the store: the key's last part, a line feed, the value. The value may be a question about a
//! node's name as well.

#![no_main]

use fabric_core::inquiry::Inquiry;
use fabric_core::record::{LeaseKey, Record};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut parts = data.splitn(2, |byte| *byte == b'\n');
    let (Some(key), Some(value)) = (parts.next(), parts.next()) else { return };
    if let Some(inquiry) = Inquiry::decode(value) {
        assert_eq!(Inquiry::decode(&inquiry.encode()), Some(inquiry));
    }
    let Ok(key) = LeaseKey::decode(&String::from_utf8_lossy(key)) else { return };
    assert_eq!(LeaseKey::decode(&key.encode()), Ok(key));
    if let Ok(record) = Record::decode(&key, value) {
        assert_eq!(Record::decode(&key, &record.encode()), Ok(record));
    }
});
