//! What happens to an entry on its way into the journal, and to one that finds no room.

use std::{cell::RefCell, sync::atomic::Ordering};

use tollgate_core::journal::frame;

use super::{
    Batch, Booking, Fsync, Inner, OnFull, lock,
    log::{Log, Stored},
};

thread_local! {
    /// Where a frame is put together, before the journal is locked.
    static FRAME: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Inner {
    pub(super) fn append(&self, is_end: bool, write: impl FnOnce(&mut Vec<u8>)) {
        FRAME.with_borrow_mut(|frame| {
            frame.clear();
            if !frame::put(frame, write) {
                tracing::error!("an entry is too long for the journal");
                return;
            }
            let stored = {
                let mut log = lock(&self.log);
                let stored = log.append(frame, is_end);
                self.look_after(&log);
                stored
            };
            if is_end {
                self.unbooked.fetch_add(1, Ordering::Relaxed);
                if self.unread.fetch_add(1, Ordering::Relaxed) + 1 == self.batch {
                    self.batch_waits.notify_one();
                }
            }
            match stored {
                Stored::Until(place) if self.fsync == Fsync::Always => self.sync_until(place),
                Stored::Until(_) | Stored::InMemory => {}
                Stored::Nowhere => self.lose_entry(&frame[frame::HEAD..], is_end),
            }
        });
    }

    /// Calls for help if it is needed.
    pub(super) fn look_after(&self, log: &Log) {
        if log.spare.is_none() || log.trouble.is_some() {
            self.note_taking(log);
            self.needs_tending.notify_one();
        }
    }

    pub(super) fn note_taking(&self, log: &Log) {
        let is_taking = self.on_full == OnFull::DropOldest || log.trouble.is_none();
        self.is_taking.store(is_taking, Ordering::Relaxed);
    }

    pub(super) fn lose_entry(&self, payload: &[u8], is_end: bool) {
        if !is_end {
            return;
        }
        tracing::error!("a usage record is lost: the journal cannot be written, and too much waits in memory");
        let mut batch = Batch::default();
        batch.push(payload, None, true);
        batch.bookings().for_each(|booking| self.lose(&booking));
        self.unbooked_fell(1);
    }

    /// Gives up a record that will never be booked.
    pub(super) fn lose(&self, booking: &Booking<'_>) {
        self.lost.inc();
        if let Some(hold) = booking.hold.as_ref().filter(|_| booking.is_own) {
            self.limiter.release(booking.record.holder(), hold, None, || {});
        }
    }

    pub(super) fn unbooked_fell(&self, ends: usize) {
        self.unbooked.fetch_sub(i64::try_from(ends).unwrap_or(0), Ordering::Relaxed);
    }
}
