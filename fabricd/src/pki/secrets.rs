//! Certificates in Secrets of Kubernetes, each written as a whole and only where there is none: of two Jobs that run at
//! once, the second one keeps what the first one made.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Client, Error};
use serde_json::json;

use super::authority::CertifiedKey;
use super::issue::{Item, Place};

const CA: &str = "ca.crt";
const CA_KEY: &str = "ca.key";
const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";

/// The Secrets `PREFIX-ca`, `PREFIX-ca-key`, `PREFIX-server` and `PREFIX-client` of one namespace.
pub struct Secrets {
    secrets: Api<Secret>,
    namespace: String,
    prefix: String,
}

impl Secrets {
    /// Those of a namespace.
    pub fn new(client: Client, namespace: &str, prefix: &str) -> Self {
        Self { secrets: Api::namespaced(client, namespace), namespace: namespace.into(), prefix: prefix.into() }
    }

    fn secret(&self, item: Item) -> String {
        let kind = match item {
            Item::Authority => "ca-key",
            Item::Server => "server",
            Item::Client => "client",
            Item::Node => "node",
        };
        format!("{}-{kind}", self.prefix)
    }

    /// False when there is one of that name.
    async fn put(&self, name: &str, kind: &str, data: BTreeMap<String, ByteString>) -> Result<bool> {
        let secret = Secret {
            metadata: ObjectMeta { name: Some(name.into()), ..ObjectMeta::default() },
            type_: Some(kind.into()),
            data: Some(data),
            ..Secret::default()
        };
        match self.secrets.create(&PostParams::default(), &secret).await {
            Ok(_) => Ok(true),
            Err(Error::Api(status)) if status.is_already_exists() => Ok(false),
            Err(error) => Err(error).with_context(|| self.failed("create", name)),
        }
    }

    async fn get(&self, name: &str) -> Result<Option<BTreeMap<String, ByteString>>> {
        let secret = self.secrets.get_opt(name).await.with_context(|| self.failed("read", name))?;
        Ok(secret.map(|secret| secret.data.unwrap_or_default()))
    }

    fn member(&self, name: &str, data: &BTreeMap<String, ByteString>, member: &str) -> Result<String> {
        let text = data.get(member).and_then(|bytes| String::from_utf8(bytes.0.clone()).ok());
        text.with_context(|| format!("the Secret {}/{name} has no {member} in PEM", self.namespace))
    }

    fn failed(&self, verb: &str, name: &str) -> String {
        format!("cannot {verb} the Secret {}/{name}", self.namespace)
    }
}

/// What a Secret of an item holds.
fn data(item: Item, pair: &CertifiedKey, ca: &str) -> BTreeMap<String, ByteString> {
    let members: &[(&str, &str)] = match item {
        Item::Authority => &[(CA, &pair.certificate), (CA_KEY, &pair.key)],
        _ => &[(CERTIFICATE, &pair.certificate), (KEY, &pair.key), (CA, ca)],
    };
    members.iter().map(|(name, pem)| ((*name).to_owned(), ByteString(pem.as_bytes().to_vec()))).collect()
}

impl Place for Secrets {
    fn name(&self, item: Item) -> String {
        format!("Secret {}/{}", self.namespace, self.secret(item))
    }

    fn flags(&self) -> String {
        format!("--namespace {} --secret-prefix {}", self.namespace, self.prefix)
    }

    async fn read(&self, item: Item) -> Result<Option<CertifiedKey>> {
        let name = self.secret(item);
        let Some(data) = self.get(&name).await? else { return Ok(None) };
        let (certificate, key) = match item {
            Item::Authority => (CA, CA_KEY),
            _ => (CERTIFICATE, KEY),
        };
        let certificate = self.member(&name, &data, certificate)?;
        Ok(Some(CertifiedKey { certificate, key: self.member(&name, &data, key)? }))
    }

    async fn create(&self, item: Item, pair: &CertifiedKey, ca: &str) -> Result<bool> {
        let kind = match item {
            Item::Authority => "Opaque",
            _ => "kubernetes.io/tls",
        };
        self.put(&self.secret(item), kind, data(item, pair, ca)).await
    }

    async fn replace(&self, item: Item, pair: &CertifiedKey, ca: &str) -> Result<()> {
        let name = self.secret(item);
        let change = Patch::Merge(json!({ "data": data(item, pair, ca) }));
        let patched = self.secrets.patch(&name, &PatchParams::default(), &change).await;
        patched.map(drop).with_context(|| self.failed("change", &name))
    }

    /// `PREFIX-ca`, which may be shown to anybody.
    async fn publish(&self, ca: &str) -> Result<()> {
        let name = format!("{}-ca", self.prefix);
        let data = BTreeMap::from([(CA.to_owned(), ByteString(ca.as_bytes().to_vec()))]);
        if self.put(&name, "Opaque", data).await? {
            return Ok(());
        }
        let there = self.get(&name).await?.unwrap_or_default();
        ensure!(
            self.member(&name, &there, CA)? == ca,
            "the Secret {}/{name} holds another authority than {}; remove the one that is wrong",
            self.namespace,
            self.name(Item::Authority)
        );
        Ok(())
    }
}
