//! The database: users, keys, upstreams, the request log and its sums. SQLite (the embedded default) or PostgreSQL.
//!
//! Both speak nearly the same SQL (`$1` parameters, `RETURNING`, `ON CONFLICT`), so every statement is written once and
//! compiled twice: the macros `on_pool!` and `change!` expand their body for each driver, fully typed, without a
//! lowest-common-denominator driver in between. Only the bulk writer differs (see `store/usage.rs`). One conformance
//! suite runs against both.
//!
//! Guarantees:
//! - Every change of users, keys, upstreams and prices happens in one transaction with its number in the change sequence and
//!   its row in `admin_log`; `change!` is the only way to write, so neither can be forgotten.
//! - Opening does not connect. A [`Store`] belongs to the Tokio runtime it was opened in, and each Pingora service has
//!   its own, so each opens its own; a database that is down fails the operation, not the start.

use std::{
    fs::{DirBuilder, OpenOptions},
    io::ErrorKind,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
    time::Duration,
};

use sqlx::{
    PgPool, SqlitePool,
    migrate::MigrateError,
    postgres::{PgConnectOptions, PgPoolOptions},
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};

mod admin;
mod audit;
mod books;
mod changes;
mod content;
mod credential;
mod error;
mod key;
mod listing;
mod number;
mod price;
mod report;
mod retention;
mod retention_postgres;
mod retention_sqlite;
mod upstream;
mod usage;
mod usage_postgres;
mod usage_sqlite;
mod user;

pub use admin::{AdminLogRow, AdminToken};
pub use audit::{AuditFilter, AuditRow, Bookmark, Cursor};
pub use changes::{ChangeListener, Changes};
pub use content::{ContentRow, SealedContent};
pub use credential::StoredCredential;
pub use error::StoreError;
pub use key::{KeySpec, StoredKey};
pub use price::{NewPrice, StoredPrice};
pub use report::{GroupBy, UsageQuery, UsageSum};
pub use retention::Swept;
pub use upstream::{StoredUpstream, UpstreamSpec};
pub use user::{StoredUser, UserSpec};

/// How long an operation waits for a connection, and a SQLite writer for the one before it. A database that restarts is
/// back by then; nobody waits longer in front of a terminal.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often, and after which pause, a migration that another process may be doing is looked at again.
const MIGRATION_TRIES: u32 = 10;
const MIGRATION_PAUSE: Duration = Duration::from_millis(50);
/// Connections per store, usually. SQLite has one writer at a time; the others read.
const CONNECTIONS: u32 = 4;

/// Runs `$body` with `$pool` bound to the pool of the database in use.
macro_rules! on_pool {
    ($store:expr, $pool:ident => $body:expr) => {
        match &$store.pool {
            $crate::store::Pool::Sqlite($pool) => $body,
            $crate::store::Pool::Postgres($pool) => $body,
        }
    };
}

/// Runs `$body` in a transaction that takes the next number of the change sequence, and commits.
///
/// The body sees the transaction as `$tx` and the number as `$seq`; it gives its result and the
/// [`Entry`](admin::Entry) for `admin_log`. Taking the number locks its one row first, so changes happen one after
/// the other: what the body reads cannot change under it, and numbers become visible in order.
macro_rules! change {
    ($store:expr, $by:expr, |$tx:ident, $seq:ident| $body:expr) => {
        match &$store.pool {
            $crate::store::Pool::Sqlite(pool) => {
                // A deferred transaction that reads first could not wait for another writer.
                let mut $tx = pool.begin_with("BEGIN IMMEDIATE").await?;
                change!(@commit $tx, $seq, $by, $body)
            }
            $crate::store::Pool::Postgres(pool) => {
                let mut $tx = pool.begin().await?;
                change!(@commit $tx, $seq, $by, $body, "SELECT pg_notify('tollgate_changes', CAST($1 AS TEXT))")
            }
        }
    };
    (@commit $tx:ident, $seq:ident, $by:expr, $body:expr $(, $notify:literal)?) => {{
        let $seq: i64 =
            sqlx::query_scalar("UPDATE change_seq SET value = value + 1 RETURNING value").fetch_one(&mut *$tx).await?;
        let (result, entry) = $body;
        sqlx::query("INSERT INTO admin_log (at, actor, action, subject_id, detail) VALUES ($1, $2, $3, $4, $5)")
            .bind($crate::store::now())
            .bind($by)
            .bind(entry.action)
            .bind(entry.subject_id)
            .bind(entry.detail.to_string())
            .execute(&mut *$tx)
            .await?;
        $(sqlx::query($notify).bind($seq).execute(&mut *$tx).await?;)?
        $tx.commit().await?;
        result
    }};
}

use {change, on_pool};

/// A handle on the database. Cloning it shares its connections.
#[derive(Clone, Debug)]
pub struct Store {
    pool: Pool,
    sums_addresses: bool,
}

#[derive(Clone, Debug)]
enum Pool {
    Sqlite(SqlitePool),
    Postgres(PgPool),
}

impl Store {
    /// Opens `sqlite://path` or `postgres://user:password@host/database`, without connecting yet.
    ///
    /// The file of SQLite and its directory are made if they are missing. `async` because a store belongs to the
    /// runtime in which it is opened.
    ///
    /// # Errors
    /// [`StoreError::Url`] if the URL cannot be meant, or the directory cannot be made.
    #[expect(clippy::unused_async, reason = "the pools need the Tokio runtime that an async caller runs in")]
    pub async fn open(url: &str) -> Result<Self, StoreError> {
        Self::open_with(url, CONNECTIONS)
    }

