//! Logs of any length, made within the database: what listings are measured and checked on.
//!
//! Rows are spread evenly over 90 days. Users, keys, models, upstreams and outcomes are mixed by a hash, some far more common than
//! others; a few values are rare, one model went out of use, and some combinations of common values do not exist.

use chrono::{DateTime, SecondsFormat, Utc};
use sqlx::{
    AssertSqlSafe, PgPool, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteSynchronous},
};

/// How long a time the rows are spread over.
const DAYS: u64 = 90;

/// What a row is, from `i` (its number), `of` (their number) and numbers that were mixed from it.
const SELECT: &str = "
    SELECT {id}, {time}, u, CASE WHEN u = 3 AND m < 60 THEN 12 ELSE u * 4 - (h / 1000) % 4 END, '10.1.2.3',
        'chat_completions',
        CASE WHEN i % (of / 40) = 5 THEN 'rare-model' WHEN i < of * 2 / 3 AND m < 30 THEN 'gpt-4' WHEN m < 60 THEN 'gpt-4o'
            WHEN m < 85 THEN 'gpt-4o-mini' WHEN m < 95 THEN 'o3' ELSE 'text-embedding-3-small' END,
        NULL,
        CASE WHEN i % (of / 30) = 7 THEN 'spare' WHEN p < 6 THEN 'openai-1' WHEN p < 9 THEN 'openai-2'
            WHEN m < 85 THEN 'azure-west' END,
        '[]',
        CASE WHEN i % (of / 20) = 11 THEN 429 WHEN s < 97 THEN 200 WHEN s < 99 THEN 429 ELSE 500 END, i % 2 = 0,
        CASE WHEN i % (of / 20) = 11 THEN 'insufficient_quota' WHEN s < 97 THEN NULL WHEN s < 99
            THEN 'rate_limit_exceeded' ELSE 'http_500' END,
        112, 208, 64, 0, 0, i < 0, i < 0, 12345, 741, 2310, 48, 'stop', NULL, NULL, NULL
    FROM (SELECT i, {of} AS of, h, 1 + (h % 1000) * (h % 1000) * 50 / 1000000 AS u, (h / 4000) % 100 AS m,
            (h / 7000) % 10 AS p, (h / 11000) % 100 AS s
        FROM (SELECT i, (i * 2654435761) % 4294967296 AS h FROM {numbers}) hashed) mixed";
const INSERT: &str =
    "INSERT INTO request_log (request_id, started_at, user_id, key_id, ip, route, model, upstream_model,
    upstream, attempts, status, stream, code, prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens,
    audio_tokens, estimated, interrupted, cost_nano_usd, ttft_ms, duration_ms, overhead_us, finish_reason, user_agent,
    client_request_id, provider_request_id) ";

/// Adds the rows from number `first` to `last` of a log of `of` rows (at least 100), whose last row is of the time `end`.
///
/// # Panics
/// If the database does not take them.
pub(crate) async fn add(url: &str, (first, last): (u64, u64), of: u64, end: DateTime<Utc>) {
    let end = end.to_rfc3339_opts(SecondsFormat::Secs, true);
    let seconds = format!("(({of} - i) * {DAYS} * 86400.0 / {of})");
    let select = SELECT.replace("{of}", &of.to_string());
    if url.starts_with("sqlite") {
        let numbers = format!(
            "(WITH RECURSIVE n(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n WHERE i < {last}) SELECT i FROM n)"
        );
        let time = format!("strftime('%Y-%m-%dT%H:%M:%f+00:00', '{end}', '-' || {seconds} || ' seconds')");
        let id = "printf('00000000-0000-7000-8000-%012x', i)";
        let select = select.replace("{id}", id).replace("{time}", &time).replace("{numbers}", &numbers);
        // Whoever loses power may make them again.
        let options = url.parse::<SqliteConnectOptions>().expect("a URL of a file").synchronous(SqliteSynchronous::Off);
        let pool =
            SqlitePool::connect_with(options.pragma("cache_size", "-200000")).await.expect("the database is there");
        sqlx::query(AssertSqlSafe(format!("{INSERT}{select}"))).execute(&pool).await.expect("rows can be added");
        pool.close().await;
    } else {
        let numbers = format!("generate_series({first}::bigint, {last}) AS i");
        let time = format!("TIMESTAMPTZ '{end}' - make_interval(secs => {seconds})");
        let id = "('00000000-0000-7000-8000-' || lpad(to_hex(i), 12, '0'))::uuid";
        let select = select.replace("{id}", id).replace("{time}", &time).replace("{numbers}", &numbers);
        let select = select.replace("'[]'", "'[]'::jsonb");
        let pool = PgPool::connect(url).await.expect("the database is there");
        sqlx::query(AssertSqlSafe(format!("{INSERT}{select}"))).execute(&pool).await.expect("rows can be added");
        pool.close().await;
    }
}

/// Brings what the database knows of its rows up to date, as it does by itself in the course of time.
///
/// # Panics
/// If it cannot.
pub(crate) async fn settle(url: &str) {
    if url.starts_with("postgres") {
        let pool = PgPool::connect(url).await.expect("the database is there");
        sqlx::query("VACUUM ANALYZE request_log").execute(&pool).await.expect("it can be vacuumed");
        pool.close().await;
    }
}
