//! The end of the journal that is written to.
//!
//! An entry is one write at a known place of the live segment. A spare segment stands ready, so that going on to the next is
//! an exchange of two handles. What the disk does not take waits in memory, bounded, in its order; whoever reads the journal
//! reads that too, and it goes to the disk as soon as that works again.

use std::{
    collections::{BTreeMap, VecDeque},
    fs::File,
    io::{self, ErrorKind},
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::Arc,
};

use tollgate_core::journal::{Place, segment};

use super::files::{self, Segment};

/// Bytes of entries that wait in memory while the disk does not take them.
const MAX_OVERFLOW: usize = 32 * 1024 * 1024;

/// What is written to, and what there is.
#[derive(Debug)]
pub(super) struct Log {
    pub(super) directory: PathBuf,
    /// How large a segment is.
    pub(super) segment_bytes: u64,
    /// How much there may be in all.
    pub(super) max_bytes: u64,
    /// May a segment be made although there is too much? Then the oldest goes.
    pub(super) may_exceed: bool,
    /// Is it to be known which closed segments were not synced to the disk?
    pub(super) must_sync: bool,
    /// Number of the next segment.
    pub(super) next: u64,
    pub(super) live: Option<Live>,
    pub(super) spare: Option<Segment>,
    /// Segments that are no longer written to, with their lengths.
    pub(super) closed: BTreeMap<u64, u64>,
    /// Closed ones that are not put into their final form yet.
    pub(super) finishing: Vec<Live>,
    /// Those that are not synced yet, by their numbers: closed ones, and what could not be synced.
    pub(super) unsynced: BTreeMap<u64, Arc<File>>,
    pub(super) overflow: VecDeque<Box<[u8]>>,
    overflow_bytes: usize,
    pub(super) trouble: Option<Trouble>,
}

/// The segment that is written to.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) segment: Segment,
    /// Where the next entry goes.
    pub(super) at: u64,
    /// Ends in it.
    pub(super) ends: u32,
    /// Is there anything that a sync of the disk has not seen?
    pub(super) is_dirty: bool,
}

impl From<Segment> for Live {
    fn from(segment: Segment) -> Self {
        Self { segment, at: segment::HEAD as u64, ends: 0, is_dirty: false }
    }
}

/// Why entries are not taken as they should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// There is as much as there may be.
    Full,
    /// The disk does not take them.
    Disk(String),
}

/// What became of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stored {
    /// It is in a file that ends here.
    Until(Place),
    /// It waits in memory.
    InMemory,
    /// There was no room for it.
    Nowhere,
}

impl Log {
    /// A journal in `directory` with these segments, written to from the segment `next` on.
    pub(super) fn new(directory: PathBuf, closed: BTreeMap<u64, u64>, next: u64) -> Self {
        Self {
            directory,
            segment_bytes: 0,
            max_bytes: 0,
            may_exceed: false,
            must_sync: false,
            next,
            live: None,
            spare: None,
            closed,
            finishing: Vec::new(),
            unsynced: BTreeMap::new(),
            overflow: VecDeque::new(),
            overflow_bytes: 0,
            trouble: None,
        }
    }

    /// Takes an entry.
    pub(super) fn append(&mut self, frame: &[u8], is_end: bool) -> Stored {
        // Later ones must not go before it.
        if self.overflow.is_empty() {
            match self.write(frame, is_end) {
                Ok(place) => return Stored::Until(place),
                Err(trouble) => self.set_trouble(Some(trouble)),
            }
        }
        if self.overflow_bytes + frame.len() > MAX_OVERFLOW {
            return Stored::Nowhere;
        }
        self.overflow_bytes += frame.len();
        self.overflow.push_back(frame.into());
        Stored::InMemory
    }

    /// Writes an entry at the end; where that is then.
    pub(super) fn write(&mut self, frame: &[u8], is_end: bool) -> Result<Place, Trouble> {
        let length = frame.len() as u64;
        if self.live.as_ref().is_none_or(|live| live.at + length > live.segment.size) {
            self.go_on()?;
        }
        let Some(live) = &mut self.live else { return Err(Trouble::Full) };
        live.segment.file.write_all_at(frame, live.at).map_err(Trouble::of)?;
        live.at += length;
        live.ends += u32::from(is_end);
        live.is_dirty = true;
        Ok(Place { segment: live.segment.number, offset: live.at })
    }

