//! Counts tokens that no provider reported, away from the requests, and writes the counts down in the journal.
//!
//! Counting is CPU time, so it is done on a thread that gives way to requests. A text stays in its queue until it is counted,
//! so a count that is cut off by the end of the process is done again by [`count_all`].

use std::sync::Arc;

use async_trait::async_trait;
use pingora_core::{server::ShutdownWatch, services::background::BackgroundService};
use tokio::time::{Instant, timeout_at};
use tollgate_core::journal::entry::Count;

use super::give_way::give_way;
use crate::{
    estimate,
    journal::{Journal, Uncounted},
    shared::Shared,
};

/// The job.
#[derive(Debug)]
pub struct TokenCounter {
    shared: Arc<Shared>,
}

impl TokenCounter {
    /// The job over `shared`.
    #[must_use]
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    async fn run(&self) {
        loop {
            let text = self.shared.journal.next_text().await;
            count(&self.shared.journal, text).await;
        }
    }
}

/// Counts what waits, until it is done or time is up.
pub async fn count_all(journal: &Journal, until: Instant) {
    while let Some(text) = journal.first_text() {
        if timeout_at(until, count(journal, text)).await.is_err() {
            return;
        }
    }
}

async fn count(journal: &Journal, text: Arc<Uncounted>) {
    let id = text.request_id;
    let counting = tokio::task::spawn_blocking(move || {
        let usage = estimate::count(&text.model, &text);
        Count { request_id: id, usage, cost_nano_usd: text.cost_nano_usd(&usage) }
    });
    let count = counting.await.inspect_err(|error| tracing::error!(%error, "tokens could not be counted")).ok();
    journal.counted(id, count);
}

#[async_trait]
impl BackgroundService for TokenCounter {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        // Tokio's blocking threads inherit it.
        give_way();
        tokio::select! {
            () = self.run() => {}
            _ = shutdown.changed() => {}
        }
    }
}
