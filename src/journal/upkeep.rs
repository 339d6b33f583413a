//! What keeps the journal going beside the requests: beginnings are written, segments are made ready and put into their final
//! form, the disk is synced, and what could not be written is tried again.

use std::{collections::BTreeMap, fs::File, io, os::unix::fs::FileExt, sync::Arc, time::Duration};

use tokio::time::{MissedTickBehavior, interval, sleep};
use tollgate_core::journal::{
    Place,
    entry::{Kind, peek},
    frame,
    segment::head,
};

use super::{
    Fsync, Inner, Journal, OnFull, files, lock,
    log::{Live, Log, Trouble},
};

/// How long a beginning waits for its end before it is written, at least; at the most it is twice as long.
const BEGIN: Duration = Duration::from_millis(5);
/// How often what does not work is tried again.
const RETRY: Duration = Duration::from_millis(200);

impl Journal {
    /// Keeps the journal going, for ever.
    pub async fn keep(&self) {
        tokio::join!(self.keep_beginning(), self.keep_ready(), self.keep_synced());
    }

    async fn keep_beginning(&self) {
        loop {
            self.0.begins_wait.notified().await;
            sleep(BEGIN).await;
            while self.0.write_begins() {
                sleep(BEGIN).await;
            }
        }
    }

    async fn keep_ready(&self) {
        loop {
            let is_well = self.0.tend();
            let called = self.0.needs_tending.notified();
            if is_well {
                called.await;
            } else {
                let waited = tokio::time::timeout(RETRY, called).await;
                drop(waited);
            }
        }
    }

    async fn keep_synced(&self) {
        let Fsync::Every(period) = self.0.fsync else { return };
        let mut tick = interval(period);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let inner = Arc::clone(&self.0);
            let synced = tokio::task::spawn_blocking(move || inner.sync()).await;
            drop(synced);
        }
    }
}

impl Inner {
    /// Writes the beginnings that waited already when this was called the last time. `true`: others wait. The journal is held
    /// meanwhile: an end that finds its beginning gone comes after it.
    pub(super) fn write_begins(&self) -> bool {
        let mut log = lock(&self.log);
        let others_wait = lock(&self.pending).take(|begin| {
            // Only a crash would have needed it.
            if log.trouble.is_none()
                && let Err(trouble) = log.write(begin, false)
            {
                log.set_trouble(Some(trouble));
            }
        });
        self.look_after(&log);
        others_wait
    }

    /// Puts closed segments into their final form, makes a spare one, and tries again what could not be written. `false`: not
    /// all is well.
    pub(super) fn tend(&self) -> bool {
        let finishing = std::mem::take(&mut lock(&self.log).finishing);
        for live in &finishing {
            if let Err(error) = Self::finish(live) {
                tracing::warn!(segment = live.segment.number, %error, "a segment of the journal keeps more room than it needs");
            }
        }
        let made = self.make_spare();
        let mut log = lock(&self.log);
        let is_end = |frame: &[u8]| is_end(&frame[frame::HEAD..]);
        let trouble = made.and_then(|()| log.write_overflow(is_end)).err();
        log.set_trouble(trouble);
        self.note_taking(&log);
        log.trouble.is_none() && log.spare.is_some()
    }

    fn finish(live: &Live) -> io::Result<()> {
        live.segment.file.set_len(live.at)?;
        live.segment.file.write_all_at(&head(Some(live.ends)), 0)
    }

    /// Makes a spare segment, if there is none. Where there is no room for it, the oldest goes, or no more requests are taken.
    fn make_spare(&self) -> Result<(), Trouble> {
        let mut made_room = true;
        while made_room && self.on_full == OnFull::DropOldest && self.is_full() {
            made_room = self.drop_oldest();
        }
        let (number, directory, size) = {
            let mut log = lock(&self.log);
            if log.spare.is_some() {
                return Ok(());
            }
            if !log.has_room() && !log.may_exceed {
                return Err(Trouble::Full);
            }
            (log.take_number(), log.directory.clone(), log.segment_bytes)
        };
        let spare = files::create(&directory, number, size).map_err(Trouble::of)?;
        if self.fsync != Fsync::Never {
            files::sync_directory(&directory).map_err(Trouble::of)?;
        }
        let mut log = lock(&self.log);
        if log.live.as_ref().is_some_and(|live| live.segment.number > number) {
            // The journal could not wait for it.
            return files::remove(&files::path(&directory, number)).map_err(Trouble::of);
        }
        log.spare = Some(spare);
        Ok(())
    }

    fn is_full(&self) -> bool {
        let log = lock(&self.log);
        log.spare.is_none() && !log.has_room()
    }

    /// Gives up the oldest entries that are not booked.
    fn drop_oldest(&self) -> bool {
        let now_ms = self.now_ms();
        lock(&self.reader).drop_oldest(&self.log, now_ms, |batch| {
            if batch.is_empty() {
                return;
            }
            tracing::error!(
                records = batch.len(),
                "the journal is full ([usage] journal_max): its oldest usage records are dropped, and lost"
            );
            batch.bookings().for_each(|booking| self.lose(&booking));
            self.unbooked_fell(batch.ends());
        })
    }

    /// Syncs to the disk what was written so far.
    pub(super) fn sync(&self) {
        let mut synced = lock(&self.synced);
        let (files, place) = take_unsynced(&mut lock(&self.log));
        let failed = files.values().find_map(|file| file.sync_data().err());
        match failed {
            None => *synced = place.unwrap_or(*synced),
            Some(error) => {
                tracing::error!(%error, "the journal cannot be synced to the disk");
                lock(&self.log).unsynced.extend(files);
            }
        }
    }

    /// Returns when everything before `place` is synced. Whoever waits while another syncs is often spared its own.
    pub(super) fn sync_until(&self, place: Place) {
        if *lock(&self.synced) < place {
            self.sync();
        }
    }

    /// Milliseconds since the journal was opened.
    pub(super) fn now_ms(&self) -> u64 {
        u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// The segments that were not synced, and where the last of them ends.
fn take_unsynced(log: &mut Log) -> (BTreeMap<u64, Arc<File>>, Option<Place>) {
    let mut files = std::mem::take(&mut log.unsynced);
    if let Some(live) = log.live.as_mut().filter(|live| live.is_dirty) {
        live.is_dirty = false;
        files.insert(live.segment.number, Arc::clone(&live.segment.file));
    }
    (files, log.live.as_ref().map(|live| Place { segment: live.segment.number, offset: live.at }))
}

/// Is the entry an end?
pub(super) fn is_end(payload: &[u8]) -> bool {
    matches!(peek(payload), Some((Kind::End | Kind::UncountedEnd, _)))
}
