//! Content on its way to the database: from the requests that are to be kept, through memory, to the job that writes it.
//!
//! Nothing of it is in the journal, which the books need for themselves: books must outlive everything, content may be lost when
//! the process is killed. A request whose mode is `none` costs one look at its key.
//!
//! **Memory is bounded.** Everything that is held, of requests under way and of those that wait to be written, is counted in
//! bytes against one bound. What finds no room is let go whole, and counted: half a conversation looks like a whole one. So
//! a database that is away for hours costs content, but neither memory nor a request.
//!
//! `capture` collects what a request and its answer are, on the request's own thread. [`seal`](crate::seal) makes rows of it, on
//! the thread of [the job](crate::jobs::content_writer) that writes them.

mod capture;

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use prometheus::IntCounter;
use tokio::sync::Notify;
use tollgate_core::{content::ContentMode, key::KeyEntry};

pub use self::capture::{Asked, Capture, Captured};

/// What one request is taken to need beside its texts, in bytes: so many requests are bounded, too.
const OVERHEAD: usize = 1024;
/// Room is taken in steps, so that a stream does not take it word by word.
const STEP: usize = 8 * 1024;
/// Beyond `max_content`, so much of an answer is collected, to be redacted: what is cut at the end is cut after that.
pub const MARGIN: usize = 4 * 1024;

/// What may be kept.
#[derive(Clone, Debug)]
pub struct Options {
    /// What is kept where neither key nor user says otherwise.
    pub mode: ContentMode,
    /// How much is kept of a request, and of an answer, in bytes.
    pub max_content_bytes: usize,
    /// How much may be in memory at once, in bytes.
    pub buffer_bytes: usize,
    /// Counts requests whose content found no room.
    pub dropped: IntCounter,
}

/// The content that is on its way; every holder has a handle to it.
#[derive(Clone, Debug)]
pub struct Contents(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    options: Options,
    held: AtomicUsize,
    waiting: Mutex<VecDeque<Captured>>,
    added: Notify,
}

impl Contents {
    /// None yet.
    #[must_use]
    pub fn new(options: Options) -> Self {
        let (held, waiting, added) = (AtomicUsize::new(0), Mutex::default(), Notify::new());
        Self(Arc::new(Inner { options, held, waiting, added }))
    }

    /// Begins to collect the content of a request that was made with `key`; `None`: nothing is to be kept, or there is no room.
    #[must_use]
    pub fn begin(&self, key: &KeyEntry, asked: impl FnOnce() -> Asked) -> Option<Box<Capture>> {
        let mode = ContentMode::of_request(key.audit_content, key.user.audit_content, self.0.options.mode);
        if mode == ContentMode::None {
            return None;
        }
        Capture::try_new(self, mode, asked()).map(Box::new)
    }

    /// Bytes that are held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.held.load(Relaxed)
    }

    /// Waits until there is something to be written.
    pub async fn wait(&self) {
        loop {
            let added = self.0.added.notified();
            if !self.waiting().is_empty() {
                return;
            }
            added.await;
        }
    }

    /// Takes what waits longest: up to `most` requests, and no more than about `most_bytes` unless one alone has more.
    #[must_use]
    pub fn take(&self, most: usize, most_bytes: usize) -> Vec<Captured> {
        let mut waiting = self.waiting();
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while taken.len() < most
            && (taken.is_empty() || bytes < most_bytes)
            && let Some(captured) = waiting.pop_front()
        {
            bytes += captured.bytes();
            taken.push(captured);
        }
        taken
    }

    /// Counts requests whose content is lost.
    pub fn lost(&self, count: usize) {
        self.0.options.dropped.inc_by(count as u64);
    }

    /// How many requests wait to be written.
    #[must_use]
    pub fn len(&self) -> usize {
        self.waiting().len()
    }

    /// Does none wait?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn add(&self, captured: Captured) {
        self.waiting().push_back(captured);
        self.0.added.notify_one();
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<Captured>> {
        // Poisoned only by a panic while a queue is pushed to.
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes that are counted as held until it is dropped.
#[derive(Debug)]
struct Room {
    contents: Contents,
    bytes: usize,
}

impl Room {
    fn of(contents: &Contents) -> Self {
        Self { contents: contents.clone(), bytes: 0 }
    }

    /// Makes it at least so large; `false`: there is no room, and what it had stays.
    fn grow_to(&mut self, bytes: usize) -> bool {
        if bytes <= self.bytes {
            return true;
        }
        let more = (bytes - self.bytes).next_multiple_of(STEP);
        let inner = &self.contents.0;
        let before = inner.held.fetch_add(more, Relaxed);
        if before + more > inner.options.buffer_bytes {
            inner.held.fetch_sub(more, Relaxed);
            return false;
        }
        self.bytes += more;
        true
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.contents.0.held.fetch_sub(self.bytes, Relaxed);
    }
}
