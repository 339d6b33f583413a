//! The journal: where the request path hands over what was used.
//!
//! A bounded queue between the requests and the job that writes to the database. Handing over is a push under a lock that
//! is held for nothing else: the writer comes for the records at its own pace and is woken only when a whole batch waits.
//! Waking it for each record would cost a request more than everything else the gateway does for it.
//!
//! When the database is away and the queue is full, the end of a request waits for room (its answer has been sent by
//! then), and after [`PATIENCE`] the record is counted as lost instead of taking the gateway down with the database.
//! Both show in the metrics.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    sync::Notify,
    time::{Instant, timeout_at},
};
use tollgate_core::{
    limit::estimate::prompt_tokens, openai::sse::StreamedOutput, price::Price, route::Dialect, usage::UsageRecord,
};

use crate::limiter::Unbooked;

/// Records that may wait for the database. At some 600 bytes each, about 40 MiB.
const CAPACITY: usize = 65_536;
/// Bytes of prompts and answers that may wait to be counted. What exceeds them is counted by its length.
const MAX_TEXT_BYTES: usize = 64 * 1024 * 1024;
/// How long a request's end waits for room.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is needed to count tokens when the provider reported none.
#[derive(Debug)]
pub struct Uncounted {
    /// How to read both texts.
    pub dialect: Dialect,
    /// The request's body.
    pub prompt: Bytes,
    /// The answer, as the meter kept it.
    pub output: Output,
}

/// An answer as far as it is known.
#[derive(Debug)]
pub enum Output {
    /// Nothing was produced.
    None,
    /// A JSON answer.
    Json(Bytes),
    /// The collected deltas of a stream.
    Stream(StreamedOutput),
}

impl Output {
    /// Tokens by the length of the text, four bytes each, as English has them.
    #[must_use]
    pub fn rough_tokens(&self) -> u64 {
        self.len() as u64 / 4
    }

    fn len(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Json(body) => body.len(),
            Self::Stream(deltas) => usize::try_from(deltas.kept_bytes()).unwrap_or(usize::MAX),
        }
    }
}

/// One finished request on its way to the books.
#[derive(Debug)]
pub struct Finished {
    /// The row.
    pub record: UsageRecord,
    /// What tokens cost at the time of the request.
    pub price: Price,
    /// Set if its tokens are still to be counted.
    pub uncounted: Option<Arc<Uncounted>>,
    /// What it holds of quotas until it is booked.
    pub unbooked: Option<Unbooked>,
}

/// The queue; both ends share it.
#[derive(Clone, Debug)]
pub struct Journal(Arc<Queue>);

#[derive(Debug)]
struct Queue {
    waiting: Mutex<Waiting>,
    batch: usize,
    batch_waits: Notify,
    has_room: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    records: VecDeque<Finished>,
    text_bytes: usize,
}

impl Finished {
    /// Bytes of text that it holds to be counted.
    fn text_bytes(&self) -> usize {
        self.uncounted.as_ref().map_or(0, |uncounted| uncounted.prompt.len() + uncounted.output.len())
    }

    /// Lets go of the texts: their tokens are taken from their lengths.
    fn count_roughly(&mut self) {
        if let Some(uncounted) = self.uncounted.take() {
            self.record.usage.prompt_tokens = prompt_tokens(&uncounted.prompt);
            self.record.usage.completion_tokens = uncounted.output.rough_tokens();
        }
    }
}

impl Queue {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Poisoned only by a panic inside a push or a pop; the records are still records.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a record, or gives it back if there is no room.
    fn push(&self, mut finished: Finished) -> Result<(), Box<Finished>> {
        let mut waiting = self.waiting();
        if waiting.records.len() >= CAPACITY {
            return Err(Box::new(finished));
        }
        if waiting.text_bytes + finished.text_bytes() > MAX_TEXT_BYTES {
            finished.count_roughly();
        }
        waiting.text_bytes += finished.text_bytes();
        waiting.records.push_back(finished);
        let count = waiting.records.len();
        drop(waiting);
        if count == self.batch {
            self.batch_waits.notify_one();
        }
        Ok(())
    }
}

impl Journal {
    /// A queue from which records are taken `batch` at a time.
    #[must_use]
    pub fn new(batch: usize) -> Self {
        Self(Arc::new(Queue { waiting: Mutex::default(), batch, batch_waits: Notify::new(), has_room: Notify::new() }))
    }

    /// Hands a finished request over.
    ///
    /// # Errors
    /// Gives the record back if there was no room for [`PATIENCE`](self).
    pub async fn record(&self, finished: Finished) -> Result<(), Box<Finished>> {
        let Err(mut back) = self.0.push(finished) else { return Ok(()) };
        let until = Instant::now() + PATIENCE;
        loop {
            let has_room = self.0.has_room.notified();
            back = match self.0.push(*back) {
                Ok(()) => return Ok(()),
                Err(back) => back,
            };
            if timeout_at(until, has_room).await.is_err() {
                return Err(back);
            }
        }
    }

    /// Hands a finished request over without waiting.
    ///
    /// # Errors
    /// Gives the record back if there is no room.
    pub fn push(&self, finished: Finished) -> Result<(), Box<Finished>> {
        self.0.push(finished)
    }

    /// Waits until a whole batch is there, at most for `patience`, and takes what there is of it.
    pub async fn next_batch(&self, patience: Duration) -> VecDeque<Finished> {
        if self.pending() < self.0.batch {
            let waited = tokio::time::timeout(patience, self.0.batch_waits.notified()).await;
            drop(waited);
        }
        self.take()
    }

    /// Takes up to a batch of what is there.
    #[must_use]
    pub fn take(&self) -> VecDeque<Finished> {
        let mut waiting = self.0.waiting();
        let count = waiting.records.len().min(self.0.batch);
        let taken: VecDeque<Finished> = waiting.records.drain(..count).collect();
        waiting.text_bytes -= taken.iter().map(Finished::text_bytes).sum::<usize>();
        drop(waiting);
        self.0.has_room.notify_waiters();
        taken
    }

    /// Records that wait.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.0.waiting().records.len()
    }
}
