//! The parts of a table on PostgreSQL: partitions by month, made before they are needed and dropped when they are old.
//!
//! **Rows without a part** are in the default partition: of a time for which there is none yet, or none any more, as when a
//! clock jumped. When the part of a month is made, its rows move there in the same transaction, so nobody ever sees them
//! twice or not at all, and a record that is written again is still known. The table is locked meanwhile; that is an
//! instant where there is nothing to move, as always when parts are made ahead, and requests do not notice: what they used
//! waits in the journal.
//!
//! **One at a time.** An advisory lock keeps replicas from each other's feet; whoever does not get it has nothing to do.
//!
//! **Nobody waits long.** A lock on the table is asked for with a short patience: behind one that waits, everybody else
//! would queue. Where somebody reads for longer, the step fails and is taken again later.

use chrono::{DateTime, SecondsFormat, Utc};
use sqlx::{AssertSqlSafe, PgPool, Postgres, Transaction};
use tollgate_core::{limit::Month, retention::Kept};

use super::{StoreError, retention::Swept};

/// The advisory lock of this work: "tollgate" in ASCII.
const LOCK: i64 = 0x746f_6c6c_6761_7465;
/// Rows of one step.
const ROWS: u32 = 5_000;

type Tx<'c> = Transaction<'c, Postgres>;

pub(super) async fn sweep(pool: &PgPool, kept: &Kept, now: DateTime<Utc>) -> Result<Swept, StoreError> {
    let mut tx = pool.begin().await?;
    let is_ours: bool =
        sqlx::query_scalar("SELECT pg_try_advisory_xact_lock($1)").bind(LOCK).fetch_one(&mut *tx).await?;
    let swept = if is_ours { sweep_within(&mut tx, kept, now).await? } else { Swept::default() };
    tx.commit().await?;
    Ok(swept)
}

async fn sweep_within(tx: &mut Tx<'_>, kept: &Kept, now: DateTime<Utc>) -> Result<Swept, StoreError> {
    let parts = parts(tx, kept).await?;
    // A table that is not there, or was made otherwise, has no parts.
    if parts.is_empty() {
        return Ok(Swept::default());
    }
    sqlx::query("SET LOCAL lock_timeout = '2s'").execute(&mut **tx).await?;
    let is_missing = |month: &Month| !parts.contains(&kept.part(*month));
    if let Some(month) = Kept::wanted(now).find(is_missing) {
        let rows_moved = make(tx, kept, month).await?;
        return Ok(Swept { parts_made: 1, rows_moved, ..Swept::default() });
    }
    let is_over = |part: &&String| kept.month_of(part).is_some_and(|month| kept.is_over(month, now));
    if let Some(part) = parts.iter().find(is_over) {
        run(tx, format!("DROP TABLE {part}")).await?;
        return Ok(Swept { parts_dropped: 1, ..Swept::default() });
    }
    match kept.since(now) {
        Some(since) => Ok(Swept { rows_deleted: delete(tx, kept, since).await?, ..Swept::default() }),
        None => Ok(Swept::default()),
    }
}

/// The names of all parts, the default one included.
async fn parts(tx: &mut Tx<'_>, kept: &Kept) -> Result<Vec<String>, StoreError> {
    let parts = sqlx::query_scalar(
        "SELECT c.relname::text FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
         WHERE i.inhparent = to_regclass($1) ORDER BY c.relname",
    );
    Ok(parts.bind(kept.table).fetch_all(&mut **tx).await?)
}

/// Makes the part of a month; gives how many rows were moved into it.
async fn make(tx: &mut Tx<'_>, kept: &Kept, month: Month) -> Result<u64, StoreError> {
    let (table, part) = (kept.table, kept.part(month));
    let [from, to] = [month, month.next()].map(|month| month.start().to_rfc3339_opts(SecondsFormat::Secs, true));
    run(tx, format!("LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")).await?;
    // With the indexes of the table, which are taken over as they are when it becomes a part.
    run(tx, format!("CREATE TABLE {part} (LIKE {table} INCLUDING ALL)")).await?;
    let columns = columns(tx, table).await?;
    let old = format!("{table}_default WHERE started_at >= '{from}' AND started_at < '{to}'");
    let moved = format!(
        "WITH moved AS (DELETE FROM {old} RETURNING {columns}) INSERT INTO {part} ({columns}) SELECT {columns} FROM moved"
    );
    let moved = run(tx, moved).await?;
    run(tx, format!("ALTER TABLE {table} ATTACH PARTITION {part} FOR VALUES FROM ('{from}') TO ('{to}')")).await?;
    Ok(moved)
}

/// The columns of a table that are not made of others.
async fn columns(tx: &mut Tx<'_>, table: &str) -> Result<String, StoreError> {
    let columns = sqlx::query_scalar(
        "SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) FROM pg_attribute
         WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped AND attgenerated = ''",
    );
    Ok(columns.bind(table).fetch_one(&mut **tx).await?)
}

/// Deletes some rows that are older than `since`: those without a part of their own, or any if each must go in its time.
async fn delete(tx: &mut Tx<'_>, kept: &Kept, since: DateTime<Utc>) -> Result<u64, StoreError> {
    let table = if kept.is_exact { kept.table.to_owned() } else { format!("{}_default", kept.table) };
    let key = "started_at, request_id";
    let delete = AssertSqlSafe(format!(
        "DELETE FROM {table} WHERE ({key}) IN
             (SELECT {key} FROM {table} WHERE started_at < $1 ORDER BY started_at LIMIT {ROWS})"
    ));
    Ok(sqlx::query(delete).bind(since).execute(&mut **tx).await?.rows_affected())
}

/// Runs a statement that is put together from names of ours and of months.
async fn run(tx: &mut Tx<'_>, statement: String) -> Result<u64, StoreError> {
    Ok(sqlx::query(AssertSqlSafe(statement)).execute(&mut **tx).await?.rows_affected())
}
