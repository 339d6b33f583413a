//! Moves content from memory to the database: hashes, redacts, compresses and encrypts it, and writes it in batches.
//!
//! All of that is CPU time that requests need more, so it is done on a thread of the highest niceness, which is there only while
//! there is something to do. It is not one that runs only when nobody else wants the core: on a machine where somebody
//! always does, all content would be lost.
//!
//! While the database is away one batch waits here, encrypted, and the rest where it is, up to the bound of
//! [`Contents`](crate::content::Contents). At the end of the process what can be written is written; what
//! cannot is lost, told and counted.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use pingora_core::{server::ShutdownWatch, services::background::BackgroundService};
use tokio::{
    sync::{Mutex, oneshot},
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
    sealer: Arc<Sealer>,
    /// How long the first of a batch waits for others.
    flush_interval: Duration,
    /// What was taken and is not in the database yet.
    out: Mutex<Option<Batch>>,
}

/// What is being written. The requests hold their room in memory until it is.
#[derive(Debug)]
struct Batch {
    of: Arc<Vec<Captured>>,
    /// `None`: they are not made yet, or whoever made them was cut off.
    rows: Option<Vec<ContentRow>>,
}

/// The job as a service.
#[derive(Debug)]
pub struct Service(pub Arc<ContentWriter>);

impl ContentWriter {
    /// A writer into the database at `store_url`; content waits for more of it for at most `flush_interval`.
    #[must_use]
    pub fn new(shared: Arc<Shared>, store_url: Secret, sealer: Sealer, flush_interval: Duration) -> Self {
        Self { shared, store_url, sealer: Arc::new(sealer), flush_interval, out: Mutex::default() }
    }

    /// Takes a batch, unless one is left from before, and writes it. `true`: there may be more.
    ///
    /// # Errors
    /// If the database does not take the batch, which is kept for the next step.
    pub async fn step(&self, store: &Store) -> Result<bool, StoreError> {
        let mut out = self.out.lock().await;
        let batch = match &mut *out {
            Some(batch) => batch,
            none => none.insert(Batch { of: Arc::new(self.shared.contents.take(BATCH.0, BATCH.1)), rows: None }),
        };
        if !batch.of.is_empty() {
            let rows = match &mut batch.rows {
                Some(rows) => rows,
                none => none.insert(self.seal(&batch.of).await),
            };
            let written = timeout(PATIENCE, store.write_contents(rows)).await;
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
        let left = self.shared.contents.len() + self.out.lock().await.as_ref().map_or(0, |batch| batch.of.len());
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

    /// Makes the rows of a batch, on a thread that goes when they are made.
    async fn seal(&self, of: &Arc<Vec<Captured>>) -> Vec<ContentRow> {
        let (done, rows) = oneshot::channel();
        let (sealer, batch) = (Arc::clone(&self.sealer), Arc::clone(of));
        let thread = std::thread::Builder::new().name("content".to_owned()).spawn(move || {
            give_most_way();
            // Nobody waits any more if the process ends.
            let _ = done.send(seal_all(&sealer, &batch));
        });
        let rows = match thread {
            Ok(_thread) => rows.await.ok(),
            Err(_) => None,
        };
        let rows = rows.unwrap_or_else(|| seal_all(&self.sealer, of));
        self.shared.contents.lost(of.len() - rows.len());
        rows
    }

    async fn run(&self, mut shutdown: ShutdownWatch) -> Result<(), StoreError> {
        let mut store = None;
        let mut wait = None;
        while !*shutdown.borrow() {
            let pause = async {
                match wait {
                    Some(wait) => sleep(wait).await,
                    None => {
                        self.shared.contents.wait().await;
                        sleep(self.flush_interval).await;
                    }
                }
            };
            tokio::select! { () = pause => {}, _ = shutdown.changed() => break }
            let store = match &mut store {
                Some(store) => store,
                // Most processes keep no content, and need no connections for it.
                none => none.insert(Store::open(self.store_url.expose()).await?),
            };
            wait = self.step_all(store, wait, &shutdown).await;
        }
        Ok(())
    }

    /// Writes what there is, in steps that are not cut off; `wait`: how long it was waited for the database, if it is away. Gives how
    /// long it is to be waited for now.
    async fn step_all(&self, store: &Store, wait: Option<Duration>, shutdown: &ShutdownWatch) -> Option<Duration> {
        loop {
            match self.step(store).await {
                Ok(true) if !*shutdown.borrow() => {}
                Ok(_) if wait.is_some() => {
                    tracing::info!("content is written to the database again");
                    return None;
                }
                Ok(_) => return None,
                Err(error) => {
                    if wait.is_none() {
                        let bytes = self.shared.contents.bytes();
                        tracing::warn!(%error, bytes, "content cannot be written to the database: it waits in memory");
                    }
                    return Some(wait.map_or(BACKOFF.0, |wait| (wait * 2).min(BACKOFF.1)));
                }
            }
        }
    }
}

fn seal_all(sealer: &Sealer, of: &[Captured]) -> Vec<ContentRow> {
    let told = |error: &std::io::Error| tracing::error!(%error, "the content of a request cannot be compressed");
    of.iter().filter_map(|captured| sealer.seal(captured).inspect_err(told).ok()).collect()
}

#[async_trait]
impl BackgroundService for Service {
    async fn start(&self, shutdown: ShutdownWatch) {
        if let Err(error) = self.0.run(shutdown).await {
            tracing::error!(%error, "content will not be written to the database");
        }
    }
}
