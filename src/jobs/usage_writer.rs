//! Moves usage from the journal to the database.
//!
//! A batch is out of the journal's hands only when the database has it, and writing one twice changes nothing, so no step of
//! this job can lose or double a record: neither a database that goes away in the middle of a commit, nor the end of the
//! process, after which the next one goes on. Order is kept; a batch is larger when there is more to do.
//!
//! **Two threads.** A batch is milliseconds of work, and a request must not wait for it, so a calm thread does it while
//! nobody else wants the core. Where somebody always does, it would fall behind without end, and a thread cannot take its
//! modesty back. So a second, normal one takes over while there is too much to do ([`is_behind`](UsageWriter::is_behind)),
//! and the calm one waits meanwhile. Threads of the database's driver inherit, so each has connections of its own.

mod booking;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use pingora_core::{server::ShutdownWatch, services::background::BackgroundService};
use tokio::{
    sync::{Mutex, watch},
    time::{Instant, sleep, timeout, timeout_at},
};
use tollgate_core::secret::Secret;

use self::booking::book;
use super::{give_way::give_way, token_counter};
use crate::{
    journal::Batch,
    shared::Shared,
    store::{Store, StoreError},
};

/// How long to wait after the database failed, at first and at the most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// How long the database may take for one batch. A connection on which nothing is heard for so long is given up.
const PATIENCE: Duration = Duration::from_secs(30);
/// How much larger a batch may be when there is more to do.
const LARGER: usize = 8;
/// Rows of one batch at the most, whatever is configured: they are one statement each column, and one transaction.
const MOST: usize = 10_000;
/// How many rows may wait, and for how long, before the normal thread takes over. A burst is no reason: the journal has
/// it, on the disk, and what is held of quotas is known without it.
const BEHIND: (usize, Duration) = (200_000, Duration::from_secs(10));
/// How often the normal thread looks.
const LOOK: Duration = Duration::from_millis(250);

/// The job; `main` keeps it to write the rest when the server has ended.
#[derive(Debug)]
pub struct UsageWriter {
    shared: Arc<Shared>,
    store_url: Secret,
    flush_interval: Duration,
    batch: usize,
    /// What was taken from the journal and is not in the database yet.
    out: Mutex<Option<Batch>>,
    /// Does the normal thread have to do it?
    hurries: watch::Sender<bool>,
}

/// The calm thread of a writer.
#[derive(Debug)]
pub struct Calm(pub Arc<UsageWriter>);

/// The normal thread of a writer.
#[derive(Debug)]
pub struct Hurried(pub Arc<UsageWriter>);

impl UsageWriter {
    /// A writer into the database at `store_url`, usually `batch` records at once; a record waits for others for at most
    /// `flush_interval`.
    #[must_use]
    pub fn new(shared: Arc<Shared>, store_url: Secret, flush_interval: Duration, batch: usize) -> Self {
        Self { shared, store_url, flush_interval, batch, out: Mutex::default(), hurries: watch::Sender::new(false) }
    }

    /// Takes a batch from the journal, unless one is left from before, and writes it: a larger one where there is more to do.
    /// `true`: there may be more.
    ///
    /// # Errors
    /// If the database does not take the batch, which is kept for the next step.
    pub async fn step(&self, store: &Store) -> Result<bool, StoreError> {
        let most = self.shared.journal.pending().clamp(self.batch, LARGER * self.batch).min(MOST);
        self.step_of(store, most, false).await
    }

    /// The same, with at most so many rows. `is_last`: does nothing wait for the count of its tokens any more?
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub async fn step_of(&self, store: &Store, most: usize, is_last: bool) -> Result<bool, StoreError> {
        let mut out = self.out.lock().await;
        let (batch, was_left) = match &mut *out {
            Some(batch) => (batch, true),
            none => (none.insert(self.take(most, is_last)), false),
        };
        let has_more = was_left || batch.len() >= most;
        self.write(batch, store).await?;
        if let Some(batch) = out.take() {
            self.shared.journal.booked(batch);
        }
        Ok(has_more)
    }

