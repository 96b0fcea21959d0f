//! [`HoldDown`]: the underlay address stays while it is away for a moment.
//!
//! When an interface loses its carrier, or networkd restarts, its addresses go and come back, and meanwhile a virtual
//! address (keepalived, kube-vip) may be the only one there. To move to it would send every peer's packets to whichever
//! node has it next.

use std::net::IpAddr;
use std::time::Duration;

use fabric_core::model::{Family, PerFamily, Subnet};
use tokio::time::Instant;

use super::{AddressRank, Choice, Host, Selector, Underlay, UnderlayError, choose, holds, is_host};

/// How long an address that went may take to come back before one takes its place that may not last either.
const GRACE: Duration = Duration::from_secs(30);

/// What was chosen last.
#[derive(Debug, Default)]
pub struct HoldDown {
    used: PerFamily<Used>,
    /// Since when the address in use is away.
    away: PerFamily<Instant>,
}

#[derive(Clone, Debug)]
struct Used {
    underlay: Underlay,
    prefix: Subnet,
}

impl HoldDown {
    /// Chooses as [`choose`], but keeps the address of before for as long as only virtual ones are there in its place, and
    /// for a grace period of 30 s when what is there is passing, or when it can't be told (after a start) whether it is
    /// virtual. `lease` is the address that peers send to, `device` the one that the VXLAN device sends from.
    ///
    /// # Errors
    /// [`UnderlayError`], also for as long as the address in use is awaited.
    pub fn choose(
        &mut self,
        selectors: &[Selector],
        host: &Host,
        family: Family,
        lease: Option<IpAddr>,
        device: Option<IpAddr>,
    ) -> Result<Underlay, UnderlayError> {
        let used = self.used.get(family).cloned();
        let in_use: Vec<IpAddr> =
            [lease, device, used.as_ref().map(|used| used.underlay.local)].into_iter().flatten().collect();
        let choice = choose(selectors, host, family, &in_use)?;
        match self.awaited(&choice, family, &in_use, used.as_ref()) {
            Some(error) => Err(error),
            None => {
                *self.away.slot(family) = None;
                *self.used.slot(family) = Some(Used { underlay: choice.underlay.clone(), prefix: choice.prefix });
                Ok(choice.underlay)
            }
        }
    }

    /// Why the address in use is awaited instead of taking this one.
    fn awaited(
        &mut self,
        choice: &Choice,
        family: Family,
        in_use: &[IpAddr],
        used: Option<&Used>,
    ) -> Option<UnderlayError> {
        let (dev, left) = (choice.underlay.dev, choice.underlay.local);
        let gone = match used {
            // Another interface, by a selector or the default route, is another choice.
            Some(used) if used.underlay.dev != dev => return None,
            Some(used) => used.underlay.local,
            None => *in_use.first()?,
        };
        if choice.named || in_use.contains(&left) {
            return None;
        }
        // Of host length, in the prefix that went with the address in use.
        let around = used.map(|used| used.prefix).filter(|prefix| holds(*prefix, left));
        if let Some(within) = around.filter(|_| is_host(choice.prefix)) {
            return Some(UnderlayError::OnlyVirtual { dev, gone, left, within });
        }
        let unsure = used.is_none() && is_host(choice.prefix);
        if choice.rank == AddressRank::Lasting && !unsure {
            return None;
        }
        let since = *self.away.slot(family).get_or_insert_with(Instant::now);
        let error = UnderlayError::Away { dev, gone, left, seconds: GRACE.as_secs() };
        (since.elapsed() < GRACE).then_some(error)
    }
}
