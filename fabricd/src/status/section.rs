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

/// As many warnings of a section are told in a status; of more the rest is counted.
const TOLD: usize = 20;

/// The sections that have a loop of their own, those that are switched on.
#[derive(Clone, Debug, Default)]
pub struct Sections {
    /// Network policies.
    pub policy: Option<watch::Receiver<Arc<SectionStatus>>>,
    /// Services.
    pub services: Option<watch::Receiver<Arc<SectionStatus>>>,
}

impl Sections {
    /// Those that are on, by what people call them.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, watch::Receiver<Arc<SectionStatus>>)> {
        let all = [("network policies", &self.policy), ("Services", &self.services)];
        all.into_iter().filter_map(|(name, section)| Some((name, section.clone()?)))
    }

    /// Why the first that isn't is not up to date.
    #[must_use]
    pub fn not_ready(&self) -> Option<String> {
        self.iter().find_map(|(name, section)| Some(format!("{name}: {}", section.borrow().ready.clone().err()?)))
    }

    /// What an operator should know of them, each with the way out.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let of = |(name, section): (&str, watch::Receiver<Arc<SectionStatus>>)| {
            let status = section.borrow().clone();
            let reason = status.ready.as_ref().err().map(|reason| format!("{name} are not up to date: {reason}"));
            let warnings = status.warnings.iter().take(TOLD).cloned();
            let more = status.warnings.len().checked_sub(TOLD + 1);
            let more = more.map(|more| format!("{} more warnings of {name}: see the log", more + 1));
            reason.into_iter().chain(warnings).chain(more).collect::<Vec<_>>()
        };
        self.iter().flat_map(of).collect()
    }
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
                Ok(()) => info!(section, "section is applied"),
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
