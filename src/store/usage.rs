//! Writing usage: `request_log` and its sums, together, each request once.
//!
//! A batch is one transaction. A request that is in the log already (the journal hands it over again after a crash, or
//! a commit whose answer was lost) is left out of the sums too, so writing a batch twice is the same as writing it once.
//!
//! No record can keep a batch from being written, or a journal would never empty again. Therefore, beside the numbers
//! (see [`number`](super::number)): texts that clients and providers choose are cut to what an index takes and freed of
//! NUL, which PostgreSQL has no place for; sums stop at the largest number instead of failing; nothing is referenced.

use std::{borrow::Cow, collections::BTreeMap, net::IpAddr};

use chrono::{DateTime, Datelike, NaiveDate, SubsecRound, Utc};
use tollgate_core::{limit::network_of, usage::UsageRecord};
use uuid::Uuid;

use super::{
    Pool, Store, StoreError,
    number::{big, small},
    usage_postgres, usage_sqlite,
};

/// Longest text of a record, and longest name or code, in characters. An index entry of PostgreSQL must stay below 2704 bytes,
/// and a class has one of the former and two of the latter.
const MAX_TEXT: usize = 256;
const MAX_WORD: usize = 64;

/// What no text may have in it: PostgreSQL has no place for NUL, and the unit separator stands between the texts of a class.
const UNSTORABLE: [char; 2] = ['\0', '\u{1f}'];

/// Columns of `request_log`, in the order in which both writers bind them.
macro_rules! log_columns {
    () => {
        "request_id, started_at, user_id, key_id, ip, route, model, upstream_model, upstream, attempts, status, stream,
         code, prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens, audio_tokens, estimated, interrupted,
         cost_nano_usd, ttft_ms, duration_ms, overhead_us, finish_reason, user_agent, client_request_id,
         provider_request_id, served_model, service_tier, cache_write_tokens, output_audio_tokens, image_tokens,
         output_image_tokens"
    };
}
/// The statement that adds sums to a table, whose columns are in the order in which both writers bind them. Numbers are
/// never negative, so the subtraction cannot overflow.
macro_rules! add_sums {
    ("usage_monthly_ip", $values:literal) => {
        add_sums!(@to "usage_monthly_ip", "month, network", $values, "requests", "total_tokens", "cost_nano_usd")
    };
    ($table:literal, $date:literal, $values:literal) => {
        add_sums!(
            @to $table, concat!($date, ", user_id, key_id, model, upstream"), $values,
            "requests", "prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens", "cost_nano_usd"
        )
    };
    (@to $table:literal, $key:expr, $values:literal, $first:literal $(, $sum:literal)*) => {
        concat!(
            "INSERT INTO ", $table, " (", $key, ", ", $first $(, ", ", $sum)*, ") ", $values,
            " ON CONFLICT (", $key, ") DO UPDATE SET ",
            add_sums!(@add $table, $first) $(, ", ", add_sums!(@add $table, $sum))*
        )
    };
    (@add $table:literal, $column:literal) => {
        concat!(
            $column, " = CASE WHEN ", $table, ".", $column, " > 9223372036854775807 - excluded.", $column,
            " THEN 9223372036854775807 ELSE ", $table, ".", $column, " + excluded.", $column, " END"
        )
    };
}
pub(super) use {add_sums, log_columns};

