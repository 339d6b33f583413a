//! What belongs to the operator: `admin_log` (who changed what), `admin_tokens` (hashes only) and `meta`.

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use tollgate_core::key::KeyHash;

use super::{Store, StoreError, change, now, on_pool};

/// One row of `admin_log`, but for who and when.
pub(super) struct Entry {
    pub(super) action: &'static str,
    pub(super) subject_id: Option<i64>,
    pub(super) detail: Value,
}

impl Entry {
    pub(super) fn new(action: &'static str, subject_id: i64, detail: Value) -> Self {
        Self { action, subject_id: Some(subject_id), detail }
    }
}

/// A row of `admin_log`.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct AdminLogRow {
    /// Its id.
    pub id: i64,
    /// When.
    pub at: DateTime<Utc>,
    /// Who.
    pub actor: String,
    /// What, such as `user.create`.
    pub action: String,
    /// Id of the row that was changed.
    pub subject_id: Option<i64>,
    /// JSON: the row as it is after the change, without secrets.
    pub detail: String,
}

/// A row of `admin_tokens`, without the hash.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct AdminToken {
    /// Its id.
    pub id: i64,
    /// What it is for.
    pub name: String,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// Since when it no longer works.
    pub revoked_at: Option<DateTime<Utc>>,
}

impl Store {
    /// Keeps the hash of a new admin token.
    ///
    /// # Errors
    /// The database's.
    pub async fn create_admin_token(&self, name: &str, hash: KeyHash, by: &str) -> Result<AdminToken, StoreError> {
        // Taking a number of the change sequence tells the gateways nothing here, but keeps one way to write.
        let token = change!(self, by, |tx, _seq| {
            let token: AdminToken = sqlx::query_as(
                "INSERT INTO admin_tokens (name, token_hash, created_at) VALUES ($1, $2, $3)
                 RETURNING id, name, created_at, revoked_at",
            )
            .bind(name)
            .bind(hash.0.as_slice())
            .bind(now())
            .fetch_one(&mut *tx)
            .await?;
            let entry = Entry::new("admin_token.create", token.id, json!({ "name": name }));
            (token, entry)
        });
        Ok(token)
    }

    /// All admin tokens, in the order of their ids.
    ///
    /// # Errors
    /// The database's.
    pub async fn admin_tokens(&self) -> Result<Vec<AdminToken>, StoreError> {
        Ok(on_pool!(self, pool =>
            sqlx::query_as("SELECT id, name, created_at, revoked_at FROM admin_tokens ORDER BY id")
                .fetch_all(pool).await?))
    }

    /// The newest changes, newest first.
    ///
    /// # Errors
    /// The database's.
    pub async fn admin_log(&self, limit: u32) -> Result<Vec<AdminLogRow>, StoreError> {
        Ok(on_pool!(self, pool => sqlx::query_as(
            "SELECT id, at, actor, action, subject_id, detail FROM admin_log ORDER BY id DESC LIMIT $1")
            .bind(i64::from(limit)).fetch_all(pool).await?))
    }

    /// The fact called `key` about this database.
    ///
    /// # Errors
    /// The database's.
    pub async fn meta(&self, key: &str) -> Result<Option<String>, StoreError> {
        Ok(on_pool!(self, pool =>
            sqlx::query_scalar("SELECT value FROM meta WHERE key = $1").bind(key).fetch_optional(pool).await?))
    }

    /// Records a fact, unless there is one already; gives the one that holds. Two processes that start at once agree.
    ///
    /// # Errors
    /// The database's.
    pub async fn meta_or_insert(&self, key: &str, value: &str) -> Result<String, StoreError> {
        on_pool!(self, pool => {
            sqlx::query("INSERT INTO meta (key, value) VALUES ($1, $2) ON CONFLICT DO NOTHING")
                .bind(key)
                .bind(value)
                .execute(pool)
                .await?;
        });
        Ok(self.meta(key).await?.unwrap_or_else(|| value.to_owned()))
    }

    /// Replaces the fact `old` by `new`, unless it has become another one meanwhile.
    ///
    /// # Errors
    /// The database's.
    pub async fn replace_meta(&self, key: &str, old: &str, new: &str) -> Result<(), StoreError> {
        on_pool!(self, pool => {
            sqlx::query("UPDATE meta SET value = $1 WHERE key = $2 AND value = $3")
                .bind(new)
                .bind(key)
                .bind(old)
                .execute(pool)
                .await?;
        });
        Ok(())
    }
}
