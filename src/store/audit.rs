//! Reading the request log, a page at a time: newest first (how those are found stands in `listing.rs`), or in the order in which
//! it grows.
//!
//! Pages go on after the last row of the one before (its time and id), not at a row number: the log grows while it is
//! read, and a page deep down costs no more than the first.
//!
//! **The order in which it grows.** A row is booked when its request is over, or much later, after an outage; so whoever follows the
//! log cannot go by the time of the requests. SQLite numbers rows as they come. On PostgreSQL several gateways write at once, and
//! what has the smaller number may become visible later; so a row bears the number of its transaction, and only those are read
//! that are older than every transaction that is still open: nothing can come in between any more. (One that stays open for long,
//! whatever it writes on that server, holds up whoever follows.)

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Serialize, Serializer};
use sqlx::{Encode, QueryBuilder, Type};
use tollgate_core::id::{KeyId, UserId};
use uuid::Uuid;

use super::{Pool, Store, StoreError, listing::push_conditions};

/// A place in the log: the rows after it are older.
pub type Cursor = (DateTime<Utc>, String);

/// Which rows of the log to read. `None` leaves a column free.
#[derive(Clone, Debug, Default)]
pub struct AuditFilter {
    /// Earliest time.
    pub since: Option<DateTime<Utc>>,
    /// First time no more.
    pub until: Option<DateTime<Utc>>,
    /// Who asked.
    pub user: Option<UserId>,
    /// With which key.
    pub key: Option<KeyId>,
    /// Model that was asked for.
    pub model: Option<String>,
    /// Upstream that answered.
    pub upstream: Option<String>,
    /// Status the client got.
    pub status: Option<u16>,
    /// Code of its error; `ok`: it had none.
    pub code: Option<String>,
    /// This one request; its time must be within the others.
    pub request: Option<Uuid>,
    /// Only rows after this place.
    pub before: Option<Cursor>,
    /// Only rows that were booked up to there.
    pub booked_until: Option<Bookmark>,
    /// At most so many rows.
    pub limit: u32,
}

/// A place in the log as it grows: what comes after it was booked later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bookmark {
    /// Number of the row, or of its transaction.
    pub(super) booked: i64,
    /// The last row of that transaction that was read; `None`: all of them were.
    row: Option<Cursor>,
}

/// A row of `request_log`, with the names of user and key.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow, Serialize)]
#[expect(missing_docs, reason = "the columns of request_log, described at UsageRecord")]
pub struct AuditRow {
    pub request_id: String,
    #[serde(serialize_with = "rfc3339")]
    pub started_at: DateTime<Utc>,
    pub user_id: i64,
    pub user: Option<String>,
    pub key_id: i64,
    pub key: Option<String>,
    pub ip: Option<String>,
    pub route: String,
    pub model: String,
    pub upstream_model: Option<String>,
    pub served_model: Option<String>,
    pub upstream: Option<String>,
    #[serde(serialize_with = "json_text")]
    pub attempts: String,
    pub status: i32,
    pub stream: bool,
    pub code: Option<String>,
    pub service_tier: Option<String>,
    pub prompt_tokens: i64,
    pub completion_tokens: i64,
    pub cached_tokens: i64,
    pub cache_write_tokens: i64,
    pub reasoning_tokens: i64,
    pub audio_tokens: i64,
    pub output_audio_tokens: i64,
    pub image_tokens: i64,
    pub output_image_tokens: i64,
    pub estimated: bool,
    pub interrupted: bool,
    pub cost_nano_usd: i64,
    pub ttft_ms: Option<i32>,
    pub duration_ms: i32,
    pub overhead_us: i32,
    pub finish_reason: Option<String>,
    pub user_agent: Option<String>,
    pub client_request_id: Option<String>,
    pub provider_request_id: Option<String>,
    #[serde(skip)]
    booked: Option<i64>,
}

fn rfc3339<S: Serializer>(time: &DateTime<Utc>, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&time.to_rfc3339_opts(SecondsFormat::Micros, true))
}

fn json_text<S: Serializer>(text: &str, to: S) -> Result<S::Ok, S::Error> {
    serde_json::from_str(text).unwrap_or(serde_json::Value::Null).serialize(to)
}

impl AuditRow {
    /// The place of this row.
    #[must_use]
    pub fn cursor(&self) -> Cursor {
        (self.started_at, self.request_id.clone())
    }

    /// The same place in the log as it grows.
    #[must_use]
    pub fn bookmark(&self) -> Bookmark {
        Bookmark { booked: self.booked.unwrap_or(0), row: Some(self.cursor()) }
    }
}

