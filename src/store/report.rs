//! Reading usage: the sums, grouped. Answered from the aggregates alone, so that a report over a year costs the gateway
//! nothing and outlives the request log. Rows come as a stream: a report by day, key and model may have millions.

use chrono::{Datelike, NaiveDate};
use futures::{StreamExt, TryStreamExt, stream::BoxStream};
use sqlx::AssertSqlSafe;
use tollgate_core::id::{KeyId, UserId};

use super::{Pool, Store, StoreError, on_pool};

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

/// Which usage to report. `None` leaves a column free.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UsageQuery {
    /// What the rows are about, in the order in which they are sorted; nothing: one row about everything.
    pub by: Vec<GroupBy>,
    /// First day; `None`: from the beginning.
    pub since: Option<NaiveDate>,
    /// First day no more; `None`: to the end.
    pub until: Option<NaiveDate>,
    /// Whose usage.
    pub user: Option<UserId>,
    /// With which key.
    pub key: Option<KeyId>,
    /// Of which model, as clients ask for it.
    pub model: Option<String>,
    /// At which upstream.
    pub upstream: Option<String>,
}

impl UsageQuery {
    /// Everything there is, by one thing.
    #[must_use]
    pub fn by(by: GroupBy) -> Self {
        Self { by: vec![by], ..Self::default() }
    }
}

/// A row of a usage report. What it is not about is `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq, sqlx::FromRow)]
pub struct UsageSum {
    /// The day.
    pub day: Option<String>,
    /// The month.
    pub month: Option<String>,
    /// Id of the user.
    pub user_id: Option<i64>,
    /// Name of the user, or of the key's; empty: there is none of that id.
    pub user: Option<String>,
    /// Id of the key.
    pub key_id: Option<i64>,
    /// Name of the key.
    pub key: Option<String>,
    /// The model; empty: the requests came to none.
    pub model: Option<String>,
    /// The upstream; empty: the requests came to none.
    pub upstream: Option<String>,
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

impl UsageSum {
    /// What the row is about, in one respect.
    #[must_use]
    pub fn name(&self, by: GroupBy) -> &str {
        let name = match by {
            GroupBy::Day => &self.day,
            GroupBy::Month => &self.month,
            GroupBy::User => &self.user,
            GroupBy::Key => &self.key,
            GroupBy::Model => &self.model,
            GroupBy::Upstream => &self.upstream,
        };
        name.as_deref().unwrap_or_default()
    }
}

/// Bounds where none are asked for: a condition that is always there is answered from the key, whose first column is the date.
const FIRST_DAY: NaiveDate = NaiveDate::from_ymd_opt(1, 1, 1).unwrap();
const LAST_DAY: NaiveDate = NaiveDate::from_ymd_opt(9999, 12, 31).unwrap();

const SUMS: [&str; 6] =
    ["requests", "prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens", "cost_nano_usd"];

impl UsageQuery {
    /// Months are summed already: they answer every question whose bounds are bounds of months.
    fn source(&self) -> (&'static str, &'static str) {
        let between_months = |date: Option<NaiveDate>| date.is_none_or(|date| date.day() == 1);
        if !self.by.contains(&GroupBy::Day) && between_months(self.since) && between_months(self.until) {
            ("usage_monthly", "month")
        } else {
            ("usage_daily", "day")
        }
    }

    fn sql(&self, sum: fn(&str) -> String) -> String {
        let (table, date) = self.source();
        let has = |by: GroupBy| self.by.contains(&by);
        let text = |expression: &str, is_asked: bool, name: &str| {
            let expression = if is_asked { expression } else { "NULL" };
            format!("CAST({expression} AS TEXT) AS \"{name}\"")
        };
        let id = |column: &str, is_asked: bool| {
            let expression = if is_asked { format!("s.{column}") } else { "NULL".to_owned() };
            format!("CAST({expression} AS BIGINT) AS {column}")
        };
        let mut columns = vec![
            text("s.day", has(GroupBy::Day), "day"),
            text(&format!("SUBSTR(CAST(s.{date} AS TEXT), 1, 7)"), has(GroupBy::Month), "month"),
            id("user_id", has(GroupBy::User)),
            text("COALESCE(u.name, '')", has(GroupBy::User) || has(GroupBy::Key), "user"),
            id("key_id", has(GroupBy::Key)),
            text("COALESCE(k.name, '')", has(GroupBy::Key), "key"),
            text("s.model", has(GroupBy::Model), "model"),
            text("s.upstream", has(GroupBy::Upstream), "upstream"),
        ];
        let groups = (1..=columns.len()).map(|n| n.to_string()).collect::<Vec<_>>().join(", ");
        columns.extend(SUMS.map(|column| format!("{} AS {column}", sum(column))));
        let order = self.by.iter().map(|by| match by {
            GroupBy::Day => "1",
            GroupBy::Month => "2",
            GroupBy::User => "4, 3",
            GroupBy::Key => "6, 5",
            GroupBy::Model => "7",
            GroupBy::Upstream => "8",
        });
        let order = order.chain(["1"]).collect::<Vec<_>>().join(", ");
        format!(
            "SELECT {} FROM {table} s LEFT JOIN users u ON u.id = s.user_id LEFT JOIN api_keys k ON k.id = s.key_id
             WHERE s.{date} >= $1 AND s.{date} < $2 AND ($3 IS NULL OR s.user_id = $3)
                 AND ($4 IS NULL OR s.key_id = $4) AND ($5 IS NULL OR s.model = $5) AND ($6 IS NULL OR s.upstream = $6)
             GROUP BY {groups} ORDER BY {order}",
            columns.join(", ")
        )
    }
}

impl Store {
    /// The sums that `query` asks for, one after the other, ordered by name. Each is an error if the database fails.
    #[must_use]
    pub fn usage_rows<'q>(&'q self, query: &'q UsageQuery) -> BoxStream<'q, Result<UsageSum, StoreError>> {
        // PostgreSQL sums bigint to numeric, which is brought back into range here; SQLite refuses to overflow.
        let sum: fn(&str) -> String = match &self.pool {
            Pool::Sqlite(_) => |column| format!("SUM(s.{column})"),
            Pool::Postgres(_) => |column| format!("CAST(LEAST(SUM(s.{column}), 9223372036854775807) AS BIGINT)"),
        };
        // Safe: put together from the constants above.
        let sql = AssertSqlSafe(query.sql(sum));
        on_pool!(self, pool => sqlx::query_as(sql)
            .bind(query.since.unwrap_or(FIRST_DAY))
            .bind(query.until.unwrap_or(LAST_DAY))
            .bind(query.user.map(|user| user.0))
            .bind(query.key.map(|key| key.0))
            .bind(query.model.as_deref())
            .bind(query.upstream.as_deref())
            .fetch(pool)
            .map_err(StoreError::from)
            .boxed())
    }

    /// All of them at once: for reports that are known to be short.
    ///
    /// # Errors
    /// The database's.
    pub async fn usage(&self, query: &UsageQuery) -> Result<Vec<UsageSum>, StoreError> {
        self.usage_rows(query).try_collect().await
    }
}
