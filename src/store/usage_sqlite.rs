//! Writing usage to SQLite: one transaction per batch, many rows per statement.
//!
//! A call into SQLite is cheap, but the driver hands every statement to a thread and waits for it, which costs more than the
//! row. So rows go in groups of [`GROUPS`], each size one prepared statement.
//!
//! The number of rows that were added tells whether all were new. Only if not (a batch that is written again) is the
//! transaction started over, with a look at which ids are there already: nobody else can write between the look and the
//! insert.

use std::{collections::HashSet, sync::LazyLock};

use chrono::SecondsFormat;
use sqlx::{Arguments, Sqlite, SqlitePool, Transaction, query::Query, sqlite::SqliteArguments};
use tollgate_core::usage::UsageRecord;
use uuid::{Uuid, fmt::Hyphenated};

use super::{
    StoreError,
    usage::{AddressSums, LogRow, Sums, Totals, add_sums, log_columns},
};

/// Columns of a row.
const COLUMNS: usize = 34;
/// Sizes of groups, largest first. SQLite takes 32,766 parameters.
const GROUPS: [usize; 3] = [64, 8, 1];

const KNOWN: &str = "SELECT r.request_id FROM json_each($1) k CROSS JOIN request_log r
    ON r.started_at = k.value ->> 0 AND r.request_id = k.value ->> 1";

static INSERTS: LazyLock<[String; 3]> = LazyLock::new(|| GROUPS.map(insert_statement));

/// `OR IGNORE`, because that can never end half-way: SQLite then keeps no journal of the statement, a copy of each page that it
/// changes (see migration 0008 too). No column that must be there is ever bound to nothing.
fn insert_statement(rows: usize) -> String {
    let row = format!("({})", vec!["?"; COLUMNS].join(","));
    let rows = vec![row; rows].join(",");
    format!(concat!("INSERT OR IGNORE INTO request_log (", log_columns!(), ") VALUES {}"), rows)
}

pub(super) async fn write<'r>(
    pool: &SqlitePool,
    records: impl Iterator<Item: Into<UsageRecord<'r>>> + Clone,
    sums_addresses: bool,
) -> Result<Vec<bool>, StoreError> {
    let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
    let Inserted { rows, new, totals } = insert(&mut tx, records.clone(), sums_addresses).await?;
    if new == rows as u64 {
        settle(tx, &totals).await?;
        return Ok(vec![true; rows]);
    }
    tx.rollback().await?;
    let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
    let records: Vec<UsageRecord<'r>> = records.map(Into::into).collect();
    let mut known = known(&mut tx, &records).await?;
    let is_new: Vec<bool> = records.iter().map(|record| known.insert(record.request_id)).collect();
    let new: Vec<_> =
        records.into_iter().zip(&is_new).filter_map(|(record, is_new)| is_new.then_some(record)).collect();
    let Inserted { totals, .. } = insert(&mut tx, new.into_iter(), sums_addresses).await?;
    settle(tx, &totals).await?;
    Ok(is_new)
}

/// The ids of `records` that are there. They are looked for with their times, as the primary key has them: without, every row
/// of the log would be looked at.
async fn known(tx: &mut Transaction<'_, Sqlite>, records: &[UsageRecord<'_>]) -> Result<HashSet<Uuid>, StoreError> {
    // As the driver writes a time.
    let time = |row: &LogRow<'_>| row.started_at.to_rfc3339_opts(SecondsFormat::AutoSi, false);
    let key = |row: LogRow<'_>| [time(&row), row.request_id.hyphenated().to_string()];
    let keys: Vec<[String; 2]> = records.iter().map(|record| key(record.clone().into())).collect();
    let known: Vec<Hyphenated> =
        sqlx::query_scalar(KNOWN).bind(serde_json::to_string(&keys).unwrap_or_default()).fetch_all(&mut **tx).await?;
    Ok(known.into_iter().map(Uuid::from).collect())
}

/// Adds the totals of the new rows and commits.
async fn settle(mut tx: Transaction<'_, Sqlite>, totals: &Totals<'_>) -> Result<(), StoreError> {
    add(
        &mut tx,
        &totals.daily,
        add_sums!("usage_daily", "day", "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)"),
    )
    .await?;
    add(
        &mut tx,
        &totals.monthly(),
        add_sums!("usage_monthly", "month", "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)"),
    )
    .await?;
    if let Some(addresses) = &totals.addresses {
        add_addresses(&mut tx, addresses).await?;
    }
    tx.commit().await?;
    Ok(())
}

/// What was inserted.
struct Inserted<'r> {
    /// How many rows.
    rows: usize,
    /// How many of them were not there yet.
    new: u64,
    /// What all come to.
    totals: Totals<'r>,
}

/// Adds a row for each of `records`. Only the rows of one statement are in memory at once.
async fn insert<'r>(
    tx: &mut Transaction<'_, Sqlite>,
    mut records: impl Iterator<Item: Into<UsageRecord<'r>>>,
    sums_addresses: bool,
) -> Result<Inserted<'r>, StoreError> {
    let mut inserted = Inserted { rows: 0, new: 0, totals: Totals::new(sums_addresses) };
    loop {
        let records = records.by_ref().take(GROUPS[0]);
        let rows: Vec<LogRow<'r>> = records.map(|record| LogRow::from(record.into())).collect();
        if rows.is_empty() {
            return Ok(inserted);
        }
        rows.iter().for_each(|row| inserted.totals.add(row));
        inserted.rows += rows.len();
        inserted.new += insert_group(tx, &rows).await?;
    }
}

