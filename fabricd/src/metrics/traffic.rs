//! What our VXLAN devices have carried, by the kernel's own counters: `ip -s link show fabric.1`. They begin anew with the
//! device.

use std::fs;
use std::sync::atomic::Ordering;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::{Registry, Unit};

use crate::status::counters::LabelValue;
use crate::status::view::View;

/// The table of `/proc/net/dev`, of this process' network namespace: it needs no sysfs.
const TABLE: &str = "/proc/self/net/dev";

/// Received and transmitted, by device.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    received: Direction,
    transmitted: Direction,
}

#[derive(Debug, Default)]
struct Direction {
    bytes: Family<Device, Counter>,
    packets: Family<Device, Counter>,
    errors: Family<Device, Counter>,
    dropped: Family<Device, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Device {
    device: LabelValue,
}

impl Traffic {
    pub(super) fn register(&self, all: &mut Registry) {
        for (name, verb, direction) in
            [("receive", "received", &self.received), ("transmit", "transmitted", &self.transmitted)]
        {
            let help = format!("Bytes {verb} by the VXLAN device, inner Ethernet frames");
            all.register_with_unit(format!("device_{name}"), help, Unit::Bytes, direction.bytes.clone());
            let help = format!("Packets {verb} by the VXLAN device");
            all.register(format!("device_{name}_packets"), help, direction.packets.clone());
            let help = format!("Packets that the VXLAN device has not {verb} because of an error");
            all.register(format!("device_{name}_errors"), help, direction.errors.clone());
            let help = format!("Packets that the VXLAN device has dropped instead of having them {verb}");
            all.register(format!("device_{name}_dropped_packets"), help, direction.dropped.clone());
        }
    }

    /// Reads the counters of the devices that the view has.
    pub(super) fn show(&self, view: &View) {
        let table = fs::read_to_string(TABLE).unwrap_or_default();
        self.received.forget();
        self.transmitted.forget();
        for vtep in &view.vteps {
            let Some(counters) = counters(&table, vtep.device.as_str()) else { continue };
            // Of each direction bytes, packets, errs and drop come first, of eight numbers.
            self.received.show(vtep.device.as_str(), &counters[..4]);
            self.transmitted.show(vtep.device.as_str(), &counters[8..12]);
        }
    }
}

impl Direction {
    fn forget(&self) {
        for family in [&self.bytes, &self.packets, &self.errors, &self.dropped] {
            family.clear();
        }
    }

    fn show(&self, device: &str, counters: &[u64]) {
        for (family, count) in [&self.bytes, &self.packets, &self.errors, &self.dropped].into_iter().zip(counters) {
            let device = Device { device: LabelValue(device.to_owned()) };
            family.get_or_create(&device).inner().store(*count, Ordering::Relaxed);
        }
    }
}

/// The sixteen numbers of a device.
fn counters(table: &str, device: &str) -> Option<[u64; 16]> {
    let (_, numbers) = table.lines().filter_map(|line| line.split_once(':')).find(|(name, _)| name.trim() == device)?;
    let numbers: Vec<u64> = numbers.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
    numbers.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_found_by_its_whole_name() {
        let table = "Inter-|   Receive                            |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
fabric.12:  9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9
  fabric.1: 1000      10    1    2    0     0          0         0     2000      20    3    4    0     0       0          0
";
        let found = counters(table, "fabric.1").expect("there");
        assert_eq!((&found[..4], &found[8..12]), (&[1000, 10, 1, 2][..], &[2000, 20, 3, 4][..]));
        assert_eq!(counters(table, "fabric"), None);
        assert_eq!(counters("fabric.1: 1 2", "fabric.1"), None);
    }
}
