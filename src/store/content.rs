//! `request_content`: what is kept of the content of requests. Whatever is in it came here encrypted.
//!
//! A row is found by the time that its request's id carries, as one of `request_log` is. Writing a row twice is the same as
//! writing it once.

use chrono::{DateTime, SubsecRound, TimeDelta, Utc};
use sqlx::QueryBuilder;
use tollgate_core::content::ContentMode;
use uuid::Uuid;

use super::{AuditFilter, AuditRow, Cursor, Pool, Store, StoreError, admin::Entry, change, number, on_pool};

/// How far the time of an id may be from that of its row: both are taken one after the other, and clocks are corrected.
const NEAR: TimeDelta = TimeDelta::minutes(5);
/// Rows of one statement: SQLite takes 32,766 parameters.
const GROUP: usize = 512;

/// A row of `request_content`.
#[derive(Clone, PartialEq, Eq)]
pub struct ContentRow {
    /// Of which request.
    pub request_id: Uuid,
    /// When that began.
    pub started_at: DateTime<Utc>,
    /// What was to be kept; never [`ContentMode::None`].
    pub mode: ContentMode,
    /// By which equal prompts are found: see [`prompt_hash`](tollgate_core::content::prompt_hash).
    pub prompt_hash: [u8; 32],
    /// Request and answer, packed, compressed and encrypted; `None`: only the hash is kept.
    pub sealed: Option<Vec<u8>>,
    /// Length of the request's body as it came, in bytes.
    pub request_bytes: u64,
    /// Length of the answer's body as the client got it, in bytes.
    pub answer_bytes: u64,
    /// Is less kept than there was?
    pub truncated: bool,
}

impl std::fmt::Debug for ContentRow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sealed = self.sealed.as_ref().map(Vec::len);
        let mut shown = f.debug_struct("ContentRow");
        shown.field("request_id", &self.request_id).field("mode", &self.mode).field("sealed_bytes", &sealed);
        shown.finish_non_exhaustive()
    }
}

/// The ciphertext of a row, alone: for `tollgate secret rotate`.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct SealedContent {
    /// Of which request, as text.
    pub request_id: String,
    /// When that began.
    pub started_at: DateTime<Utc>,
    /// The ciphertext.
    pub content: Vec<u8>,
}

#[derive(sqlx::FromRow)]
struct Row {
    started_at: DateTime<Utc>,
    mode: String,
    prompt_hash: Vec<u8>,
    content: Option<Vec<u8>>,
    request_bytes: i64,
    answer_bytes: i64,
    truncated: bool,
}

impl Row {
    fn of(self, request_id: Uuid) -> Result<ContentRow, StoreError> {
        let corrupt = |what: &str| StoreError::Corrupt(format!("request_content.{what} of the request {request_id}"));
        Ok(ContentRow {
            request_id,
            started_at: self.started_at,
            mode: self.mode.parse().map_err(|_| corrupt("mode"))?,
            prompt_hash: self.prompt_hash.try_into().map_err(|_| corrupt("prompt_hash"))?,
            sealed: self.content,
            request_bytes: number::count(self.request_bytes),
            answer_bytes: number::count(self.answer_bytes),
            truncated: self.truncated,
        })
    }
}

/// Inserts `$rows`, whose ids are bound as `$id`.
macro_rules! insert {
    ($pool:expr, $rows:expr, |$row:ident| $id:expr) => {{
        let mut tx = $pool.begin().await?;
        for group in $rows.chunks(GROUP) {
            let mut query = QueryBuilder::new(
                "INSERT INTO request_content (request_id, started_at, mode, prompt_hash, content, request_bytes,
                                              answer_bytes, truncated) ",
            );
            query.push_values(group, |mut query, $row: &ContentRow| {
                query
                    .push_bind($id)
                    .push_bind($row.started_at.trunc_subsecs(6))
                    .push_bind($row.mode.as_str())
                    .push_bind($row.prompt_hash.as_slice())
                    .push_bind($row.sealed.as_deref())
                    .push_bind(number::big($row.request_bytes))
                    .push_bind(number::big($row.answer_bytes))
                    .push_bind($row.truncated);
            });
            query.push(" ON CONFLICT DO NOTHING").build().execute(&mut *tx).await?;
        }
        tx.commit().await?;
    }};
}

/// The window in which the row of a request lies.
fn window(request_id: Uuid) -> Result<(DateTime<Utc>, DateTime<Utc>), StoreError> {
    let time = request_id.get_timestamp().and_then(|time| {
        let (seconds, nanos) = time.to_unix();
        DateTime::from_timestamp(i64::try_from(seconds).ok()?, nanos)
    });
    let none = || StoreError::NotFound(format!("{request_id} is no id of a request: `tollgate audit` shows them"));
    let time = time.ok_or_else(none)?;
    let window = time.checked_sub_signed(NEAR).zip(time.checked_add_signed(NEAR));
    window.ok_or_else(none)
}

