//! Keeps the journal going: see [`Journal::keep`](crate::journal::Journal::keep).

use std::sync::Arc;

use async_trait::async_trait;
use pingora_core::{server::ShutdownWatch, services::background::BackgroundService};

use crate::shared::Shared;

/// The job. It has a thread of its own, because disks make whoever writes to them wait.
#[derive(Debug)]
pub struct JournalKeeper {
    shared: Arc<Shared>,
}

impl JournalKeeper {
    /// The job over `shared`.
    #[must_use]
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

#[async_trait]
impl BackgroundService for JournalKeeper {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        tokio::select! {
            () = self.shared.journal.keep() => {}
            _ = shutdown.changed() => {}
        }
    }
}
