//! What is old goes, what is not stays, and nobody notices: months as partitions on PostgreSQL, small steps on SQLite.

use std::time::{Duration, Instant};

use chrono::{DateTime, Days, TimeDelta, Utc};
use sqlx::{Connection, PgConnection, SqliteConnection};
use tollgate::store::{AuditFilter, GroupBy, Store, StoreError, Swept, UsageQuery};
use tollgate_core::{limit::Month, retention::Kept, usage::UsageRecord};
use uuid::Uuid;

use crate::{
    store::{Database, on_both_databases, record, write},
    support::{
        gateway::{Gateway, PATIENCE},
        openai::{chat, completion},
        upstream::Upstream,
    },
};

on_both_databases! {
    what_is_old_goes_and_the_sums_stay,
    a_clock_that_jumped_is_no_reason_to_lose_a_row,
    steps_and_writers_at_once_lose_and_double_nothing,
    a_table_that_is_not_there_needs_nothing,
    content_goes_to_the_very_day,
    a_running_gateway_does_it_by_itself,
}

fn kept(days: u32) -> Kept {
    Kept { table: "request_log", days, is_exact: false }
}

fn at(time: &str) -> DateTime<Utc> {
    time.parse().unwrap()
}

/// A row for each of these times.
fn rows(times: impl IntoIterator<Item = DateTime<Utc>>) -> Vec<UsageRecord<'static>> {
    let row = |(n, started_at)| UsageRecord { started_at, ..record(n, "2026-11-23T10:00:00Z") };
    (1..).zip(times).map(row).collect()
}

/// Takes steps until nothing is left to be done; what they did together, and each.
async fn sweep(store: &Store, kept: &Kept, now: DateTime<Utc>) -> (Swept, Vec<Swept>) {
    let (mut all, mut steps) = (Swept::default(), Vec::new());
    loop {
        let step = store.sweep(kept, now).await.unwrap();
        if !step.is_something() {
            return (all, steps);
        }
        all.rows_deleted += step.rows_deleted;
        all.parts_dropped += step.parts_dropped;
        all.parts_made += step.parts_made;
        all.rows_moved += step.rows_moved;
        steps.push(step);
    }
}

async fn log(store: &Store) -> Vec<DateTime<Utc>> {
    let rows = store.audit(&AuditFilter { limit: 100_000, ..AuditFilter::default() }).await.unwrap();
    rows.into_iter().map(|row| row.started_at).collect()
}

async fn booked(store: &Store) -> i64 {
    let sums = store.usage(&UsageQuery::by(GroupBy::Month)).await.unwrap();
    sums.iter().map(|sum| sum.requests).sum()
}

/// The partitions of a table, or none.
async fn parts(url: &str) -> Vec<String> {
    if url.starts_with("sqlite") {
        return Vec::new();
    }
    let mut connection = PgConnection::connect(url).await.unwrap();
    let parts = "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'request_log'::regclass ORDER BY 1";
    sqlx::query_scalar(parts).fetch_all(&mut connection).await.unwrap()
}

