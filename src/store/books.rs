//! Reading the sums of a month: what quotas are checked against.

use std::net::IpAddr;

use chrono::NaiveDate;
use tollgate_core::{
    id::{KeyId, UserId},
    limit::{Amount, Month},
    usage::{Booked, BookedAddress},
};

use super::{Pool, Store, StoreError, number, on_pool};

/// The most addresses that are read at once. Those that used least are left out: they are far from any quota, and are read
/// by name once they are in use.
const MAX_ADDRESSES: i64 = 100_000;

macro_rules! select {
    ($($rest:literal),*) => {
        concat!(
            "SELECT user_id, key_id, model, total_tokens, cost_nano_usd FROM usage_monthly WHERE month = $1",
            $($rest),*
        )
    };
}

macro_rules! select_addresses {
    ($rest:literal) => {
        concat!("SELECT network, total_tokens, cost_nano_usd FROM usage_monthly_ip WHERE month = $1", $rest)
    };
}

#[derive(sqlx::FromRow)]
struct Row {
    user_id: i64,
    key_id: i64,
    model: String,
    total_tokens: i64,
    cost_nano_usd: i64,
}

impl From<Row> for Booked {
    fn from(row: Row) -> Self {
        Self {
            user: UserId(row.user_id),
            key: KeyId(row.key_id),
            model: row.model,
            amount: amount(row.total_tokens, row.cost_nano_usd),
        }
    }
}

#[derive(sqlx::FromRow)]
struct AddressRow {
    network: String,
    total_tokens: i64,
    cost_nano_usd: i64,
}

/// What names no address was not written by a gateway.
fn addresses(rows: Vec<AddressRow>) -> Vec<BookedAddress> {
    let read = |row: AddressRow| {
        let network = row.network.parse().ok()?;
        Some(BookedAddress { network, amount: amount(row.total_tokens, row.cost_nano_usd) })
    };
    rows.into_iter().filter_map(read).collect()
}

fn amount(tokens: i64, nano_usd: i64) -> Amount {
    Amount { tokens: number::count(tokens), nano_usd: number::count(nano_usd) }
}

impl Store {
    /// Everything that is booked of a month; a key and model may have several rows.
    ///
    /// # Errors
    /// The database's.
    pub async fn booked(&self, month: Month) -> Result<Vec<Booked>, StoreError> {
        let rows: Vec<Row> =
            on_pool!(self, pool => sqlx::query_as(select!()).bind(first_day(month)).fetch_all(pool).await?);
        Ok(rows.into_iter().map(Booked::from).collect())
    }

    /// The same, of these users.
    ///
    /// # Errors
    /// The database's.
    pub async fn booked_of(&self, month: Month, users: &[UserId]) -> Result<Vec<Booked>, StoreError> {
        let ids: Vec<i64> = users.iter().map(|user| user.0).collect();
        let rows: Vec<Row> = match &self.pool {
            Pool::Sqlite(pool) => {
                let query = sqlx::query_as(select!(" AND user_id IN (SELECT value FROM json_each($2))"));
                let list = serde_json::to_string(&ids).unwrap_or_default();
                query.bind(first_day(month)).bind(list).fetch_all(pool).await?
            }
            Pool::Postgres(pool) => {
                let query = sqlx::query_as(select!(" AND user_id = ANY($2)"));
                query.bind(first_day(month)).bind(ids).fetch_all(pool).await?
            }
        };
        Ok(rows.into_iter().map(Booked::from).collect())
    }

    /// What is booked of the 100,000 addresses that used most of a month's tokens, as far as sums by address were kept.
    ///
    /// # Errors
    /// The database's.
    pub async fn booked_addresses(&self, month: Month) -> Result<Vec<BookedAddress>, StoreError> {
        let query = select_addresses!(" ORDER BY total_tokens DESC LIMIT $2");
        let rows = on_pool!(self, pool =>
            sqlx::query_as(query).bind(first_day(month)).bind(MAX_ADDRESSES).fetch_all(pool).await?);
        Ok(addresses(rows))
    }

    /// The same, of these networks.
    ///
    /// # Errors
    /// The database's.
    pub async fn booked_of_addresses(
        &self,
        month: Month,
        networks: &[IpAddr],
    ) -> Result<Vec<BookedAddress>, StoreError> {
        let names: Vec<String> = networks.iter().map(ToString::to_string).collect();
        let rows = match &self.pool {
            Pool::Sqlite(pool) => {
                let query = sqlx::query_as(select_addresses!(" AND network IN (SELECT value FROM json_each($2))"));
                let list = serde_json::to_string(&names).unwrap_or_default();
                query.bind(first_day(month)).bind(list).fetch_all(pool).await?
            }
            Pool::Postgres(pool) => {
                let query = sqlx::query_as(select_addresses!(" AND network = ANY($2)"));
                query.bind(first_day(month)).bind(names).fetch_all(pool).await?
            }
        };
        Ok(addresses(rows))
    }
}

fn first_day(month: Month) -> NaiveDate {
    month.start().date_naive()
}
