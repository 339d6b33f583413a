//! `prices`: what models cost, and since when, as it was imported. A price is never removed, so that one can see what a request
//! was charged by; importing another one for the same model and time corrects it, for requests that come from then on.

use chrono::{DateTime, SecondsFormat, SubsecRound, Utc};
use serde_json::json;
use tollgate_core::price::Price;

use super::{Store, StoreError, admin::Entry, change, now, on_pool};

macro_rules! columns {
    () => {
        "model, effective_from, price, imported_at"
    };
}
pub(super) use columns;

/// A price to be imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewPrice {
    /// Of which model.
    pub model: String,
    /// From when it holds.
    pub effective_from: DateTime<Utc>,
    /// How much.
    pub price: Price,
}

/// A row of `prices`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredPrice {
    /// Of which model.
    pub model: String,
    /// From when it holds.
    pub effective_from: DateTime<Utc>,
    /// How much.
    pub price: Price,
    /// When it was imported, or corrected.
    pub imported_at: DateTime<Utc>,
}

#[derive(sqlx::FromRow)]
pub(super) struct Row {
    model: String,
    effective_from: DateTime<Utc>,
    price: String,
    imported_at: DateTime<Utc>,
}

impl TryFrom<Row> for StoredPrice {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        let price = serde_json::from_str(&row.price)
            .map_err(|error| StoreError::Corrupt(format!("the price of {:?} cannot be read: {error}", row.model)))?;
        Ok(Self { model: row.model, effective_from: row.effective_from, price, imported_at: row.imported_at })
    }
}

impl Store {
    /// Every price that was imported, by model and time. One that cannot be read is logged and left out.
    ///
    /// # Errors
    /// The database's.
    pub async fn prices(&self) -> Result<Vec<StoredPrice>, StoreError> {
        let rows: Vec<Row> = on_pool!(self, pool => sqlx::query_as(
            concat!("SELECT ", columns!(), " FROM prices ORDER BY model, effective_from")).fetch_all(pool).await?);
        Ok(super::changes::readable(rows).collect())
    }

    /// Adds prices, all or none. One of the same model and time as another that is there takes its place. `by` is who does
    /// it, for `admin_log`.
    ///
    /// # Errors
    /// The database's.
    pub async fn import_prices(&self, prices: &[NewPrice], by: &str) -> Result<(), StoreError> {
        let rows: Vec<(&str, DateTime<Utc>, String)> = prices
            .iter()
            .map(|new| Ok((&*new.model, new.effective_from.trunc_subsecs(6), json_of(new)?)))
            .collect::<Result<_, StoreError>>()?;
        let names: Vec<_> = rows
            .iter()
            .map(
                |(model, from, _)| json!({ "model": model, "from": from.to_rfc3339_opts(SecondsFormat::AutoSi, true) }),
            )
            .collect();
        change!(self, by, |tx, seq| {
            for (model, from, price) in &rows {
                sqlx::query(
                    "INSERT INTO prices (model, effective_from, price, imported_at, changed_seq)
                     VALUES ($1, $2, $3, $4, $5)
                     ON CONFLICT (model, effective_from) DO UPDATE
                     SET price = excluded.price, imported_at = excluded.imported_at, changed_seq = excluded.changed_seq",
                )
                .bind(*model)
                .bind(*from)
                .bind(price.as_str())
                .bind(now())
                .bind(seq)
                .execute(&mut *tx)
                .await?;
            }
            ((), Entry { action: "prices.import", subject_id: None, detail: json!({ "prices": names }) })
        });
        Ok(())
    }
}

fn json_of(new: &NewPrice) -> Result<String, StoreError> {
    serde_json::to_string(&new.price)
        .map_err(|error| StoreError::Invalid(format!("the price of {:?} cannot be written down: {error}", new.model)))
}
