//! Moves usage from the journal to the database.
//!
//! A batch stays in [`UsageWriter`] until the database has it, and writing one twice changes nothing, so no step of this
//! job can lose or double a record: neither a database that goes away in the middle of a commit, nor the end of the
//! process, after which `main` writes what is left.
//!
//! Tokens that no provider reported are counted here, away from the requests, on Tokio's blocking threads.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use async_trait::async_trait;
use pingora_core::{server::ShutdownWatch, services::background::BackgroundService};
use tokio::{
    sync::Mutex,
    time::{Instant, sleep, timeout_at},
};
use tollgate_core::{
    limit::{Month, network_of},
    usage::{Booked, BookedAddress, Usage, UsageRecord},
};

use crate::{
    estimate,
    journal::{Finished, Uncounted},
    limiter::Unbooked,
    shared::Shared,
    store::{Store, StoreError},
};

/// How long to wait after the database failed, at first and at the most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// The job; `main` keeps it to write the rest when the server has ended.
#[derive(Debug)]
pub struct UsageWriter {
    shared: Arc<Shared>,
    store_url: String,
    flush_interval: Duration,
    batch: Mutex<Batch>,
}

/// What was taken from the journal and is not in the database yet. A step that is cancelled leaves every record in one of
/// the two.
#[derive(Debug, Default)]
struct Batch {
    taken: VecDeque<Finished>,
    ready: Vec<UsageRecord>,
    /// What the ready ones hold of quotas until they are booked.
    held: Vec<Option<Unbooked>>,
}

impl Batch {
    fn is_empty(&self) -> bool {
        self.taken.is_empty() && self.ready.is_empty()
    }
}

impl UsageWriter {
    /// A writer into the database at `store_url`; a record waits for others for at most `flush_interval`.
    #[must_use]
    pub fn new(shared: Arc<Shared>, store_url: String, flush_interval: Duration) -> Self {
        Self { shared, store_url, flush_interval, batch: Mutex::default() }
    }

    /// Takes one batch from the journal, unless one is left from before, and writes it.
    ///
    /// # Errors
    /// If the database does not take the batch, which is kept for the next step.
    pub async fn step(&self, store: &Store) -> Result<(), StoreError> {
        let mut batch = self.batch.lock().await;
        if batch.is_empty() {
            batch.taken = self.shared.journal.next_batch(self.flush_interval).await;
        }
        self.write(&mut batch, store).await
    }

    /// Writes everything that has been handed over, until it is done or `patience` is over.
    ///
    /// # Errors
    /// If the database does not take it, or not in time; says how many records are lost.
    pub async fn drain(&self, patience: Duration) -> anyhow::Result<()> {
        let store = self.open().await?;
        let until = Instant::now() + patience;
        let mut batch = self.batch.lock().await;
        loop {
            if batch.is_empty() {
                batch.taken = self.shared.journal.take();
            }
            if batch.is_empty() {
                return Ok(());
            }
            let written = timeout_at(until, self.write(&mut batch, &store)).await;
            if let Ok(Err(error)) = &written {
                tracing::warn!(%error, "usage cannot be written; trying again");
                sleep(BACKOFF.0).await;
            }
            if written.is_err() || Instant::now() >= until {
                let left = batch.taken.len() + batch.ready.len() + self.shared.journal.pending();
                anyhow::bail!("{left} usage records are lost: the database did not take them in time");
            }
        }
    }

    async fn write(&self, batch: &mut Batch, store: &Store) -> Result<(), StoreError> {
        self.settle(batch).await;
        if batch.ready.is_empty() {
            return Ok(());
        }
        let began = Instant::now();
        // Nobody compares the books with the database while one of the two is ahead.
        let books = self.shared.limiter.books();
        let ledger = books.ledger().await;
        let sums_addresses = self.shared.limiter.has_quota_of_addresses();
        let written = store.write_usage(&batch.ready).await;
        let metrics = &self.shared.metrics;
        metrics.store_up.set(i64::from(written.is_ok()));
        written?;
        metrics.usage_flush_seconds.observe(began.elapsed().as_secs_f64());
        for (record, unbooked) in batch.ready.drain(..).zip(batch.held.drain(..)) {
            let month = Month::of(record.started_at);
            let network = record.ip.filter(|_| sums_addresses).map(network_of);
            let booked = Booked::from(record);
            books.add(month, &booked);
            if let Some(network) = network {
                books.add_address(month, BookedAddress { network, amount: booked.amount });
            }
            if let Some(unbooked) = unbooked {
                unbooked.booked(month, booked.amount);
            }
        }
        drop(ledger);
        Ok(())
    }

    /// Counts what is not counted yet, prices it, and adds it to the metrics.
    async fn settle(&self, batch: &mut Batch) {
        while let Some(next) = batch.taken.front() {
            let counted = match &next.uncounted {
                Some(uncounted) => count(next.record.model.clone(), Arc::clone(uncounted)).await,
                None => None,
            };
            let Some(Finished { mut record, price, unbooked, .. }) = batch.taken.pop_front() else { return };
            record.usage = counted.unwrap_or(record.usage);
            record.cost_nano_usd = price.cost_nano_usd(&record.usage);
            let label = self.shared.metrics.model_label(&record.model, false);
            self.shared.metrics.tokens(&label, &record.usage);
            batch.ready.push(record);
            batch.held.push(unbooked);
        }
    }

    async fn open(&self) -> Result<Store, StoreError> {
        Ok(Store::open(&self.store_url).await?.summing_addresses(self.shared.limiter.has_quota_of_addresses()))
    }

    async fn run(&self) -> Result<Infallible, StoreError> {
        let store = self.open().await?;
        let mut backoff = BACKOFF.0;
        loop {
            match self.step(&store).await {
                Ok(()) => backoff = BACKOFF.0,
                Err(error) => {
                    tracing::warn!(%error, pending = self.shared.journal.pending(), "usage cannot be written; trying again");
                    sleep(backoff).await;
                    backoff = (backoff * 2).min(BACKOFF.1);
                }
            }
        }
    }
}

async fn count(model: String, uncounted: Arc<Uncounted>) -> Option<Usage> {
    let counting = tokio::task::spawn_blocking(move || estimate::count(&model, &uncounted));
    counting.await.inspect_err(|error| tracing::error!(%error, "tokens could not be counted")).ok()
}

/// Lets requests go first where cores are scarce: a batch is milliseconds of work, and a request must not wait for it.
///
/// Niceness is not enough: whoever runs keeps the core for the rest of its slice, and that is what a p99 is made of. Of
/// an idle thread Linux takes the core away at once. Threads of the database's driver inherit it.
#[cfg(target_os = "linux")]
fn give_way() {
    use thread_priority::{
        NormalThreadSchedulePolicy::Idle, ThreadPriority, ThreadSchedulePolicy, set_thread_priority_and_policy,
        thread_native_id,
    };
    let idle = ThreadSchedulePolicy::Normal(Idle);
    if let Err(error) = set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, idle) {
        tracing::debug!(%error, "the usage writer keeps its priority");
    }
}

#[cfg(not(target_os = "linux"))]
fn give_way() {}

#[async_trait]
impl BackgroundService for UsageWriter {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        give_way();
        tokio::select! {
            Err(error) = self.run() => tracing::error!(%error, "the usage writer cannot start"),
            _ = shutdown.changed() => {}
        }
    }
}
