//! `api_keys`: hashes of the keys we issue, and what each may do. Never deleted, because the books name them; only
//! revoked, which gives the name free.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde_json::json;
use tollgate_core::{
    content::ContentMode,
    id::{KeyId, UserId, check_name},
    key::{ApiKey, IpNet, KeyEntry, KeyHash},
    limit::{Limits, ModelLimits, written},
    user::User,
};

use super::{Store, StoreError, admin::Entry, change, now, number, on_pool, user::content_mode};

macro_rules! select {
    ($($rest:literal),*) => {
        concat!(
            "SELECT k.id, k.user_id, u.name AS user_name, k.name, k.key_hash, k.prefix, k.models, k.allow_ip, k.rpm, k.tpm,
                    k.concurrency, k.monthly_tokens, k.monthly_nano_usd, k.model_limits, k.audit_content,
                    k.created_at, k.expires_at, k.revoked_at
             FROM api_keys k JOIN users u ON u.id = k.user_id ",
            $($rest),*
        )
    };
}
pub(super) use select;

/// What can be said about a key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeySpec {
    /// Its name, unique among its user's live keys.
    pub name: String,
    /// Models it may use; patterns with `*`; empty: every model.
    pub models: Vec<String>,
    /// Addresses it may be used from; empty: any.
    pub allow_ip: Vec<IpNet>,
    /// Limits and quota where they differ from the default.
    pub limits: Limits,
    /// Limits of single models, each named once.
    pub model_limits: Vec<ModelLimits>,
    /// What is kept of the content of its requests, where it differs from what its user says.
    pub audit_content: Option<ContentMode>,
    /// When it ceases to work.
    pub expires_at: Option<DateTime<Utc>>,
}

/// A row of `api_keys`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredKey {
    /// Its id.
    pub id: KeyId,
    /// Who owns it.
    pub user_id: UserId,
    /// The owner's name.
    pub user_name: String,
    /// What was said about it.
    pub spec: KeySpec,
    /// What is kept of the secret.
    pub hash: KeyHash,
    /// The part of the secret that may be shown.
    pub prefix: String,
    /// When it was created.
    pub created_at: DateTime<Utc>,
    /// Since when it no longer works.
    pub revoked_at: Option<DateTime<Utc>>,
}

impl StoredKey {
    /// What the key directory holds of it. `user` is the owner.
    #[must_use]
    pub fn to_entry(&self, user: Arc<User>) -> KeyEntry {
        KeyEntry {
            id: self.id,
            name: self.spec.name.clone(),
            prefix: self.prefix.clone(),
            user,
            models: self.spec.models.clone(),
            allow_ip: self.spec.allow_ip.clone(),
            limits: self.spec.limits,
            model_limits: self.spec.model_limits.clone(),
            audit_content: self.spec.audit_content,
            expires_at: self.spec.expires_at,
            revoked_at: self.revoked_at,
        }
    }
}

#[derive(sqlx::FromRow)]
pub(super) struct Row {
    id: i64,
    user_id: i64,
    user_name: String,
    name: String,
    key_hash: Vec<u8>,
    prefix: String,
    models: String,
    allow_ip: String,
    rpm: Option<i64>,
    tpm: Option<i64>,
    concurrency: Option<i64>,
    monthly_tokens: Option<i64>,
    monthly_nano_usd: Option<i64>,
    model_limits: String,
    audit_content: Option<String>,
    created_at: DateTime<Utc>,
    expires_at: Option<DateTime<Utc>>,
    revoked_at: Option<DateTime<Utc>>,
}

impl TryFrom<Row> for StoredKey {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        let corrupt = |what: &str| StoreError::Corrupt(format!("api_keys.{what} of the key with id {}", row.id));
        let nets: Vec<String> = serde_json::from_str(&row.allow_ip).map_err(|_| corrupt("allow_ip"))?;
        Ok(Self {
            id: KeyId(row.id),
            user_id: UserId(row.user_id),
            spec: KeySpec {
                models: serde_json::from_str(&row.models).map_err(|_| corrupt("models"))?,
                allow_ip: nets
                    .iter()
                    .map(|net| IpNet::parse(net))
                    .collect::<Result<_, _>>()
                    .map_err(|_| corrupt("allow_ip"))?,
                name: row.name,
                limits: Limits {
                    rpm: row.rpm.map(number::count32),
                    tpm: row.tpm.map(number::count),
                    concurrency: row.concurrency.map(number::count32),
                    monthly_tokens: row.monthly_tokens.map(number::count),
                    monthly_nano_usd: row.monthly_nano_usd.map(number::count),
                },
                model_limits: serde_json::from_str(&row.model_limits).map_err(|_| corrupt("model_limits"))?,
                audit_content: content_mode(row.audit_content.as_deref()),
                expires_at: row.expires_at,
            },
            hash: KeyHash(row.key_hash.as_slice().try_into().map_err(|_| corrupt("key_hash"))?),
            user_name: row.user_name,
            prefix: row.prefix,
            created_at: row.created_at,
            revoked_at: row.revoked_at,
        })
    }
}