/// A row of `request_log`, in the types of its columns.
pub(super) struct LogRow<'r> {
    pub(super) request_id: Uuid,
    pub(super) started_at: DateTime<Utc>,
    pub(super) user_id: i64,
    pub(super) key_id: i64,
    pub(super) ip: Option<String>,
    pub(super) network: Option<IpAddr>,
    pub(super) route: Cow<'r, str>,
    pub(super) model: Cow<'r, str>,
    pub(super) upstream_model: Option<Cow<'r, str>>,
    pub(super) upstream: Option<Cow<'r, str>>,
    pub(super) attempts: Cow<'r, str>,
    pub(super) status: i32,
    pub(super) stream: bool,
    pub(super) code: Option<Cow<'r, str>>,
    pub(super) prompt_tokens: i64,
    pub(super) completion_tokens: i64,
    pub(super) total_tokens: i64,
    pub(super) cached_tokens: i64,
    pub(super) reasoning_tokens: i64,
    pub(super) audio_tokens: i64,
    pub(super) estimated: bool,
    pub(super) interrupted: bool,
    pub(super) cost_nano_usd: i64,
    pub(super) ttft_ms: Option<i32>,
    pub(super) duration_ms: i32,
    pub(super) overhead_us: i32,
    pub(super) finish_reason: Option<Cow<'r, str>>,
    pub(super) user_agent: Option<Cow<'r, str>>,
    pub(super) client_request_id: Option<Cow<'r, str>>,
    pub(super) provider_request_id: Option<Cow<'r, str>>,
    pub(super) served_model: Option<Cow<'r, str>>,
    pub(super) service_tier: Option<Cow<'r, str>>,
    pub(super) cache_write_tokens: i64,
    pub(super) output_audio_tokens: i64,
    pub(super) image_tokens: i64,
    pub(super) output_image_tokens: i64,
}

impl<'r> From<UsageRecord<'r>> for LogRow<'r> {
    fn from(record: UsageRecord<'r>) -> Self {
        let usage = &record.usage;
        Self {
            request_id: record.request_id,
            started_at: record.started_at.trunc_subsecs(6),
            user_id: record.user_id.0,
            key_id: record.key_id.0,
            ip: record.ip.map(|ip| ip.to_canonical().to_string()),
            network: record.ip.map(network_of),
            route: storable(record.route),
            model: storable(record.model),
            upstream_model: record.upstream_model.map(storable),
            upstream: record.upstream.map(storable_word),
            attempts: storable_json(record.attempts),
            status: i32::from(record.status),
            stream: record.stream,
            code: record.code.map(storable_word),
            prompt_tokens: big(usage.prompt_tokens),
            completion_tokens: big(usage.completion_tokens),
            total_tokens: big(usage.total_tokens()),
            cached_tokens: big(usage.cached_tokens),
            reasoning_tokens: big(usage.reasoning_tokens),
            audio_tokens: big(usage.audio_tokens),
            estimated: record.estimated,
            interrupted: record.interrupted,
            cost_nano_usd: big(record.cost_nano_usd),
            ttft_ms: record.ttft_ms.map(small),
            duration_ms: small(record.duration_ms),
            overhead_us: small(record.overhead_us),
            finish_reason: record.finish_reason.map(storable),
            user_agent: record.user_agent.map(storable),
            client_request_id: record.client_request_id.map(storable),
            provider_request_id: record.provider_request_id.map(storable),
            served_model: record.served_model.map(storable),
            service_tier: record.service_tier.map(storable),
            cache_write_tokens: big(usage.cache_write_tokens),
            output_audio_tokens: big(usage.output_audio_tokens),
            image_tokens: big(usage.image_tokens),
            output_image_tokens: big(usage.output_image_tokens),
        }
    }
}

