//! `upstreams`: the members of the pool that do not come from the config file. The credential is Fernet ciphertext
//! on its way in, at rest and on its way out; whoever uses an upstream decrypts it.

use chrono::{DateTime, Utc};
use serde_json::json;
use tollgate_core::{
    id::{UpstreamId, check_name},
    secret::Secret,
    upstream::{BaseUrl, Handling, ModelEntry, Overrides, Upstream, UpstreamKind},
};

use super::{Store, StoreError, admin::Entry, change, now, number, on_pool};

macro_rules! columns {
    () => {
        "id, name, kind, base_url, credential, models, weight, priority, api_version, handling, created_at, disabled_at,
         removed_at"
    };
}
pub(super) use columns;

/// What can be said about an upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamSpec {
    /// Unique name, the label in metrics.
    pub name: String,
    /// How it wants to be spoken to.
    pub kind: UpstreamKind,
    /// Where it is.
    pub base_url: BaseUrl,
    /// The provider's secret, as Fernet ciphertext.
    pub credential: String,
    /// What it serves; empty stands for `*`.
    pub models: Vec<ModelEntry>,
    /// Share of the work among upstreams of the same priority.
    pub weight: u32,
    /// Lower numbers are used first.
    pub priority: u32,
    /// Azure's `api-version`.
    pub api_version: Option<String>,
    /// How it is handled, where not as the defaults say.
    pub overrides: Overrides,
    /// Does it get no new work?
    pub disabled: bool,
}

/// A row of `upstreams` that was not removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredUpstream {
    /// Its id.
    pub id: UpstreamId,
    /// What was said about it.
    pub spec: UpstreamSpec,
    /// When it was added.
    pub created_at: DateTime<Utc>,
    /// Since when it is disabled.
    pub disabled_at: Option<DateTime<Utc>>,
}

impl StoredUpstream {
    /// The upstream as requests see it. `credential` is the decrypted one, `defaults` how upstreams are handled that do not
    /// say otherwise.
    #[must_use]
    pub fn to_upstream(&self, credential: Secret, defaults: Handling) -> Upstream {
        let spec = self.spec.clone();
        Upstream {
            id: Some(self.id),
            name: spec.name,
            kind: spec.kind,
            base_url: spec.base_url,
            credential,
            models: spec.models,
            weight: spec.weight,
            priority: spec.priority,
            api_version: spec.api_version,
            handling: spec.overrides.over(defaults),
            ca_pem: None,
            disabled: spec.disabled,
        }
    }
}

#[derive(sqlx::FromRow)]
pub(super) struct Row {
    id: i64,
    name: String,
    kind: String,
    base_url: String,
    credential: Option<String>,
    models: String,
    weight: i64,
    priority: i64,
    api_version: Option<String>,
    handling: String,
    created_at: DateTime<Utc>,
    disabled_at: Option<DateTime<Utc>>,
    removed_at: Option<DateTime<Utc>>,
}

impl Row {
    /// Its id, if the upstream was removed.
    pub(super) fn removed(&self) -> Option<UpstreamId> {
        self.removed_at.map(|_| UpstreamId(self.id))
    }
}

impl TryFrom<Row> for StoredUpstream {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        let corrupt = |what: &str| StoreError::Corrupt(format!("upstreams.{what} of the upstream {:?}", row.name));
        let models: Vec<String> = serde_json::from_str(&row.models).map_err(|_| corrupt("models"))?;
        Ok(Self {
            id: UpstreamId(row.id),
            spec: UpstreamSpec {
                kind: row.kind.parse().map_err(|_| corrupt("kind"))?,
                base_url: BaseUrl::parse(&row.base_url).map_err(|_| corrupt("base_url"))?,
                credential: row.credential.ok_or_else(|| corrupt("credential"))?,
                models: models
                    .iter()
                    .map(|model| ModelEntry::parse(model))
                    .collect::<Result<_, _>>()
                    .map_err(|_| corrupt("models"))?,
                weight: number::count32(row.weight),
                priority: number::count32(row.priority),
                api_version: row.api_version,
                overrides: serde_json::from_str(&row.handling).map_err(|_| corrupt("handling"))?,
                disabled: row.disabled_at.is_some(),
                name: row.name,
            },
            created_at: row.created_at,
            disabled_at: row.disabled_at,
        })
    }
}

