//! `users`: who owns keys and a monthly quota. Never deleted, because the books name them; only disabled.

use chrono::{DateTime, Utc};
use serde_json::json;
use tollgate_core::{
    content::ContentMode,
    id::{UserId, check_name},
    limit::Limits,
    user::User,
};

use super::{Store, StoreError, admin::Entry, change, now, number, on_pool};

macro_rules! columns {
    () => {
        "id, name, rpm, tpm, concurrency, monthly_tokens, monthly_nano_usd, audit_content, created_at, disabled_at"
    };
}
pub(super) use columns;

/// What can be said about a user.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserSpec {
    /// Unique name.
    pub name: String,
    /// Are their keys refused?
    pub disabled: bool,
    /// Limits and quota over all keys of this user, where they differ from the default.
    pub limits: Limits,
    /// What is kept of the content of their requests, where it differs from the default.
    pub audit_content: Option<ContentMode>,
}

/// A row of `users`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredUser {
    /// Its id.
    pub id: UserId,
    /// What was said about them.
    pub spec: UserSpec,
    /// When they were created.
    pub created_at: DateTime<Utc>,
    /// Since when they are disabled.
    pub disabled_at: Option<DateTime<Utc>>,
}

impl StoredUser {
    /// The user as requests see them.
    #[must_use]
    pub fn to_user(&self) -> User {
        let UserSpec { name, disabled, limits, audit_content } = self.spec.clone();
        User { id: self.id, name, disabled, limits, audit_content }
    }
}

#[derive(sqlx::FromRow)]
pub(super) struct Row {
    pub(super) id: i64,
    name: String,
    rpm: Option<i64>,
    tpm: Option<i64>,
    concurrency: Option<i64>,
    monthly_tokens: Option<i64>,
    monthly_nano_usd: Option<i64>,
    audit_content: Option<String>,
    created_at: DateTime<Utc>,
    disabled_at: Option<DateTime<Utc>>,
}

impl From<Row> for StoredUser {
    fn from(row: Row) -> Self {
        Self {
            id: UserId(row.id),
            spec: UserSpec {
                name: row.name,
                disabled: row.disabled_at.is_some(),
                limits: Limits {
                    rpm: row.rpm.map(number::count32),
                    tpm: row.tpm.map(number::count),
                    concurrency: row.concurrency.map(number::count32),
                    monthly_tokens: row.monthly_tokens.map(number::count),
                    monthly_nano_usd: row.monthly_nano_usd.map(number::count),
                },
                audit_content: content_mode(row.audit_content.as_deref()),
            },
            created_at: row.created_at,
            disabled_at: row.disabled_at,
        }
    }
}

