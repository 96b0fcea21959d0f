//! The second look at a list in which most of what was known is missing.

use std::time::Duration;

use tokio::time::sleep;
use tracing::warn;

/// How long the disappearance of most objects waits for a second look.
const SECOND_LOOK: Duration = Duration::from_millis(1500);

/// A list that is not published yet. One in which most of what is published is missing has to be confirmed by a second one:
/// an operator's slip, a half-restored backup and a store that is being rebuilt look like that for a moment, and what goes
/// takes kernel entries along. The second list counts, whatever it shows.
#[derive(Debug)]
pub struct Look<T> {
    /// What is listed, for the log.
    pub kind: &'static str,
    /// What was found.
    pub found: T,
    /// How many objects that are.
    pub left: usize,
    /// True when most of what is published would be gone.
    pub loses_most: bool,
}

impl<T> Look<T> {
    /// Lets go of this list, and waits until it is time for the second one.
    pub async fn hold_back(self) {
        warn!(kind = self.kind, left = self.left, "most of what was known is gone; held back until a second look");
        drop(self.found);
        sleep(SECOND_LOOK).await;
    }

    /// What the second list found.
    pub fn believe(self) -> T {
        warn!(kind = self.kind, left = self.left, gone = self.loses_most, "second look taken; published");
        self.found
    }
}
