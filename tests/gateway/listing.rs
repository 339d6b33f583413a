//! Listing the log: whatever is asked for, the right rows come in the right order, and no more are looked at than must be.

use chrono::{DateTime, Duration, NaiveDate, Utc};
use sqlx::{Connection, PgConnection};
use tollgate::store::{AuditFilter, AuditRow, GroupBy, KeySpec, Store, UsageQuery, UserSpec};
use tollgate_core::{
    id::{KeyId, UserId},
    key::ApiKey,
    limit::Month,
    retention::Kept,
    usage::UsageRecord,
};

use crate::{
    store::{Database, on_both_databases, record, write},
    support::many,
};

on_both_databases! {
    every_filter_finds_its_rows_page_by_page,
    no_listing_looks_at_more_than_it_must,
    texts_cannot_pretend_to_be_another_class,
}

/// The values that a filter is given, of each column: none, a common and a rare or missing one.
struct Values {
    users: Vec<Option<i64>>,
    keys: Vec<Option<i64>>,
    models: Vec<Option<&'static str>>,
    upstreams: Vec<Option<&'static str>>,
    statuses: Vec<Option<u16>>,
    codes: Vec<Option<&'static str>>,
}

impl Values {
    /// Every filter that can be made of them.
    fn filters(&self) -> Vec<AuditFilter> {
        let mut filters = vec![AuditFilter::default()];
        macro_rules! spread {
            ($field:ident, $values:expr, $wrap:expr) => {
                filters = filters
                    .iter()
                    .flat_map(|filter| {
                        $values.iter().map(|value| AuditFilter { $field: value.map($wrap), ..filter.clone() })
                    })
                    .collect();
            };
        }
        spread!(user, self.users, UserId);
        spread!(key, self.keys, KeyId);
        spread!(model, self.models, str::to_owned);
        spread!(upstream, self.upstreams, str::to_owned);
        spread!(status, self.statuses, |status| status);
        spread!(code, self.codes, str::to_owned);
        filters
    }
}

fn is_meant(row: &AuditRow, filter: &AuditFilter) -> bool {
    let code = filter.code.as_deref().map(|code| if code == "ok" { None } else { Some(code) });
    filter.since.is_none_or(|since| row.started_at >= since)
        && filter.until.is_none_or(|until| row.started_at < until)
        && filter.user.is_none_or(|user| row.user_id == user.0)
        && filter.key.is_none_or(|key| row.key_id == key.0)
        && filter.model.as_ref().is_none_or(|model| row.model == *model)
        && filter.upstream.as_ref().is_none_or(|upstream| row.upstream.as_ref() == Some(upstream))
        && filter.status.is_none_or(|status| row.status == i32::from(status))
        && code.is_none_or(|code| row.code.as_deref() == code)
}

fn start() -> DateTime<Utc> {
    "2026-11-23T10:00:00Z".parse().unwrap()
}

/// Rows in which every value meets every other one, more than one of them at the same instant.
fn mixed() -> Vec<UsageRecord<'static>> {
    let of = |n: u16| {
        let pick = |by: u16, of: u16| n / by % of;
        let codes = [None, Some("http_500"), Some("rate_limit_exceeded"), None];
        UsageRecord {
            started_at: start() + Duration::milliseconds(100 * i64::from(n / 5)),
            user_id: UserId(pick(1, 3).into()),
            key_id: KeyId(pick(2, 4).into()),
            model: ["gpt-4o", "gpt-4o-mini", ""][usize::from(pick(3, 3))].into(),
            upstream: [Some("main".into()), None, Some("ma".into())][usize::from(pick(7, 3))].clone(),
            status: [200, 500, 429, 0][usize::from(pick(5, 4))],
            code: codes[usize::from(pick(11, 4))].map(Into::into),
            ..record(u128::from(n) * 7919 % 1009, "2026-11-23T10:00:00Z")
        }
    };
    (1..400).map(of).collect()
}

/// The ids of a listing that is read in pages.
async fn pages(store: &Store, filter: &AuditFilter) -> Vec<String> {
    let (mut filter, mut ids) = (filter.clone(), Vec::new());
    loop {
        let page = store.audit(&filter).await.unwrap();
        ids.extend(page.iter().map(|row| row.request_id.clone()));
        let Some(last) = page.last().filter(|_| page.len() == filter.limit as usize) else { return ids };
        filter.before = Some(last.cursor());
    }
}

