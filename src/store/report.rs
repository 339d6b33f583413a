//! Reading usage: the sums, grouped. Answered from the aggregates alone, so that a report over a year costs the gateway
//! nothing and outlives the request log.

use chrono::{Datelike, NaiveDate};
use sqlx::AssertSqlSafe;

use super::{Store, StoreError, on_pool};

/// What the rows of a report are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupBy {
    /// A day, UTC.
    Day,
    /// A calendar month, UTC.
    Month,
    /// A user.
    User,
    /// A key.
    Key,
    /// A model, as clients ask for it.
    Model,
    /// An upstream.
    Upstream,
}

impl GroupBy {
    /// The word for it on the command line and in rows.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Day => "day",
            Self::Month => "month",
            Self::User => "user",
            Self::Key => "key",
            Self::Model => "model",
            Self::Upstream => "upstream",
        }
    }
}

/// Which usage to report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsageQuery {
    /// What the rows are about.
    pub by: GroupBy,
    /// First day; `None`: from the beginning.
    pub since: Option<NaiveDate>,
    /// First day no more; `None`: to the end.
    pub until: Option<NaiveDate>,
}

/// A row of a usage report.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct UsageSum {
    /// The day, month, model, or name; empty for a model or upstream that a request never came to.
    pub name: String,
    /// Id of the user or key.
    pub id: Option<i64>,
    /// Who owns the key.
    pub owner: Option<String>,
    /// Number of requests.
    pub requests: i64,
    /// Tokens of the input, cached ones included.
    pub prompt_tokens: i64,
    /// Tokens of the output.
    pub completion_tokens: i64,
    /// Both together.
    pub total_tokens: i64,
    /// The part of the input that was cached.
    pub cached_tokens: i64,
    /// What it cost, in 10^-9 dollars.
    pub cost_nano_usd: i64,
}

impl UsageQuery {
    /// Months are summed already: they answer every question whose bounds are bounds of months.
    fn source(&self) -> (&'static str, &'static str) {
        let between_months = |date: Option<NaiveDate>| date.is_none_or(|date| date.day() == 1);
        if self.by != GroupBy::Day && between_months(self.since) && between_months(self.until) {
            ("usage_monthly", "month")
        } else {
            ("usage_daily", "day")
        }
    }

    fn sql(&self, sum: fn(&str) -> String) -> String {
        let (table, date) = self.source();
        let (name, id, owner) = match self.by {
            GroupBy::Day => ("CAST(s.day AS TEXT)".to_owned(), "NULL", "NULL"),
            GroupBy::Month => (format!("SUBSTR(CAST(s.{date} AS TEXT), 1, 7)"), "NULL", "NULL"),
            GroupBy::User => ("COALESCE(u.name, '')".to_owned(), "s.user_id", "NULL"),
            GroupBy::Key => ("COALESCE(k.name, '')".to_owned(), "s.key_id", "u.name"),
            GroupBy::Model => ("s.model".to_owned(), "NULL", "NULL"),
            GroupBy::Upstream => ("s.upstream".to_owned(), "NULL", "NULL"),
        };
        let sums = ["requests", "prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens", "cost_nano_usd"]
            .map(|column| format!("{} AS {column}", sum(column)))
            .join(", ");
        format!(
            "SELECT {name} AS name, CAST({id} AS BIGINT) AS id, CAST({owner} AS TEXT) AS owner, {sums}
             FROM {table} s LEFT JOIN users u ON u.id = s.user_id LEFT JOIN api_keys k ON k.id = s.key_id
             WHERE ($1 IS NULL OR s.{date} >= $1) AND ($2 IS NULL OR s.{date} < $2)
             GROUP BY 1, 2, 3 ORDER BY 1, 2"
        )
    }
}

impl Store {
    /// The sums that `query` asks for, ordered by name.
    ///
    /// # Errors
    /// The database's.
    pub async fn usage(&self, query: UsageQuery) -> Result<Vec<UsageSum>, StoreError> {
        // PostgreSQL sums bigint to numeric, which is brought back into range here; SQLite refuses to overflow.
        let sum: fn(&str) -> String = match &self.pool {
            super::Pool::Sqlite(_) => |column| format!("SUM(s.{column})"),
            super::Pool::Postgres(_) => |column| format!("CAST(LEAST(SUM(s.{column}), 9223372036854775807) AS BIGINT)"),
        };
        // Safe: put together from the constants above.
        let sql = query.sql(sum);
        Ok(on_pool!(self, pool => sqlx::query_as(AssertSqlSafe(sql))
            .bind(query.since).bind(query.until).fetch_all(pool).await?))
    }
}
