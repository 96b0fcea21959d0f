//! What pods get of the network.
use super::Report;
use anyhow::Result;
/// Measures.
///
/// # Errors
/// The lab breaks.
pub fn run(_report: &mut Report) -> Result<()> {
    Ok(())
}
