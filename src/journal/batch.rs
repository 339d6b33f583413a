//! What is taken from the journal to be booked.
//!
//! The entries are copied from the file as they are, and read again each time they are written: a batch owns its bytes and
//! nothing else, whatever becomes of the file meanwhile.

use tollgate_core::{
    journal::entry::{Begin, Count, End, Kind, peek},
    limit::hold::Hold,
    usage::UsageRecord,
};

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

    /// Adds the entry of a row; `count` takes the place of its rough numbers.
    pub(super) fn push(&mut self, payload: &[u8], count: Option<Count>, is_own: bool) {
        self.bytes.extend_from_slice(payload);
        self.rows.push(Row { end: self.bytes.len(), count, is_own });
        self.ends += usize::from(!matches!(peek(payload), Some((Kind::Begin, _))));
    }

    /// The rows. Their entries were intact, so one that cannot be read is a defect; it is told, and left out.
    pub fn bookings(&self) -> impl Iterator<Item = Booking<'_>> {
        let starts = std::iter::once(0).chain(self.rows.iter().map(|row| row.end));
        self.rows.iter().zip(starts).filter_map(|(row, start)| {
            let booking = booking(&self.bytes[start..row.end], row);
            if booking.is_none() {
                tracing::error!("an entry of the journal cannot be understood; it is left out");
            }
            booking
        })
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