/// What is selected of a row `r`, with [`NAMES`] beside it, and one of the columns below as `booked`.
pub(super) const COLUMNS: &str = "CAST(r.request_id AS TEXT) AS request_id, r.started_at, r.user_id, u.name AS \"user\",
    r.key_id, k.name AS \"key\", r.ip, r.route, r.model, r.upstream_model, r.served_model, r.upstream,
    CAST(r.attempts AS TEXT) AS attempts, r.status, r.stream, r.code, r.service_tier, r.prompt_tokens,
    r.completion_tokens, r.cached_tokens, r.cache_write_tokens, r.reasoning_tokens, r.audio_tokens,
    r.output_audio_tokens, r.image_tokens, r.output_image_tokens, r.estimated, r.interrupted, r.cost_nano_usd, r.ttft_ms,
    r.duration_ms, r.overhead_us, r.finish_reason, r.user_agent, r.client_request_id, r.provider_request_id";
/// The names of users and keys.
pub(super) const NAMES: &str = " LEFT JOIN users u ON u.id = r.user_id LEFT JOIN api_keys k ON k.id = r.key_id";
/// The columns with the order of booking.
pub(super) const BOOKED_SQLITE: &str = "r.rowid";
pub(super) const BOOKED_POSTGRES: &str = "r.booked_by";

/// The beginning of a query for rows in the order of booking.
fn select(booked: &str) -> String {
    format!("SELECT {COLUMNS}, {booked} AS booked FROM request_log r{NAMES} WHERE 1 = 1")
}

/// Adds the conditions of a filter, but for its places. Only those that are asked for, so that the database sees which index
/// serves them.
fn narrow<'f, DB>(query: &mut QueryBuilder<DB>, filter: &'f AuditFilter)
where
    DB: sqlx::Database,
    DateTime<Utc>: Encode<'f, DB> + Type<DB>,
    i64: Encode<'f, DB> + Type<DB>,
    i32: Encode<'f, DB> + Type<DB>,
    &'f str: Encode<'f, DB> + Type<DB>,
{
    push_conditions(query, filter);
    let texts = [("model", &filter.model), ("upstream", &filter.upstream), ("code", &filter.code)];
    for (column, text) in texts {
        match text.as_deref() {
            None => {}
            Some("ok") if column == "code" => drop(query.push(" AND r.code IS NULL")),
            Some(text) => drop(query.push(" AND r.").push(column).push(" = ").push_bind(text)),
        }
    }
    if let Some(status) = filter.status {
        query.push(" AND r.status = ").push_bind(i32::from(status));
    }
}

impl Store {
    /// How far the log has grown.
    ///
    /// # Errors
    /// The database's.
    pub async fn bookmark(&self) -> Result<Bookmark, StoreError> {
        let booked: i64 = match &self.pool {
            Pool::Sqlite(pool) => {
                sqlx::query_scalar("SELECT COALESCE(MAX(rowid), 0) FROM request_log").fetch_one(pool).await?
            }
            Pool::Postgres(pool) => {
                sqlx::query_scalar("SELECT txid_snapshot_xmin(txid_current_snapshot()) - 1").fetch_one(pool).await?
            }
        };
        Ok(Bookmark { booked, row: None })
    }

    /// The rows that `filter` asks for and that were booked after `after`, in the order in which they were.
    ///
    /// # Errors
    /// The database's.
    pub async fn booked_after(&self, filter: &AuditFilter, after: &Bookmark) -> Result<Vec<AuditRow>, StoreError> {
        Ok(match &self.pool {
            Pool::Sqlite(pool) => {
                let mut query = QueryBuilder::new(select(BOOKED_SQLITE));
                narrow(&mut query, filter);
                query.push(" AND r.rowid > ").push_bind(after.booked);
                query.push(" ORDER BY r.rowid LIMIT ").push_bind(i64::from(filter.limit));
                query.build_query_as().fetch_all(pool).await?
            }
            Pool::Postgres(pool) => {
                let mut query = QueryBuilder::new(select(BOOKED_POSTGRES));
                narrow(&mut query, filter);
                query.push(" AND r.booked_by < txid_snapshot_xmin(txid_current_snapshot())");
                match &after.row {
                    None => drop(query.push(" AND r.booked_by > ").push_bind(after.booked)),
                    Some((time, id)) => {
                        query.push(" AND r.booked_by >= ").push_bind(after.booked);
                        query.push(" AND (r.booked_by, r.started_at, CAST(r.request_id AS TEXT)) > (");
                        query.push_bind(after.booked).push(", ").push_bind(time).push(", ").push_bind(id).push(")");
                    }
                }
                query.push(" ORDER BY r.booked_by, r.started_at, CAST(r.request_id AS TEXT) LIMIT ");
                query.push_bind(i64::from(filter.limit));
                query.build_query_as().fetch_all(pool).await?
            }
        })
    }
}