async fn insert_group(tx: &mut Transaction<'_, Sqlite>, mut rows: &[LogRow<'_>]) -> Result<u64, StoreError> {
    let mut added = 0;
    for (size, statement) in GROUPS.into_iter().zip(INSERTS.iter()) {
        while let Some((group, rest)) = rows.split_at_checked(size) {
            let mut arguments = SqliteArguments::default();
            arguments.reserve(size * COLUMNS, 0);
            let query = sqlx::query_with(statement.as_str(), arguments);
            let query = group.iter().fold(query, |query, row| bind(query, row));
            added += query.execute(&mut **tx).await?.rows_affected();
            rows = rest;
        }
    }
    Ok(added)
}

fn bind<'q>(query: Query<'q, Sqlite, SqliteArguments>, row: &'q LogRow<'_>) -> Query<'q, Sqlite, SqliteArguments> {
    query
        .bind(row.request_id.hyphenated())
        .bind(row.started_at)
        .bind(row.user_id)
        .bind(row.key_id)
        .bind(row.ip.as_deref())
        .bind(&*row.route)
        .bind(&*row.model)
        .bind(row.upstream_model.as_deref())
        .bind(row.upstream.as_deref())
        .bind(&*row.attempts)
        .bind(row.status)
        .bind(row.stream)
        .bind(row.code.as_deref())
        .bind(row.prompt_tokens)
        .bind(row.completion_tokens)
        .bind(row.cached_tokens)
        .bind(row.reasoning_tokens)
        .bind(row.audio_tokens)
        .bind(row.estimated)
        .bind(row.interrupted)
        .bind(row.cost_nano_usd)
        .bind(row.ttft_ms)
        .bind(row.duration_ms)
        .bind(row.overhead_us)
        .bind(row.finish_reason.as_deref())
        .bind(row.user_agent.as_deref())
        .bind(row.client_request_id.as_deref())
        .bind(row.provider_request_id.as_deref())
        .bind(row.served_model.as_deref())
        .bind(row.service_tier.as_deref())
        .bind(row.cache_write_tokens)
        .bind(row.output_audio_tokens)
        .bind(row.image_tokens)
        .bind(row.output_image_tokens)
}

async fn add(tx: &mut Transaction<'_, Sqlite>, sums: &Sums<'_>, statement: &'static str) -> Result<(), StoreError> {
    for (key, sum) in sums {
        sqlx::query(statement)
            .bind(key.date)
            .bind(key.user_id)
            .bind(key.key_id)
            .bind(&*key.model)
            .bind(&*key.upstream)
            .bind(sum.requests)
            .bind(sum.prompt_tokens)
            .bind(sum.completion_tokens)
            .bind(sum.total_tokens)
            .bind(sum.cached_tokens)
            .bind(sum.cost_nano_usd)
            .execute(&mut **tx)
            .await?;
    }
    Ok(())
}

async fn add_addresses(tx: &mut Transaction<'_, Sqlite>, sums: &AddressSums) -> Result<(), StoreError> {
    for ((month, network), sum) in sums {
        sqlx::query(add_sums!("usage_monthly_ip", "VALUES ($1, $2, $3, $4, $5)"))
            .bind(month)
            .bind(network.to_string())
            .bind(sum.requests)
            .bind(sum.total_tokens)
            .bind(sum.cost_nano_usd)
            .execute(&mut **tx)
            .await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use sqlx::{AssertSqlSafe, Row};

    use super::*;

    /// A column of what SQLite says of how it goes about a statement.
    async fn explain(statement: String, column: usize) -> Vec<String> {
        let pool = SqlitePool::connect("sqlite::memory:").await.unwrap();
        sqlx::migrate!("migrations/sqlite").run(&pool).await.unwrap();
        let rows = sqlx::query(AssertSqlSafe(statement)).fetch_all(&pool).await.unwrap();
        rows.iter().map(|row| row.get(column)).collect()
    }

    #[tokio::test]
    async fn sqlite_needs_no_journal_of_the_insert() {
        let steps = explain(format!("EXPLAIN {}", INSERTS[0]), 1).await;
        let has = |name: &str| steps.iter().any(|step| step.contains(name));
        assert!(has("IdxInsert") && has("Concat"), "it computes the class: {steps:?}");
        assert!(!has("Func"), "SQLite takes a function for something that may fail: {steps:?}");
    }

    #[tokio::test]
    async fn known_rows_are_found_by_the_primary_key() {
        let plan = explain(format!("EXPLAIN QUERY PLAN {KNOWN}"), 3).await;
        assert!(plan[0].starts_with("SCAN k VIRTUAL TABLE"), "{plan:?}");
        assert!(plan[1].starts_with("SEARCH r USING COVERING INDEX sqlite_autoindex_request_log_1"), "{plan:?}");
    }
}
