//! Writing usage to SQLite: prepared statements in one transaction. Rows are bound one by one because a call costs
//! microseconds, while a statement over arrays would need JSON in between.

use sqlx::{Sqlite, SqlitePool, Transaction};

use super::{
    StoreError,
    usage::{LogRow, Sums, add_sums, log_columns, sum_columns, sum_up},
};

pub(super) async fn write(pool: &SqlitePool, rows: &[LogRow]) -> Result<u64, StoreError> {
    let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
    let mut new = Vec::with_capacity(rows.len());
    for row in rows {
        if insert(&mut tx, row).await? {
            new.push(row);
        }
    }
    let (daily, monthly) = sum_up(new.iter().copied());
    add(&mut tx, &daily, add_sums!("usage_daily", "day", "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)"))
        .await?;
    add(
        &mut tx,
        &monthly,
        add_sums!("usage_monthly", "month", "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)"),
    )
    .await?;
    tx.commit().await?;
    Ok(new.len() as u64)
}

/// Was the row not there yet?
async fn insert(tx: &mut Transaction<'_, Sqlite>, row: &LogRow) -> Result<bool, StoreError> {
    const INSERT: &str = concat!(
        "INSERT INTO request_log (",
        log_columns!(),
        ") VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22,
                   $23, $24, $25, $26, $27, $28) ON CONFLICT DO NOTHING"
    );
    let done = sqlx::query(INSERT)
        .bind(row.request_id.hyphenated())
        .bind(row.started_at)
        .bind(row.user_id)
        .bind(row.key_id)
        .bind(&row.ip)
        .bind(row.route)
        .bind(&row.model)
        .bind(&row.upstream_model)
        .bind(&row.upstream)
        .bind(&row.attempts)
        .bind(row.status)
        .bind(row.stream)
        .bind(&row.code)
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
        .bind(&row.finish_reason)
        .bind(&row.user_agent)
        .bind(&row.client_request_id)
        .bind(&row.provider_request_id)
        .execute(&mut **tx)
        .await?;
    Ok(done.rows_affected() == 1)
}

async fn add(tx: &mut Transaction<'_, Sqlite>, sums: &Sums, statement: &'static str) -> Result<(), StoreError> {
    for (key, sum) in sums {
        sqlx::query(statement)
            .bind(key.date)
            .bind(key.user_id)
            .bind(key.key_id)
            .bind(&key.model)
            .bind(&key.upstream)
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
