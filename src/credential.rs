//! Credentials that come from a file of their own, such as a mounted one: read at the start, and again when it changes.
//!
//! Whether a file changed is told from what the system keeps about it, without reading it. Times of files are coarse, so a change
//! right after another one may look like no change; that is why a file that was touched just now is read again until its time is
//! older than that. What is in the file is checked before it is used, and is wiped from memory wherever it passes.

use std::{
    fs::{self, File, Metadata},
    io::Read,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use tollgate_core::secret::{Secret, Unsendable};
use zeroize::Zeroizing;

/// Longest credential that is read, in bytes.
const MAX_BYTES: u64 = 16 * 1024;
/// How old the time of a file must be before an equal time means that nothing changed.
const SETTLED: Duration = Duration::from_secs(2);

/// Reads a credential: the file holds nothing else, but for a line break at its end.
///
/// # Errors
/// A sentence that names the file and the mend, and never what is in it.
pub fn read(path: &Path) -> Result<Secret, String> {
    let shown = path.display();
    let about = |error: std::io::Error| format!("{shown} cannot be read: {error}");
    // Looked at first, because opening a pipe would wait for somebody to write.
    let length = match fs::metadata(path).map_err(about)? {
        found if found.is_file() => found.len(),
        _ => return Err(format!("{shown} is no regular file: name the file that holds the credential")),
    };
    // Large enough from the start: a buffer that grows leaves copies behind.
    let capacity = usize::try_from(length.min(MAX_BYTES)).unwrap_or_default() + 1;
    let mut bytes = Zeroizing::new(Vec::with_capacity(capacity));
    File::open(path).and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes)).map_err(about)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(format!("{shown} is larger than {MAX_BYTES} bytes, so it cannot be the right file"));
    }
    while bytes.last().is_some_and(|last| matches!(last, b'\n' | b'\r')) {
        bytes.pop();
    }
    tollgate_core::secret::check_sendable(&bytes).map_err(|unsendable| match unsendable {
        Unsendable::Empty => format!("{shown} is empty: write the provider's secret into it"),
        Unsendable::NotPrintable => format!("{shown} {unsendable}: it must hold the secret and nothing else"),
    })?;
    // What is printable ASCII is a text.
    Ok(Secret::new(String::from_utf8(std::mem::take(&mut *bytes)).unwrap_or_default()))
}

/// A file whose changes are noticed.
#[derive(Debug)]
pub struct Watched {
    path: PathBuf,
    /// As it was at the last look; `None`: whatever it is then, it is read at the next one.
    seen: Option<Seen>,
}

/// What the system keeps about a file; `Gone`: there is none, or it may not be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Gone,
    There { device: u64, inode: u64, length: u64, modified: (i64, i64), changed: (i64, i64) },
}

impl Seen {
    fn of(found: &Metadata) -> Self {
        Self::There {
            device: found.dev(),
            inode: found.ino(),
            length: found.len(),
            modified: (found.mtime(), found.mtime_nsec()),
            // Unlike the time of the content, nobody can set this one back.
            changed: (found.ctime(), found.ctime_nsec()),
        }
    }

    fn is_settled(self, now: SystemTime) -> bool {
        let Self::There { changed: (seconds, _), .. } = self else { return true };
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or_default());
        // The clock of a file server may be ahead of ours.
        let apart = now.duration_since(at).unwrap_or_else(|ahead| ahead.duration());
        apart > SETTLED
    }
}

impl Watched {
    /// Nothing of the file at `path` is known yet, so the first look reads it.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path, seen: None }
    }

    /// What is in the file, if it may have changed since the last look.
    pub fn look(&mut self, now: SystemTime) -> Option<Result<Secret, String>> {
        let seen = fs::metadata(&self.path).map_or(Seen::Gone, |found| Seen::of(&found));
        if self.seen == Some(seen) {
            return None;
        }
        self.seen = Some(seen).filter(|seen| seen.is_settled(now));
        Some(read(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So late that every file has settled.
    fn late() -> SystemTime {
        SystemTime::now() + Duration::from_secs(60)
    }

    #[test]
    fn a_file_holds_a_credential_and_at_most_a_line_break() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        let with = |content: &str| {
            fs::write(&path, content).unwrap();
            read(&path)
        };
        for good in ["sk-1", "sk-1\n", "sk-1\r\n", "sk-1\n\n"] {
            assert_eq!(with(good).unwrap().expose(), "sk-1", "{good:?}");
        }
        let long = "x".repeat(20_000);
        for (bad, says) in [
            ("", "is empty: write"),
            ("\n", "is empty: write"),
            ("sk 1", "it must hold the secret and nothing else"),
            ("sk-1\nsk-2\n", "it must hold the secret and nothing else"),
            (" sk-1", "contains white space"),
            ("sk-\u{e9}", "cannot be sent in a header"),
            (&long, "is larger than 16384 bytes"),
        ] {
            let message = with(bad).unwrap_err();
            assert!(message.contains(says) && message.contains("/key "), "{bad:?}: {message}");
            assert!(!message.contains("sk"), "{message}");
        }
        let message = read(directory.path()).unwrap_err();
        assert!(message.contains("is no regular file"), "{message}");
        fs::remove_file(&path).unwrap();
        assert!(read(&path).unwrap_err().contains("cannot be read: No such file"));
    }

    #[test]
    fn a_file_is_read_when_it_changes_and_not_otherwise() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        fs::write(&path, "sk-1\n").unwrap();
        let mut watched = Watched::new(path.clone());
        let read = |watched: &mut Watched, now| {
            watched.look(now).map(|read| read.map_or_else(|_| "bad".to_owned(), |secret| secret.expose().to_owned()))
        };
        assert_eq!(read(&mut watched, late()).as_deref(), Some("sk-1"), "the first look reads");
        assert_eq!(read(&mut watched, late()), None);
        // In place, with the same length; the system's clock has gone on by then.
        std::thread::sleep(Duration::from_millis(20));
        fs::write(&path, "sk-2\n").unwrap();
        assert_eq!(read(&mut watched, late()).as_deref(), Some("sk-2"));
        assert_eq!(read(&mut watched, late()), None);
        // Replaced by another file, as mounted secrets are.
        fs::write(directory.path().join("new"), "sk-3").unwrap();
        fs::rename(directory.path().join("new"), &path).unwrap();
        assert_eq!(read(&mut watched, late()).as_deref(), Some("sk-3"));
        fs::remove_file(&path).unwrap();
        assert_eq!(read(&mut watched, late()).as_deref(), Some("bad"));
        assert_eq!(read(&mut watched, late()), None, "that it is gone is told once");
        fs::write(&path, "sk-4").unwrap();
        assert_eq!(read(&mut watched, late()).as_deref(), Some("sk-4"));
    }

    #[test]
    fn a_file_that_was_touched_just_now_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        fs::write(&path, "sk-1").unwrap();
        let mut watched = Watched::new(path);
        assert!(watched.look(SystemTime::now()).is_some());
        assert!(watched.look(SystemTime::now()).is_some(), "the next change may carry the same time");
        assert!(watched.look(late()).is_some());
        assert!(watched.look(late()).is_none());
    }
}