/// A NUL is written as \u0000 in JSON, which jsonb refuses as well.
fn storable_json(json: Cow<'_, str>) -> Cow<'_, str> {
    const NUL: &str = "\\u0000";
    if json.contains(NUL) { json.replace(NUL, "\\ufffd").into() } else { json }
}

fn storable(text: Cow<'_, str>) -> Cow<'_, str> {
    cut(text, MAX_TEXT)
}

fn storable_word(text: Cow<'_, str>) -> Cow<'_, str> {
    cut(text, MAX_WORD)
}

fn cut(text: Cow<'_, str>, most: usize) -> Cow<'_, str> {
    if text.len() <= most && !text.contains(UNSTORABLE) {
        return text;
    }
    text.chars().take(most).map(|c| if UNSTORABLE.contains(&c) { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// What one row of the sums is about. Their order is that in which rows are locked, the same for every writer.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SumKey<'r> {
    pub(super) date: NaiveDate,
    pub(super) user_id: i64,
    pub(super) key_id: i64,
    pub(super) model: Cow<'r, str>,
    pub(super) upstream: Cow<'r, str>,
}

/// What is added to one row of the sums.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sum {
    pub(super) requests: i64,
    pub(super) prompt_tokens: i64,
    pub(super) completion_tokens: i64,
    pub(super) total_tokens: i64,
    pub(super) cached_tokens: i64,
    pub(super) cost_nano_usd: i64,
}

impl Sum {
    fn add(&mut self, other: Self) {
        let add = |sum: &mut i64, n: i64| *sum = sum.saturating_add(n);
        add(&mut self.requests, other.requests);
        add(&mut self.prompt_tokens, other.prompt_tokens);
        add(&mut self.completion_tokens, other.completion_tokens);
        add(&mut self.total_tokens, other.total_tokens);
        add(&mut self.cached_tokens, other.cached_tokens);
        add(&mut self.cost_nano_usd, other.cost_nano_usd);
    }
}

impl From<&LogRow<'_>> for Sum {
    fn from(row: &LogRow<'_>) -> Self {
        Self {
            requests: 1,
            prompt_tokens: row.prompt_tokens,
            completion_tokens: row.completion_tokens,
            total_tokens: row.total_tokens,
            cached_tokens: row.cached_tokens,
            cost_nano_usd: row.cost_nano_usd,
        }
    }
}

pub(super) type Sums<'r> = BTreeMap<SumKey<'r>, Sum>;
/// By month and network; their order is that in which rows are locked, too.
pub(super) type AddressSums = BTreeMap<(NaiveDate, IpAddr), Sum>;

/// What rows come to.
#[derive(Debug)]
pub(super) struct Totals<'r> {
    /// By day.
    pub(super) daily: Sums<'r>,
    /// By month and address, where that is wanted.
    pub(super) addresses: Option<AddressSums>,
}

impl<'r> Totals<'r> {
    pub(super) fn new(sums_addresses: bool) -> Self {
        Self { daily: Sums::new(), addresses: sums_addresses.then(AddressSums::new) }
    }

    pub(super) fn add(&mut self, row: &LogRow<'r>) {
        let (day, sum) = (row.started_at.date_naive(), Sum::from(row));
        let key = SumKey {
            date: day,
            user_id: row.user_id,
            key_id: row.key_id,
            model: row.model.clone(),
            upstream: row.upstream.clone().unwrap_or_default(),
        };
        self.daily.entry(key).or_default().add(sum);
        if let (Some(addresses), Some(network)) = (&mut self.addresses, row.network) {
            addresses.entry((first_day(day), network)).or_default().add(sum);
        }
    }

    /// By month.
    pub(super) fn monthly(&self) -> Sums<'r> {
        let mut monthly = Sums::new();
        for (day, sum) in &self.daily {
            let month = SumKey { date: first_day(day.date), ..day.clone() };
            monthly.entry(month).or_default().add(*sum);
        }
        monthly
    }
}

fn first_day(date: NaiveDate) -> NaiveDate {
    date.with_day(1).unwrap_or(date)
}

impl Store {
    /// Writes a batch to `request_log` and the sums; tells of each record whether it was new. The records are gone through
    /// more than once.
    ///
    /// # Errors
    /// The database's. Then nothing of the batch is written, or it is not known whether it was.
    pub async fn write_usage<'r>(
        &self,
        records: impl IntoIterator<Item: Into<UsageRecord<'r>>, IntoIter: Clone>,
    ) -> Result<Vec<bool>, StoreError> {
        let records = records.into_iter();
        match &self.pool {
            Pool::Sqlite(pool) => usage_sqlite::write(pool, records, self.sums_addresses).await,
            Pool::Postgres(pool) => usage_postgres::write(pool, records, self.sums_addresses).await,
        }
    }
}