impl Store {
    /// Adds an upstream.
    ///
    /// # Errors
    /// [`StoreError::Taken`] or [`StoreError::Invalid`]; else the database's.
    pub async fn create_upstream(&self, spec: &UpstreamSpec, by: &str) -> Result<StoredUpstream, StoreError> {
        check_name(&spec.name).map_err(StoreError::Invalid)?;
        let row: Row = change!(self, by, |tx, seq| {
            let row: Row = sqlx::query_as(concat!(
                "INSERT INTO upstreams (name, kind, base_url, credential, models, weight, priority, api_version,
                                        handling, created_at, disabled_at, changed_seq)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) RETURNING ",
                columns!()
            ))
            .bind(&spec.name)
            .bind(spec.kind.as_str())
            .bind(spec.base_url.to_string())
            .bind(&spec.credential)
            .bind(models(spec))
            .bind(i64::from(spec.weight))
            .bind(i64::from(spec.priority))
            .bind(&spec.api_version)
            .bind(json!(spec.overrides).to_string())
            .bind(now())
            .bind(spec.disabled.then(now))
            .bind(seq)
            .fetch_one(&mut *tx)
            .await
            .map_err(|error| name_taken(error, spec))?;
            let entry = Entry::new("upstream.add", row.id, detail(spec));
            (row, entry)
        });
        row.try_into()
    }

    /// Changes what is said about an upstream, as `edit` does it to what is stored.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Taken`] or [`StoreError::Invalid`]; else the database's.
    pub async fn update_upstream(
        &self,
        id: UpstreamId,
        by: &str,
        edit: impl FnOnce(&mut UpstreamSpec),
    ) -> Result<StoredUpstream, StoreError> {
        let upstream = change!(self, by, |tx, seq| {
            let row: Option<Row> =
                sqlx::query_as(concat!("SELECT ", columns!(), " FROM upstreams WHERE id = $1 AND removed_at IS NULL"))
                    .bind(id.0)
                    .fetch_optional(&mut *tx)
                    .await?;
            let mut upstream = StoredUpstream::try_from(row.ok_or_else(|| not_found(&id.to_string()))?)?;
            edit(&mut upstream.spec);
            let spec = &upstream.spec;
            check_name(&spec.name).map_err(StoreError::Invalid)?;
            upstream.disabled_at = spec.disabled.then(|| upstream.disabled_at.unwrap_or_else(now));
            sqlx::query(
                "UPDATE upstreams SET name = $1, kind = $2, base_url = $3, credential = $4, models = $5, weight = $6,
                                      priority = $7, api_version = $8, handling = $9, disabled_at = $10,
                                      changed_seq = $11
                 WHERE id = $12",
            )
            .bind(&spec.name)
            .bind(spec.kind.as_str())
            .bind(spec.base_url.to_string())
            .bind(&spec.credential)
            .bind(models(spec))
            .bind(i64::from(spec.weight))
            .bind(i64::from(spec.priority))
            .bind(&spec.api_version)
            .bind(json!(spec.overrides).to_string())
            .bind(upstream.disabled_at)
            .bind(seq)
            .bind(id.0)
            .execute(&mut *tx)
            .await
            .map_err(|error| name_taken(error, spec))?;
            let entry = Entry::new("upstream.update", id.0, detail(spec));
            (upstream, entry)
        });
        Ok(upstream)
    }

    /// Removes an upstream and forgets its credential. Doing it again changes nothing.
    ///
    /// # Errors
    /// The database's.
    pub async fn remove_upstream(&self, id: UpstreamId, by: &str) -> Result<(), StoreError> {
        change!(self, by, |tx, seq| {
            sqlx::query(
                "UPDATE upstreams SET removed_at = COALESCE(removed_at, $1), credential = NULL, changed_seq = $2
                 WHERE id = $3",
            )
            .bind(now())
            .bind(seq)
            .bind(id.0)
            .execute(&mut *tx)
            .await?;
            ((), Entry::new("upstream.remove", id.0, json!({})))
        });
        Ok(())
    }

    /// All upstreams of the database, in the order of their ids.
    ///
    /// # Errors
    /// The database's.
    pub async fn upstreams(&self) -> Result<Vec<StoredUpstream>, StoreError> {
        let rows: Vec<Row> = on_pool!(self, pool => sqlx::query_as(
            concat!("SELECT ", columns!(), " FROM upstreams WHERE removed_at IS NULL ORDER BY id"))
            .fetch_all(pool).await?);
        rows.into_iter().map(StoredUpstream::try_from).collect()
    }

    /// The upstream with this id or name.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; else the database's.
    pub async fn find_upstream(&self, id_or_name: &str) -> Result<StoredUpstream, StoreError> {
        let row: Option<Row> = on_pool!(self, pool => sqlx::query_as(
            concat!("SELECT ", columns!(), " FROM upstreams WHERE removed_at IS NULL AND (id = $1 OR name = $2)"))
            .bind(id_or_name.parse::<i64>().ok()).bind(id_or_name).fetch_optional(pool).await?);
        row.ok_or_else(|| not_found(id_or_name))?.try_into()
    }
}

fn models(spec: &UpstreamSpec) -> String {
    json!(spec.models.iter().map(ToString::to_string).collect::<Vec<_>>()).to_string()
}

fn name_taken(error: sqlx::Error, spec: &UpstreamSpec) -> StoreError {
    StoreError::name_taken(error, || format!("an upstream named {:?} exists already", spec.name))
}

fn not_found(id_or_name: &str) -> StoreError {
    StoreError::NotFound(format!(
        "there is no upstream {id_or_name:?} in the database: `tollgate upstream list` shows them all"
    ))
}

fn detail(spec: &UpstreamSpec) -> serde_json::Value {
    json!({
        "name": spec.name, "kind": spec.kind, "base_url": spec.base_url.to_string(),
        "models": spec.models.iter().map(ToString::to_string).collect::<Vec<_>>(), "weight": spec.weight,
        "priority": spec.priority, "api_version": spec.api_version, "handling": spec.overrides,
        "disabled": spec.disabled,
    })
}