    /// Writes everything that has been handed over, until it is done or `patience` is over. The rest stays in the journal.
    pub async fn drain(&self, patience: Duration) {
        let until = Instant::now() + patience;
        token_counter::count_all(&self.shared.journal, until).await;
        let written = timeout_at(until, self.write_all()).await;
        let left = self.shared.journal.pending();
        match written {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, left, "usage stays in the journal for the next start"),
            Err(_) => tracing::warn!(left, "usage stays in the journal for the next start: the database was too slow"),
        }
    }

    async fn write_all(&self) -> Result<(), StoreError> {
        let store = self.open().await?;
        let mut tries = 0;
        loop {
            match self.step_of(&store, MOST, true).await {
                Ok(true) => tries = 0,
                Ok(false) => return Ok(()),
                Err(error) if tries == 10 => return Err(error),
                Err(_) => {
                    tries += 1;
                    sleep(BACKOFF.0).await;
                }
            }
        }
    }

    /// Takes a batch, and adds its tokens to the metrics.
    fn take(&self, most: usize, is_last: bool) -> Batch {
        let batch = self.shared.journal.read(most, is_last);
        let metrics = &self.shared.metrics;
        for booking in batch.bookings().filter(|booking| booking.is_own) {
            let label = metrics.model_label(&booking.record.model, false);
            metrics.tokens(&label, &booking.record.usage);
        }
        batch
    }

    async fn write(&self, batch: &Batch, store: &Store) -> Result<(), StoreError> {
        if batch.is_empty() {
            return Ok(());
        }
        let began = Instant::now();
        // Nobody compares the books with the database while one of the two is ahead.
        let ledger = self.shared.limiter.books().ledger().await;
        let written = timeout(PATIENCE, store.write_usage(batch.bookings())).await;
        let written = written.unwrap_or_else(|_| Err(StoreError::TooSlow));
        let metrics = &self.shared.metrics;
        metrics.store_up.set(i64::from(written.is_ok()));
        let is_new = written?;
        metrics.usage_flush_seconds.observe(began.elapsed().as_secs_f64());
        book(&self.shared.limiter, batch.bookings().zip(is_new));
        drop(ledger);
        Ok(())
    }

    async fn open(&self) -> Result<Store, StoreError> {
        Ok(Store::open_for_one(self.store_url.expose())
            .await?
            .summing_addresses(self.shared.limiter.has_quota_of_addresses()))
    }

    /// Is there more to be done than the calm thread can be relied on to do?
    #[must_use]
    pub fn is_behind(&self) -> bool {
        let journal = &self.shared.journal;
        journal.pending() > BEHIND.0 || journal.behind_for() > BEHIND.1 + self.flush_interval
    }

    /// Writes until the end, waiting for batches.
    async fn run_calmly(&self, mut shutdown: ShutdownWatch) -> Result<(), StoreError> {
        let store = self.open().await?;
        let (mut trouble, mut hurries) = (Trouble::default(), self.hurries.subscribe());
        let mut has_more = false;
        while !*shutdown.borrow() {
            let its_turn = async {
                if !has_more {
                    self.shared.journal.wait_for_batch(self.flush_interval).await;
                }
                // Its sender is `self`.
                let calm = hurries.wait_for(|hurries| !hurries).await;
                drop(calm);
            };
            tokio::select! { () = its_turn => {}, _ = shutdown.changed() => break }
            has_more = self.step_and_wait(&store, &mut trouble, &mut shutdown).await;
        }
        Ok(())
    }

    /// Writes while there is too much to do, until the end.
    async fn run_hurriedly(&self, mut shutdown: ShutdownWatch) -> Result<(), StoreError> {
        while !self.is_behind() {
            tokio::select! { () = sleep(LOOK) => {}, _ = shutdown.changed() => return Ok(()) }
        }
        // Most processes never come here, and need no connections for it.
        let store = self.open().await?;
        let mut trouble = Trouble::default();
        while !*shutdown.borrow() {
            if self.is_behind() {
                self.hurries.send_replace(true);
                while self.step_and_wait(&store, &mut trouble, &mut shutdown).await && !*shutdown.borrow() {}
                self.hurries.send_replace(false);
            }
            tokio::select! { () = sleep(LOOK) => {}, _ = shutdown.changed() => break }
        }
        Ok(())
    }

    /// A step, and after one that failed a while. The step itself is never cut off: its transaction would stay open, with its
    /// locks, in the way of the last ones.
    async fn step_and_wait(&self, store: &Store, trouble: &mut Trouble, shutdown: &mut ShutdownWatch) -> bool {
        let step = self.step(store).await;
        tokio::select! {
            has_more = trouble.after(step, self) => has_more,
            _ = shutdown.changed() => false,
        }
    }
}

/// A database that is away, as one thread sees it.
#[derive(Debug, Default)]
struct Trouble {
    wait: Option<Duration>,
}

impl Trouble {
    /// After a step: waits if it failed. `true`: there may be more to do.
    async fn after(&mut self, step: Result<bool, StoreError>, writer: &UsageWriter) -> bool {
        let pending = writer.shared.journal.pending();
        match (step, self.wait) {
            (Ok(has_more), None) => has_more,
            (Ok(has_more), Some(_)) => {
                tracing::info!(pending, "usage is written to the database again");
                self.wait = None;
                has_more
            }
            (Err(error), wait) => {
                if wait.is_none() {
                    tracing::warn!(%error, pending, "usage cannot be written to the database: it waits in the journal");
                }
                let wait = wait.unwrap_or(BACKOFF.0);
                sleep(wait).await;
                self.wait = Some((wait * 2).min(BACKOFF.1));
                true
            }
        }
    }
}

fn tell(ended: Result<(), StoreError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "the usage writer cannot start");
    }
}

#[async_trait]
impl BackgroundService for Calm {
    async fn start(&self, shutdown: ShutdownWatch) {
        give_way();
        tell(self.0.run_calmly(shutdown).await);
    }
}

#[async_trait]
impl BackgroundService for Hurried {
    async fn start(&self, shutdown: ShutdownWatch) {
        tell(self.0.run_hurriedly(shutdown).await);
    }
}
