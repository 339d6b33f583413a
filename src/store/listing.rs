//! Listing the log: the newest rows that fit a filter, from however many there are, and however rare they are.
//!
//! **Why not one index per filter.** What is looked for may be rare although each part of the filter is common: the failures of a
//! user with millions of rows, a model at an upstream that hardly ever serves it. Going through the rows of one part in search
//! of the other may be going through all of them, and an index for every combination would cost the writer far more than the
//! rows. But rows differ in few ways: those that are alike in model, upstream, status and code are a *class* (a generated column;
//! see migration 0007), and a user, a key, a whole log has some dozens of classes. Three indexes, by user, by key and by neither,
//! have the class before the time. So a listing is two questions:
//!
//! 1. Which classes are there? An index answers by skipping from one to the next ([`push_classes`]).
//! 2. What are the newest rows of those that fit? Each class gives its newest ones, and the newest of these are the page.
//!
//! Its cost is that of some descents of an index for each class, whatever is asked for. Where nothing is asked for but times, the
//! primary key is in the right order by itself.
//!
//! Pages go on after a place, not at a row number: see [`Cursor`](super::Cursor).

use chrono::{DateTime, Utc};
use sqlx::{Database, Encode, Postgres, QueryBuilder, Row, Sqlite, Type};

use super::{
    AuditFilter, AuditRow, Pool, Store, StoreError,
    audit::{BOOKED_POSTGRES, BOOKED_SQLITE, COLUMNS, NAMES},
    on_pool,
};

/// What stands between the parts of a class, and in none of them (see [`storable`](super::usage)); and what comes after it.
const SEPARATOR: char = '\u{1f}';
const AFTER_SEPARATOR: char = '\u{20}';

const ORDER: &str = " ORDER BY r.started_at DESC, r.request_id DESC LIMIT ";

impl AuditFilter {
    /// Does it leave everything free but the time?
    fn is_of_all(&self) -> bool {
        let parts = [self.model.is_some(), self.upstream.is_some(), self.status.is_some(), self.code.is_some()];
        self.user.is_none() && self.key.is_none() && parts == [false; 4]
    }

    /// May rows of this class be meant?
    fn fits(&self, class: &str) -> bool {
        let mut parts = class.split(SEPARATOR);
        let mut part = |asked: Option<&str>| {
            let part = parts.next().unwrap_or_default();
            asked.is_none_or(|asked| asked == part)
        };
        let (status, code) = (self.status.map(|status| status.to_string()), self.code.as_deref());
        let code = if code == Some("ok") { Some("") } else { code };
        // Each is looked at, because each takes its part.
        let fits = [part(self.model.as_deref()), part(self.upstream.as_deref()), part(status.as_deref()), part(code)];
        fits == [true; 4]
    }
}

/// Whose classes: a key has one user, so it goes before.
fn push_owner<'f, DB>(query: &mut QueryBuilder<DB>, filter: &'f AuditFilter)
where
    DB: Database,
    i64: Encode<'f, DB> + Type<DB>,
{
    match (filter.key, filter.user) {
        (Some(key), _) => drop(query.push(" AND r.key_id = ").push_bind(key.0)),
        (None, Some(user)) => drop(query.push(" AND r.user_id = ").push_bind(user.0)),
        (None, None) => {}
    }
}

/// The question for classes. Those of a model stand together, between two bounds.
fn push_classes<'f, DB>(query: &mut QueryBuilder<DB>, filter: &'f AuditFilter)
where
    DB: Database,
    i64: Encode<'f, DB> + Type<DB>,
    String: Encode<'f, DB> + Type<DB>,
{
    let bound = |after: char| filter.model.as_ref().map(|model| format!("{model}{after}"));
    let push_within = |query: &mut QueryBuilder<DB>| match bound(AFTER_SEPARATOR) {
        Some(end) => drop(query.push("class < ").push_bind(end)),
        None => drop(query.push("class IS NOT NULL")),
    };
    query.push("WITH RECURSIVE c (class) AS (SELECT (SELECT MIN(r.class) FROM request_log r WHERE r.class >= ");
    query.push_bind(bound(SEPARATOR).unwrap_or_default());
    push_owner(query, filter);
    query.push(") UNION ALL SELECT (SELECT MIN(r.class) FROM request_log r WHERE r.class > c.class");
    push_owner(query, filter);
    query.push(") FROM c WHERE ");
    push_within(query);
    query.push(") SELECT class FROM c WHERE ");
    push_within(query);
}

