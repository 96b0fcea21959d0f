//! When a certificate ends. Of X.509 no more is needed, so it is walked to that field alone (RFC 5280 section 4.1).

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

/// The end of the validity of the first certificate in a PEM file, in seconds since 1970; the earliest of a chain.
#[must_use]
pub fn not_after(pem: &str) -> Option<i64> {
    let all = CertificateDer::pem_slice_iter(pem.as_bytes());
    all.map(|der| ends(&der.ok()?)).collect::<Option<Vec<i64>>>()?.into_iter().min()
}

fn ends(der: &[u8]) -> Option<i64> {
    let (certificate, _) = value(der)?;
    let (mut fields, _) = value(certificate)?;
    // [0] version is optional; serial number, algorithm and issuer follow, then the validity.
    if fields.first() == Some(&0xa0) {
        fields = value(fields)?.1;
    }
    for _ in 0..3 {
        fields = value(fields)?.1;
    }
    let (validity, _) = value(fields)?;
    let (_, after) = value(validity)?;
    let (time, _) = value(after)?;
    seconds(std::str::from_utf8(time).ok()?)
}

/// The value of the first element, and what follows it.
fn value(der: &[u8]) -> Option<(&[u8], &[u8])> {
    let (&first, mut rest) = der.get(1..)?.split_first()?;
    let mut length = usize::from(first);
    if first & 0x80 != 0 {
        let (bytes, after) = rest.split_at_checked(usize::from(first & 0x7f))?;
        (length, rest) =
            (bytes.iter().try_fold(0_usize, |sum, byte| Some(sum.checked_mul(256)? + usize::from(*byte)))?, after);
    }
    rest.split_at_checked(length)
}

/// UTCTime (`YYMMDDHHMMSSZ`, 1950 to 2049) or GeneralizedTime (`YYYYMMDDHHMMSSZ`).
fn seconds(time: &str) -> Option<i64> {
    let (year, rest) = match time.len() {
        13 => {
            let short: i64 = time.get(..2)?.parse().ok()?;
            (if short < 50 { 2000 + short } else { 1900 + short }, time.get(2..)?)
        }
        15 => (time.get(..4)?.parse().ok()?, time.get(4..)?),
        _ => return None,
    };
    let part = |at: usize| rest.get(at..at + 2)?.parse::<i64>().ok();
    let (month, day) = (part(0)?, part(2)?);
    // Days since 1970 of the proleptic Gregorian calendar, the year begun in March.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + (153 * month + 2) / 5 + day - 1 - 719_468;
    Some(days * 86_400 + part(4)? * 3600 + part(6)? * 60 + part(8)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_counted_from_1970() {
        for (text, want) in [
            ("700101000000Z", 0),
            ("000229120000Z", 951_825_600),
            ("20380119031408Z", 2_147_483_648),
            ("491231235959Z", 2_524_607_999),
        ] {
            assert_eq!(seconds(text), Some(want), "{text}");
        }
        assert_eq!(seconds("nonsense12345"), None);
    }

    #[test]
    fn what_is_no_certificate_is_none() {
        assert_eq!(not_after(""), None);
        assert_eq!(not_after("-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"), None);
        for length in 0..8 {
            assert_eq!(ends(&[0x30, 0x84, 0xff, 0xff, 0xff, 0xff, 0, 0][..length]), None);
        }
    }
}
