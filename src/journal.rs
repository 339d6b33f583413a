//! The journal: where the request path hands over what was used, before the client has the last of its answer.
//!
//! **Files of this machine.** An entry is one write at the end of a file. It is in the kernel when the call returns, so no end
//! of this process loses it, and a database that is away costs disk, not memory. The job that books reads the files at its
//! own pace; a thread is woken only when a whole batch waits. What the entries are, and how they are found again in files
//! that something happened to, is in [`tollgate_core::journal`].
//!
//! **Two entries per request, one write.** A request is written down when it is admitted, so that one that this process does
//! not outlive is booked with its estimate. Most are over within milliseconds, and their beginnings are never written:
//! they wait in memory for a moment, and their ends take them back.
//!
//! **Its end is bounded.** There is a cap, and a choice at the cap: refuse requests, or drop the oldest entries. A disk that
//! does not take entries is no reason to fail a request that is under way: they wait in memory, bounded, until it does.
//! Everything that is lost is counted and told.
//!
//! | file | what it does |
//! |---|---|
//! | `start` | opens it, with everything that can be wrong with a directory |
//! | `append`, `log` | the end that is written to |
//! | `reader`, `scanner`, `batch` | the end that is read |
//! | `upkeep` | what goes on beside the requests |
//! | `texts` | what is still to be counted |

mod append;
mod batch;
mod files;
mod log;
mod options;
mod reader;
mod scanner;
mod start;
mod texts;
mod upkeep;

use std::{
    fs::File,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use prometheus::IntCounter;
use tokio::sync::Notify;
use tollgate_core::journal::{
    Place,
    entry::{Begin, Count, End},
    frame,
    pending::{Pending, Ticket},
};
use uuid::Uuid;

pub use self::{
    batch::{Batch, Booking, Bookings},
    options::{Fsync, MIN_CAP, OnFull, Options},
    texts::{Output, Uncounted},
};
use self::{
    log::{Log, Trouble},
    reader::Reader,
    start::Opened,
    texts::Texts,
};
use crate::limiter::Limiter;

/// Most bytes of one segment: some fifty thousand entries.
const MAX_SEGMENT: u64 = 16 * 1024 * 1024;
/// A journal that is full has at least so many segments, so that dropping the oldest is dropping a small part.
const MIN_SEGMENTS: u64 = 8;
/// Bytes of beginnings that wait to be written. One that finds no room is not written: only a crash would have needed it.
const MAX_PENDING: usize = 1024 * 1024;
/// How long an end waits for the count of its tokens.
const COUNTING: Duration = Duration::from_secs(10);

/// The journal of this process; every holder has a handle to it.
#[derive(Clone, Debug)]
pub struct Journal(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    on_full: OnFull,
    fsync: Fsync,
    batch: usize,
    limiter: Limiter,
    lost: IntCounter,
    damaged: IntCounter,
    opened: Instant,
    lock: File,
    // Locked in this order, where more than one is.
    reader: Mutex<Reader>,
    log: Mutex<Log>,
    pending: Mutex<Pending>,
    texts: Texts,
    /// Everything before it is on the disk.
    synced: Mutex<Place>,
    is_taking: AtomicBool,
    begins_wait: Notify,
    needs_tending: Notify,
    batch_waits: Notify,
    /// Ends since the last look of the reader.
    unread: AtomicUsize,
    /// Ends that are not booked.
    unbooked: AtomicI64,
    /// When the reader last saw that there was nothing more, in milliseconds.
    caught_up_ms: AtomicU64,
}

/// How a journal is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// It takes entries.
    Well,
    /// There is as much as there may be.
    Full,
    /// The disk does not take entries, for this reason; they wait in memory.
    Failing(String),
}

/// A request that was written down.
#[derive(Debug)]
pub struct Open(Ticket);

impl Journal {
    /// Opens the journal in a directory, for this process alone.
    ///
    /// # Errors
    /// What is wrong with the directory, and the mend.
    pub fn open(options: Options) -> anyhow::Result<Self> {
        let Options { directory, max_bytes, on_full, fsync, batch, limiter, lost, damaged } = options;
        let segment_bytes = (max_bytes / MIN_SEGMENTS).min(MAX_SEGMENT);
        let Opened { lock, mut log, reader, backlog } = start::open(&directory, segment_bytes, fsync != Fsync::Never)?;
        log.max_bytes = max_bytes;
        log.may_exceed = on_full == OnFull::DropOldest;
        log.must_sync = fsync != Fsync::Never;
        if backlog > 0 {
            tracing::info!(records = backlog, "usage of an earlier run waits in the journal");
        }
        let inner = Inner {
            on_full,
            fsync,
            batch,
            limiter,
            lost,
            damaged,
            opened: Instant::now(),
            lock,
            reader: Mutex::new(reader),
            log: Mutex::new(log),
            pending: Mutex::default(),
            texts: Texts::default(),
            synced: Mutex::default(),
            is_taking: AtomicBool::new(true),
            begins_wait: Notify::new(),
            needs_tending: Notify::new(),
            batch_waits: Notify::new(),
            unread: AtomicUsize::new(0),
            unbooked: AtomicI64::new(backlog.cast_signed()),
            caught_up_ms: AtomicU64::new(0),
        };
        // What is amiss is known before the first request.
        inner.tend();
        Ok(Self(Arc::new(inner)))
    }