async fn every_filter_finds_its_rows_page_by_page(database: Database) {
    let store = database.store().await;
    write(&store, &mixed()).await;
    let all = store.audit(&AuditFilter { limit: 1000, ..AuditFilter::default() }).await.unwrap();
    assert_eq!(all.len(), 399);
    assert!(all.is_sorted_by(|a, b| (a.started_at, &a.request_id) > (b.started_at, &b.request_id)));
    let values = Values {
        users: vec![None, Some(1)],
        keys: vec![None, Some(2)],
        models: vec![None, Some("gpt-4o"), Some("")],
        upstreams: vec![None, Some("ma")],
        statuses: vec![None, Some(200), Some(0)],
        codes: vec![None, Some("ok"), Some("http_500"), Some("http")],
    };
    let times = [(None, None), (Some(start() + Duration::seconds(2)), Some(start() + Duration::seconds(5)))];
    let mut rows_seen = 0;
    for (filter, (since, until)) in values.filters().into_iter().flat_map(|filter| times.map(|t| (filter.clone(), t))) {
        let filter = AuditFilter { since, until, limit: 11, ..filter };
        let meant: Vec<&String> = all.iter().filter(|row| is_meant(row, &filter)).map(|row| &row.request_id).collect();
        rows_seen += meant.len();
        assert_eq!(pages(&store, &filter).await.iter().collect::<Vec<_>>(), meant, "{filter:?}");
    }
    assert!(rows_seen > 5_000, "{rows_seen}");
}

async fn texts_cannot_pretend_to_be_another_class(database: Database) {
    let store = database.store().await;
    let odd = UsageRecord { model: "a\u{1f}main\u{1f}200\u{1f}".into(), ..record(1, "2026-11-23T10:00:00Z") };
    write(&store, &[odd, record(2, "2026-11-23T10:00:00Z")]).await;
    let found = |model: &str| AuditFilter { model: Some(model.into()), limit: 9, ..AuditFilter::default() };
    assert_eq!(store.audit(&found("a")).await.unwrap(), []);
    assert_eq!(store.audit(&found("a\u{fffd}main\u{fffd}200\u{fffd}")).await.unwrap().len(), 1);
    assert_eq!(store.audit(&AuditFilter { status: Some(200), ..found("gpt-4o") }).await.unwrap().len(), 1);
}

const MANY: u64 = 60_000;