async fn what_is_old_goes_and_the_sums_stay(database: Database) {
    let store = database.store().await;
    let now = at("2026-11-25T12:00:00Z");
    // One in each six hours of a hundred days, as a gateway without partitions left them.
    let times: Vec<_> = (0..400).map(|n| now - TimeDelta::hours(6 * n)).collect();
    write(&store, &rows(times.iter().copied())).await;
    let (first, _) = sweep(&store, &kept(0), now).await;
    assert_eq!(log(&store).await, times, "0 is for ever");
    if database.url.starts_with("postgres") {
        let november = times.iter().filter(|time| **time >= at("2026-11-01T00:00:00Z")).count() as u64;
        assert_eq!(first, Swept { parts_made: 3, rows_moved: november, ..Swept::default() });
        let names = ["request_log_2026_11", "request_log_2026_12", "request_log_2027_01", "request_log_default"];
        assert_eq!(parts(&database.url).await, names);
    }

    let (done, _) = sweep(&store, &kept(90), now).await;
    let since = now - TimeDelta::days(90);
    let left: Vec<_> = times.iter().copied().filter(|time| *time >= since).collect();
    assert_eq!(log(&store).await, left, "to the very row, where it has no month of its own");
    assert_eq!(done, Swept { rows_deleted: 400 - left.len() as u64, ..Swept::default() });
    assert_eq!(
        write(&store, &rows(times)).await,
        400 - left.len(),
        "those that are there are known, those that went are not"
    );
    sweep(&store, &kept(90), now).await;

    // November goes as a whole, once its last moment is old enough; not on the day before.
    let later = at("2027-02-28T00:00:00Z");
    let (done, _) = sweep(&store, &kept(90), later).await;
    if database.url.starts_with("postgres") {
        assert_eq!((done.parts_made, done.parts_dropped), (3, 0), "the months of the new time");
        assert_eq!(log(&store).await.len(), 99, "all of November is there, nothing before");
        let (done, _) = sweep(&store, &kept(90), later + TimeDelta::days(1)).await;
        assert_eq!((done.parts_dropped, done.rows_deleted), (1, 0));
        let names = parts(&database.url).await;
        assert!(
            !names.contains(&"request_log_2026_11".to_owned()) && names.contains(&"request_log_2026_12".to_owned())
        );
    }
    assert!(log(&store).await.is_empty());
    assert!(booked(&store).await >= 400, "sums are for ever");
}

async fn a_clock_that_jumped_is_no_reason_to_lose_a_row(database: Database) {
    let store = database.store().await;
    let now = at("2026-11-25T12:00:00Z");
    sweep(&store, &kept(90), now).await;
    let times = [at("2031-05-05T00:00:00Z"), at("2027-01-01T00:00:00Z"), now, at("1999-01-01T00:00:00Z")];
    assert_eq!(write(&store, &rows(times)).await, 4);
    assert_eq!(log(&store).await, times);
    let (done, _) = sweep(&store, &kept(90), now).await;
    assert_eq!(done, Swept { rows_deleted: 1, ..Swept::default() }, "only what is old goes");
    // What came too early is there when its month comes, and goes with it.
    let then = at("2031-05-04T00:00:00Z");
    let (done, _) = sweep(&store, &kept(0), then).await;
    assert_eq!(log(&store).await, times[..3]);
    if database.url.starts_with("postgres") {
        assert_eq!((done.parts_made, done.rows_moved), (3, 1));
    }
    sweep(&store, &kept(90), at("2031-10-01T00:00:00Z")).await;
    assert!(log(&store).await.is_empty());
    assert_eq!(booked(&store).await, 4);
}

