//! Names of our VXLAN devices, and which of them is to be used.
//!
//! VNI, port and group policy of a device can't change. So that traffic goes on while its successor is built, there are
//! two names for each VNI, and the successor has the one that is free.

use std::collections::BTreeMap;

use crate::model::{Family, IfName, Vni};
use crate::state::{ForeignLink, VxlanLink};

/// The names that our device of one VNI may have, the usual one first: `fabric.1` and `fab.1`, `fabric6.1` and `fab6.1`.
///
/// An interface's name has at most 15 bytes: of the largest VNIs IPv6 devices have only the short one.
pub fn names(family: Family, vni: Vni) -> impl Iterator<Item = IfName> {
    let stems = match family {
        Family::V4 => ["fabric", "fab"],
        Family::V6 => ["fabric6", "fab6"],
    };
    stems.into_iter().filter_map(move |stem| format!("{stem}.{vni}").parse().ok())
}

/// Whether a VXLAN device is ours: it has one of our names, with its own VNI, be it as an alternative name (`ip link property
/// add dev DEV altname NAME`): so a takeover from flannel marks the device where the kernel can't rename it.
#[must_use]
pub fn is_ours(name: &IfName, vni: Vni) -> bool {
    Family::ALL.into_iter().any(|family| names(family, vni).any(|ours| ours == *name))
}

/// The name for a device that is to be like `want`: that of one which is so or can become so; else a free one, so that
/// the two stand side by side. The kernel refuses two with one VNI, port and underlay family: then there is no way but
/// to make it anew in its place.
///
/// # Panics
/// Never: each VNI has a short name.
#[must_use]
pub fn choose(
    family: Family,
    want: &VxlanLink,
    have: &BTreeMap<IfName, VxlanLink>,
    foreign: &BTreeMap<IfName, ForeignLink>,
) -> IfName {
    let usual = names(family, want.vni).next().expect("4 bytes and 8 digits fit");
    let place = |link: &VxlanLink| (link.vni, link.port, Family::of(link.local));
    let stands = |name: &IfName| have.get(name).is_some_and(|link| link.can_become(want));
    if let Some(name) = names(family, want.vni).find(stands) {
        return name;
    }
    let is_marked = |(name, link): &(&IfName, &VxlanLink)| {
        (link.vni, Family::of(link.local)) == (want.vni, family) && !is_ours(name, link.vni)
    };
    // One that only has our name as an alternative one: nothing else can have that name.
    let marked = have.iter().find(is_marked);
    if let Some((name, link)) = marked
        && place(link) == place(want)
    {
        return *name;
    }
    let is_taken = |name: &IfName| have.contains_key(name) || foreign.contains_key(name);
    let free = |name: &IfName| !is_taken(name) && (marked.is_none() || *name != usual);
    let beside = marked.is_some() || have.get(&usual).is_some_and(|link| place(link) != place(want));
    names(family, want.vni).find(|name| beside && free(name)).unwrap_or(usual)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(port: u16) -> VxlanLink {
        VxlanLink {
            vni: Vni::try_from(1).expect("valid"),
            port,
            gbp: false,
            mac: "02:42:c0:00:02:01".parse().expect("valid"),
            local: "192.0.2.1".parse().expect("valid"),
            mtu: 1450,
            learning: false,
            up: true,
        }
    }

    fn chosen(want: &VxlanLink, have: &[(&str, VxlanLink)], foreign: &[&str]) -> String {
        let name = |text: &str| text.parse().expect("valid");
        let have = have.iter().map(|(of, link)| (name(of), *link)).collect();
        let other = ForeignLink { kind: "dummy".into(), vxlan: None };
        let foreign = foreign.iter().map(|of| (name(of), other.clone())).collect();
        choose(Family::V4, want, &have, &foreign).to_string()
    }

    #[test]
    fn successor_with_another_port_has_the_other_name_and_keeps_it() {
        let (old, new) = (link(8472), link(4789));
        assert_eq!(chosen(&old, &[], &[]), "fabric.1");
        assert_eq!(chosen(&old, &[("fabric.1", old)], &[]), "fabric.1");
        assert_eq!(chosen(&new, &[("fabric.1", old)], &[]), "fab.1");
        assert_eq!(chosen(&new, &[("fabric.1", old), ("fab.1", new)], &[]), "fab.1");
        assert_eq!(chosen(&new, &[("fab.1", new)], &[]), "fab.1");
        assert_eq!(chosen(&old, &[("fab.1", new)], &[]), "fabric.1");
    }

    #[test]
    fn where_no_second_one_can_stand_it_is_made_anew_in_its_place() {
        let (old, gbp) = (link(8472), VxlanLink { gbp: true, ..link(8472) });
        assert_eq!(chosen(&gbp, &[("fabric.1", old)], &[]), "fabric.1");
        assert_eq!(chosen(&link(4789), &[("fabric.1", old)], &["fab.1"]), "fabric.1");
    }

    #[test]
    fn device_with_our_name_as_its_alternative_one_is_kept_and_its_successor_has_the_other_name() {
        let (old, new) = (link(8472), link(4789));
        assert_eq!(chosen(&old, &[("flannel.1", old)], &[]), "flannel.1");
        assert_eq!(chosen(&new, &[("flannel.1", old)], &[]), "fab.1");
        assert_eq!(chosen(&new, &[("fab.1", new), ("flannel.1", old)], &[]), "fab.1");
        assert_eq!(chosen(&VxlanLink { gbp: true, ..old }, &[("flannel.1", old)], &[]), "flannel.1", "made anew");
        let other = VxlanLink { vni: Vni::try_from(2).expect("valid"), ..old };
        assert_eq!(chosen(&old, &[("flannel.2", other)], &[]), "fabric.1");
    }

    #[test]
    fn every_vni_has_a_name_in_both_families() {
        let names = |family, vni: u32| {
            names(family, Vni::try_from(vni).expect("valid")).map(|name| name.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(names(Family::V4, 16_777_215), ["fabric.16777215", "fab.16777215"]);
        assert_eq!(names(Family::V6, 9_999_999), ["fabric6.9999999", "fab6.9999999"]);
        assert_eq!(names(Family::V6, 16_777_215), ["fab6.16777215"]);
    }
}