/// Rows that a plan of PostgreSQL says it looked at.
fn looked_at(plan: &[String]) -> u64 {
    let number = |line: &str, before: &str| -> Option<u64> {
        let rest = line.split_once(before)?.1;
        rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    let (mut total, mut loops) = (0, 0);
    for line in plan {
        let is_node = line.contains("(actual rows=") || line.contains("(never executed)");
        if is_node {
            let scans = line.contains(" Scan") && line.contains("request_log");
            loops = if scans { number(line, "loops=").unwrap_or(0) } else { 0 };
            total += loops * number(line, "actual rows=").unwrap_or(0);
        }
        // An average, rounded down.
        total += number(line, "Rows Removed by Filter: ").map_or(0, |removed| (removed + 1) * loops);
    }
    total
}

/// The whole log is never gone through, and never sorted: each look at it is by an index, and few rows are read.
async fn no_listing_looks_at_more_than_it_must(database: Database) {
    let store = database.store().await;
    let user = store.create_user(&UserSpec { name: "alice".into(), ..UserSpec::default() }, "test").await.unwrap();
    for n in 1..=4 {
        let spec = KeySpec { name: format!("key {n}"), ..KeySpec::default() };
        store.create_key(user.id, &spec, &ApiKey::from_random(&[n; 32]), "test").await.unwrap();
    }
    let end = Utc::now();
    let kept = Kept { table: "request_log", days: 0, is_exact: false };
    while store.sweep(&kept, end).await.unwrap().is_something() {}
    many::add(&database.url, (1, MANY), MANY, end).await;
    many::settle(&database.url).await;
    let values = Values {
        users: vec![None, Some(1), Some(7)],
        keys: vec![None, Some(4)],
        models: vec![None, Some("gpt-4o"), Some("gpt-4"), Some("rare-model"), Some("nobody's")],
        upstreams: vec![None, Some("openai-1"), Some("azure-west")],
        statuses: vec![None, Some(200), Some(500)],
        codes: vec![None, Some("insufficient_quota")],
    };
    let times = [
        (None, None),
        (Some(end - Duration::days(50)), Some(end - Duration::days(40))),
        (Some(end - Duration::hours(1)), None),
    ];
    for (index, filter) in values.filters().into_iter().enumerate() {
        let (since, until) = times[index % times.len()];
        let filter = AuditFilter { since, until, limit: 50, ..filter };
        let plan = store.audit_plan(&filter).await.unwrap();
        if database.url.starts_with("postgres") {
            let most = 4_000;
            let rows = looked_at(&plan);
            assert!(rows <= most, "{rows} rows for {filter:?}\n{}", plan.join("\n"));
            assert!(rows > 0 || store.audit(&filter).await.unwrap().is_empty(), "{}", plan.join("\n"));
        } else {
            let scans = plan.iter().filter(|line| line.starts_with("SCAN request_log") || line.starts_with("SCAN r"));
            let in_order = |line: &&String| line.contains("USING INDEX") || line.contains("USING COVERING INDEX");
            assert!(scans.clone().all(|line| in_order(&line)), "{filter:?}\n{}", plan.join("\n"));
            let of_all = AuditFilter { since, until, limit: 50, ..AuditFilter::default() };
            let sorts = plan.iter().any(|line| line == "USE TEMP B-TREE FOR ORDER BY");
            assert!(!sorts || format!("{filter:?}") != format!("{of_all:?}"), "{}", plan.join("\n"));
            assert!(scans.count() == 0 || format!("{filter:?}") == format!("{of_all:?}"), "{}", plan.join("\n"));
        }
    }
}

/// How often tables were gone through whole, once all who did it are gone.
async fn whole_looks(url: &str, tables: &[&str]) -> i64 {
    let mut connection = PgConnection::connect(url).await.unwrap();
    // What a connection did is counted at the latest before it is gone.
    let others = "SELECT COUNT(*) FROM pg_stat_activity
        WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()";
    while sqlx::query_scalar::<_, i64>(others).fetch_one(&mut connection).await.unwrap() > 0 {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let looks = "SELECT SUM(seq_scan)::bigint FROM pg_stat_user_tables WHERE relname = ANY($1)";
    sqlx::query_scalar(looks).bind(tables).fetch_one(&mut connection).await.unwrap()
}

/// Sums of some days, and what quotas are checked against, are found by the keys of the sums.
#[tokio::test]
async fn no_question_for_sums_goes_through_all_of_them() {
    let database = Database::postgres();
    database.store().await.close().await;
    let tables = ["usage_daily", "usage_monthly", "usage_monthly_ip"];
    let mut owner = PgConnection::connect(&database.url).await.unwrap();
    for statement in [
        "INSERT INTO usage_daily (day, user_id, key_id, model, upstream, requests, prompt_tokens, completion_tokens,
                total_tokens, cached_tokens, cost_nano_usd)
            SELECT DATE '2026-11-30' - d, k / 4, k, 'gpt-4o', 'main', 1, 1, 1, 2, 0, 1
            FROM generate_series(0, 700) d, generate_series(1, 40) k",
        "INSERT INTO usage_monthly (month, user_id, key_id, model, upstream, requests, prompt_tokens, completion_tokens,
                total_tokens, cached_tokens, cost_nano_usd)
            SELECT (DATE '2026-11-01' - make_interval(months => m))::date, k / 4, k, 'gpt-4o', 'main', 1, 1, 1, 2, 0, 1
            FROM generate_series(0, 23) m, generate_series(1, 1000) k",
        "INSERT INTO usage_monthly_ip (month, network, requests, total_tokens, cost_nano_usd)
            SELECT (DATE '2026-11-01' - make_interval(months => m))::date, '10.0.' || k / 200 || '.' || k % 200, 1, 2, 1
            FROM generate_series(0, 23) m, generate_series(1, 1000) k",
        "ANALYZE",
    ] {
        sqlx::query(statement).execute(&mut owner).await.unwrap();
    }
    owner.close().await.unwrap();
    let before = whole_looks(&database.url, &tables).await;
    let store = database.store().await;

    let (first, month) = (NaiveDate::from_ymd_opt(2026, 11, 20), Month::of("2026-11-15T00:00:00Z".parse().unwrap()));
    for by in [GroupBy::Day, GroupBy::Month, GroupBy::User, GroupBy::Key, GroupBy::Model, GroupBy::Upstream] {
        let rows = store.usage(&UsageQuery { since: first, ..UsageQuery::by(by) }).await.unwrap();
        assert_eq!(rows.iter().map(|row| row.requests).sum::<i64>(), 11 * 40, "{by:?}");
        let months = UsageQuery { since: month.start().date_naive().into(), ..UsageQuery::by(GroupBy::User) };
        assert_eq!(store.usage(&months).await.unwrap().len(), 251);
    }
    assert_eq!(store.booked(month).await.unwrap().len(), 1000);
    assert_eq!(store.booked_of(month, &[UserId(7)]).await.unwrap().len(), 4);
    assert_eq!(store.booked_addresses(month).await.unwrap().len(), 1000);
    assert_eq!(store.booked_of_addresses(month, &["10.0.1.7".parse().unwrap()]).await.unwrap().len(), 1);
    store.close().await;
    assert_eq!(whole_looks(&database.url, &tables).await, before);
}
