//! Keeping the tables that grow within bounds: what is old goes, in steps that nobody has to wait for.
//!
//! On PostgreSQL such a table has a part for each month (see [`retention_postgres`]), on SQLite its
//! rows go a few at a time. Either way a step is one short transaction that may be broken off or repeated, and any number of
//! processes may take steps at once. The sums are not touched: they stay for ever.

use chrono::{DateTime, Utc};
use tollgate_core::retention::Kept;

use super::{Pool, Store, StoreError, retention_postgres, retention_sqlite};

/// What a step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Rows that were deleted.
    pub rows_deleted: u64,
    /// Parts that were dropped.
    pub parts_dropped: u64,
    /// Parts that were made.
    pub parts_made: u64,
    /// Rows that were moved into them.
    pub rows_moved: u64,
}

impl Swept {
    /// Was there something to do? Then there may be more.
    #[must_use]
    pub fn is_something(&self) -> bool {
        *self != Self::default()
    }
}

impl Store {
    /// Does one thing that is to be done about a table at the time `now`: makes a part, drops one, or deletes some rows. A table
    /// that is not there needs nothing, nor does one that another process is busy with.
    ///
    /// # Errors
    /// The database's; among them that somebody else is using the table for too long.
    pub async fn sweep(&self, kept: &Kept, now: DateTime<Utc>) -> Result<Swept, StoreError> {
        match &self.pool {
            Pool::Sqlite(pool) => retention_sqlite::sweep(pool, kept, now).await,
            Pool::Postgres(pool) => retention_postgres::sweep(pool, kept, now).await,
        }
    }
}
