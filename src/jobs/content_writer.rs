//! Moves content from memory to the database: hashes, redacts, compresses and encrypts it, and writes it in batches.
//!
//! All of that is CPU time that requests need more, so it is done on a thread of the lowest niceness. It is not one that runs
//! only when nobody else wants the core: on a machine where somebody always does, all content would be lost.
//!
//! While the database is away one batch waits here, encrypted, and the rest where it is, up to the bound of
//! [`Contents`](crate::content::Contents). At the end of the process what can be written is written; what
//! cannot is lost, told and counted.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use pingora_core::{server::ShutdownWatch, services::background::BackgroundService};
use tokio::{
    sync::Mutex,
    time::{Instant, sleep, timeout, timeout_at},
};
use tollgate_core::secret::Secret;

use super::give_way::give_most_way;
use crate::{
    content::Captured,
    seal::Sealer,
    shared::Shared,
    store::{ContentRow, Store, StoreError},
};

/// Most requests of one batch, and about the most bytes, before compression.
const BATCH: (usize, usize) = (256, 8 * 1024 * 1024);
/// How long to wait after the database failed, at first and at the most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// How long the database may take for one batch.
const PATIENCE: Duration = Duration::from_secs(30);

/// The job; `main` keeps it to write the rest when the server has ended.
#[derive(Debug)]
pub struct ContentWriter {
    shared: Arc<Shared>,
    store_url: Secret,
    sealer: Sealer,
    /// How long the first of a batch waits for others.
    flush_interval: Duration,
    /// What was taken and is not in the database yet.
    out: Mutex<Option<Batch>>,
}

/// Rows, and the requests that they are of: these hold the room in memory until the rows are written.
#[derive(Debug)]
struct Batch {
    rows: Vec<ContentRow>,
    _of: Vec<Captured>,
}

/// The job as a service.
#[derive(Debug)]
pub struct Service(pub Arc<ContentWriter>);

impl ContentWriter {
    /// A writer into the database at `store_url`; content waits for more of it for at most `flush_interval`.
    #[must_use]
    pub fn new(shared: Arc<Shared>, store_url: Secret, sealer: Sealer, flush_interval: Duration) -> Self {
        Self { shared, store_url, sealer, flush_interval, out: Mutex::default() }
    }

    /// Takes a batch, unless one is left from before, and writes it. `true`: there may be more.
    ///
    /// # Errors
    /// If the database does not take the batch, which is kept for the next step.
    pub async fn step(&self, store: &Store) -> Result<bool, StoreError> {
        let mut out = self.out.lock().await;
        let batch = match &mut *out {
            Some(batch) => batch,
            none => none.insert(self.seal(self.shared.contents.take(BATCH.0, BATCH.1))),
        };
        if !batch.rows.is_empty() {
            let written = timeout(PATIENCE, store.write_contents(&batch.rows)).await;
            written.unwrap_or(Err(StoreError::TooSlow))?;
        }
        *out = None;
        Ok(!self.shared.contents.is_empty())
    }

    /// Writes everything that waits, until it is done or `patience` is over. The rest is lost.
    pub async fn drain(&self, patience: Duration) {
        let until = Instant::now() + patience;
        if let Ok(Ok(())) = timeout_at(until, self.write_all()).await {
            return;
        }
        let left = self.shared.contents.len() + self.out.lock().await.as_ref().map_or(0, |batch| batch.rows.len());
        if left > 0 {
            self.shared.contents.lost(left);
            tracing::warn!(left, "the content of requests is lost: the database did not take it in time");
        }
    }

    async fn write_all(&self) -> Result<(), StoreError> {
        if self.shared.contents.is_empty() && self.out.lock().await.is_none() {
            return Ok(());
        }
        let store = Store::open(self.store_url.expose()).await?;
        loop {
            match self.step(&store).await {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(_) => sleep(BACKOFF.0).await,
            }
        }
    }

    fn seal(&self, of: Vec<Captured>) -> Batch {
        let row = |captured: &Captured| {
            let row = self.sealer.seal(captured);
            row.inspect_err(|error| {
                self.shared.contents.lost(1);
                tracing::error!(%error, "the content of a request cannot be compressed");
            })
        };
        Batch { rows: of.iter().filter_map(|captured| row(captured).ok()).collect(), _of: of }
    }

    async fn run(&self) -> Result<(), StoreError> {
        let store = Store::open(self.store_url.expose()).await?;
        let mut wait = None;
        loop {
            if wait.is_none() {
                self.shared.contents.wait().await;
                sleep(self.flush_interval).await;
            }
            match self.step_all(&store).await {
                Ok(()) if wait.take().is_some() => tracing::info!("content is written to the database again"),
                Ok(()) => {}
                Err(error) => {
                    if wait.is_none() {
                        let bytes = self.shared.contents.bytes();
                        tracing::warn!(%error, bytes, "content cannot be written to the database: it waits in memory");
                    }
                    let pause = wait.unwrap_or(BACKOFF.0);
                    sleep(pause).await;
                    wait = Some((pause * 2).min(BACKOFF.1));
                }
            }
        }
    }

    async fn step_all(&self, store: &Store) -> Result<(), StoreError> {
        while self.step(store).await? {}
        Ok(())
    }
}

#[async_trait]
impl BackgroundService for Service {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        give_most_way();
        tokio::select! {
            Err(error) = self.0.run() => tracing::error!(%error, "content will not be written to the database"),
            _ = shutdown.changed() => {}
        }
    }
}
