//! Files of the journal: making them, opening them, and the note of how far they are booked.
//!
//! Space is taken from the disk when a segment is made, as far as the file system can do that, so that a disk that fills up
//! shows there and not in the middle of an answer. Everything is for the eyes of its owner alone.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, ErrorKind, Write},
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};
use tollgate_core::journal::{
    Place,
    segment::{NOTE, head, name_of, note, read_note},
};

/// The file that is locked as long as a process uses the directory.
pub(super) const LOCK: &str = "lock";
/// The file with the note of how far the journal is booked.
const POSITION: &str = "position";
/// The file with the beginnings whose segments are gone.
const OPEN: &str = "open";

/// A segment that can be written to.
#[derive(Clone, Debug)]
pub(super) struct Segment {
    pub(super) number: u64,
    pub(super) file: Arc<File>,
    /// Bytes that it may have.
    pub(super) size: u64,
}

/// The file of a segment.
pub(super) fn path(directory: &Path, number: u64) -> PathBuf {
    directory.join(name_of(number))
}

/// Makes a directory, and those above it.
pub(super) fn make_directory(directory: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)
}

/// Makes a segment with all the room that it will need. One that cannot be made leaves nothing.
pub(super) fn create(directory: &Path, number: u64, size: u64) -> io::Result<Segment> {
    let path = path(directory, number);
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    let made = preallocate(&file, size).and_then(|()| file.write_all_at(&head(None), 0));
    if let Err(error) = made {
        // What remains is an empty segment, which is read as one.
        let _ = fs::remove_file(&path);
        return Err(error);
    }
    Ok(Segment { number, file: Arc::new(file), size })
}

fn preallocate(file: &File, size: u64) -> io::Result<()> {
    loop {
        match fallocate(file, FallocateFlags::empty(), 0, size) {
            Err(Errno::INTR) => {}
            // The file system cannot do it: the file grows as it is written.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(()),
            done => return done.map_err(io::Error::from),
        }
    }
}

/// Makes the names of new files last.
pub(super) fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// The note of how far the journal is booked.
#[derive(Debug)]
pub(super) struct Position(File);

impl Position {
    pub(super) fn open(directory: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600).open(directory.join(POSITION)).map(Self)
    }

    /// What it says. Nothing is booked, as far as can be told, if it is damaged: then all is handed over again.
    pub(super) fn read(&self) -> Place {
        let mut bytes = [0; NOTE];
        self.0.read_exact_at(&mut bytes, 0).ok().and_then(|()| read_note(&bytes)).unwrap_or_default()
    }

    pub(super) fn write(&self, place: Place) -> io::Result<()> {
        self.0.write_all_at(&note(place), 0)
    }
}

/// What [`keep_open`] wrote; nothing if there is none.
pub(super) fn read_open(directory: &Path) -> io::Result<Vec<u8>> {
    match fs::read(directory.join(OPEN)) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        read => read,
    }
}

/// Keeps the frames of beginnings whose segments are about to go, instead of those that were kept before.
pub(super) fn keep_open(directory: &Path, frames: &[u8], must_last: bool) -> io::Result<()> {
    if frames.is_empty() {
        return remove(&directory.join(OPEN));
    }
    let new = directory.join("open.new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(frames)?;
    if must_last {
        file.sync_data()?;
    }
    fs::rename(&new, directory.join(OPEN))
}

/// Removes a file, if it is there.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}
