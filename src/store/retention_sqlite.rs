//! Deleting old rows from SQLite: few at a time, because whoever writes to SQLite keeps all others waiting.
//!
//! The file does not become smaller by it. SQLite uses the room again for new rows, so it stops growing once as much goes as
//! comes; giving room back to the system would need a file that was made for it, and moves pages about under a lock. `VACUUM`
//! does it by hand.

use chrono::{DateTime, Utc};
use sqlx::{AssertSqlSafe, SqlitePool};
use tollgate_core::retention::Kept;

use super::{StoreError, retention::Swept};

/// Rows of one step: some ten milliseconds.
const ROWS: u32 = 500;

pub(super) async fn sweep(pool: &SqlitePool, kept: &Kept, now: DateTime<Utc>) -> Result<Swept, StoreError> {
    let Some(since) = kept.since(now) else { return Ok(Swept::default()) };
    let is_there: bool =
        sqlx::query_scalar("SELECT COUNT(*) > 0 FROM sqlite_schema WHERE type = 'table' AND name = $1")
            .bind(kept.table)
            .fetch_one(pool)
            .await?;
    if !is_there {
        return Ok(Swept::default());
    }
    let table = kept.table;
    // Safe: the name is a constant of ours.
    let delete = AssertSqlSafe(format!(
        "DELETE FROM {table} WHERE rowid IN
             (SELECT rowid FROM {table} WHERE started_at < $1 ORDER BY started_at LIMIT {ROWS})"
    ));
    let deleted = sqlx::query(delete).bind(since).execute(pool).await?;
    Ok(Swept { rows_deleted: deleted.rows_affected(), ..Swept::default() })
}
