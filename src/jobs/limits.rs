//! Keeps what limits and quotas are checked against true.
//!
//! The books in memory are counted up as usage is written. Here they are compared with the database: what other replicas
//! booked comes in, and should any sum have drifted, the database is right. With Redis, what Redis has booked is compared
//! too; because a replica may be between its commit and telling Redis, a difference must be seen twice to count as drift.

use std::{collections::HashMap, convert::Infallible, sync::Arc, time::Duration};

use async_trait::async_trait;
use chrono::Utc;
use pingora_core::{server::ShutdownWatch, services::background::BackgroundService};
use tokio::{sync::Mutex, time::sleep};
use tollgate_core::{
    limit::{Amount, Month, Subject},
    secret::Secret,
};

use crate::{
    limiter::Active,
    shared::Shared,
    store::{Store, StoreError},
};

/// How often the books are compared with the database.
const PERIOD: Duration = Duration::from_secs(5);
/// Every so many rounds, all users and addresses are compared, not only the active ones.
const ALL_EVERY: u32 = 12;
/// Users, and addresses, that are compared in one round.
const MAX_ACTIVE: usize = 1_000;

/// The job.
#[derive(Debug)]
pub struct Limits {
    shared: Arc<Shared>,
    store_url: Secret,
    doubtful: Mutex<Differences>,
}

/// By how much Redis's books were off at the last look: too little, too much.
type Differences = HashMap<Subject, (Month, Amount, Amount)>;

impl Limits {
    /// The job over `shared` and the database at `store_url`.
    #[must_use]
    pub fn new(shared: Arc<Shared>, store_url: Secret) -> Self {
        Self { shared, store_url, doubtful: Mutex::default() }
    }

    /// Reads everything that is booked of this month; of addresses, should there be too many, those that used most.
    ///
    /// # Errors
    /// The database's.
    pub async fn load(&self, store: &Store) -> Result<(), StoreError> {
        let month = Month::of(Utc::now());
        let limiter = &self.shared.limiter;
        let books = limiter.books();
        let ledger = books.ledger().await;
        books.correct(month, &store.booked(month).await?);
        if limiter.has_quota_of_addresses() {
            books.correct_addresses(month, &store.booked_addresses(month).await?);
        }
        drop(ledger);
        Ok(())
    }

    /// Compares the books with the database, and Redis with the books.
    ///
    /// # Errors
    /// The database's.
    pub async fn step(&self, store: &Store) -> Result<(), StoreError> {
        let month = Month::of(Utc::now());
        let active = self.shared.limiter.active(MAX_ACTIVE);
        if active.is_empty() {
            return Ok(());
        }
        let corrected = self.compare_books(month, &active, store).await?;
        self.shared.metrics.quota_corrections_total.with_label_values(&["memory"]).inc_by(corrected as u64);
        self.compare_redis(month, &active).await;
        Ok(())
    }

    /// Returns how many sums in memory had to be corrected.
    async fn compare_books(&self, month: Month, active: &Active, store: &Store) -> Result<usize, StoreError> {
        let users: Vec<_> = active.users.iter().copied().collect();
        let addresses: Vec<_> = active.addresses.iter().copied().collect();
        let books = self.shared.limiter.books();
        let ledger = books.ledger().await;
        let mut corrected = books.correct(month, &store.booked_of(month, &users).await?);
        if !addresses.is_empty() {
            corrected += books.correct_addresses(month, &store.booked_of_addresses(month, &addresses).await?);
        }
        drop(ledger);
        Ok(corrected)
    }

    /// Only of those whose books have just been compared: of others, it may be the books that are behind.
    async fn compare_redis(&self, month: Month, active: &Active) {
        let limiter = &self.shared.limiter;
        let mut doubtful = self.doubtful.lock().await;
        let mut differences = Differences::new();
        for (subject, (of, seen)) in limiter.seen_booked().await {
            let truth = limiter.books().of(of, &subject);
            if of != month || seen == truth || !active.has(&subject) {
                continue;
            }
            let difference = (of, truth.minus(seen), seen.minus(truth));
            if doubtful.get(&subject) == Some(&difference) {
                tracing::warn!(?subject, ?seen, ?truth, "a quota in Redis had drifted from the database; corrected");
                limiter.correct_redis(&subject, of, seen, truth);
                self.shared.metrics.quota_corrections_total.with_label_values(&["redis"]).inc();
            } else {
                differences.insert(subject, difference);
            }
        }
        *doubtful = differences;
    }

    async fn run(&self) -> Result<Infallible, StoreError> {
        let store = Store::open(self.store_url.expose()).await?;
        for round in 1_u32.. {
            sleep(PERIOD).await;
            let result =
                if round.is_multiple_of(ALL_EVERY) { self.load(&store).await } else { self.step(&store).await };
            if let Err(error) = result {
                tracing::debug!(%error, "the books cannot be compared; quotas go by what is known");
            }
        }
        std::future::pending().await
    }
}

#[async_trait]
impl BackgroundService for Limits {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        let limiter = &self.shared.limiter;
        let keep = async { tokio::join!(limiter.keep_linked(), limiter.keep_sweeping()) };
        tokio::select! {
            Err(error) = self.run() => tracing::error!(%error, "quotas will not be compared with the database"),
            _ = keep => {}
            _ = shutdown.changed() => {}
        }
    }
}