/// Replicas that take steps while others write, each batch more than once, as after a crash.
async fn steps_and_writers_at_once_lose_and_double_nothing(database: Database) {
    let now = at("2026-11-25T12:00:00Z");
    let first = database.store().await;
    let times: Vec<_> = (0..1_200).map(|n| now + TimeDelta::hours(n - 600)).collect();
    let all = rows(times.iter().copied());
    write(&first, &all[..600]).await;
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..3_usize {
        let (store, mut all) = (database.store().await, all.clone());
        tasks.spawn(async move {
            all.rotate_left(n * 400);
            for batch in all.chunks(50) {
                store.write_usage(batch.to_vec()).await.unwrap();
            }
        });
        let store = database.store().await;
        tasks.spawn(async move {
            while !matches!(store.sweep(&kept(5), now).await, Ok(swept) if !swept.is_something()) {
                tokio::task::yield_now().await;
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    sweep(&first, &kept(0), now).await;
    let log = log(&first).await;
    let mut distinct = log.clone();
    distinct.dedup();
    assert_eq!(distinct, log, "no row is there twice");
    let young: Vec<_> = times.iter().rev().filter(|time| **time >= now - TimeDelta::days(5)).copied().collect();
    assert!(young.iter().all(|time| log.contains(time)), "no row that is kept is missing");
    // An old row that had gone may have been booked again; of the others none was.
    let days = UsageQuery { since: Some(now.date_naive() - Days::new(4)), ..UsageQuery::by(GroupBy::Day) };
    let sums: i64 = first.usage(&days).await.unwrap().iter().map(|sum| sum.requests).sum();
    let counted = young.iter().filter(|time| time.date_naive() >= now.date_naive() - Days::new(4)).count();
    assert_eq!(usize::try_from(sums).unwrap(), counted);
}

async fn a_table_that_is_not_there_needs_nothing(database: Database) {
    let store = database.store().await;
    let absent = Kept { table: "no_such_table", days: 1, is_exact: true };
    assert_eq!(store.sweep(&absent, Utc::now()).await.unwrap(), Swept::default());
}

/// Old rows that were left behind, and a setting.
async fn a_running_gateway_does_it_by_itself(database: Database) {
    let store = database.store().await;
    let now = Utc::now();
    write(&store, &rows([now - TimeDelta::days(3), now - TimeDelta::days(400)])).await;
    let upstream = Upstream::start(completion());
    let gateway = Gateway::builder()
        .store(&database.url)
        .upstream("main", &upstream.base_url(), "")
        .tables("[audit]\nretention_days = 20")
        .start();
    let start = Instant::now();
    while gateway.metric("tollgate_retention_rows_deleted_total{table=\"request_log\"}").await < 1.0 {
        assert!(start.elapsed() < PATIENCE, "nothing is deleted");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(gateway.metric("tollgate_retention_partitions_dropped_total{table=\"request_log\"}").await, 0.0);
    assert_eq!(log(&store).await.len(), 1);
    assert_eq!(gateway.ask("/v1/chat/completions", &chat()).await.status, 200);
    gateway.rows(2).await;
    if database.url.starts_with("postgres") {
        let kept = kept(1);
        let wanted: Vec<_> = Kept::wanted(now).map(|month| kept.part(month)).collect();
        let start = Instant::now();
        while !contains_all(&parts(&database.url).await, &wanted) {
            assert!(start.elapsed() < PATIENCE, "no months are made");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn contains_all(all: &[String], some: &[String]) -> bool {
    some.iter().all(|one| all.contains(one))
}

#[tokio::test]
async fn sqlite_deletes_a_few_rows_at_a_time() {
    let database = Database::sqlite();
    let store = database.store().await;
    let now = at("2026-11-25T12:00:00Z");
    write(&store, &rows((0..1_700).map(|n| now - TimeDelta::days(200) + TimeDelta::seconds(n)))).await;
    let (all, steps) = sweep(&store, &kept(90), now).await;
    assert_eq!(all.rows_deleted, 1_700);
    assert!(steps.iter().all(|step| step.rows_deleted <= 500) && steps.len() == 4, "{steps:?}");
}

/// A month may wait for its last row, but somebody's words go in their time, wherever they are.
#[tokio::test]
async fn what_must_go_in_its_time_does() {
    let database = Database::postgres();
    let store = database.store().await;
    let now = at("2026-11-25T12:00:00Z");
    sweep(&store, &kept(0), now).await;
    write(&store, &rows((0..20).map(|n| now - TimeDelta::days(n)))).await;
    let (done, _) = sweep(&store, &kept(10), now).await;
    assert_eq!((done, log(&store).await.len()), (Swept::default(), 20));
    let (done, _) = sweep(&store, &Kept { is_exact: true, ..kept(10) }, now).await;
    assert_eq!((done.rows_deleted, log(&store).await.len()), (9, 11));
}

/// The content of requests, whose table is made for the same job.
async fn content_goes_to_the_very_day(database: Database) {
    let store = database.store().await;
    let now = at("2026-11-25T12:00:00Z");
    let kept = Kept { table: "request_content", days: 30, is_exact: true };
    sweep(&store, &kept, now).await;
    let insert = "INSERT INTO request_content (request_id, started_at, mode, prompt_hash, request_bytes, answer_bytes, truncated)
        VALUES ($1, $2, 'hash', $3, 1, 1, FALSE)";
    macro_rules! insert {
        ($connection:ty, $id:expr) => {{
            let mut connection = <$connection>::connect(&database.url).await.unwrap();
            for day in 0_u32..40 {
                let query =
                    sqlx::query(insert).bind($id(Uuid::from_u128(day.into()))).bind(now - TimeDelta::days(day.into()));
                query.bind(&[7_u8; 32][..]).execute(&mut connection).await.unwrap();
            }
        }};
    }
    if database.url.starts_with("postgres") {
        insert!(PgConnection, |id| id);
    } else {
        insert!(SqliteConnection, Uuid::hyphenated);
    }
    let (done, _) = sweep(&store, &kept, now).await;
    assert_eq!(done, Swept { rows_deleted: 9, ..Swept::default() }, "30 days and not a month more");
    let (done, _) = sweep(&store, &kept, now + TimeDelta::days(100)).await;
    // On PostgreSQL the 25 of November go with their month.
    let with_their_month = if done.parts_dropped > 0 { 25 } else { 0 };
    assert_eq!(done.rows_deleted + with_their_month, 31, "{done:?}");
}

/// Somebody reads for long: nobody queues behind the step for long, and it is done later.
#[tokio::test]
async fn a_step_gives_way_to_a_long_reader() {
    let database = Database::postgres();
    let store = database.store().await;
    let mut reader = PgConnection::connect(&database.url).await.unwrap();
    let mut reading = reader.begin().await.unwrap();
    sqlx::query("SELECT FROM request_log").execute(&mut *reading).await.unwrap();
    let error = store.sweep(&kept(0), Utc::now()).await.unwrap_err();
    assert!(matches!(&error, StoreError::Database(_)) && error.to_string().contains("lock timeout"), "{error}");
    assert_eq!(write(&store, &rows([Utc::now()])).await, 1, "the writer goes on");
    reading.commit().await.unwrap();
    let (done, _) = sweep(&store, &kept(0), Utc::now()).await;
    assert_eq!((done.parts_made, done.rows_moved), (3, 1));
}

/// A month that somebody took out to keep it, or added, is left alone.
#[tokio::test]
async fn partitions_of_others_are_left_alone() {
    let database = Database::postgres();
    let store = database.store().await;
    let now = at("2026-11-25T12:00:00Z");
    let mut owner = PgConnection::connect(&database.url).await.unwrap();
    for statement in [
        "CREATE TABLE request_log_2020_01 (LIKE request_log INCLUDING ALL)",
        "CREATE TABLE request_log_museum PARTITION OF request_log FOR VALUES FROM ('2019-01-01') TO ('2020-01-01')",
    ] {
        sqlx::query(statement).execute(&mut owner).await.unwrap();
    }
    write(&store, &rows([at("2019-05-05T00:00:00Z")])).await;
    let (done, _) = sweep(&store, &kept(90), now).await;
    assert_eq!((done.parts_dropped, done.rows_deleted), (0, 0));
    assert!(parts(&database.url).await.contains(&"request_log_museum".to_owned()));
    let detached: i64 =
        sqlx::query_scalar("SELECT COUNT(*) FROM request_log_2020_01").fetch_one(&mut owner).await.unwrap();
    assert_eq!(detached, 0);
    assert_eq!(Month::of(now), Kept::wanted(now).next().unwrap());
}

/// The room of rows that went is used again.
#[tokio::test]
async fn a_file_of_sqlite_stops_growing_once_as_much_goes_as_comes() {
    let database = Database::sqlite();
    let store = database.store().await;
    let size = async || {
        let mut connection = SqliteConnection::connect(&database.url).await.unwrap();
        let count: i64 = sqlx::query_scalar("PRAGMA page_count").fetch_one(&mut connection).await.unwrap();
        count
    };
    let start = at("2026-01-01T00:00:00Z");
    let (mut number, mut sizes) = (0_u128, Vec::new());
    for day in 0..40 {
        let now = start + TimeDelta::days(day);
        let batch: Vec<_> = (0..100)
            .map(|n| {
                number += 1;
                UsageRecord { started_at: now + TimeDelta::minutes(n), ..record(number, "2026-11-23T10:00:00Z") }
            })
            .collect();
        write(&store, &batch).await;
        sweep(&store, &kept(10), now).await;
        sizes.push(size().await);
    }
    let (then, now) = (sizes[19], sizes[39]);
    assert!(now <= then + then / 10, "{sizes:?}");
    assert_eq!(log(&store).await.len(), 1_000 + 100);
}
