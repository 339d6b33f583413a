//! Reads the frames of one segment, whatever happened to it.
//!
//! What is damaged is left out, counted, and told in the log; reading goes on with the next intact frame. A sector that the
//! disk cannot read is damage like any other.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt, path::Path};

use tollgate_core::journal::{
    frame::{HEAD, Step, step},
    segment::{self, Head, read_head},
};

/// How much is read at once. While the kernel copies it, nobody else gets the core.
const CHUNK: usize = 64 * 1024;
/// How much is left out where the disk cannot be read.
const SECTOR: usize = 4096;

/// A segment that is being read.
#[derive(Debug)]
pub(super) struct Scanner {
    file: File,
    name: String,
    bytes: Vec<u8>,
    /// Where in `bytes` what was not looked at yet begins.
    start: usize,
    /// Where in the file that is.
    at: u64,
    /// How far the file may be read.
    until: u64,
    /// Damaged bytes since the last frame.
    damaged: u64,
    /// All of them, until they are asked for.
    all_damaged: u64,
}

impl Scanner {
    /// Reads the segment in the file `path`, its first `until` bytes.
    pub(super) fn open(path: &Path, until: u64) -> io::Result<Self> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let file = File::open(path)?;
        let mut scanner = Self { file, name, bytes: Vec::new(), start: 0, at: 0, until: 0, damaged: 0, all_damaged: 0 };
        scanner.extend(until);
        let mut head = [0; segment::HEAD];
        let is_read = until >= head.len() as u64 && scanner.file.read_exact_at(&mut head, 0).is_ok();
        if is_read && read_head(&head) != Head::Damaged {
            scanner.at = head.len() as u64;
        }
        Ok(scanner)
    }

    /// Lets it read on: there are `until` bytes now.
    pub(super) fn extend(&mut self, until: u64) {
        self.until = self.until.max(until);
    }

    /// How far it has read.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// Where in [`bytes`](Self::bytes) the next payload is, and where its frame begins in the file; `None`: there is none so far.
    pub(super) fn next(&mut self) -> Option<(u64, Range<usize>)> {
        loop {
            let has_all = self.at + (self.bytes.len() - self.start) as u64 >= self.until;
            match step(&self.bytes[self.start..], has_all) {
                Step::Frame(length) => {
                    let frame = self.start..self.start + length;
                    let at = self.at;
                    self.pass(length);
                    self.tell_damage();
                    return Some((at, frame.start + HEAD..frame.end));
                }
                Step::Skip(length) => {
                    let skipped = &self.bytes[self.start..self.start + length];
                    // Room that was never written to is no damage.
                    if skipped.iter().any(|byte| *byte != 0) {
                        self.damaged += length as u64;
                    }
                    self.pass(length);
                }
                Step::More if has_all => {
                    self.tell_damage();
                    return None;
                }
                Step::More => self.fill(),
            }
        }
    }

    /// What was read last.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Damaged bytes that were found since the last call.
    pub(super) fn take_damaged(&mut self) -> u64 {
        std::mem::take(&mut self.all_damaged)
    }

    fn pass(&mut self, length: usize) {
        self.start += length;
        self.at += length as u64;
    }

    fn fill(&mut self) {
        self.bytes.drain(..self.start);
        self.start = 0;
        let (known, from) = (self.bytes.len(), self.at + self.bytes.len() as u64);
        let most = usize::try_from(self.until.saturating_sub(from)).unwrap_or(CHUNK).min(CHUNK);
        self.bytes.resize(known + most, 0);
        match self.file.read_at(&mut self.bytes[known..], from) {
            Ok(0) => {
                // The file is shorter than it was.
                self.bytes.truncate(known);
                self.until = from;
            }
            Ok(read) => self.bytes.truncate(known + read),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => self.bytes.truncate(known),
            Err(error) => {
                tracing::error!(segment = self.name, offset = from, %error, "a part of the journal cannot be read");
                let unread = most.min(SECTOR);
                self.bytes.truncate(known + unread);
                self.bytes[known..].fill(0);
                self.damaged += unread as u64;
            }
        }
    }

    fn tell_damage(&mut self) {
        let bytes = std::mem::take(&mut self.damaged);
        if bytes > 0 {
            self.all_damaged += bytes;
            let before = self.at;
            tracing::warn!(segment = self.name, before, bytes, "a damaged part of the journal is left out");
        }
    }
}

#[cfg(test)]
mod tests {
    use tollgate_core::journal::frame::put;

    use super::*;

    #[test]
    fn intact_frames_are_read_and_damage_is_counted() {
        let mut bytes = segment::head(None).to_vec();
        let mut ends = Vec::new();
        for n in 0..2_000_u16 {
            put(&mut bytes, |out| out.extend(std::iter::repeat_n(n.to_le_bytes(), 150).flatten()));
            ends.push(bytes.len());
        }
        bytes[ends[10] + 30] ^= 1;
        bytes[ends[1_500]..ends[1_502]].fill(0);
        bytes.extend([0; 5_000]);
        bytes[ends[1_999] + 9] = 7;
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        let mut scanner = Scanner::open(file.path(), segment::HEAD as u64).unwrap();
        let mut found = Vec::new();
        // It is written while it is read, and then longer than it was said to be.
        for until in [ends[3], ends[4], ends[1_700], bytes.len() + 9] {
            scanner.extend(until as u64);
            while let Some((_, payload)) = scanner.next() {
                let payload = &scanner.bytes()[payload];
                found.push(u16::from_le_bytes([payload[0], payload[1]]));
            }
        }
        let expected: Vec<u16> = (0..2_000).filter(|n| ![11, 1_501, 1_502].contains(n)).collect();
        assert_eq!(found, expected);
        assert_eq!((scanner.take_damaged(), scanner.take_damaged()), (310 + 5_000, 0));
    }
}
