//! The request log: read in pages, filtered, followed.

use tollgate::store::{AuditFilter, Bookmark, Store};
use tollgate_core::{
    id::{KeyId, UserId},
    usage::UsageRecord,
};
use uuid::Uuid;

use super::{Database, at, on_both_databases, record, write};
use crate::support::gateway::PATIENCE;

on_both_databases! {
    the_log_is_read_newest_first_in_pages,
    the_log_is_filtered,
    the_log_is_followed_as_it_grows,
}

async fn the_log_is_read_newest_first_in_pages(database: Database) {
    let store = database.store().await;
    // Some at the same instant, some with a fraction and some without: text must sort as time does.
    let times = ["10:00:00Z", "10:00:00.5Z", "10:00:00.123456Z", "10:00:01Z", "10:00:01Z", "09:59:59.999Z"];
    let batch: Vec<_> = (1_u128..).zip(times).map(|(n, t)| record(n, &format!("2026-11-23T{t}"))).collect();
    write(&store, &batch).await;
    let (mut filter, mut order) = (AuditFilter { limit: 2, ..AuditFilter::default() }, Vec::new());
    loop {
        let page = store.audit(&filter).await.unwrap();
        let Some(last) = page.last() else { break };
        assert!(page.len() <= 2);
        filter.before = Some(last.cursor());
        order.extend(page.iter().map(|row| row.request_id[35..].to_owned()));
    }
    assert_eq!(order, ["5", "4", "2", "3", "1", "6"]);
}

async fn the_log_is_filtered(database: Database) {
    let store = database.store().await;
    let first = record(1, "2026-11-23T10:00:00Z");
    let second = UsageRecord {
        user_id: UserId(2),
        key_id: KeyId(2),
        model: "o3".into(),
        status: 429,
        upstream: Some("spare".into()),
        code: Some("rate_limit_exceeded".into()),
        ..record(2, "2026-11-23T11:00:00Z")
    };
    write(&store, &[first, second]).await;
    let one = AuditFilter { limit: 9, ..AuditFilter::default() };
    let time = Some(at("2026-11-23T11:00:00Z"));
    let cases = [
        (one.clone(), "21"),
        (AuditFilter { since: time, ..one.clone() }, "2"),
        (AuditFilter { until: time, ..one.clone() }, "1"),
        (AuditFilter { user: Some(UserId(1)), ..one.clone() }, "1"),
        (AuditFilter { key: Some(KeyId(2)), ..one.clone() }, "2"),
        (AuditFilter { model: Some("o3".into()), ..one.clone() }, "2"),
        (AuditFilter { status: Some(429), ..one.clone() }, "2"),
        (AuditFilter { upstream: Some("spare".into()), ..one.clone() }, "2"),
        (AuditFilter { code: Some("rate_limit_exceeded".into()), ..one.clone() }, "2"),
        (AuditFilter { code: Some("ok".into()), ..one.clone() }, "1"),
        (AuditFilter { status: Some(429), model: Some("gpt-4o".into()), ..one.clone() }, ""),
    ];
    for (filter, expected) in cases {
        let ids: String =
            store.audit(&filter).await.unwrap().iter().map(|row| row.request_id[35..].to_owned()).collect();
        assert_eq!(ids, expected, "{filter:?}");
    }
}

/// The next rows as the log grows, once there are `count`: the transactions of other tests hold them up.
async fn grown(store: &Store, filter: &AuditFilter, place: &mut Bookmark, count: usize) -> String {
    let (mut seen, start) = (String::new(), std::time::Instant::now());
    while seen.len() < count {
        let rows = store.booked_after(filter, place).await.unwrap();
        assert!(rows.len() <= filter.limit as usize);
        if let Some(last) = rows.last() {
            *place = last.bookmark();
        }
        seen.extend(rows.iter().map(|row| row.request_id[35..].to_owned()));
        assert!(start.elapsed() < PATIENCE, "only {seen}");
    }
    seen
}

async fn the_log_is_followed_as_it_grows(database: Database) {
    let store = database.store().await;
    write(&store, &[record(1, "2026-11-23T10:00:00Z")]).await;
    let filter = AuditFilter { limit: 2, model: Some("gpt-4o".into()), ..AuditFilter::default() };
    let mut place = store.bookmark().await.unwrap();
    let start = std::time::Instant::now();
    let until = loop {
        let until = AuditFilter { booked_until: Some(place.clone()), limit: 9, ..AuditFilter::default() };
        if store.audit(&until).await.unwrap().len() == 1 {
            break until;
        }
        assert!(start.elapsed() < PATIENCE);
        place = store.bookmark().await.unwrap();
    };
    // Booked later, and of requests that began earlier.
    write(&store, &[record(3, "2026-11-23T09:00:01Z"), record(2, "2026-11-23T09:00:02Z")]).await;
    write(&store, &[record(5, "2026-11-01T00:00:00Z"), record(4, "2026-11-01T00:00:00Z")]).await;
    let other = UsageRecord { model: "o3".into(), ..record(6, "2026-11-24T00:00:00Z") };
    write(&store, &[other, record(7, "2026-10-01T00:00:00Z")]).await;
    assert_eq!(store.audit(&until).await.unwrap().len(), 1, "what was there at the bookmark");
    // Within a batch SQLite knows an order, and PostgreSQL goes by time and id.
    let expected = if database.url.starts_with("sqlite") { "32547" } else { "32457" };
    let seen = grown(&store, &filter, &mut place, 5).await;
    assert_eq!(seen, expected, "batch after batch, each row once, whenever its request began");
    write(&store, &[record(8, "2026-11-23T10:00:00Z")]).await;
    assert_eq!(grown(&store, &filter, &mut place, 1).await, "8");
    assert_eq!(store.booked_after(&filter, &place).await.unwrap(), []);
}

/// On PostgreSQL what has the smaller number may become visible later.
#[tokio::test]
async fn whoever_follows_the_log_waits_for_transactions_that_are_open() {
    let database = Database::postgres();
    let store = database.store().await;
    let mut place = store.bookmark().await.unwrap();
    let pool = sqlx::PgPool::connect(&database.url).await.unwrap();
    let mut slow = pool.begin().await.unwrap();
    let insert =
        "INSERT INTO request_log (request_id, started_at, user_id, key_id, route, model, attempts, status, stream,
            prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens, audio_tokens, estimated, interrupted,
            cost_nano_usd, duration_ms, overhead_us)
        VALUES ($1, now(), 1, 1, 'r', 'm', '[]', 200, false, 1, 1, 0, 0, 0, false, false, 0, 1, 1)";
    sqlx::query(insert).bind(Uuid::from_u128(1)).execute(&mut *slow).await.unwrap();
    write(&store, &[record(2, "2026-11-23T10:00:00Z")]).await;
    let filter = AuditFilter { limit: 9, ..AuditFilter::default() };
    let rows = store.booked_after(&filter, &place).await.unwrap();
    assert_eq!(rows, [], "what began earlier may still come before it");
    slow.commit().await.unwrap();
    assert_eq!(grown(&store, &filter, &mut place, 2).await, "12");
}
