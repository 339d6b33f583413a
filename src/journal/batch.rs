//! What is taken from the journal to be booked.
//!
//! The entries are copied from the file as they are, and read again each time they are written: a batch owns its bytes and
//! nothing else, whatever becomes of the file meanwhile.

use std::slice;

use tollgate_core::{
    journal::entry::{Begin, Count, End, Kind, peek},
    limit::hold::Hold,
    usage::UsageRecord,
};

/// Bytes of memory that a batch keeps for the next one: two batches of usual entries.
const MAX_KEPT: usize = 8 * 1024 * 1024;

/// Entries that become rows together.
#[derive(Debug, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    rows: Vec<Row>,
    ends: usize,
}

#[derive(Debug)]
struct Row {
    /// Where in `bytes` it ends.
    end: usize,
    count: Option<Count>,
    is_own: bool,
}

/// The rows of a batch, each read when it is asked for. Their entries were intact, so one that cannot be read is a defect; it
/// is told, and left out.
#[derive(Clone, Debug)]
pub struct Bookings<'b> {
    bytes: &'b [u8],
    rows: slice::Iter<'b, Row>,
    /// Where in `bytes` the next one begins.
    start: usize,
}

/// A row, and what it is to the limiter.
#[derive(Debug)]
pub struct Booking<'b> {
    /// The row.
    pub record: UsageRecord<'b>,
    /// What it holds of quotas.
    pub hold: Option<Hold>,
    /// Is it of a request of this process? Holds of others are gone with their processes.
    pub is_own: bool,
}

impl<'b> From<Booking<'b>> for UsageRecord<'b> {
    fn from(booking: Booking<'b>) -> Self {
        booking.record
    }
}

impl Batch {
    /// How many rows there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Is there none?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Ends among them; the others are beginnings whose ends never came.
    pub(super) fn ends(&self) -> usize {
        self.ends
    }

    /// Forgets the rows, but keeps the memory, unless it is unusually much.
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.bytes.shrink_to(MAX_KEPT);
        self.rows.clear();
        self.ends = 0;
    }

    /// Adds the entry of a row; `count` takes the place of its rough numbers.
    pub(super) fn push(&mut self, payload: &[u8], count: Option<Count>, is_own: bool) {
        self.bytes.extend_from_slice(payload);
        self.rows.push(Row { end: self.bytes.len(), count, is_own });
        self.ends += usize::from(!matches!(peek(payload), Some((Kind::Begin, _))));
    }

    /// The rows.
    #[must_use]
    pub fn bookings(&self) -> Bookings<'_> {
        Bookings { bytes: &self.bytes, rows: self.rows.iter(), start: 0 }
    }
}

impl<'b> Iterator for Bookings<'b> {
    type Item = Booking<'b>;

    fn next(&mut self) -> Option<Booking<'b>> {
        loop {
            let row = self.rows.next()?;
            let payload = &self.bytes[self.start..row.end];
            self.start = row.end;
            match booking(payload, row) {
                None => tracing::error!("an entry of the journal cannot be understood; it is left out"),
                known => return known,
            }
        }
    }
}

fn booking<'b>(payload: &'b [u8], row: &Row) -> Option<Booking<'b>> {
    if let Some(begin) = Begin::read(payload) {
        return Some(Booking { record: begin.interrupted(), hold: None, is_own: row.is_own });
    }
    let End { mut record, hold, .. } = End::read(payload)?;
    if let Some(count) = row.count {
        (record.usage, record.cost_nano_usd) = (count.usage, count.cost_nano_usd);
    }
    Some(Booking { record, hold, is_own: row.is_own })
}
