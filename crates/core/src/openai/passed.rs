//! Passing on what is left of a chunk without copying it, if that is possible.

use std::ops::Range;

use bytes::Bytes;

/// What is passed on of one chunk: a slice of it where that is possible, a copy where something was taken out.
pub(super) struct Passed<'c> {
    pub(super) chunk: &'c Bytes,
    /// Where the part of the chunk begins that has been neither passed on nor dropped.
    pub(super) undecided: usize,
    /// The last passed part of the chunk; not yet in `copied`.
    run: Range<usize>,
    /// What was passed on before it.
    copied: Vec<u8>,
}

impl<'c> Passed<'c> {
    pub(super) fn new(chunk: &'c Bytes) -> Self {
        Self { chunk, undecided: 0, run: 0..0, copied: Vec::new() }
    }

    /// Passes the undecided part up to `end`.
    pub(super) fn pass_until(&mut self, end: usize) {
        if self.undecided == self.run.end {
            self.run.end = end;
        } else if self.undecided < end {
            self.flush();
            self.run = self.undecided..end;
        }
        self.undecided = end;
    }

    /// Passes bytes that were held back of earlier chunks. They come before anything of this one.
    pub(super) fn pass_held(&mut self, held: Vec<u8>) {
        debug_assert!(self.copied.is_empty() && self.run.is_empty(), "held bytes must come first");
        self.copied = held;
    }

    fn flush(&mut self) {
        if self.copied.is_empty() && !self.run.is_empty() {
            self.copied.reserve(self.chunk.len());
        }
        self.copied.extend_from_slice(&self.chunk[self.run.clone()]);
    }

    pub(super) fn finish(mut self) -> Bytes {
        if self.copied.is_empty() {
            return self.chunk.slice(self.run);
        }
        self.flush();
        Bytes::from(self.copied)
    }
}