    /// Goes on to the next segment: the spare one, or one that is made now.
    pub(super) fn go_on(&mut self) -> Result<(), Trouble> {
        let next = match self.spare.take() {
            Some(spare) => spare,
            None if !self.has_room() && !self.may_exceed => return Err(Trouble::Full),
            None => {
                let number = self.take_number();
                files::create(&self.directory, number, self.segment_bytes).map_err(Trouble::of)?
            }
        };
        if let Some(live) = self.live.replace(next.into()) {
            self.closed.insert(live.segment.number, live.at);
            if self.must_sync && live.is_dirty {
                self.unsynced.insert(live.segment.number, Arc::clone(&live.segment.file));
            }
            self.finishing.push(live);
        }
        Ok(())
    }

    /// A closed segment was removed: nobody needs it on the disk any more. Gives the handle on it that was kept for that.
    pub(super) fn forget(&mut self, number: u64) -> Option<Arc<File>> {
        self.closed.remove(&number);
        self.unsynced.remove(&number)
    }

    /// Is there room for another segment?
    pub(super) fn has_room(&self) -> bool {
        self.bytes() + self.segment_bytes <= self.max_bytes
    }

    /// The number of a segment that is about to be made.
    pub(super) fn take_number(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        number
    }

    /// Bytes on the disk.
    pub(super) fn bytes(&self) -> u64 {
        let open = [self.live.as_ref().map(|live| &live.segment), self.spare.as_ref()];
        open.into_iter().flatten().map(|segment| segment.size).sum::<u64>() + self.closed.values().sum::<u64>()
    }

    /// How much of a segment can be read, and whether that is all there will be.
    pub(super) fn extent(&self, number: u64) -> Option<(u64, bool)> {
        let live = self.live.as_ref().filter(|live| live.segment.number == number);
        live.map(|live| (live.at, false)).or_else(|| self.closed.get(&number).map(|length| (*length, true)))
    }

    /// The segment after another one.
    pub(super) fn after(&self, number: u64) -> Option<u64> {
        let closed = self.closed.range(number + 1..).next().map(|(number, _)| *number);
        closed.or_else(|| self.live.as_ref().map(|live| live.segment.number).filter(|live| *live > number))
    }

    /// Takes out what waits in memory, at most `most` entries.
    pub(super) fn take_overflow(&mut self, most: usize) -> impl Iterator<Item = Box<[u8]>> {
        let count = most.min(self.overflow.len());
        let taken: Vec<_> = self.overflow.drain(..count).collect();
        self.overflow_bytes -= taken.iter().map(|frame| frame.len()).sum::<usize>();
        taken.into_iter()
    }

    /// Writes what waits in memory.
    pub(super) fn write_overflow(&mut self, is_end: impl Fn(&[u8]) -> bool) -> Result<(), Trouble> {
        while let Some(frame) = self.overflow.pop_front() {
            let written = self.write(&frame, is_end(&frame));
            if let Err(trouble) = written {
                self.overflow.push_front(frame);
                return Err(trouble);
            }
            self.overflow_bytes -= frame.len();
        }
        Ok(())
    }

    /// Notes whether entries are taken as they should be. A change is told once, loudly.
    pub(super) fn set_trouble(&mut self, trouble: Option<Trouble>) {
        if self.trouble == trouble {
            return;
        }
        let directory = self.directory.display();
        match &trouble {
            None => tracing::info!(%directory, "the journal takes entries again"),
            Some(Trouble::Full) => tracing::error!(
                %directory,
                bytes = self.bytes(),
                "the journal is full ([usage] journal_max): the database does not take usage fast enough, or not at all"
            ),
            Some(Trouble::Disk(error)) => tracing::error!(
                %directory,
                error,
                "the journal cannot be written ([usage] journal): usage is kept in memory until it can"
            ),
        }
        self.trouble = trouble;
    }
}

impl Trouble {
    pub(super) fn of(error: io::Error) -> Self {
        // The text tells a full disk from a broken one.
        Self::Disk(if error.kind() == ErrorKind::StorageFull {
            "the disk is full".to_owned()
        } else {
            error.to_string()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_that_is_gone_is_not_kept_to_be_synced() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = Log::new(directory.path().to_owned(), BTreeMap::new(), 1);
        (log.segment_bytes, log.max_bytes, log.must_sync) = (4096, 1 << 20, true);
        let (first, second) = (log.write(&[1; 3000], true).unwrap(), log.write(&[2; 3000], true).unwrap());
        assert_eq!((first.segment, second.segment), (1, 2));
        assert!(log.unsynced.contains_key(&1) && log.extent(1).is_some());
        let last = log.forget(1).expect("its handle");
        assert_eq!(log.extent(1), None);
        log.finishing.clear();
        assert_eq!(Arc::strong_count(&last), 1, "the kernel frees the file when its caller is done with it");
        assert!(log.unsynced.is_empty());
    }
}