    /// May a request be taken? Not if its end may find no room, and the configuration says to refuse it then.
    #[must_use]
    pub fn is_taking(&self) -> bool {
        self.0.is_taking.load(Ordering::Relaxed)
    }

    /// Are entries taken as they should be?
    #[must_use]
    pub fn condition(&self) -> Condition {
        let log = lock(&self.0.log);
        match &log.trouble {
            Some(Trouble::Full) => Condition::Full,
            Some(Trouble::Disk(error)) => Condition::Failing(error.clone()),
            // The oldest goes as soon as more room is needed.
            None if log.may_exceed && !log.has_room() => Condition::Full,
            None => Condition::Well,
        }
    }

    /// Writes down that a request was admitted; `None`: it must not be taken.
    #[must_use]
    pub fn begin(&self, begin: &Begin<'_>) -> Option<Open> {
        if !self.is_taking() {
            return None;
        }
        let mut pending = lock(&self.0.pending);
        let has_room = pending.bytes() < MAX_PENDING;
        let (ticket, is_only) = pending.push(|out| {
            if has_room {
                frame::put(out, |out| begin.write(out));
            }
        });
        drop(pending);
        if is_only {
            self.0.begins_wait.notify_one();
        }
        Some(Open(ticket))
    }

    /// Writes down that a request is over. `uncounted`: its tokens are still to be counted; those of the record are rough.
    pub fn end(&self, open: Option<Open>, mut end: End<'_>, uncounted: Option<Uncounted>) {
        let uncounted = uncounted.filter(|text| self.0.texts.reserve(text));
        end.is_uncounted = uncounted.is_some();
        if let Some(Open(ticket)) = open {
            lock(&self.0.pending).take_back(ticket);
        }
        self.0.append(true, |out| end.write(out));
        if let Some(text) = uncounted {
            self.0.texts.add(text);
        }
    }

    /// The text that waits longest to be counted, as soon as there is one.
    pub async fn next_text(&self) -> Arc<Uncounted> {
        self.0.texts.next().await
    }

    /// The same, if there is one.
    #[must_use]
    pub fn first_text(&self) -> Option<Arc<Uncounted>> {
        self.0.texts.first()
    }

    /// Writes down the tokens of a text, or that they cannot be counted: then the rough numbers stand.
    pub fn counted(&self, request_id: Uuid, count: Option<Count>) {
        if let Some(count) = count {
            self.0.append(false, |out| count.write(out));
        }
        self.0.texts.done(request_id);
    }

    /// Waits until a whole batch waits to be booked, at most for `patience`.
    pub async fn wait_for_batch(&self, patience: Duration) {
        if self.0.unread.load(Ordering::Relaxed) < self.0.batch {
            let waited = tokio::time::timeout(patience, self.0.batch_waits.notified()).await;
            drop(waited);
        }
    }

    /// Takes up to `most` rows to be booked. Only one batch may be out at a time. `is_last`: does nothing wait for the count of
    /// its tokens any more?
    #[must_use]
    pub fn read(&self, most: usize, is_last: bool) -> Batch {
        let inner = &*self.0;
        inner.unread.store(0, Ordering::Relaxed);
        let now_ms = inner.now_ms();
        let patience_ms = u64::try_from(COUNTING.as_millis()).unwrap_or(u64::MAX);
        let since_ms = if is_last { u64::MAX } else { now_ms.saturating_sub(patience_ms) };
        let mut reader = lock(&inner.reader);
        let batch = reader.read(&inner.log, most, now_ms, since_ms);
        inner.damaged.inc_by(std::mem::take(&mut reader.damaged));
        if batch.len() < most {
            inner.caught_up_ms.store(now_ms, Ordering::Relaxed);
        }
        batch
    }

    /// The batch that is out is booked.
    pub fn booked(&self, batch: Batch) {
        let ends = batch.ends();
        lock(&self.0.reader).booked(batch, &self.0.log);
        self.0.unbooked_fell(ends);
        // There may be room again.
        self.0.needs_tending.notify_one();
    }

    /// Ends that are not in the database yet.
    #[must_use]
    pub fn pending(&self) -> usize {
        usize::try_from(self.0.unbooked.load(Ordering::Relaxed)).unwrap_or(0)
    }

    /// For how long there has always been something to be booked.
    #[must_use]
    pub fn behind_for(&self) -> Duration {
        let since_ms = self.0.now_ms().saturating_sub(self.0.caught_up_ms.load(Ordering::Relaxed));
        if self.pending() == 0 { Duration::ZERO } else { Duration::from_millis(since_ms) }
    }

    /// Bytes on the disk.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        lock(&self.0.log).bytes()
    }

    /// Brings everything to the disk and lets other processes have the directory. Nothing is written after it.
    pub fn close(&self) {
        while self.0.write_begins() {}
        self.0.tend();
        if self.0.fsync != Fsync::Never {
            self.0.sync();
        }
        if let Err(error) = self.0.lock.unlock() {
            tracing::warn!(%error, "the journal stays locked until the process ends");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Poisoned only by a panic between two of its fields, and nothing in there panics.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
