//! The end of the journal that is read: from entries to batches of rows, and what may be forgotten once they are booked.
//!
//! Reading begins with the oldest segment. What stands before the noted position is booked already and is only looked at for
//! beginnings that are still open. When the first segment of this process is reached, everything of earlier ones was seen:
//! their open beginnings will never end.
//!
//! Of a segment that goes, the beginnings that are still open are kept in a file of their own, so a request that takes hours
//! does not keep the journal of hours.

use std::{path::PathBuf, sync::Mutex};

use tollgate_core::journal::{
    Place,
    frame::{HEAD, Step, put, step},
    track::{Seen, Tracker},
};

use super::{
    batch::Batch,
    files::{self, Position},
    lock,
    log::Log,
    scanner::Scanner,
};

/// Where the journal is read.
#[derive(Debug)]
pub(super) struct Reader {
    directory: PathBuf,
    at: Place,
    scanner: Option<Scanner>,
    tracker: Tracker,
    position: Position,
    /// Everything before it was booked when this process began.
    booked_before: Place,
    /// The first segment of this process.
    first_own: u64,
    /// Was everything of earlier processes seen?
    is_past_others: bool,
    /// How far was read when the batch that is out was handed out.
    out: Option<Place>,
    must_last: bool,
    /// A batch that is over, for its memory: to give back some megabytes and to take others costs more than to fill them.
    spare: Batch,
    /// Damaged bytes that were left out, until they are asked for.
    pub(super) damaged: u64,
}

impl Reader {
    /// Reads what is in `directory`, this process's own entries from the segment `first_own` on. `open`: the beginnings that
    /// were kept. `must_last`: is what is kept synced to the disk?
    pub(super) fn new(directory: PathBuf, position: Position, first_own: u64, open: &[u8], must_last: bool) -> Self {
        let mut tracker = Tracker::default();
        for payload in frames(open) {
            tracker.see_again(0, payload);
        }
        let booked_before = position.read();
        Self {
            directory,
            at: Place::default(),
            scanner: None,
            tracker,
            position,
            booked_before,
            first_own,
            is_past_others: false,
            out: None,
            must_last,
            spare: Batch::default(),
            damaged: 0,
        }
    }

    /// Takes up to `most` rows. Ends that wait for their counts since before `since_ms` go without.
    pub(super) fn read(&mut self, log: &Mutex<Log>, most: usize, now_ms: u64, since_ms: u64) -> Batch {
        let mut batch = std::mem::take(&mut self.spare);
        while batch.len() < most && self.read_next(log, now_ms, &mut batch) {
            self.pass_overdue(since_ms, &mut batch);
        }
        self.pass_overdue(since_ms, &mut batch);
        if batch.len() < most {
            let waiting: Vec<_> = lock(log).take_overflow(most - batch.len()).collect();
            for frame in waiting {
                take(&mut self.tracker, self.at, &frame[HEAD..], now_ms, true, &mut batch);
            }
        }
        self.out = Some(self.at);
        batch
    }

    /// The batch that is out is booked: notes it, and forgets what is no longer needed.
    pub(super) fn booked(&mut self, mut batch: Batch, log: &Mutex<Log>) {
        batch.clear();
        self.spare = batch;
        self.out = None;
        self.settle(log);
    }

    /// Reads on to the end of a segment that is no longer written to; hands what is in it to `lost` instead of to the
    /// database, and removes it. `false`: there is none.
    pub(super) fn drop_oldest(&mut self, log: &Mutex<Log>, now_ms: u64, lost: impl FnOnce(&Batch)) -> bool {
        let mut batch = Batch::default();
        loop {
            let (segment, is_closed) = {
                let log = lock(log);
                let segment = if self.at == Place::default() { log.after(0).unwrap_or(0) } else { self.at.segment };
                (segment, log.extent(segment).is_none_or(|(_, is_closed)| is_closed) && log.after(segment).is_some())
            };
            if !is_closed {
                lost(&batch);
                return false;
            }
            while self.at.segment <= segment && self.read_next(log, now_ms, &mut batch) {}
            if self.remove_unneeded(log) {
                lost(&batch);
                return true;
            }
        }
    }

    /// Reads on to the next row, or to the next segment. `false`: there is nothing more now.
    fn read_next(&mut self, log: &Mutex<Log>, now_ms: u64, batch: &mut Batch) -> bool {
        while let Some(scanner) = &mut self.scanner {
            while let Some((offset, payload)) = scanner.next() {
                self.at.offset = scanner.at();
                let place = Place { segment: self.at.segment, offset };
                let payload = &scanner.bytes()[payload];
                if place < self.booked_before {
                    self.tracker.see_again(place.segment, payload);
                } else if take(&mut self.tracker, place, payload, now_ms, place.segment >= self.first_own, batch) {
                    return true;
                }
            }
            self.at.offset = scanner.at();
            self.damaged += scanner.take_damaged();
            match lock(log).extent(self.at.segment) {
                Some((until, _)) if until > self.at.offset => scanner.extend(until),
                Some((_, false)) => return false,
                Some((_, true)) | None => break,
            }
        }
        self.go_on(log, batch)
    }

