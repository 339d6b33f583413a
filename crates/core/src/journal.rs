//! The journal's form: what stands in its files, how that is read again whatever happened to them, and what follows from it.
//!
//! Usage is written to files of this machine before the database gets it. A file is a *segment*: a head, then *frames*, each
//! with its length and checksum, each holding one *entry* about one request. Segments are numbered; every process begins a
//! new one, so a number tells whether an entry is of this process or of one before it.
//!
//! | module | what it holds |
//! |---|---|
//! | [`segment`] | names and heads of files, and the note of how far they are booked |
//! | [`frame`] | frames, and finding the intact ones among whatever else there is |
//! | [`entry`] | the three kinds of entries |
//! | [`pending`] | beginnings that are not written yet, because their ends may come first |
//! | [`track`] | which entries become rows, and which still wait for another |
//!
//! Everything here is a function of bytes and numbers; files, clocks and locks are `src/journal.rs`'s.

mod bytes;
pub mod entry;
pub mod frame;
pub mod pending;
pub mod segment;
pub mod track;

/// A place in the journal. Later ones are greater.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// Number of the segment.
    pub segment: u64,
    /// Bytes from its beginning.
    pub offset: u64,
}
