//! What `--cleanup` does about the lease: it is given back, as long as it is this machine's to give. A record in this node's
//! name that another machine wrote stays: that one may live.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::inquiry::{Inquiry, Party};
use fabric_core::lease::{Expect, Place, QUICK};
use fabric_core::leases::{Lease, LeaseSet};
use fabric_core::model::NodeName;
use fabric_core::record::{Instance, LeaseKey};
use tokio::time::timeout;

use super::Remembered;
use crate::store::{Claim, LeaseStore};

/// The machine that is cleaned up.
#[derive(Clone, Debug)]
pub struct DepartingNode {
    /// Its name as a node.
    pub node: NodeName,
    /// This boot of it.
    pub instance: Instance,
    /// All addresses that it has or publishes.
    pub addresses: Vec<IpAddr>,
    /// What its disk remembers.
    pub remembered: Option<Remembered>,
    /// Time to live of its leases.
    pub ttl: Duration,
}

/// What became of the lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GivenBack {
    /// It is free.
    Released(LeaseKey),
    /// There was none.
    Nothing,
    /// It is another machine's, or may be.
    Anothers(LeaseKey, Place),
}

impl DepartingNode {
    /// Gives the lease back.
    ///
    /// # Errors
    /// What the store says, and [`anyhow`]'s when it has gone.
    pub async fn give_back(&self, store: &impl LeaseStore) -> anyhow::Result<GivenBack> {
        let mut leases = store.leases();
        let leases: Arc<LeaseSet> = leases.wait_for(Option::is_some).await?.clone().expect("waited for");
        let Some(lease) = leases.of_node(&self.node).or_else(|| leases.iter().find(|lease| self.wrote(lease))) else {
            return Ok(GivenBack::Nothing);
        };
        // Where the cluster assigns the subnets it is the Node's, whoever asks.
        if store.assigned().is_none()
            && let Some(other) = self.anothers(store, lease).await?
        {
            return Ok(GivenBack::Anothers(lease.key, other));
        }
        let claim = Claim {
            node: self.node.clone(),
            key: lease.key,
            record: lease.record.clone(),
            expect: Expect::Revision(lease.mod_revision),
            seen_revision: leases.revision(),
            outdated: false,
            evict: vec![],
            formerly: lease.record.node().filter(|node| **node != self.node).cloned(),
            ttl: self.ttl,
            lease_id: fastrand::i64(1..),
        };
        let grant = store.claim(&claim).await?;
        store.release(&grant).await?;
        Ok(GivenBack::Released(lease.key))
    }

    /// The machine that has the record, unless that is surely this one.
    async fn anothers(&self, store: &impl LeaseStore, lease: &Lease) -> anyhow::Result<Option<Place>> {
        let Some(owner) = lease.record.owner.as_ref().filter(|_| !lease.record.is_placeholder()) else {
            return Ok(None);
        };
        if self.wrote(lease) {
            return Ok(None);
        }
        let addresses = lease.record.endpoints().values().map(|e| e.public_ip).collect();
        let there = Place { addresses, boot: owner.boot.clone(), since: None };
        let mark = self.remembered.as_ref().and_then(|before| before.mark);
        let remembers = mark.is_some_and(|mark| mark.mod_revision == lease.mod_revision);
        if !remembers && !self.has_address_of(lease) {
            return Ok(Some(there));
        }
        let by = Party { instance: self.instance.clone(), addresses: self.addresses.clone(), since: 0 };
        let inquiry = Inquiry { number: fastrand::u64(1..), by, answer: None };
        let Some(mut inquiries) = store.inquiries() else { return Ok(None) };
        store.inquire(&owner.node, &inquiry).await?;
        let answer = |asked: &crate::store::Inquired| {
            let heard = asked.get(&owner.node).filter(|heard| heard.number == inquiry.number)?;
            heard.answer.as_ref().map(Place::from)
        };
        let heard = timeout(QUICK, inquiries.wait_for(|asked| answer(asked).is_some())).await;
        Ok(heard.ok().and_then(Result::ok).and_then(|asked| answer(&asked)))
    }

    /// True for a record that this boot of this machine wrote, under whatever name.
    fn wrote(&self, lease: &Lease) -> bool {
        let owner = lease.record.owner.as_ref().filter(|_| !lease.record.is_placeholder());
        owner.is_some_and(|owner| owner.instance() == self.instance) && self.has_address_of(lease)
    }

    fn has_address_of(&self, lease: &Lease) -> bool {
        lease.record.endpoints().values().any(|e| self.addresses.contains(&e.public_ip))
    }
}
