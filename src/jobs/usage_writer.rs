//! Moves usage from the journal to the database.
//!
//! A batch stays in [`UsageWriter`] until the database has it, and writing one twice changes nothing, so no step of this
//! job can lose or double a record: neither a database that goes away in the middle of a commit, nor the end of the
//! process, after which `main` writes what is left.
//!
//! Tokens that no provider reported are counted here, away from the requests, on Tokio's blocking threads.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use pingora_core::{server::ShutdownWatch, services::background::BackgroundService};
use tokio::{
    sync::{Mutex, mpsc},
    time::{Instant, sleep, timeout_at},
};
use tollgate_core::usage::UsageRecord;

use crate::{
    estimate,
    journal::Finished,
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
    rules: Rules,
    state: Mutex<State>,
}

/// How records are batched.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Records in one transaction at the most.
    pub batch: usize,
    /// How long a record waits for company.
    pub flush_interval: Duration,
}

#[derive(Debug)]
struct State {
    receiver: mpsc::Receiver<Finished>,
    batch: Vec<UsageRecord>,
}

impl UsageWriter {
    /// A writer of what `receiver` brings into the database at `store_url`.
    #[must_use]
    pub fn new(shared: Arc<Shared>, store_url: String, rules: Rules, receiver: mpsc::Receiver<Finished>) -> Self {
        Self { shared, store_url, rules, state: Mutex::new(State { receiver, batch: Vec::new() }) }
    }

    /// One batch: collects for at most the flush interval, writes, forgets. Gives the number of records written; `None`
    /// when the journal has ended.
    ///
    /// # Errors
    /// If the database does not take the batch, which is kept for the next step.
    pub async fn step(&self, store: &Store) -> Result<Option<usize>, StoreError> {
        let mut state = self.state.lock().await;
        if state.batch.is_empty() && !self.collect(&mut state).await {
            return Ok(None);
        }
        self.write(&mut state, store).await.map(Some)
    }

    /// Writes everything that has been handed over, until it is done or `patience` is over.
    ///
    /// # Errors
    /// If the database does not take it, or not in time; says how many records are lost.
    pub async fn drain(&self, patience: Duration) -> anyhow::Result<()> {
        let store = Store::open(&self.store_url).await?;
        let until = Instant::now() + patience;
        let mut state = self.state.lock().await;
        loop {
            while let Ok(finished) = state.receiver.try_recv() {
                let record = self.settle(finished).await;
                state.batch.push(record);
                if state.batch.len() >= self.rules.batch {
                    break;
                }
            }
            if state.batch.is_empty() {
                return Ok(());
            }
            let written = timeout_at(until, self.write(&mut state, &store)).await;
            if let Ok(Err(error)) = &written {
                tracing::warn!(%error, "usage cannot be written; trying again");
                sleep(BACKOFF.0).await;
            }
            if written.is_err() || Instant::now() >= until {
                let left = state.batch.len() + state.receiver.len();
                anyhow::bail!("{left} usage records are lost: the database did not take them in time");
            }
        }
    }

    async fn collect(&self, state: &mut State) -> bool {
        let Some(first) = state.receiver.recv().await else { return false };
        let until = Instant::now() + self.rules.flush_interval;
        let record = self.settle(first).await;
        state.batch.push(record);
        while state.batch.len() < self.rules.batch {
            match timeout_at(until, state.receiver.recv()).await {
                Ok(Some(finished)) => {
                    let record = self.settle(finished).await;
                    state.batch.push(record);
                }
                Ok(None) | Err(_) => break,
            }
        }
        true
    }

    async fn write(&self, state: &mut State, store: &Store) -> Result<usize, StoreError> {
        let began = Instant::now();
        let written = store.write_usage(&state.batch).await;
        let metrics = &self.shared.metrics;
        metrics.store_up.set(i64::from(written.is_ok()));
        written?;
        metrics.usage_flush_seconds.observe(began.elapsed().as_secs_f64());
        let count = state.batch.len();
        state.batch.clear();
        Ok(count)
    }

    /// Counts what is not counted yet, prices it, and adds it to the metrics.
    async fn settle(&self, finished: Finished) -> UsageRecord {
        let Finished { mut record, price, uncounted } = finished;
        if let Some(uncounted) = uncounted {
            let model = record.model.clone();
            match tokio::task::spawn_blocking(move || estimate::count(&model, &uncounted)).await {
                Ok(usage) => record.usage = usage,
                Err(error) => tracing::error!(%error, request_id = %record.request_id, "tokens could not be counted"),
            }
        }
        record.cost_nano_usd = price.cost_nano_usd(&record.usage);
        let label = self.shared.metrics.model_label(&record.model, false);
        self.shared.metrics.tokens(&label, &record.usage);
        record
    }

    async fn run(&self) -> Result<(), StoreError> {
        let store = Store::open(&self.store_url).await?;
        let mut backoff = BACKOFF.0;
        loop {
            match self.step(&store).await {
                Ok(Some(_)) => backoff = BACKOFF.0,
                Ok(None) => return Ok(()),
                Err(error) => {
                    tracing::warn!(%error, pending = self.shared.journal.pending(), "usage cannot be written; trying again");
                    sleep(backoff).await;
                    backoff = (backoff * 2).min(BACKOFF.1);
                }
            }
        }
    }
}

#[async_trait]
impl BackgroundService for UsageWriter {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        tokio::select! {
            ended = self.run() => if let Err(error) = ended {
                tracing::error!(%error, "the usage writer cannot start");
            },
            _ = shutdown.changed() => {}
        }
    }
}
