//! Reading the request log, newest first, a page at a time.
//!
//! Pages go on after the last row of the one before (its time and id), not at a row number: the log grows while it is
//! read, and a page deep down costs no more than the first.

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Serialize, Serializer};
use sqlx::QueryBuilder;
use tollgate_core::id::{KeyId, UserId};
use uuid::Uuid;

use super::{Store, StoreError, on_pool};

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
    /// Status the client got.
    pub status: Option<u16>,
    /// This one request; its time must be within the others.
    pub request: Option<Uuid>,
    /// Only rows after this place.
    pub before: Option<Cursor>,
    /// At most so many rows.
    pub limit: u32,
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
    pub upstream: Option<String>,
    #[serde(serialize_with = "json_text")]
    pub attempts: String,
    pub status: i32,
    pub stream: bool,
    pub code: Option<String>,
    pub prompt_tokens: i64,
    pub completion_tokens: i64,
    pub cached_tokens: i64,
    pub reasoning_tokens: i64,
    pub audio_tokens: i64,
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
}

const SELECT: &str = "SELECT CAST(r.request_id AS TEXT) AS request_id, r.started_at, r.user_id, u.name AS \"user\",
        r.key_id, k.name AS \"key\", r.ip, r.route, r.model, r.upstream_model, r.upstream,
        CAST(r.attempts AS TEXT) AS attempts, r.status, r.stream, r.code, r.prompt_tokens, r.completion_tokens,
        r.cached_tokens, r.reasoning_tokens, r.audio_tokens, r.estimated, r.interrupted, r.cost_nano_usd, r.ttft_ms,
        r.duration_ms, r.overhead_us, r.finish_reason, r.user_agent, r.client_request_id, r.provider_request_id
    FROM request_log r LEFT JOIN users u ON u.id = r.user_id LEFT JOIN api_keys k ON k.id = r.key_id WHERE 1 = 1";

impl Store {
    /// The rows that `filter` asks for, newest first.
    ///
    /// # Errors
    /// The database's.
    pub async fn audit(&self, filter: &AuditFilter) -> Result<Vec<AuditRow>, StoreError> {
        Ok(on_pool!(self, pool => {
            // Only the conditions that are asked for, so that the database sees which index serves them.
            let mut query = QueryBuilder::new(SELECT);
            if let Some(since) = filter.since {
                query.push(" AND r.started_at >= ").push_bind(since);
            }
            if let Some(until) = filter.until {
                query.push(" AND r.started_at < ").push_bind(until);
            }
            if let Some(user) = filter.user {
                query.push(" AND r.user_id = ").push_bind(user.0);
            }
            if let Some(key) = filter.key {
                query.push(" AND r.key_id = ").push_bind(key.0);
            }
            if let Some(model) = &filter.model {
                query.push(" AND r.model = ").push_bind(model);
            }
            if let Some(status) = filter.status {
                query.push(" AND r.status = ").push_bind(i32::from(status));
            }
            if let Some(request) = filter.request {
                query.push(" AND CAST(r.request_id AS TEXT) = ").push_bind(request.hyphenated().to_string());
            }
            if let Some((time, id)) = &filter.before {
                query.push(" AND r.started_at <= ").push_bind(time);
                query.push(" AND (r.started_at < ").push_bind(time);
                query.push(" OR CAST(r.request_id AS TEXT) < ").push_bind(id).push(")");
            }
            query.push(" ORDER BY r.started_at DESC, r.request_id DESC LIMIT ").push_bind(i64::from(filter.limit));
            query.build_query_as().fetch_all(pool).await?
        }))
    }
}
