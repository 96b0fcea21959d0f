//! [`SectionStatus`]: how it stands with a section that has a loop of its own, as that saw it last.

use std::sync::Arc;

use tokio::sync::watch;
use tracing::{info, warn};

/// What is known after one pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectionStatus {
    /// Whether the kernel holds what the API server says; else why not.
    pub ready: Result<(), String>,
    /// What an operator should know, each with the way out.
    pub warnings: Vec<String>,
}

impl Default for SectionStatus {
    /// Of a daemon that has just begun.
    fn default() -> Self {
        Self { ready: Err("starting".to_owned()), warnings: vec![] }
    }
}

impl SectionStatus {
    /// Tells whoever watches, and logs what is new. `section` is what the log calls it: `Services`.
    pub fn publish(self, section: &'static str, to: &watch::Sender<Arc<Self>>) {
        let before = to.borrow().clone();
        if before.ready != self.ready {
            match &self.ready {
                Ok(()) => info!(section, "section is in force"),
                Err(reason) => warn!(section, reason, "section is not up to date"),
            }
        }
        for warning in self.warnings.iter().filter(|warning| !before.warnings.contains(warning)) {
            warn!(section, "{warning}");
        }
        if *before != self {
            to.send_replace(Arc::new(self));
        }
    }
}