/// The conditions on single rows: all but those on their class, and those on places.
pub(super) fn push_conditions<'f, DB>(query: &mut QueryBuilder<DB>, filter: &'f AuditFilter)
where
    DB: Database,
    DateTime<Utc>: Encode<'f, DB> + Type<DB>,
    i64: Encode<'f, DB> + Type<DB>,
{
    if let Some(since) = filter.since {
        query.push(" AND r.started_at >= ").push_bind(since);
    }
    if let Some(until) = filter.until {
        query.push(" AND r.started_at < ").push_bind(until);
    }
    if let Some(key) = filter.key {
        query.push(" AND r.key_id = ").push_bind(key.0);
    }
    if let Some(user) = filter.user {
        query.push(" AND r.user_id = ").push_bind(user.0);
    }
}

/// Only rows after a place, and those that were booked up to another; `booked`: the column that tells.
fn push_places<'f, DB>(query: &mut QueryBuilder<DB>, filter: &'f AuditFilter, booked: &str)
where
    DB: Database,
    DateTime<Utc>: Encode<'f, DB> + Type<DB>,
    i64: Encode<'f, DB> + Type<DB>,
    &'f str: Encode<'f, DB> + Type<DB>,
{
    push_booked(query, filter, booked);
    if let Some((time, id)) = &filter.before {
        query.push(" AND r.started_at <= ").push_bind(*time);
        query.push(" AND (r.started_at < ").push_bind(*time);
        query.push(" OR CAST(r.request_id AS TEXT) < ").push_bind(id.as_str()).push(")");
    }
}

fn push_booked<'f, DB>(query: &mut QueryBuilder<DB>, filter: &'f AuditFilter, booked: &str)
where
    DB: Database,
    i64: Encode<'f, DB> + Type<DB>,
{
    if let Some(bookmark) = &filter.booked_until {
        query.push(" AND COALESCE(").push(booked).push(", 0) <= ").push_bind(bookmark.booked);
    }
}

fn push_select<DB: Database>(query: &mut QueryBuilder<DB>, booked: &str) {
    query.push("SELECT ").push(COLUMNS).push(", ").push(booked).push(" AS booked FROM ");
}

/// Everything, or one request, by the primary key.
fn push_all<'f, DB>(query: &mut QueryBuilder<DB>, filter: &'f AuditFilter, booked: &str)
where
    DB: Database,
    DateTime<Utc>: Encode<'f, DB> + Type<DB>,
    String: Encode<'f, DB> + Type<DB>,
    i64: Encode<'f, DB> + Type<DB>,
    &'f str: Encode<'f, DB> + Type<DB>,
{
    push_select(query, booked);
    query.push("request_log r").push(NAMES).push(" WHERE 1 = 1");
    push_conditions(query, filter);
    if let Some(request) = filter.request {
        query.push(" AND CAST(r.request_id AS TEXT) = ").push_bind(request.hyphenated().to_string());
    }
    push_places(query, filter, booked);
    query.push(ORDER).push_bind(i64::from(filter.limit));
}

/// A page of rows of these classes, from SQLite.
fn push_page_sqlite(query: &mut QueryBuilder<Sqlite>, filter: &AuditFilter, classes: &[String]) {
    let limit = i64::from(filter.limit);
    push_select(query, BOOKED_SQLITE);
    query.push("json_each(").push_bind(serde_json::to_string(classes).unwrap_or_default());
    // A cross join, because SQLite keeps its order.
    query.push(") c CROSS JOIN request_log r ON r.rowid IN (SELECT r.rowid FROM request_log r WHERE r.class = c.value");
    push_conditions(query, filter);
    push_places(query, filter, BOOKED_SQLITE);
    query.push(ORDER).push_bind(limit).push(")").push(NAMES).push(ORDER).push_bind(limit);
}

/// A page of rows of these classes, from PostgreSQL: the time of its oldest row first, which the index alone tells, so that no
/// more rows are read than are shown. Rows at the very time of the place that it goes on after do not count for that, because
/// some of them are not meant.
fn push_page_postgres(query: &mut QueryBuilder<Postgres>, filter: &AuditFilter, classes: &[String]) {
    let limit = i64::from(filter.limit);
    query.push("WITH c AS MATERIALIZED (SELECT UNNEST(").push_bind(classes.to_vec()).push("::text[]) AS class), ");
    query.push("oldest AS (SELECT MIN(n.t) AS t FROM (SELECT n.t FROM c, LATERAL (SELECT r.started_at AS t FROM request_log r ");
    query.push("WHERE r.class = c.class");
    push_conditions(query, filter);
    push_booked(query, filter, BOOKED_POSTGRES);
    if let Some((time, _)) = &filter.before {
        query.push(" AND r.started_at < ").push_bind(*time);
    }
    query.push(" ORDER BY r.started_at DESC NULLS LAST LIMIT ").push_bind(limit);
    query.push(") n ORDER BY n.t DESC LIMIT ").push_bind(limit).push(") n) ");
    push_select(query, BOOKED_POSTGRES);
    query.push("(SELECT p.* FROM c, oldest, LATERAL (SELECT r.* FROM request_log r WHERE r.class = c.class");
    push_conditions(query, filter);
    push_places(query, filter, BOOKED_POSTGRES);
    query.push(" AND r.started_at >= COALESCE(oldest.t, ").push_bind(filter.before.as_ref().map(|(time, _)| *time));
    query.push(") ORDER BY r.started_at DESC NULLS LAST, r.request_id DESC LIMIT ").push_bind(limit);
    query.push(") p) r").push(NAMES).push(ORDER).push_bind(limit);
}

