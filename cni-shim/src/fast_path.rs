//! A pod that goes is taken out of the fast path, whether the daemon runs or not: its eBPF programs go on without it, and
//! would send what is for the next pod of this address to the port of this one.

use std::io::{Error, ErrorKind, Result as IoResult};
use std::net::IpAddr;
use std::path::Path;

use fabric_bpf::abi;
use fabric_ebpf::Map;
use zerocopy::FromBytes;

use crate::error::{CniError, Code};

/// Where eBPF's file system is.
pub const BPFFS: &str = "/sys/fs/bpf";

/// Clears these addresses in the daemon's map of pods, if there is one.
///
/// # Errors
/// The map is there and can't be written: then the address must not be given to another pod yet.
pub fn forget(bpffs: &Path, ips: &[IpAddr]) -> Result<(), CniError> {
    let maps = bpffs.join("fabric").join(abi::LAYOUT.to_string()).join("maps");
    clear(&maps, ips).map_err(|error| {
        let what = format!("cannot take the pod's address out of the fast path ({}): {error}", maps.display());
        CniError::new(Code::Io, what)
    })
}

fn clear(maps: &Path, ips: &[IpAddr]) -> IoResult<()> {
    let open = |map: abi::Map| match Map::open(&maps.join(map.name())) {
        Ok(found) if found.shape().value_size as usize == map.value_size() => Ok(Some(found)),
        Ok(_) => Err(Error::other(format!("{} has another layout", map.name()))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    };
    let maps = (open(abi::Map::Config)?, open(abi::Map::PodIndex4)?, open(abi::Map::PodIndex6)?);
    let (Some(config), Some(index4), Some(index6)) = maps else { return Ok(()) };
    let config = config.get(&0_u32.to_ne_bytes())?.unwrap_or_default();
    let Ok(abi::Config { own4, own4_mask, .. }) = abi::Config::read_from_bytes(&config) else { return Ok(()) };
    for ip in ips {
        match ip {
            IpAddr::V4(ip) if ip.to_bits() & own4_mask == own4 && own4_mask != 0 => {
                let number = ip.to_bits() - own4;
                index4.set(&number.to_ne_bytes(), &0_u32.to_ne_bytes())?;
            }
            IpAddr::V4(_) => {}
            IpAddr::V6(ip) => drop(index6.remove(&ip.octets())?),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_without_a_fast_path_has_nothing_to_clear() {
        let dir = tempfile::tempdir().expect("a folder");
        let ips = ["10.244.1.5".parse().expect("an address")];
        assert_eq!(forget(dir.path(), &ips).map_err(|error| format!("{error:?}")), Ok(()));
        assert_eq!(forget(&dir.path().join("none"), &ips).map_err(|error| format!("{error:?}")), Ok(()));
    }
}
