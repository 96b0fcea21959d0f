//! What is created, kept and renewed, wherever it lies.

use anyhow::{Context as _, Result, ensure};
use time::OffsetDateTime;

use super::authority::{Authority, CertifiedKey, Subject, ends_soon};

/// One of the certificates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Item {
    /// Signs the others.
    Authority,
    /// etcd's members have it.
    Server,
    /// fabricd has it.
    Client,
    /// A node's daemon has it, towards those of other nodes.
    Node,
}

/// Where certificates are kept.
pub trait Place {
    /// What a person calls the place of an item.
    fn name(&self, item: Item) -> String;

    /// The flags of `fabricd pki` that name the place.
    fn flags(&self) -> String;

    /// What is there.
    async fn read(&self, item: Item) -> Result<Option<CertifiedKey>>;

    /// Puts it there, with the authority's certificate beside it; false when there is one by now.
    async fn create(&self, item: Item, pair: &CertifiedKey, ca: &str) -> Result<bool>;

    /// Puts it in the place of the one that is there.
    async fn replace(&self, item: Item, pair: &CertifiedKey, ca: &str) -> Result<()>;

    /// Shows the authority's certificate to those who may not see its key.
    async fn publish(&self, ca: &str) -> Result<()>;
}

/// What the certificates are to be like.
pub struct Plan {
    /// Where etcd's members are.
    pub addresses: Vec<String>,
    /// How long they last.
    pub days: u32,
}

impl Plan {
    fn subjects(&self) -> [(Item, Subject); 2] {
        [(Item::Server, Subject::Server(self.addresses.clone())), (Item::Client, Subject::Client)]
    }

    /// The command that does this for the same members, in the same place.
    fn command(&self, verb: &str, place: &impl Place) -> String {
        format!("fabricd pki {verb} --etcd-address {} {}", self.addresses.join(","), place.flags())
    }

    /// Makes what is missing.
    ///
    /// # Errors
    /// A place can't be read or written; something that is there doesn't fit, and `renew` would help.
    pub async fn init(&self, place: &impl Place) -> Result<()> {
        let authority = authority(place, "fabric-etcd-ca").await?;
        for (item, subject) in self.subjects() {
            let pair = obtain(place, item, authority.certificate(), || authority.sign(&subject, self.days)).await?;
            let objection = authority.objection(&subject, &pair.certificate);
            let objection = objection.with_context(|| format!("cannot use {}", place.name(item)))?;
            ensure!(
                objection.is_none(),
                "{} can't be used: {}; replace it with: {}",
                place.name(item),
                objection.unwrap_or_default(),
                self.command("renew", place)
            );
        }
        Ok(())
    }

    /// Renews what ends soon or doesn't fit, or all but the authority. The authority stays: who trusts it goes on.
    ///
    /// # Errors
    /// A place can't be read or written; there is nothing yet to renew.
    pub async fn renew(&self, place: &impl Place, all: bool) -> Result<()> {
        let missing =
            |item| format!("there is no {}; create it with: {}", place.name(item), self.command("init", place));
        let authority = place.read(Item::Authority).await?.with_context(|| missing(Item::Authority))?;
        let authority = Authority::open(authority)?;
        for (item, subject) in self.subjects() {
            let pair = place.read(item).await?.with_context(|| missing(item))?;
            let reason = match authority.objection(&subject, &pair.certificate)? {
                _ if all => "told to".to_owned(),
                Some(objection) => objection,
                None if ends_soon(&pair.certificate, OffsetDateTime::now_utc())? => "it ends soon".to_owned(),
                None => {
                    println!("{} is valid, unchanged", place.name(item));
                    continue;
                }
            };
            place.replace(item, &authority.sign(&subject, self.days)?, authority.certificate()).await?;
            println!("{} renewed: {reason}", place.name(item));
        }
        Ok(())
    }
}

/// The authority that is there, or else a new one of this name.
///
/// # Errors
/// The place can't be read or written, or what is there can't be used.
pub async fn authority(place: &impl Place, name: &str) -> Result<Authority> {
    let made = Authority::create(name)?;
    let authority = Authority::open(obtain(place, Item::Authority, &made.certificate, || Ok(made.clone())).await?)?;
    place.publish(authority.certificate()).await?;
    Ok(authority)
}

/// What is there, or else what is made now. Of two that make it at once, one gives way.
async fn obtain(
    place: &impl Place,
    item: Item,
    ca: &str,
    make: impl FnOnce() -> Result<CertifiedKey>,
) -> Result<CertifiedKey> {
    if let Some(pair) = place.read(item).await? {
        println!("{} exists, unchanged", place.name(item));
        return Ok(pair);
    }
    let pair = make()?;
    if place.create(item, &pair, ca).await? {
        println!("{} created", place.name(item));
        return Ok(pair);
    }
    place.read(item).await?.with_context(|| format!("{} was made and removed meanwhile", place.name(item)))
}
