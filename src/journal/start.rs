//! Opening the journal: what can fail fails here, before a request is accepted, with the setting and the mend.
//!
//! A disk that is full is no reason not to start: the database may well be there, and what it takes frees the disk.
//!
//! Segments that a process left in the middle of its work have room that nobody will use. They are put into their final form,
//! so that one which starts and dies again and again does not fill the disk with nothing.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, ErrorKind, Read},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

use anyhow::{Context, bail};
use tollgate_core::journal::{
    Place,
    segment::{self, Head, number_of, read_head},
};

use super::{
    files::{self, LOCK, Position},
    log::{Log, Trouble},
    reader::Reader,
    scanner::Scanner,
    upkeep::is_end,
};

/// A journal that was opened.
pub(super) struct Opened {
    /// Locked as long as it is open.
    pub(super) lock: File,
    pub(super) log: Log,
    pub(super) reader: Reader,
    /// Ends of earlier processes that are not booked.
    pub(super) backlog: u64,
}

/// Opens the journal in `directory`, and begins a new segment.
///
/// # Errors
/// What is wrong with the directory, and the mend.
pub(super) fn open(directory: &Path, segment_bytes: u64, must_last: bool) -> anyhow::Result<Opened> {
    let lock = lock(directory)?;
    let mut closed = existing(directory)?;
    let newest = closed.last_key_value().map_or(0, |(number, _)| *number);
    closed.retain(|number, length| finish(directory, *number, length));
    let cannot_use = || format!("[usage] journal: {} cannot be used", directory.display());
    let position = Position::open(directory).with_context(cannot_use)?;
    let open = files::read_open(directory).with_context(cannot_use)?;
    let booked = position.read();
    let backlog = closed.iter().map(|(number, length)| ends_after(directory, *number, *length, booked)).sum();
    let next = newest.max(booked.segment) + 1;
    let reader = Reader::new(directory.to_owned(), position, next, &open, must_last);
    let mut log = Log::new(directory.to_owned(), closed, next);
    log.segment_bytes = segment_bytes;
    match files::create(directory, log.take_number(), segment_bytes) {
        Ok(segment) => log.live = Some(segment.into()),
        Err(error) if error.kind() == ErrorKind::StorageFull => log.set_trouble(Some(Trouble::of(error))),
        Err(error) => return Err(error).with_context(|| unusable(directory)),
    }
    Ok(Opened { lock, log, reader, backlog })
}

fn unusable(directory: &Path) -> String {
    let directory = directory.display();
    format!(
        "[usage] journal: {directory} cannot be written to: usage is kept there until the database has it, so make the \
         directory writable, or name another one"
    )
}

/// Makes sure of the directory, and that nobody else uses it.
fn lock(directory: &Path) -> anyhow::Result<File> {
    files::make_directory(directory).with_context(|| unusable(directory))?;
    let path = directory.join(LOCK);
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = file.with_context(|| unusable(directory))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!(
            "[usage] journal: {} is in use by another process, which would mix its entries with ours: stop it, or name another \
             directory for this one",
            directory.display()
        ),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| unusable(directory)),
    }
}

/// The segments that are there, with their lengths.
fn existing(directory: &Path) -> anyhow::Result<BTreeMap<u64, u64>> {
    let cannot_read = || format!("[usage] journal: {} cannot be read", directory.display());
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(directory).with_context(cannot_read)? {
        let entry = entry.with_context(cannot_read)?;
        let Some(number) = entry.file_name().to_str().and_then(number_of) else { continue };
        let length = entry.metadata().with_context(cannot_read)?.len();
        if let Head::Newer(version) = head_of(&entry.path()) {
            bail!(
                "[usage] journal: {} has version {version}, which a newer tollgate wrote: start that one until everything in it \
                 is in the database, or name another directory",
                entry.path().display()
            );
        }
        found.insert(number, length);
    }
    Ok(found)
}

/// One that cannot be read is damaged, which is seen when it is read.
fn head_of(path: &Path) -> Head {
    let mut head = [0; segment::HEAD];
    let read: io::Result<()> = File::open(path).and_then(|mut file| file.read_exact(&mut head));
    read.map_or(Head::Damaged, |()| read_head(&head))
}

/// Puts a segment into its final form, if it is not; `false`: there was nothing in it, and it is gone.
fn finish(directory: &Path, number: u64, length: &mut u64) -> bool {
    let path = files::path(directory, number);
    if head_of(&path) != Head::Known(None) {
        return true;
    }
    let Ok(mut scanner) = Scanner::open(&path, *length) else { return true };
    let (mut ends, mut until) = (0, segment::HEAD as u64);
    while let Some((_, payload)) = scanner.next() {
        ends += u32::from(is_end(&scanner.bytes()[payload]));
        until = scanner.at();
    }
    let is_empty = until == segment::HEAD as u64;
    if scanner.take_damaged() > 0 {
        // Whoever reads it will tell.
        return true;
    }
    let finished = if is_empty { files::remove(&path) } else { cut(&path, until, ends) };
    match finished {
        Ok(()) => *length = until,
        Err(error) => {
            tracing::warn!(segment = number, %error, "a segment of the journal keeps more room than it needs");
        }
    }
    !is_empty
}

fn cut(path: &Path, until: u64, ends: u32) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    file.set_len(until)?;
    file.write_all_at(&segment::head(Some(ends)), 0)
}

/// Ends in a segment that are not booked.
fn ends_after(directory: &Path, number: u64, length: u64, booked: Place) -> u64 {
    let path = files::path(directory, number);
    match head_of(&path) {
        _ if number < booked.segment => 0,
        Head::Known(Some(ends)) if number > booked.segment => ends.into(),
        _ => count_ends(&path, length, Place { segment: number, offset: 0 }, booked),
    }
}

fn count_ends(path: &Path, length: u64, mut place: Place, booked: Place) -> u64 {
    let Ok(mut scanner) = Scanner::open(path, length) else { return 0 };
    let mut ends = 0;
    while let Some((offset, payload)) = scanner.next() {
        place.offset = offset;
        ends += u64::from(is_end(&scanner.bytes()[payload]) && place >= booked);
    }
    ends
}