impl Store {
    /// Keeps the hash of `key` as a new key of a user.
    ///
    /// # Errors
    /// [`StoreError::Taken`] or [`StoreError::Invalid`]; else the database's.
    pub async fn create_key(
        &self,
        user: UserId,
        spec: &KeySpec,
        key: &ApiKey,
        by: &str,
    ) -> Result<StoredKey, StoreError> {
        check(spec)?;
        let row: Row = change!(self, by, |tx, seq| {
            let id: i64 = sqlx::query_scalar(
                "INSERT INTO api_keys (user_id, name, key_hash, prefix, models, allow_ip, rpm, tpm, concurrency,
                                       monthly_tokens, monthly_nano_usd, model_limits, audit_content, created_at,
                                       expires_at, changed_seq)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16) RETURNING id",
            )
            .bind(user.0)
            .bind(&spec.name)
            .bind(key.hash().0.as_slice())
            .bind(key.prefix())
            .bind(json!(spec.models).to_string())
            .bind(nets(spec))
            .bind(spec.limits.rpm.map(i64::from))
            .bind(spec.limits.tpm.map(number::big))
            .bind(spec.limits.concurrency.map(i64::from))
            .bind(spec.limits.monthly_tokens.map(number::big))
            .bind(spec.limits.monthly_nano_usd.map(number::big))
            .bind(json!(spec.model_limits).to_string())
            .bind(spec.audit_content.map(ContentMode::as_str))
            .bind(now())
            .bind(spec.expires_at)
            .bind(seq)
            .fetch_one(&mut *tx)
            .await
            .map_err(|error| name_taken(error, spec))?;
            let row: Row = sqlx::query_as(select!("WHERE k.id = $1")).bind(id).fetch_one(&mut *tx).await?;
            (row, Entry::new("key.create", id, detail(user, key.prefix(), spec)))
        });
        row.try_into()
    }

    /// Changes what is said about a key, as `edit` does it to what is stored.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Taken`] or [`StoreError::Invalid`]; else the database's.
    pub async fn update_key(
        &self,
        id: KeyId,
        by: &str,
        edit: impl FnOnce(&mut KeySpec),
    ) -> Result<StoredKey, StoreError> {
        let key = change!(self, by, |tx, seq| {
            let row: Option<Row> =
                sqlx::query_as(select!("WHERE k.id = $1")).bind(id.0).fetch_optional(&mut *tx).await?;
            let mut key = StoredKey::try_from(row.ok_or_else(|| not_found(&id.to_string()))?)?;
            edit(&mut key.spec);
            let spec = &key.spec;
            check(spec)?;
            sqlx::query(
                "UPDATE api_keys SET name = $1, models = $2, allow_ip = $3, rpm = $4, tpm = $5, concurrency = $6,
                                     monthly_tokens = $7, monthly_nano_usd = $8, model_limits = $9, audit_content = $10,
                                     expires_at = $11, changed_seq = $12
                 WHERE id = $13",
            )
            .bind(&spec.name)
            .bind(json!(spec.models).to_string())
            .bind(nets(spec))
            .bind(spec.limits.rpm.map(i64::from))
            .bind(spec.limits.tpm.map(number::big))
            .bind(spec.limits.concurrency.map(i64::from))
            .bind(spec.limits.monthly_tokens.map(number::big))
            .bind(spec.limits.monthly_nano_usd.map(number::big))
            .bind(json!(spec.model_limits).to_string())
            .bind(spec.audit_content.map(ContentMode::as_str))
            .bind(spec.expires_at)
            .bind(seq)
            .bind(id.0)
            .execute(&mut *tx)
            .await
            .map_err(|error| name_taken(error, spec))?;
            let entry = Entry::new("key.update", id.0, detail(key.user_id, &key.prefix, spec));
            (key, entry)
        });
        Ok(key)
    }

    /// Makes a key stop working, for good. Doing it again changes nothing.
    ///
    /// # Errors
    /// The database's.
    pub async fn revoke_key(&self, id: KeyId, by: &str) -> Result<(), StoreError> {
        change!(self, by, |tx, seq| {
            sqlx::query("UPDATE api_keys SET revoked_at = COALESCE(revoked_at, $1), changed_seq = $2 WHERE id = $3")
                .bind(now())
                .bind(seq)
                .bind(id.0)
                .execute(&mut *tx)
                .await?;
            ((), Entry::new("key.revoke", id.0, json!({})))
        });
        Ok(())
    }

    /// Replaces the secret of a key by `key`; the old one stops working.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if the key is revoked; else the database's.
    pub async fn rotate_key(&self, id: KeyId, key: &ApiKey, by: &str) -> Result<StoredKey, StoreError> {
        let row: Option<Row> = change!(self, by, |tx, seq| {
            sqlx::query(
                "UPDATE api_keys SET key_hash = $1, prefix = $2, changed_seq = $3 WHERE id = $4 AND revoked_at IS NULL",
            )
            .bind(key.hash().0.as_slice())
            .bind(key.prefix())
            .bind(seq)
            .bind(id.0)
            .execute(&mut *tx)
            .await?;
            let row: Option<Row> = sqlx::query_as(select!("WHERE k.id = $1 AND k.revoked_at IS NULL"))
                .bind(id.0)
                .fetch_optional(&mut *tx)
                .await?;
            if row.is_none() {
                return Err(StoreError::Invalid(format!("the key with id {id} is revoked: create a new one")));
            }
            (row, Entry::new("key.rotate", id.0, json!({ "prefix": key.prefix() })))
        });
        row.ok_or_else(|| not_found(&id.to_string()))?.try_into()
    }

    /// The keys of one user, or of all, in the order of their ids.
    ///
    /// # Errors
    /// The database's.
    pub async fn keys(&self, user: Option<UserId>) -> Result<Vec<StoredKey>, StoreError> {
        let rows: Vec<Row> = on_pool!(self, pool =>
            sqlx::query_as(select!("WHERE $1 IS NULL OR k.user_id = $1 ORDER BY k.id"))
                .bind(user.map(|user| user.0)).fetch_all(pool).await?);
        rows.into_iter().map(StoredKey::try_from).collect()
    }

    /// The key with this id, name or `user/name`. A live key is preferred to revoked ones of the same name.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is none, or no single one; else the database's.
    pub async fn find_key(&self, text: &str) -> Result<StoredKey, StoreError> {
        let (user, name) = text.split_once('/').map_or((None, text), |(user, name)| (Some(user), name));
        let rows: Vec<Row> = on_pool!(self, pool => sqlx::query_as(select!(
                "WHERE k.id = $1 OR (k.name = $2 AND ($3 IS NULL OR u.name = $3))
                 ORDER BY k.revoked_at IS NOT NULL, k.id DESC"
            ))
            .bind(text.parse::<i64>().ok()).bind(name).bind(user).fetch_all(pool).await?);
        let live = rows.iter().filter(|row| row.revoked_at.is_none()).count();
        if live > 1 {
            let all: Vec<_> =
                rows.iter().take(live).map(|row| format!("{}/{} (id {})", row.user_name, row.name, row.id)).collect();
            return Err(StoreError::NotFound(format!(
                "several keys are named {text:?}; say which: {}",
                all.join(", ")
            )));
        }
        rows.into_iter().next().ok_or_else(|| not_found(text))?.try_into()
    }
}

