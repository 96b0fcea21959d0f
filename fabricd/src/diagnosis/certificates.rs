//! When a certificate ends.

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// The end of the validity of the first certificate in a PEM file, in seconds since 1970; the earliest of a chain. `None`
/// when there is no certificate, or one that can't be read.
#[must_use]
pub fn not_after(pem: &str) -> Option<i64> {
    let all = CertificateDer::pem_slice_iter(pem.as_bytes());
    all.map(|der| ends(&der.ok()?)).collect::<Option<Vec<i64>>>()?.into_iter().min()
}

fn ends(der: &[u8]) -> Option<i64> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    Some(certificate.validity().not_after.timestamp())
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    use super::*;

    /// A certificate that ends with the beginning of that day, and its key.
    fn until(year: i32, month: u8, day: u8) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut wanted = CertificateParams::default();
        (wanted.not_before, wanted.not_after) = (date_time_ymd(1970, 1, 1), date_time_ymd(year, month, day));
        (wanted.self_signed(&key).unwrap().pem(), key.serialize_pem())
    }

    /// X.509 writes a year before 2050 with two digits (UTCTime), later ones with four (RFC 5280 section 4.1.2.5).
    #[test]
    fn the_end_is_told_on_both_sides_of_2050() {
        for ((year, month, day), want) in
            [((2000, 2, 29), 951_782_400), ((2049, 12, 31), 2_524_521_600), ((2050, 1, 1), 2_524_608_000)]
        {
            assert_eq!(not_after(&until(year, month, day).0), Some(want), "{year}-{month}-{day}");
        }
    }

    #[test]
    fn of_a_chain_the_earliest_end_counts_and_keys_are_passed_over() {
        let ((first, key), (second, _)) = (until(2040, 1, 1), until(2030, 1, 1));
        assert_eq!(not_after(&format!("{key}{first}{second}")), Some(1_893_456_000));
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
