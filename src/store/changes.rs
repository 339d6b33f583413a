//! What a running gateway learns from the database: everything once, then what changed.
//!
//! Every write takes the next number of one sequence and leaves it on the rows it touches, so "what is new since
//! number n" is a question that any replica can ask at any time, however long it was away. PostgreSQL also announces
//! each number ([`ChangeListener`]); the announcement only makes the question come sooner, nothing depends on it.

use std::{collections::BTreeMap, sync::Arc};

use sqlx::postgres::PgListener;
use tollgate_core::{
    id::{UpstreamId, UserId},
    key::{KeyEntry, KeyHash},
    user::User,
};

use super::{Pool, Store, StoreError, StoredKey, StoredPrice, StoredUpstream, StoredUser, key, price, upstream, user};

/// Rows that changed after a number of the change sequence, and the number to ask with next time.
#[derive(Debug, Default)]
pub struct Changes {
    /// Number up to which this is complete.
    pub seq: i64,
    /// Is this everything there is, so that whatever else the caller has is gone? It is when everything was asked for,
    /// and when the database is an older one than the caller has seen: a backup was restored.
    pub complete: bool,
    /// Users that changed.
    pub users: Vec<Arc<User>>,
    /// Keys that changed, or whose user did, whole. Revoked ones too. A rotated key comes with its new hash: whoever
    /// keeps keys by hash drops the entry with the same id under the old one.
    pub keys: Vec<(KeyHash, Arc<KeyEntry>)>,
    /// Upstreams that changed, with their credentials encrypted.
    pub upstreams: Vec<StoredUpstream>,
    /// Upstreams that were removed.
    pub removed_upstreams: Vec<UpstreamId>,
    /// Prices that were imported.
    pub prices: Vec<StoredPrice>,
}

impl Changes {
    /// Did nothing change?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let people = self.users.is_empty() && self.keys.is_empty();
        people && self.upstreams.is_empty() && self.removed_upstreams.is_empty() && self.prices.is_empty()
    }
}

/// Reads the sequence first and all rows in one snapshot, so that nothing falls between two questions.
macro_rules! read_changes {
    ($pool:expr, $begin:literal, $since:expr) => {{
        let mut tx = $pool.begin_with($begin).await?;
        let seq: i64 = sqlx::query_scalar("SELECT value FROM change_seq").fetch_one(&mut *tx).await?;
        if seq == $since && seq != 0 {
            return Ok(Changes { seq, ..Changes::default() });
        }
        let since = if $since > seq { 0 } else { $since };
        let users: Vec<user::Row> = sqlx::query_as(concat!(
            "SELECT ",
            user::columns!(),
            " FROM users WHERE changed_seq > $1 OR id IN (SELECT user_id FROM api_keys WHERE changed_seq > $1)"
        ))
        .bind(since)
        .fetch_all(&mut *tx)
        .await?;
        let keys: Vec<key::Row> = sqlx::query_as(key::select!("WHERE k.changed_seq > $1 OR u.changed_seq > $1"))
            .bind(since)
            .fetch_all(&mut *tx)
            .await?;
        let upstreams: Vec<upstream::Row> =
            sqlx::query_as(concat!("SELECT ", upstream::columns!(), " FROM upstreams WHERE changed_seq > $1"))
                .bind(since)
                .fetch_all(&mut *tx)
                .await?;
        let prices: Vec<price::Row> =
            sqlx::query_as(concat!("SELECT ", price::columns!(), " FROM prices WHERE changed_seq > $1"))
                .bind(since)
                .fetch_all(&mut *tx)
                .await?;
        (seq, since == 0, users, keys, upstreams, prices)
    }};
}

impl Store {
    /// Everything that changed after `since`; 0: everything there is.
    ///
    /// A row that cannot be read does not keep the others from being seen: it is logged, and left out when everything
    /// is loaded; otherwise what the caller has of it stays.
    ///
    /// # Errors
    /// The database's.
    pub async fn changes_since(&self, since: i64) -> Result<Changes, StoreError> {
        let (seq, complete, users, keys, upstreams, prices) = match &self.pool {
            Pool::Sqlite(pool) => read_changes!(pool, "BEGIN", since),
            Pool::Postgres(pool) => read_changes!(pool, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", since),
        };
        let owners: BTreeMap<UserId, Arc<User>> =
            users.into_iter().map(|row| (UserId(row.id), Arc::new(StoredUser::from(row).to_user()))).collect();
        Ok(Changes {
            seq,
            complete,
            keys: readable::<_, StoredKey>(keys)
                .filter_map(|key| Some((key.hash, Arc::new(key.to_entry(owners.get(&key.user_id)?.clone())))))
                .collect(),
            users: owners.into_values().collect(),
            removed_upstreams: upstreams.iter().filter_map(upstream::Row::removed).collect(),
            prices: readable(prices).collect(),
            upstreams: readable(upstreams.into_iter().filter(|row| row.removed().is_none())).collect(),
        })
    }

    /// Listens for announcements of changes.
    ///
    /// # Errors
    /// If the database cannot be reached.
    pub async fn listen(&self) -> Result<ChangeListener, StoreError> {
        let listener = match &self.pool {
            Pool::Sqlite(_) => None,
            Pool::Postgres(pool) => {
                let mut listener = PgListener::connect_with(pool).await?;
                listener.listen("tollgate_changes").await?;
                Some(listener)
            }
        };
        Ok(ChangeListener(listener))
    }
}

/// The rows that this version understands.
pub(super) fn readable<Row, T: TryFrom<Row, Error = StoreError>>(
    rows: impl IntoIterator<Item = Row>,
) -> impl Iterator<Item = T> {
    rows.into_iter().filter_map(|row| T::try_from(row).inspect_err(|error| tracing::error!("ignored: {error}")).ok())
}

/// Hears of changes as soon as they are made.
#[derive(Debug)]
pub struct ChangeListener(Option<PgListener>);

impl ChangeListener {
    /// Waits for the next change: on PostgreSQL until it is announced, on SQLite for ever. Use it beside a timer.
    ///
    /// # Errors
    /// If the connection broke. The next call makes a new one.
    pub async fn changed(&mut self) -> Result<(), StoreError> {
        match &mut self.0 {
            // An announcement may have been missed when the connection was lost: that counts as one.
            Some(listener) => Ok(listener.try_recv().await.map(drop)?),
            None => std::future::pending().await,
        }
    }
}
