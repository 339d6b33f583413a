//! Keeps the tables that grow within bounds: makes their parts before they are needed, and gives up what is older than
//! `[audit]` says.
//!
//! Every replica runs it; the database sees to it that one works at a time. A step is a short transaction, and after each this
//! job pauses, so that whoever writes comes to his turn. What fails is tried again with the next round: nothing gets lost by
//! being late.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use pingora_core::{server::ShutdownWatch, services::background::BackgroundService};
use tokio::time::sleep;
use tollgate_core::{retention::Kept, secret::Secret};

use crate::{
    shared::Shared,
    store::{Store, StoreError, Swept},
};

/// From one round to the next.
const PERIOD: Duration = Duration::from_secs(60);
/// From one step to the next.
const PAUSE: Duration = Duration::from_millis(50);

/// The job.
#[derive(Debug)]
pub struct Retention {
    shared: Arc<Shared>,
    store_url: Secret,
    tables: Vec<Kept>,
}

impl Retention {
    /// The job over these tables of the database at `store_url`.
    #[must_use]
    pub fn new(shared: Arc<Shared>, store_url: Secret, tables: Vec<Kept>) -> Self {
        Self { shared, store_url, tables }
    }

    /// Takes one step at each table, and counts what it did. `true`: there may be more to do.
    ///
    /// # Errors
    /// The database's. A table that cannot be worked at does not keep the others from their steps.
    pub async fn step(&self, store: &Store, now: DateTime<Utc>) -> Result<bool, StoreError> {
        let (mut has_more, mut failed) = (false, Ok(()));
        for kept in &self.tables {
            match store.sweep(kept, now).await {
                Ok(swept) => {
                    has_more |= swept.is_something();
                    self.note(kept, swept);
                }
                Err(error) => failed = Err(error),
            }
        }
        failed.map(|()| has_more)
    }

    fn note(&self, kept: &Kept, swept: Swept) {
        let metrics = &self.shared.metrics;
        metrics.retention_rows_deleted_total.with_label_values(&[kept.table]).inc_by(swept.rows_deleted);
        metrics.retention_partitions_dropped_total.with_label_values(&[kept.table]).inc_by(swept.parts_dropped);
        let Swept { parts_dropped, parts_made, rows_moved, .. } = swept;
        if parts_dropped > 0 || parts_made > 0 {
            tracing::info!(table = kept.table, parts_dropped, parts_made, rows_moved, "the months of a table changed");
        }
    }

    async fn run(&self) -> Result<(), StoreError> {
        let store = Store::open(self.store_url.expose()).await?;
        let mut is_failing = false;
        loop {
            let result = self.step(&store, Utc::now()).await;
            if let Err(error) = &result
                && !is_failing
            {
                tracing::warn!(%error, "old rows stay for now; this is tried again every minute");
            }
            is_failing = result.is_err();
            sleep(if matches!(result, Ok(true)) { PAUSE } else { PERIOD }).await;
        }
    }
}

#[async_trait]
impl BackgroundService for Retention {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        tokio::select! {
            ended = self.run() => if let Err(error) = ended {
                tracing::error!(%error, "old rows will not be deleted");
            },
            // A step that is cut off here is rolled back by the database.
            _ = shutdown.changed() => {}
        }
    }
}