    fn go_on(&mut self, log: &Mutex<Log>, batch: &mut Batch) -> bool {
        let next = {
            let log = lock(log);
            log.after(self.at.segment).and_then(|next| Some((next, log.extent(next)?.0)))
        };
        let Some((segment, until)) = next else { return false };
        self.at = Place { segment, offset: 0 };
        let opened = Scanner::open(&files::path(&self.directory, segment), until);
        self.scanner = opened
            .inspect_err(|error| {
                tracing::error!(segment, %error, "a segment of the journal cannot be opened; it is left out");
            })
            .ok();
        if segment >= self.first_own && !self.is_past_others {
            self.is_past_others = true;
            self.end_others(batch);
        }
        true
    }

    /// Nothing more will come of earlier processes.
    fn end_others(&mut self, batch: &mut Batch) {
        self.pass_overdue(u64::MAX, batch);
        for payload in self.tracker.take_open() {
            batch.push(&payload, None, false);
        }
    }

    fn pass_overdue(&mut self, since_ms: u64, batch: &mut Batch) {
        while let Some(held) = self.tracker.overdue(since_ms) {
            batch.push(&held.payload, None, held.place.segment >= self.first_own);
        }
    }

    /// Notes how far everything is booked, and removes what is before it.
    fn settle(&mut self, log: &Mutex<Log>) {
        let settled = self.tracker.settled(self.at);
        // Not before what was booked already is seen again: beginnings in it may be open.
        if settled < self.booked_before {
            return;
        }
        if let Err(error) = self.position.write(settled) {
            tracing::warn!(%error, "how far the journal is booked cannot be noted: a restart will hand it over again");
        }
        self.remove_before(log, settled.segment);
    }

    /// Removes segments before `first`.
    fn remove_before(&mut self, log: &Mutex<Log>, first: u64) {
        let gone: Vec<u64> = lock(log).closed.range(..first).map(|(number, _)| *number).collect();
        if !gone.is_empty() && self.keep_open(first) {
            self.remove(log, gone);
        }
    }

    /// Removes what was read and is not needed for the batch that is out.
    fn remove_unneeded(&mut self, log: &Mutex<Log>) -> bool {
        if self.out.is_none() {
            self.settle(log);
        }
        let needed = self.out.map(|out| out.segment);
        let read = self.at.segment;
        let is_read = |number: &u64| needed.is_none_or(|needed| *number > needed) && *number < read;
        let gone: Vec<u64> = lock(log).closed.keys().copied().filter(is_read).collect();
        if gone.is_empty() {
            return lock(log).has_room();
        }
        self.keep_open(read) && self.remove(log, gone)
    }

    fn keep_open(&self, before: u64) -> bool {
        let mut frames = Vec::new();
        for payload in self.tracker.open_before(before) {
            put(&mut frames, |out| out.extend_from_slice(payload));
        }
        let kept = files::keep_open(&self.directory, &frames, self.must_last);
        kept.inspect_err(|error| tracing::warn!(%error, "requests under way cannot be kept: their segments stay"))
            .is_ok()
    }

    fn remove(&self, log: &Mutex<Log>, gone: Vec<u64>) -> bool {
        let mut all_gone = true;
        for number in gone {
            match files::remove(&files::path(&self.directory, number)) {
                Ok(()) => {
                    // The kernel frees the file with its last handle, which takes it milliseconds: nobody waits for this thread.
                    let last = lock(log).forget(number);
                    drop(last);
                }
                Err(error) => {
                    all_gone = false;
                    tracing::warn!(segment = number, %error, "a segment of the journal cannot be removed");
                }
            }
        }
        all_gone
    }
}

/// Takes an entry in; `true`: it made a row.
fn take(tracker: &mut Tracker, place: Place, payload: &[u8], now_ms: u64, is_own: bool, batch: &mut Batch) -> bool {
    match tracker.see(place, payload, now_ms) {
        Seen::Nothing => return false,
        Seen::Row => batch.push(payload, None, is_own),
        Seen::Counted(held, count) => batch.push(&held.payload, Some(count), is_own),
    }
    true
}

/// The payloads of frames in memory.
fn frames(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        loop {
            match step(bytes, true) {
                Step::Frame(length) => {
                    let (frame, rest) = bytes.split_at(length);
                    bytes = rest;
                    return Some(&frame[HEAD..]);
                }
                Step::Skip(length) => bytes = &bytes[length..],
                Step::More => return None,
            }
        }
    })
}
