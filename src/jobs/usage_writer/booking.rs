//! What the limiter learns when a batch is in the database: the books grow, and what was held is let go.

use std::{collections::HashMap, net::IpAddr};

use tollgate_core::{
    id::{KeyId, UserId},
    limit::{Amount, Month, hold::Hold, network_of},
    usage::{Booked, BookedAddress, UsageRecord},
};

use crate::limiter::Limiter;

/// Tells the limiter what the database has now. Of each record: what it holds, whether it is of this process, and whether it
/// was new.
pub(super) fn book(limiter: &Limiter, records: &[UsageRecord<'_>], holds: &[(Option<Hold>, bool)], is_new: &[bool]) {
    let mut sums = Sums::default();
    for ((record, (hold, is_own)), is_new) in records.iter().zip(holds).zip(is_new) {
        // What this process wrote is handed over once. If it was there all the same, the answer to a commit was lost, and the
        // books do not have it. What an earlier one wrote and was there, the books have from the start.
        if !is_own && !is_new {
            continue;
        }
        let month = Month::of(record.started_at);
        sums.add(month, record);
        match hold {
            Some(hold) if *is_own => limiter.release(record.holder(), hold, Some((month, record.amount()))),
            Some(hold) => limiter.booked_late(record.holder(), hold, month, record.amount()),
            None => {}
        }
    }
    let books = limiter.books();
    for ((month, user, key, model), amount) in sums.keys {
        books.add(month, &Booked { user, key, model: model.to_owned(), amount });
    }
    if limiter.has_quota_of_addresses() {
        for ((month, network), amount) in sums.addresses {
            books.add_address(month, BookedAddress { network, amount });
        }
    }
}

/// What a batch adds to the books.
#[derive(Default)]
struct Sums<'r> {
    keys: HashMap<(Month, UserId, KeyId, &'r str), Amount>,
    addresses: HashMap<(Month, IpAddr), Amount>,
}

impl<'r> Sums<'r> {
    fn add(&mut self, month: Month, record: &'r UsageRecord<'_>) {
        let amount = record.amount();
        let sum = self.keys.entry((month, record.user_id, record.key_id, &record.model)).or_default();
        *sum = sum.plus(amount);
        if let Some(ip) = record.ip {
            let sum = self.addresses.entry((month, network_of(ip))).or_default();
            *sum = sum.plus(amount);
        }
    }
}