impl Store {
    /// Creates a user. `by` is who does it, for `admin_log`.
    ///
    /// # Errors
    /// [`StoreError::Taken`] or [`StoreError::Invalid`] for the name; else the database's.
    pub async fn create_user(&self, spec: &UserSpec, by: &str) -> Result<StoredUser, StoreError> {
        check_name(&spec.name).map_err(StoreError::Invalid)?;
        let row: Row = change!(self, by, |tx, seq| {
            let row: Row = sqlx::query_as(concat!(
                "INSERT INTO users (name, rpm, tpm, concurrency, monthly_tokens, monthly_nano_usd, audit_content,
                                    created_at, disabled_at, changed_seq)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) RETURNING ",
                columns!()
            ))
            .bind(&spec.name)
            .bind(spec.limits.rpm.map(i64::from))
            .bind(spec.limits.tpm.map(number::big))
            .bind(spec.limits.concurrency.map(i64::from))
            .bind(spec.limits.monthly_tokens.map(number::big))
            .bind(spec.limits.monthly_nano_usd.map(number::big))
            .bind(spec.audit_content.map(ContentMode::as_str))
            .bind(now())
            .bind(spec.disabled.then(now))
            .bind(seq)
            .fetch_one(&mut *tx)
            .await
            .map_err(|error| name_taken(error, spec))?;
            let entry = Entry::new("user.create", row.id, detail(spec));
            (row, entry)
        });
        Ok(row.into())
    }

    /// Changes what is said about a user, as `edit` does it to what is stored.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Taken`] or [`StoreError::Invalid`]; else the database's.
    pub async fn update_user(
        &self,
        id: UserId,
        by: &str,
        edit: impl FnOnce(&mut UserSpec),
    ) -> Result<StoredUser, StoreError> {
        let user = change!(self, by, |tx, seq| {
            let row: Option<Row> = sqlx::query_as(concat!("SELECT ", columns!(), " FROM users WHERE id = $1"))
                .bind(id.0)
                .fetch_optional(&mut *tx)
                .await?;
            let mut user = StoredUser::from(row.ok_or_else(|| not_found(&id.to_string()))?);
            edit(&mut user.spec);
            let spec = &user.spec;
            check_name(&spec.name).map_err(StoreError::Invalid)?;
            user.disabled_at = spec.disabled.then(|| user.disabled_at.unwrap_or_else(now));
            sqlx::query(
                "UPDATE users SET name = $1, rpm = $2, tpm = $3, concurrency = $4, monthly_tokens = $5,
                                  monthly_nano_usd = $6, audit_content = $7, disabled_at = $8, changed_seq = $9
                 WHERE id = $10",
            )
            .bind(&spec.name)
            .bind(spec.limits.rpm.map(i64::from))
            .bind(spec.limits.tpm.map(number::big))
            .bind(spec.limits.concurrency.map(i64::from))
            .bind(spec.limits.monthly_tokens.map(number::big))
            .bind(spec.limits.monthly_nano_usd.map(number::big))
            .bind(spec.audit_content.map(ContentMode::as_str))
            .bind(user.disabled_at)
            .bind(seq)
            .bind(id.0)
            .execute(&mut *tx)
            .await
            .map_err(|error| name_taken(error, spec))?;
            let entry = Entry::new("user.update", id.0, detail(spec));
            (user, entry)
        });
        Ok(user)
    }

    /// All users, in the order of their ids.
    ///
    /// # Errors
    /// The database's.
    pub async fn users(&self) -> Result<Vec<StoredUser>, StoreError> {
        let rows: Vec<Row> = on_pool!(self, pool => sqlx::query_as(concat!("SELECT ", columns!(), " FROM users ORDER BY id"))
            .fetch_all(pool).await?);
        Ok(rows.into_iter().map(StoredUser::from).collect())
    }

    /// The user with this id or name.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; else the database's.
    pub async fn find_user(&self, id_or_name: &str) -> Result<StoredUser, StoreError> {
        let row: Option<Row> = on_pool!(self, pool =>
            sqlx::query_as(concat!("SELECT ", columns!(), " FROM users WHERE id = $1 OR name = $2"))
                .bind(id_or_name.parse::<i64>().ok()).bind(id_or_name).fetch_optional(pool).await?);
        row.map(StoredUser::from).ok_or_else(|| not_found(id_or_name))
    }
}

/// The mode in a row, whose column takes no other words. One that a newer tollgate knows keeps less than this one could.
pub(super) fn content_mode(text: Option<&str>) -> Option<ContentMode> {
    text.map(|text| text.parse().unwrap_or_default())
}

fn name_taken(error: sqlx::Error, spec: &UserSpec) -> StoreError {
    StoreError::name_taken(error, || format!("a user named {:?} exists already", spec.name))
}

fn not_found(id_or_name: &str) -> StoreError {
    StoreError::NotFound(format!("there is no user {id_or_name:?}: `tollgate user list` shows them all"))
}

fn detail(spec: &UserSpec) -> serde_json::Value {
    let content = spec.audit_content.map(ContentMode::as_str);
    json!({ "name": spec.name, "disabled": spec.disabled, "limits": spec.limits, "audit_content": content })
}