fn check(spec: &KeySpec) -> Result<(), StoreError> {
    check_name(&spec.name).map_err(StoreError::Invalid)?;
    for entry in &spec.model_limits {
        written::check_model(&entry.model)
            .map_err(|message| StoreError::Invalid(format!("{:?} {message}", entry.model)))?;
    }
    written::check_distinct(&spec.model_limits).map_err(StoreError::Invalid)?;
    match spec.models.iter().find(|model| model.is_empty() || model.chars().any(|c| c.is_control() || c == ' ')) {
        Some(bad) => Err(StoreError::Invalid(format!("{bad:?} is not a model: write a name, or a pattern with *"))),
        None => Ok(()),
    }
}

fn nets(spec: &KeySpec) -> String {
    json!(spec.allow_ip.iter().map(ToString::to_string).collect::<Vec<_>>()).to_string()
}

fn name_taken(error: sqlx::Error, spec: &KeySpec) -> StoreError {
    StoreError::name_taken(error, || {
        format!("this user has a key named {:?} already: revoke it, or choose another name", spec.name)
    })
}

fn not_found(text: &str) -> StoreError {
    StoreError::NotFound(format!("there is no key {text:?}: `tollgate key list` shows them all"))
}

fn detail(user: UserId, prefix: &str, spec: &KeySpec) -> serde_json::Value {
    json!({
        "user_id": user, "prefix": prefix, "name": spec.name, "models": spec.models,
        "allow_ip": spec.allow_ip.iter().map(ToString::to_string).collect::<Vec<_>>(), "limits": spec.limits,
        "model_limits": spec.model_limits, "audit_content": spec.audit_content.map(ContentMode::as_str),
        "expires_at": spec.expires_at.map(|at| at.to_rfc3339()),
    })
}
