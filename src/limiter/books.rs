//! What the database has booked this month, in memory: a quota is checked against it without a query.
//!
//! Loaded at the start, counted up as the usage writer books, and compared with the database by a job, which also brings
//! in what other replicas booked. The books of last month are kept too: at midnight some replica's clock is late.

use std::{
    collections::HashMap,
    sync::{PoisonError, RwLock},
};

use foldhash::quality::RandomState;
use tokio::sync::{Mutex, MutexGuard};
use tollgate_core::{
    limit::{Amount, Month, Subject},
    usage::{Booked, BookedAddress},
};

/// The sums of this month and of the last.
#[derive(Debug, Default)]
pub struct Books {
    pages: RwLock<Vec<Page>>,
    ledger: Mutex<()>,
}

#[derive(Debug)]
struct Page {
    month: Month,
    sums: Sums,
}

type Sums = HashMap<Subject, Amount, RandomState>;

impl Books {
    /// Held by who writes to the database until the books have it too, and by who compares the two.
    pub async fn ledger(&self) -> MutexGuard<'_, ()> {
        self.ledger.lock().await
    }

    /// What is booked of a subject in a month.
    #[must_use]
    pub fn of(&self, month: Month, subject: &Subject) -> Amount {
        let pages = self.pages.read().unwrap_or_else(PoisonError::into_inner);
        let page = pages.iter().find(|page| page.month == month);
        page.and_then(|page| page.sums.get(subject)).copied().unwrap_or_default()
    }

    /// Adds what has just been booked.
    pub fn add(&self, month: Month, booked: &Booked) {
        self.add_to(month, subjects(booked), booked.amount);
    }

    /// Adds what has just been booked of an address.
    pub fn add_address(&self, month: Month, booked: BookedAddress) {
        self.add_to(month, [Subject::Ip(booked.network)], booked.amount);
    }

    /// Puts what the database has in place of what is known of the users in `rows`; returns how many sums differed.
    pub fn correct(&self, month: Month, rows: &[Booked]) -> usize {
        let mut truth = Sums::default();
        for row in rows {
            add_each(&mut truth, subjects(row), row.amount);
        }
        self.replace(month, truth)
    }

    /// The same for the addresses in `rows`.
    pub fn correct_addresses(&self, month: Month, rows: &[BookedAddress]) -> usize {
        self.replace(month, rows.iter().map(|row| (Subject::Ip(row.network), row.amount)).collect())
    }

    fn add_to(&self, month: Month, subjects: impl IntoIterator<Item = Subject>, amount: Amount) {
        if amount.is_zero() {
            return;
        }
        let mut pages = self.pages.write().unwrap_or_else(PoisonError::into_inner);
        add_each(&mut page(&mut pages, month).sums, subjects, amount);
    }

    fn replace(&self, month: Month, truth: Sums) -> usize {
        let mut pages = self.pages.write().unwrap_or_else(PoisonError::into_inner);
        let page = page(&mut pages, month);
        let mut differed = 0;
        for (subject, amount) in truth {
            differed += usize::from(page.sums.insert(subject, amount).unwrap_or_default() != amount);
        }
        differed
    }
}

/// Whose sums a row belongs to.
fn subjects(row: &Booked) -> [Subject; 3] {
    [
        Subject::User(row.user),
        Subject::Key(row.user, row.key),
        Subject::KeyModel(row.user, row.key, row.model.as_str().into()),
    ]
}

fn add_each(sums: &mut Sums, subjects: impl IntoIterator<Item = Subject>, amount: Amount) {
    for subject in subjects {
        let sum = sums.entry(subject).or_default();
        *sum = sum.plus(amount);
    }
}

/// The page of a month. A new month takes the place of the older of two.
fn page(pages: &mut Vec<Page>, month: Month) -> &mut Page {
    if let Some(index) = pages.iter().position(|page| page.month == month) {
        return &mut pages[index];
    }
    if pages.len() == 2 {
        let older = usize::from(pages[1].month < pages[0].month);
        pages.remove(older);
    }
    pages.push(Page { month, sums: Sums::default() });
    let last = pages.len() - 1;
    &mut pages[last]
}

#[cfg(test)]
mod tests {
    use super::*;
    use tollgate_core::id::{KeyId, UserId};

    fn row(key: i64, model: &str, tokens: u64) -> Booked {
        let amount = Amount { tokens, nano_usd: 2 * tokens };
        Booked { user: UserId(1), key: KeyId(key), model: model.to_owned(), amount }
    }

    #[test]
    fn a_row_counts_for_user_key_and_model() {
        let (books, month) = (Books::default(), Month(5));
        assert_eq!(books.correct(month, &[row(1, "a", 10), row(1, "b", 5), row(2, "a", 1)]), 6);
        books.add(month, &row(1, "a", 100));
        let of = |subject| books.of(month, &subject).tokens;
        assert_eq!(of(Subject::User(UserId(1))), 116);
        assert_eq!(of(Subject::Key(UserId(1), KeyId(1))), 115);
        assert_eq!(of(Subject::KeyModel(UserId(1), KeyId(1), "a".into())), 110);
        assert_eq!(books.correct(month, &[row(1, "a", 110), row(1, "b", 5), row(2, "a", 1)]), 0, "no drift");
        assert_eq!(books.correct(month, &[row(1, "a", 90), row(1, "b", 5), row(2, "a", 1)]), 3);
        assert_eq!(of(Subject::Key(UserId(1), KeyId(1))), 95, "the database is right");
    }

    #[test]
    fn an_address_has_sums_of_its_own() {
        let (books, month) = (Books::default(), Month(5));
        let booked = |tokens| BookedAddress {
            network: "10.0.0.1".parse().unwrap(),
            amount: Amount { tokens, nano_usd: 2 * tokens },
        };
        let of = |ip: &str| books.of(month, &Subject::of_ip(ip.parse().unwrap())).tokens;
        books.add_address(month, booked(10));
        books.add_address(month, booked(5));
        assert_eq!((of("10.0.0.1"), of("10.0.0.2")), (15, 0));
        assert_eq!(books.correct_addresses(month, &[booked(15)]), 0);
        assert_eq!(books.correct_addresses(month, &[booked(20)]), 1);
        assert_eq!(of("10.0.0.1"), 20, "the database is right");
    }

    #[test]
    fn a_month_begins_with_nothing_and_the_last_is_remembered() {
        let books = Books::default();
        books.add(Month(5), &row(1, "a", 10));
        let of = |month| books.of(month, &Subject::Key(UserId(1), KeyId(1))).tokens;
        assert_eq!(of(Month(6)), 0);
        books.add(Month(6), &row(1, "a", 1));
        assert_eq!((of(Month(5)), of(Month(6))), (10, 1));
        books.add(Month(7), &row(1, "a", 2));
        assert_eq!((of(Month(5)), of(Month(6)), of(Month(7))), (0, 1, 2));
    }
}
