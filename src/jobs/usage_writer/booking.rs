//! What the limiter learns when a batch is in the database: the books grow, and what was held is let go.

use tollgate_core::{
    limit::{Month, network_of},
    usage::{Booked, BookedAddress, UsageRecord},
};

use crate::{journal::Booking, limiter::Limiter};

/// Tells the limiter what the database has now, and of each row whether it was new.
pub(super) fn book<'b>(limiter: &Limiter, bookings: impl Iterator<Item = (Booking<'b>, bool)>) {
    for (Booking { record, hold, is_own }, is_new) in bookings {
        let record = &record;
        // What this process wrote is handed over once. If it was there all the same, the answer to a commit was lost, and the
        // books do not have it. What an earlier one wrote and was there, the books have from the start.
        if !is_own && !is_new {
            continue;
        }
        let (month, amount) = (Month::of(record.started_at), record.amount());
        match hold {
            Some(hold) if is_own => {
                limiter.release(record.holder(), &hold, Some((month, amount)), || add(limiter, month, record));
            }
            Some(hold) => {
                add(limiter, month, record);
                limiter.booked_late(record.holder(), &hold, month, amount);
            }
            None => add(limiter, month, record),
        }
    }
}

fn add(limiter: &Limiter, month: Month, record: &UsageRecord<'_>) {
    let (books, amount) = (limiter.books(), record.amount());
    books.add(month, &Booked { user: record.user_id, key: record.key_id, model: record.model.to_string(), amount });
    if let Some(ip) = record.ip.filter(|_| limiter.has_quota_of_addresses()) {
        books.add_address(month, BookedAddress { network: network_of(ip), amount });
    }
}
