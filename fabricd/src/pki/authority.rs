//! The certificates themselves (X.509): ECDSA with P-256, which every etcd and every TLS library speaks.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use fabric_core::model::NodeName;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use time::{Duration, OffsetDateTime};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;

/// The authority itself outlives what it signs.
const AUTHORITY_DAYS: i64 = 36_500;

/// Machines whose clocks are behind take a new certificate all the same.
const CLOCK_SKEW: Duration = Duration::hours(1);

/// In every server certificate: `etcdctl` and probes come by these.
const LOCAL: [&str; 3] = ["127.0.0.1", "::1", "localhost"];

/// A certificate and its key, in PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertifiedKey {
    /// The certificate.
    pub certificate: String,
    /// The private key.
    pub key: String,
}

/// Who a certificate is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// etcd's members, at these addresses (in their shortest spelling) and names: towards clients, and among each other, where they are clients too.
    Server(Vec<String>),
    /// fabricd. Its name is also that of its user in etcd.
    Client,
    /// The daemon of this node, towards those of other nodes: it answers them, and asks them.
    Node(NodeName),
}

impl Subject {
    /// The addresses and names that it is known by.
    fn names(&self) -> Vec<&str> {
        match self {
            Self::Server(addresses) => LOCAL.into_iter().chain(addresses.iter().map(String::as_str)).collect(),
            Self::Client => vec![],
            Self::Node(name) => vec![name.as_str()],
        }
    }

    fn common_name(&self) -> &str {
        match self {
            Self::Server(_) => "fabric-etcd",
            Self::Client => "fabricd",
            Self::Node(name) => name.as_str(),
        }
    }
}

/// Somebody who signs certificates.
pub struct Authority {
    pair: CertifiedKey,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// A new one of this name.
    ///
    /// # Errors
    /// When the machine has no randomness.
    pub fn create(name: &str) -> Result<CertifiedKey> {
        let mut wanted = lasting(AUTHORITY_DAYS);
        wanted.distinguished_name.push(DnType::CommonName, name);
        wanted.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        wanted.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        Ok(CertifiedKey { certificate: wanted.self_signed(&key)?.pem(), key: key.serialize_pem() })
    }

    /// The one with this certificate and key.
    ///
    /// # Errors
    /// When they can't be read.
    pub fn open(pair: CertifiedKey) -> Result<Self> {
        let key = KeyPair::from_pem(&pair.key).context("cannot read the authority's key")?;
        let issuer =
            Issuer::from_ca_cert_pem(&pair.certificate, key).context("cannot read the authority's certificate")?;
        Ok(Self { pair, issuer })
    }

    /// Its certificate, in PEM: who trusts it trusts what it signed.
    #[must_use]
    pub fn certificate(&self) -> &str {
        &self.pair.certificate
    }

    /// A certificate with a key of its own.
    ///
    /// # Errors
    /// When a name is no ASCII.
    pub fn sign(&self, subject: &Subject, days: u32) -> Result<CertifiedKey> {
        let mut wanted = lasting(days.into());
        wanted.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        wanted.use_authority_key_identifier_extension = true;
        let both = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        wanted.extended_key_usages = match subject {
            Subject::Server(_) | Subject::Node(_) => both.into(),
            Subject::Client => vec![ExtendedKeyUsagePurpose::ClientAuth],
        };
        wanted.subject_alt_names = alternatives(&subject.names())?;
        wanted.distinguished_name.push(DnType::CommonName, subject.common_name());
        let key = KeyPair::generate()?;
        Ok(CertifiedKey { certificate: wanted.signed_by(&key, &self.issuer)?.pem(), key: key.serialize_pem() })
    }

    /// Why a certificate can't serve this subject: another signed it, or it lacks an address.
    ///
    /// # Errors
    /// When one of the certificates can't be read.
    pub fn objection(&self, subject: &Subject, certificate: &str) -> Result<Option<String>> {
        let (certificate, authority) = (Document::read(certificate)?, Document::read(&self.pair.certificate)?);
        let (certificate, authority) = (certificate.parse()?, authority.parse()?);
        if certificate.verify_signature(Some(authority.public_key())).is_err() {
            return Ok(Some("it is signed by another authority".to_owned()));
        }
        let has = named(&certificate)?;
        let mut lacks = subject.names();
        lacks.retain(|name| !has.iter().any(|has| has == name));
        Ok((!lacks.is_empty()).then(|| format!("it is not for {}", lacks.join(", "))))
    }
}

/// True when less than a third of a certificate's life is left.
///
/// # Errors
/// When it can't be read.
pub fn ends_soon(certificate: &str, now: OffsetDateTime) -> Result<bool> {
    let document = Document::read(certificate)?;
    let certificate = document.parse()?;
    let (begin, end) =
        (certificate.validity().not_before.to_datetime(), certificate.validity().not_after.to_datetime());
    Ok(end - now < (end - begin) / 3)
}

/// A PEM that was opened; a parsed certificate borrows from it.
struct Document(x509_parser::pem::Pem);

impl Document {
    fn read(pem: &str) -> Result<Self> {
        let (_, document) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).context("it is no PEM")?;
        Ok(Self(document))
    }

    fn parse(&self) -> Result<X509Certificate<'_>> {
        self.0.parse_x509().context("it is no certificate")
    }
}

fn lasting(days: i64) -> CertificateParams {
    let now = OffsetDateTime::now_utc();
    let mut wanted = CertificateParams::default();
    (wanted.not_before, wanted.not_after) = (now - CLOCK_SKEW, now + Duration::days(days));
    wanted.distinguished_name = rcgen::DistinguishedName::new();
    wanted
}

fn alternatives(names: &[&str]) -> Result<Vec<SanType>> {
    let alternative = |address: &str| match address.parse() {
        Ok(ip) => Ok(SanType::IpAddress(ip)),
        Err(_) => Ok(SanType::DnsName(address.try_into()?)),
    };
    names.iter().copied().map(alternative).collect()
}

/// The addresses and names that a certificate is for, as a person writes them.
fn named(certificate: &X509Certificate<'_>) -> Result<Vec<String>> {
    let Some(names) = certificate.subject_alternative_name()? else { return Ok(vec![]) };
    let text = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => address(bytes).map(|ip| ip.to_string()),
        _ => None,
    };
    Ok(names.value.general_names.iter().filter_map(text).collect())
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}
