//! The promises on the kernels between those that CI runs.

use anyhow::Result;

use crate::fabric::keeps_its_promises;

#[test]
fn the_kernels_between_are_one_fabric_with_a_node_in_namespaces() -> Result<()> {
    keeps_its_promises(["6.1", "6.12"])
}
