//! [`Handle`]: what others ask the loop of Services.

use std::sync::Arc;

use fabric_core::services::plan::Described;
use tokio::sync::{mpsc, oneshot, watch};

use crate::status::section::SectionStatus;

/// How others watch and ask the loop. A clone asks the same one.
#[derive(Clone, Debug)]
pub struct Handle {
    /// How it stands, as the last pass saw it.
    pub status: watch::Receiver<Arc<SectionStatus>>,
    /// Takes questions; each is answered between two passes.
    pub questions: mpsc::Sender<Question>,
}

/// Which Services are asked for, as [`ServicePlan::find`](fabric_core::services::plan::ServicePlan::find) takes it.
#[derive(Debug)]
pub struct Question {
    /// `namespace/name`, a name, an address, or nothing for all.
    pub what: String,
    /// Gets the answer.
    pub reply: oneshot::Sender<Vec<Described>>,
}

impl Handle {
    /// These Services as this node translates them, beside what the kernel holds; `None` when the daemon is ending.
    pub async fn describe(&self, what: &str) -> Option<Vec<Described>> {
        let (reply, answer) = oneshot::channel();
        self.questions.send(Question { what: what.to_owned(), reply }).await.ok()?;
        answer.await.ok()
    }
}
