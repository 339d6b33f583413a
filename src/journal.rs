//! The journal: where the request path hands over what was used.
//!
//! A bounded queue between the requests and the job that writes to the database. Handing over never waits as long as
//! there is room; when the database is away and the queue is full, the end of a request waits for room (its answer has
//! been sent by then), and after [`PATIENCE`] the record is counted as lost instead of taking the gateway down with the
//! database. Both show in the metrics.

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tollgate_core::{openai::sse::StreamedOutput, price::Price, route::Dialect, usage::UsageRecord};

/// Records that may wait for the database. At some 600 bytes each, about 40 MiB.
const CAPACITY: usize = 65_536;
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

/// One finished request on its way to the books.
#[derive(Debug)]
pub struct Finished {
    /// The row.
    pub record: UsageRecord,
    /// What tokens cost at the time of the request.
    pub price: Price,
    /// Set if its tokens are still to be counted.
    pub uncounted: Option<Box<Uncounted>>,
}

/// The requests' end of the queue.
#[derive(Clone, Debug)]
pub struct Journal(mpsc::Sender<Finished>);

impl Journal {
    /// Makes the queue; the receiver belongs to the usage writer.
    #[must_use]
    pub fn new() -> (Self, mpsc::Receiver<Finished>) {
        let (sender, receiver) = mpsc::channel(CAPACITY);
        (Self(sender), receiver)
    }

    /// Hands a finished request over.
    ///
    /// # Errors
    /// Gives the record back if there was no room for [`PATIENCE`], or if the writer has ended.
    pub async fn record(&self, finished: Finished) -> Result<(), Box<Finished>> {
        match self.0.try_send(finished) {
            Ok(()) => Ok(()),
            Err(mpsc::error::TrySendError::Closed(finished)) => Err(Box::new(finished)),
            Err(mpsc::error::TrySendError::Full(finished)) => match self.0.send_timeout(finished, PATIENCE).await {
                Ok(()) => Ok(()),
                Err(error) => Err(Box::new(error.into_inner())),
            },
        }
    }

    /// Records that wait.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.0.max_capacity() - self.0.capacity()
    }
}