impl Store {
    /// The rows that `filter` asks for, newest first.
    ///
    /// # Errors
    /// The database's.
    pub async fn audit(&self, filter: &AuditFilter) -> Result<Vec<AuditRow>, StoreError> {
        macro_rules! rows {
            ($pool:expr, |$query:ident| $push:expr) => {{
                let mut $query = QueryBuilder::new("");
                $push;
                $query.build_query_as().fetch_all($pool).await?
            }};
        }
        let Some(filter) = &self.of_key(filter).await? else { return Ok(Vec::new()) };
        if filter.is_of_all() {
            return Ok(match &self.pool {
                Pool::Sqlite(pool) => rows!(pool, |query| push_all(&mut query, filter, BOOKED_SQLITE)),
                Pool::Postgres(pool) => rows!(pool, |query| push_all(&mut query, filter, BOOKED_POSTGRES)),
            });
        }
        let classes = self.classes(filter).await?;
        if classes.is_empty() {
            return Ok(Vec::new());
        }
        Ok(match &self.pool {
            Pool::Sqlite(pool) => rows!(pool, |query| push_page_sqlite(&mut query, filter, &classes)),
            Pool::Postgres(pool) => rows!(pool, |query| push_page_postgres(&mut query, filter, &classes)),
        })
    }

    /// A key has one user for good. So beside a key the user says nothing new, or leaves nothing: `None`.
    async fn of_key(&self, filter: &AuditFilter) -> Result<Option<AuditFilter>, StoreError> {
        let (Some(key), Some(user)) = (filter.key, filter.user) else { return Ok(Some(filter.clone())) };
        let owner: Option<i64> = on_pool!(self, pool =>
            sqlx::query_scalar("SELECT user_id FROM api_keys WHERE id = $1").bind(key.0).fetch_optional(pool).await?);
        Ok(match owner {
            None => Some(filter.clone()),
            Some(owner) if owner == user.0 => Some(AuditFilter { user: None, ..filter.clone() }),
            Some(_) => None,
        })
    }

    /// The classes of which rows may be meant.
    async fn classes(&self, filter: &AuditFilter) -> Result<Vec<String>, StoreError> {
        let classes: Vec<String> = on_pool!(self, pool => {
            let mut query = QueryBuilder::new("");
            push_classes(&mut query, filter);
            query.build_query_scalar().fetch_all(pool).await?
        });
        Ok(classes.into_iter().filter(|class| filter.fits(class)).collect())
    }

    /// How the database finds what `filter` asks for, line by line, in its own words: for whoever measures it. PostgreSQL does it
    /// for that, and tells how many rows it looked at.
    ///
    /// # Errors
    /// The database's.
    pub async fn audit_plan(&self, filter: &AuditFilter) -> Result<Vec<String>, StoreError> {
        const POSTGRES: &str = "EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF) ";
        const SQLITE: &str = "EXPLAIN QUERY PLAN ";
        macro_rules! plan {
            ($pool:expr, $start:expr, $column:literal, |$query:ident| $push:expr) => {{
                let mut $query = QueryBuilder::new($start);
                $push;
                let rows = $query.build().fetch_all($pool).await?;
                rows.iter().map(|row| row.try_get::<String, _>($column)).collect::<Result<Vec<_>, _>>()?
            }};
        }
        let Some(filter) = &self.of_key(filter).await? else { return Ok(Vec::new()) };
        let is_of_all = filter.is_of_all();
        let classes = if is_of_all { Vec::new() } else { self.classes(filter).await? };
        Ok(match &self.pool {
            Pool::Sqlite(pool) if is_of_all => {
                plan!(pool, SQLITE, 3, |query| push_all(&mut query, filter, BOOKED_SQLITE))
            }
            Pool::Postgres(pool) if is_of_all => {
                plan!(pool, POSTGRES, 0, |query| push_all(&mut query, filter, BOOKED_POSTGRES))
            }
            Pool::Sqlite(pool) => {
                let mut lines = plan!(pool, SQLITE, 3, |query| push_classes(&mut query, filter));
                lines.extend(plan!(pool, SQLITE, 3, |query| push_page_sqlite(&mut query, filter, &classes)));
                lines
            }
            Pool::Postgres(pool) => {
                let mut lines = plan!(pool, POSTGRES, 0, |query| push_classes(&mut query, filter));
                lines.extend(plan!(pool, POSTGRES, 0, |query| push_page_postgres(&mut query, filter, &classes)));
                lines
            }
        })
    }
}
