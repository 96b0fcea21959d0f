//! Writes of the fast path, and what its paths follow from.

use std::collections::BTreeMap;
use std::net::IpAddr;

use fabric_core::diff::{Change, fast_path};
use fabric_core::state::fast_path::UnderlayPath;

use super::Tables;

impl Tables {
    /// One write of the fast path, as the kernel takes it: maps before what is in them and before programs, programs before
    /// links, and these at interfaces that are there.
    pub(super) fn write_fast_path(&mut self, op: &fast_path::Op) -> Result<(), i32> {
        use fast_path::Op;
        let has = |there: bool, errno| if there { Ok(()) } else { Err(errno) };
        match op {
            Op::Former | Op::Maps(_) | Op::Program(Change::Delete(_)) | Op::Link(_, Change::Delete(_)) => {}
            Op::Link(place, Change::Create(program) | Change::Replace { now: program, .. }) => {
                has(self.fast_path.programs.contains(program), libc::ENOENT)?;
                has(self.links.values().any(|link| link.index == place.ifindex), libc::ENODEV)?;
            }
            Op::Peer(..) | Op::Index(..) | Op::Address(..) => has(self.fast_path.node.is_some(), libc::EINVAL)?,
            Op::Node(_) | Op::Pod(..) | Op::Seed(_) | Op::Program(_) => {
                has(self.fast_path.maps.is_some(), libc::EINVAL)?;
            }
        }
        op.apply_to(&mut self.fast_path);
        Ok(())
    }

    /// The way to each underlay address: over the interface that has its prefix.
    pub(super) fn paths(&self) -> BTreeMap<IpAddr, UnderlayPath> {
        let path = |ip: &IpAddr| {
            let (dev, ..) = self.addresses.iter().find(|(_, _, prefix)| prefix.contains(*ip))?;
            Some((*ip, UnderlayPath { ifindex: self.links.get(dev)?.index, gateway: *ip }))
        };
        self.fdb.values().filter_map(path).collect()
    }
}