impl Store {
    /// Writes a batch in one transaction. Rows that are there already stay as they are.
    ///
    /// # Errors
    /// The database's. Then nothing of the batch is written, or it is not known whether it was.
    pub async fn write_contents(&self, rows: &[ContentRow]) -> Result<(), StoreError> {
        match &self.pool {
            Pool::Sqlite(pool) => insert!(pool, rows, |row| row.request_id.hyphenated()),
            Pool::Postgres(pool) => insert!(pool, rows, |row| row.request_id),
        }
        Ok(())
    }

    /// What is kept of the content of a request, if anything.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if the id is none; else the database's.
    pub async fn find_content(&self, request_id: Uuid) -> Result<Option<ContentRow>, StoreError> {
        let (since, until) = window(request_id)?;
        let row: Option<Row> = on_pool!(self, pool => sqlx::query_as(
            "SELECT started_at, mode, prompt_hash, content, request_bytes, answer_bytes, truncated FROM request_content
             WHERE started_at >= $1 AND started_at < $2 AND CAST(request_id AS TEXT) = $3")
            .bind(since).bind(until).bind(request_id.hyphenated().to_string()).fetch_optional(pool).await?);
        row.map(|row| row.of(request_id)).transpose()
    }

    /// The row of the log of a request.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is none; else the database's.
    pub async fn find_request(&self, request_id: Uuid) -> Result<AuditRow, StoreError> {
        let (since, until) = window(request_id)?;
        let (since, until) = (Some(since), Some(until));
        let filter = AuditFilter { since, until, request: Some(request_id), limit: 1, ..AuditFilter::default() };
        let none = || {
            let text = "if it has just ended, ask again in a moment; else `tollgate audit` shows what there is";
            StoreError::NotFound(format!("there is no request {request_id} in the log: {text}"))
        };
        self.audit(&filter).await?.pop().ok_or_else(none)
    }

    /// The ids of the last requests with this prompt, newest first.
    ///
    /// # Errors
    /// The database's.
    pub async fn requests_of_prompt(&self, prompt_hash: &[u8; 32], limit: u32) -> Result<Vec<String>, StoreError> {
        Ok(on_pool!(self, pool => sqlx::query_scalar(
            "SELECT CAST(request_id AS TEXT) FROM request_content WHERE prompt_hash = $1 ORDER BY started_at DESC LIMIT $2")
            .bind(prompt_hash.as_slice()).bind(i64::from(limit)).fetch_all(pool).await?))
    }

    /// Up to `limit` ciphertexts, in the order of their requests, from behind `after` on.
    ///
    /// # Errors
    /// The database's.
    pub async fn contents_after(&self, after: Option<&Cursor>, limit: u32) -> Result<Vec<SealedContent>, StoreError> {
        let (time, id) = after.map_or((DateTime::<Utc>::UNIX_EPOCH, ""), |(time, id)| (*time, id));
        Ok(on_pool!(self, pool => sqlx::query_as(
            "SELECT CAST(request_id AS TEXT) AS request_id, started_at, content FROM request_content
             WHERE content IS NOT NULL AND started_at >= $1 AND (started_at > $1 OR CAST(request_id AS TEXT) > $2)
             ORDER BY started_at, request_id LIMIT $3")
            .bind(time).bind(id).bind(i64::from(limit)).fetch_all(pool).await?))
    }

    /// Puts each second text, which is the same content, in the place of the ciphertext of the first; all in one transaction. What
    /// is not there any more is left out.
    ///
    /// # Errors
    /// The database's.
    pub async fn replace_contents(&self, replaced: &[(SealedContent, Vec<u8>)]) -> Result<(), StoreError> {
        on_pool!(self, pool => {
            let mut tx = pool.begin().await?;
            for (old, new) in replaced {
                sqlx::query("UPDATE request_content SET content = $1
                             WHERE started_at = $2 AND CAST(request_id AS TEXT) = $3 AND content IS NOT NULL")
                    .bind(new.as_slice())
                    .bind(old.started_at)
                    .bind(&old.request_id)
                    .execute(&mut *tx)
                    .await?;
            }
            tx.commit().await?;
        });
        Ok(())
    }

    /// Notes in the log of changes that somebody has read the content of a request.
    ///
    /// # Errors
    /// The database's.
    pub async fn note_content_read(&self, request_id: Uuid, by: &str) -> Result<(), StoreError> {
        change!(self, by, |tx, _seq| {
            let detail = serde_json::json!({ "request_id": request_id });
            ((), Entry { action: "content.read", subject_id: None, detail })
        });
        Ok(())
    }
}
