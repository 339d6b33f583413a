//! Writing usage to PostgreSQL: three or four statements per batch, whatever its size, with one array per column.

use std::collections::HashSet;

use sqlx::{PgPool, Postgres, Transaction};
use tollgate_core::usage::UsageRecord;
use uuid::Uuid;

use super::{
    StoreError,
    usage::{AddressSums, LogRow, Sum, SumKey, Sums, Totals, add_sums, log_columns},
};

/// Binds one array per column of `$rows`.
macro_rules! bind_columns {
    ($query:expr, $rows:expr, |$row:ident| $($column:expr),+ $(,)?) => {
        $query$(.bind($rows.iter().map(|$row| $column).collect::<Vec<_>>()))+
    };
}

pub(super) async fn write<'r>(
    pool: &PgPool,
    records: impl Iterator<Item: Into<UsageRecord<'r>>>,
    sums_addresses: bool,
) -> Result<Vec<bool>, StoreError> {
    let rows: Vec<LogRow<'_>> = records.map(|record| LogRow::from(record.into())).collect();
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let mut tx = pool.begin().await?;
    let mut ids = insert(&mut tx, &rows).await?;
    // Taking the ids out counts a record that is twice in the batch once.
    let is_new: Vec<bool> = rows.iter().map(|row| ids.remove(&row.request_id)).collect();
    let mut totals = Totals::new(sums_addresses);
    rows.iter().zip(&is_new).filter(|(_, is_new)| **is_new).for_each(|(row, _)| totals.add(row));
    add(&mut tx, &totals.daily, add_sums!("usage_daily", "day", "SELECT * FROM UNNEST($1::date[], $2::bigint[], $3::bigint[], $4::text[], $5::text[], $6::bigint[], $7::bigint[], $8::bigint[], $9::bigint[], $10::bigint[], $11::bigint[])")).await?;
    add(&mut tx, &totals.monthly(), add_sums!("usage_monthly", "month", "SELECT * FROM UNNEST($1::date[], $2::bigint[], $3::bigint[], $4::text[], $5::text[], $6::bigint[], $7::bigint[], $8::bigint[], $9::bigint[], $10::bigint[], $11::bigint[])")).await?;
    if let Some(addresses) = &totals.addresses {
        add_addresses(&mut tx, addresses).await?;
    }
    tx.commit().await?;
    Ok(is_new)
}

/// The ids of the rows that were not there yet. They are inserted in the order of their ids: of writers that have the same rows
/// in other orders, each could wait for the other.
async fn insert(tx: &mut Transaction<'_, Postgres>, rows: &[LogRow<'_>]) -> Result<HashSet<Uuid>, StoreError> {
    const INSERT: &str = concat!(
        "INSERT INTO request_log (",
        log_columns!(),
        ") SELECT * FROM UNNEST(
             $1::uuid[], $2::timestamptz[], $3::bigint[], $4::bigint[], $5::text[], $6::text[], $7::text[], $8::text[],
             $9::text[], $10::text[]::jsonb[], $11::integer[], $12::boolean[], $13::text[], $14::bigint[],
             $15::bigint[], $16::bigint[], $17::bigint[], $18::bigint[], $19::boolean[], $20::boolean[],
             $21::bigint[], $22::integer[], $23::integer[], $24::integer[], $25::text[], $26::text[], $27::text[],
             $28::text[], $29::text[], $30::text[], $31::bigint[], $32::bigint[], $33::bigint[], $34::bigint[])
         ORDER BY 1
         ON CONFLICT DO NOTHING RETURNING request_id"
    );
    let insert = bind_columns!(
        sqlx::query_scalar(INSERT),
        rows,
        |row| row.request_id,
        row.started_at,
        row.user_id,
        row.key_id,
        row.ip.as_deref(),
        &*row.route,
        &*row.model,
        row.upstream_model.as_deref(),
        row.upstream.as_deref(),
        &*row.attempts,
        row.status,
        row.stream,
        row.code.as_deref(),
        row.prompt_tokens,
        row.completion_tokens,
        row.cached_tokens,
        row.reasoning_tokens,
        row.audio_tokens,
        row.estimated,
        row.interrupted,
        row.cost_nano_usd,
        row.ttft_ms,
        row.duration_ms,
        row.overhead_us,
        row.finish_reason.as_deref(),
        row.user_agent.as_deref(),
        row.client_request_id.as_deref(),
        row.provider_request_id.as_deref(),
        row.served_model.as_deref(),
        row.service_tier.as_deref(),
        row.cache_write_tokens,
        row.output_audio_tokens,
        row.image_tokens,
        row.output_image_tokens,
    );
    let new: Vec<Uuid> = insert.fetch_all(&mut **tx).await?;
    Ok(new.into_iter().collect())
}

async fn add(tx: &mut Transaction<'_, Postgres>, sums: &Sums<'_>, statement: &'static str) -> Result<(), StoreError> {
    let rows: Vec<(&SumKey<'_>, &Sum)> = sums.iter().collect();
    bind_columns!(
        sqlx::query(statement),
        rows,
        |row| row.0.date,
        row.0.user_id,
        row.0.key_id,
        &*row.0.model,
        &*row.0.upstream,
        row.1.requests,
        row.1.prompt_tokens,
        row.1.completion_tokens,
        row.1.total_tokens,
        row.1.cached_tokens,
        row.1.cost_nano_usd,
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}

async fn add_addresses(tx: &mut Transaction<'_, Postgres>, sums: &AddressSums) -> Result<(), StoreError> {
    const ADD: &str = add_sums!(
        "usage_monthly_ip",
        "SELECT * FROM UNNEST($1::date[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[])"
    );
    let rows: Vec<_> = sums.iter().collect();
    bind_columns!(
        sqlx::query(ADD),
        rows,
        |row| row.0.0,
        row.0.1.to_string(),
        row.1.requests,
        row.1.total_tokens,
        row.1.cost_nano_usd,
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}