    /// The same, for who does one thing after the other: SQLite with a single connection. Of several, each would find that
    /// what it kept of the file is outdated, because another one wrote.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    #[expect(clippy::unused_async, reason = "the pools need the Tokio runtime that an async caller runs in")]
    pub async fn open_for_one(url: &str) -> Result<Self, StoreError> {
        Self::open_with(url, 1)
    }

    fn open_with(url: &str, sqlite_connections: u32) -> Result<Self, StoreError> {
        if let Some(path) = url.strip_prefix("sqlite://") {
            return Ok(Self { pool: Pool::Sqlite(open_sqlite(path, sqlite_connections)?), sums_addresses: false });
        }
        if url.starts_with("postgres://") || url.starts_with("postgresql://") {
            return Ok(Self { pool: Pool::Postgres(open_postgres(url)?), sums_addresses: false });
        }
        // The value is not repeated: a misspelt postgres URL would show its password.
        Err(StoreError::Url("it must begin with sqlite:// or postgres://".to_owned()))
    }

    /// Keeps sums by address too, if `wanted`; no store does so unasked, because addresses are personal data.
    #[must_use]
    pub fn summing_addresses(self, wanted: bool) -> Self {
        Self { sums_addresses: wanted, ..self }
    }

    /// Brings the tables up to date. Any number of processes may do it at once.
    ///
    /// # Errors
    /// If the database cannot be reached, or was made by a newer tollgate.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        match &self.pool {
            Pool::Sqlite(pool) => migrate_sqlite(pool).await,
            Pool::Postgres(pool) => Ok(sqlx::migrate!("migrations/postgres").run(pool).await?),
        }
    }

    /// Closes the connections, after the operations that use them.
    pub async fn close(&self) {
        on_pool!(self, pool => pool.close().await);
    }
}

/// SQLite has no lock for migrations: of several processes that start at once, all but one find a table that was not there
/// when they looked. Looking again shows that the work is done.
async fn migrate_sqlite(pool: &SqlitePool) -> Result<(), StoreError> {
    let migrations = sqlx::migrate!("migrations/sqlite");
    for _ in 0..MIGRATION_TRIES {
        match migrations.run(pool).await {
            Err(MigrateError::Execute(_) | MigrateError::ExecuteMigration(..)) => {
                tokio::time::sleep(MIGRATION_PAUSE).await;
            }
            done => return Ok(done?),
        }
    }
    Ok(migrations.run(pool).await?)
}

fn open_sqlite(path: &str, connections: u32) -> Result<SqlitePool, StoreError> {
    if path.is_empty() || path.contains(['?', ':']) {
        return Err(StoreError::Url(format!(
            "sqlite://{path} must name a file, without parameters, such as sqlite://data/tollgate.db"
        )));
    }
    make_private(Path::new(path)).map_err(|error| StoreError::Url(format!("{path} cannot be opened: {error}")))?;
    let options = SqliteConnectOptions::new()
        .filename(path)
        .foreign_keys(true)
        .journal_mode(SqliteJournalMode::Wal)
        // NORMAL may forget the last commits when the power fails, and the journal drops what was committed: with it,
        // usage could be lost. One sync per batch is cheap.
        .synchronous(SqliteSynchronous::Full)
        // Of a new file only. A batch fills most pages that it touches, so large ones are fewer system calls and no more bytes.
        .page_size(16_384)
        // The writer touches some hundred pages of the log's indexes with every batch, mostly those of the batch before. So
        // it pays to keep them, and to bring them to the file not with every other batch: both together halve its work.
        .pragma("cache_size", "-8000")
        .pragma("wal_autocheckpoint", "2000")
        .busy_timeout(PATIENCE);
    Ok(SqlitePoolOptions::new().max_connections(connections).acquire_timeout(PATIENCE).connect_lazy_with(options))
}

/// Makes the file and its directory, for the eyes of their owner alone. SQLite gives the files beside it the same mode.
///
/// A file that is there is not opened: to close it would let go of every lock that SQLite holds on it in this process
/// (<https://www.sqlite.org/howtocorrupt.html>, 2.2), and the next process that ends its use would take away the log that this one
/// goes on writing to.
fn make_private(path: &Path) -> std::io::Result<()> {
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    match OpenOptions::new().append(true).create_new(true).mode(0o600).open(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists && !path.is_dir() => Ok(()),
        made => made.map(drop),
    }
}

fn open_postgres(url: &str) -> Result<PgPool, StoreError> {
    let options: PgConnectOptions = url
        .parse()
        .map_err(|_| StoreError::Url("it is not of the form postgres://user:password@host:5432/database".to_owned()))?;
    Ok(PgPoolOptions::new()
        .max_connections(CONNECTIONS)
        .acquire_timeout(PATIENCE)
        .connect_lazy_with(options.application_name("tollgate")))
}

/// The time, as precise as both databases keep it.
fn now() -> chrono::DateTime<chrono::Utc> {
    use chrono::SubsecRound;
    chrono::Utc::now().trunc_subsecs(6)
}
