//! Usage: each record once, and sums that are what the records say.

use chrono::NaiveDate;
use tollgate::store::{AuditFilter, GroupBy, KeySpec, Store, UsageQuery};
use tollgate_core::{
    id::{KeyId, UserId},
    limit::{Amount, Month},
    usage::{Attempt, BookedAddress, Usage, UsageRecord, attempts_json},
};

use super::{Database, alice, api_key, at, attempt, on_both_databases, record, write};
use crate::support::program::Program;

on_both_databases! {
    usage_is_counted_once,
    addresses_are_counted_once_and_only_if_asked_for,
    batches_at_once_are_counted_once,
    no_record_can_block_a_batch,
    sums_stop_at_the_largest_number,
    usage_is_reported_by_everything,
    sums_are_what_the_log_says_across_the_end_of_a_month,
    usage_is_filtered_and_grouped_by_several_things,
}

async fn sums(store: &Store, by: GroupBy) -> Vec<(String, i64, i64, i64, i64)> {
    let rows = store.usage(&UsageQuery::by(by)).await.unwrap();
    rows.into_iter()
        .map(|r| (r.name(by).to_owned(), r.requests, r.total_tokens, r.cached_tokens, r.cost_nano_usd))
        .collect()
}

async fn usage_is_counted_once(database: Database) {
    let store = database.store().await;
    let batch: Vec<_> = (0..5).map(|n| record(n, "2026-11-23T10:00:00.123456789Z")).collect();
    assert_eq!(write(&store, &[]).await, 0);
    assert_eq!(write(&store, &batch).await, 5);
    assert_eq!(write(&store, &batch).await, 0, "the same again is nothing new");
    let mut mixed = vec![record(4, "2026-11-23T10:00:00.123456789Z")];
    mixed.extend([record(5, "2026-11-23T10:00:01Z"), record(5, "2026-11-23T10:00:01Z")]);
    assert_eq!(write(&store, &mixed).await, 1, "one of them is new, once");
    for by in [GroupBy::Day, GroupBy::Month] {
        let name = if by == GroupBy::Day { "2026-11-23" } else { "2026-11" };
        assert_eq!(sums(&store, by).await, [(name.to_owned(), 6, 90, 24, 6_000)], "{by:?}");
    }
    let log = store.audit(&AuditFilter { limit: 100, ..AuditFilter::default() }).await.unwrap();
    assert_eq!(log.len(), 6);
    let row = log.last().unwrap();
    assert_eq!(row.request_id, "00000000-0000-0000-0000-000000000000");
    assert_eq!(row.started_at, at("2026-11-23T10:00:00.123456Z"), "as precise as the database");
    assert_eq!(row.ip.as_deref(), Some("10.1.2.3"));
    let attempts: serde_json::Value = serde_json::from_str(&row.attempts).unwrap();
    assert_eq!(attempts, serde_json::json!([{ "upstream": "main", "status": 200, "duration_ms": 5 }]));
    assert_eq!((row.prompt_tokens, row.completion_tokens, row.cached_tokens), (10, 5, 4));
    assert_eq!((row.reasoning_tokens, row.cache_write_tokens, row.cost_nano_usd), (2, 3, 1_000));
    assert_eq!((row.audio_tokens, row.output_audio_tokens), (5, 1));
    assert_eq!((row.image_tokens, row.output_image_tokens), (7, 2));
    assert_eq!(row.served_model.as_deref(), Some("gpt-4o-2024-08-06"));
    assert_eq!(row.service_tier.as_deref(), Some("default"));
    assert_eq!((row.stream, row.estimated, row.interrupted, row.status), (true, false, true, 200));
    assert_eq!((row.ttft_ms, row.duration_ms, row.overhead_us), (Some(7), 20, 300));
    let texts = [&row.upstream_model, &row.upstream, &row.code, &row.finish_reason, &row.user_agent];
    assert_eq!(texts.map(Option::as_deref), [Some("prod"), Some("main"), None, Some("stop"), Some("test/1")]);
    assert_eq!((row.route.as_str(), row.model.as_str()), ("chat_completions", "gpt-4o"));
    assert_eq!(row.client_request_id.as_deref(), Some("mine"));
    assert_eq!(row.provider_request_id.as_deref(), Some("req_1"));
}

async fn addresses_are_counted_once_and_only_if_asked_for(database: Database) {
    let from = |n, ip: &str| UsageRecord { ip: ip.parse().ok(), ..record(n, "2026-11-23T10:00:00Z") };
    let booked = |network: &str, requests: u64| BookedAddress {
        network: network.parse().unwrap(),
        amount: Amount { tokens: 15 * requests, nano_usd: 1_000 * requests },
    };
    let month = Month::of(at("2026-11-23T10:00:00Z"));
    let store = database.store().await;
    write(&store, &[from(1, "10.0.0.1")]).await;
    assert_eq!(store.booked_addresses(month).await.unwrap(), [], "addresses are personal data");

    let store = store.summing_addresses(true);
    let batch = [
        from(2, "10.0.0.1"),
        from(3, "::ffff:10.0.0.1"),
        from(4, "2001:db8:1:2::1"),
        from(5, "2001:db8:1:2:ffff::9"),
        from(6, "2001:db8:1:2::7"),
        from(7, "10.0.0.2"),
        from(8, "from nowhere"),
        UsageRecord { ip: "10.0.0.1".parse().ok(), ..record(9, "2026-12-01T00:00:00Z") },
    ];
    write(&store, &batch[..5]).await;
    assert_eq!(write(&store, &batch).await, 3, "the rest of them");
    assert_eq!(write(&store, &batch).await, 0);
    write(&store, &[from(1, "10.0.0.1")]).await;
    let expected = [booked("2001:db8:1:2::", 3), booked("10.0.0.1", 2), booked("10.0.0.2", 1)];
    assert_eq!(store.booked_addresses(month).await.unwrap(), expected, "those that used most come first");
    assert_eq!(store.booked_addresses(month.next()).await.unwrap(), [booked("10.0.0.1", 1)]);
    let some = [expected[0].network, "10.0.0.9".parse().unwrap()];
    assert_eq!(store.booked_of_addresses(month, &some).await.unwrap(), expected[..1]);
    assert_eq!(store.booked_of_addresses(month, &[]).await.unwrap(), []);
}

async fn batches_at_once_are_counted_once(database: Database) {
    let stores = [database.store().await, database.store().await];
    let batch: Vec<_> = (0..50).map(|n| record(n, "2026-11-23T10:00:00Z")).collect();
    let mut writers = tokio::task::JoinSet::new();
    for n in 0..6 {
        let (store, mut batch) = (stores[n % 2].clone(), batch.clone());
        // Each in another order, so that rows locked in that order would lock each other out.
        batch.rotate_left(n * 7);
        batch.iter_mut().for_each(|record| record.user_id = UserId((record.request_id.as_u128() % 5) as i64));
        writers.spawn(async move { write(&store, &batch).await });
    }
    let mut new = 0;
    while let Some(done) = writers.join_next().await {
        new += done.unwrap();
    }
    assert_eq!(new, 50);
    assert_eq!(sums(&stores[0], GroupBy::Month).await, [("2026-11".to_owned(), 50, 750, 200, 50_000)]);
}

async fn no_record_can_block_a_batch(database: Database) {
    let store = database.store().await;
    let mut bad = record(1, "2026-11-23T10:00:00Z");
    bad.user_id = UserId(-7);
    bad.model = format!("nul\0{}", "é".repeat(100_000)).into();
    bad.upstream = Some("\0".into());
    bad.user_agent = Some("x".repeat(1_000_000).into());
    bad.attempts = attempts_json(&[Attempt { error: Some("nul\0".into()), ..attempt() }], None).into();
    bad.usage.prompt_tokens = u64::MAX;
    bad.cost_nano_usd = u64::MAX;
    (bad.duration_ms, bad.overhead_us, bad.ttft_ms) = (u32::MAX, u32::MAX, Some(u32::MAX));
    // Nothing that can be compressed: index entries have a largest size.
    let noise = |seed: u32| -> String {
        let next = |x: &mut u32| {
            *x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            char::from_u32(0x1_0000 + (*x >> 13))
        };
        std::iter::repeat_with({
            let mut x = seed;
            move || next(&mut x)
        })
        .flatten()
        .take(1_000)
        .collect()
    };
    let long = UsageRecord {
        model: noise(1).into(),
        upstream: Some(noise(2).into()),
        code: Some(noise(3).into()),
        ..record(3, "2026-11-23T09:00:00Z")
    };
    assert_eq!(write(&store, &[bad, record(2, "2026-11-23T10:00:00Z"), long]).await, 3);
    let log = store.audit(&AuditFilter { limit: 9, ..AuditFilter::default() }).await.unwrap();
    let bad = &log[1];
    assert_eq!((bad.prompt_tokens, bad.cost_nano_usd, bad.duration_ms), (i64::MAX, i64::MAX, i32::MAX));
    assert!(bad.model.starts_with("nul\u{fffd}é"), "{}", bad.model);
    assert_eq!(bad.model.chars().count(), 256);
}

async fn sums_stop_at_the_largest_number(database: Database) {
    let store = database.store().await;
    let large = |n| UsageRecord { cost_nano_usd: u64::MAX, ..record(n, "2026-11-23T10:00:00Z") };
    assert_eq!(write(&store, &[large(1), large(2)]).await, 2, "within a batch");
    assert_eq!(write(&store, &[large(3)]).await, 1, "and from batch to batch");
    assert_eq!(sums(&store, GroupBy::Model).await, [("gpt-4o".to_owned(), 3, 45, 12, i64::MAX)]);
}

async fn usage_is_reported_by_everything(database: Database) {
    let store = database.store().await;
    let user = store.create_user(&alice(), "test").await.unwrap();
    let spec = KeySpec { name: "ci".into(), ..KeySpec::default() };
    let key = store.create_key(user.id, &spec, &api_key(1), "test").await.unwrap();
    let of_key = |record| UsageRecord { user_id: user.id, key_id: key.id, ..record };
    let lost = UsageRecord { upstream: None, ..of_key(record(3, "2026-12-01T00:00:00Z")) };
    let other = UsageRecord { model: "o3".into(), ..of_key(record(2, "2026-11-30T23:59:59.999999Z")) };
    write(&store, &[of_key(record(1, "2026-11-23T10:00:00Z")), other, lost]).await;

    let row = |name: &str, n: i64| (name.to_owned(), n, n * 15, n * 4, n * 1_000);
    let days = [row("2026-11-23", 1), row("2026-11-30", 1), row("2026-12-01", 1)];
    assert_eq!(sums(&store, GroupBy::Day).await, days);
    assert_eq!(sums(&store, GroupBy::Month).await, [row("2026-11", 2), row("2026-12", 1)]);
    assert_eq!(sums(&store, GroupBy::User).await, [row("alice", 3)]);
    assert_eq!(sums(&store, GroupBy::Key).await, [row("ci", 3)]);
    assert_eq!(sums(&store, GroupBy::Model).await, [row("gpt-4o", 2), row("o3", 1)]);
    assert_eq!(sums(&store, GroupBy::Upstream).await, [row("", 1), row("main", 2)]);
    let by_key = &store.usage(&UsageQuery::by(GroupBy::Key)).await.unwrap()[0];
    assert_eq!((by_key.key_id, by_key.user.as_deref()), (Some(key.id.0), Some("alice")));

    let between = async |by, since: &str, until: &str| -> Vec<(String, i64)> {
        let date = |text: &str| text.parse::<NaiveDate>().ok();
        let query = UsageQuery { since: date(since), until: date(until), ..UsageQuery::by(by) };
        let rows = store.usage(&query).await.unwrap();
        rows.into_iter().map(|row| (row.name(by).to_owned(), row.requests)).collect()
    };
    assert_eq!(between(GroupBy::Day, "2026-11-24", "2026-12-01").await, [("2026-11-30".to_owned(), 1)]);
    assert_eq!(between(GroupBy::Month, "2026-11-24", "").await, [("2026-11".to_owned(), 1), ("2026-12".to_owned(), 1)]);
    assert_eq!(between(GroupBy::User, "2026-12-01", "2027-01-01").await, [("alice".to_owned(), 1)]);
    assert_eq!(between(GroupBy::User, "", "2026-11-23").await, []);
}

async fn sums_are_what_the_log_says_across_the_end_of_a_month(database: Database) {
    let store = database.store().await;
    let times = [
        "2026-11-30T23:59:59.999999Z",
        "2026-12-01T00:00:00Z",
        "2026-12-01T00:00:00.000001Z",
        "2026-12-31T23:59:59.9999999Z",
        "2027-01-01T00:00:00Z",
        "2028-02-29T12:00:00Z",
    ];
    let made = |n: u64| UsageRecord {
        usage: Usage { prompt_tokens: n * 3, completion_tokens: n, cached_tokens: n, ..Usage::default() },
        cost_nano_usd: n * 7,
        model: if n.is_multiple_of(2) { "gpt-4o" } else { "o3" }.into(),
        user_id: UserId((n % 3).cast_signed()),
        upstream: (!n.is_multiple_of(4)).then(|| "main".into()),
        ..record(n.into(), times[usize::try_from(n).unwrap() % times.len()])
    };
    let all: Vec<_> = (0..120).map(made).collect();
    // In batches that overlap, as after a crash.
    for start in (0..100).step_by(20) {
        write(&store, &all[start..start + 40]).await;
    }
    let rows = store.audit(&AuditFilter { limit: 1000, ..AuditFilter::default() }).await.unwrap();
    assert_eq!(rows.len(), 120);
    for (by, length) in [(GroupBy::Day, 10), (GroupBy::Month, 7)] {
        let mut expected = std::collections::BTreeMap::<String, (i64, i64, i64, i64)>::new();
        for row in &rows {
            let sum = expected.entry(row.started_at.to_rfc3339()[..length].to_owned()).or_default();
            let tokens = row.prompt_tokens + row.completion_tokens;
            *sum = (sum.0 + 1, sum.1 + tokens, sum.2 + row.cached_tokens, sum.3 + row.cost_nano_usd);
        }
        let booked =
            sums(&store, by).await.into_iter().map(|(name, n, tokens, cached, cost)| (name, (n, tokens, cached, cost)));
        assert_eq!(booked.collect::<std::collections::BTreeMap<_, _>>(), expected, "{by:?}");
        assert_eq!(expected.len(), if by == GroupBy::Day { 5 } else { 4 });
    }
}

async fn usage_is_filtered_and_grouped_by_several_things(database: Database) {
    let store = database.store().await;
    let of = |n, user, model: &'static str, time| UsageRecord {
        user_id: UserId(user),
        key_id: KeyId(user * 10),
        model: model.into(),
        ..record(n, time)
    };
    let rows = [
        of(1, 1, "a", "2026-11-23T10:00:00Z"),
        of(2, 1, "b", "2026-11-23T10:00:00Z"),
        of(3, 2, "a", "2026-11-24T10:00:00Z"),
        of(4, 2, "a", "2026-12-24T10:00:00Z"),
    ];
    write(&store, &rows).await;
    let ask = async |query: UsageQuery| -> Vec<String> {
        let rows = store.usage(&query).await.unwrap();
        let text = |row: &tollgate::store::UsageSum| {
            let names = query.by.iter().map(|by| match by {
                GroupBy::User => row.user_id.unwrap().to_string(),
                by => row.name(*by).to_owned(),
            });
            names.chain([row.requests.to_string()]).collect::<Vec<_>>().join(" ")
        };
        rows.iter().map(text).collect()
    };
    let by = |by: &[GroupBy]| UsageQuery { by: by.to_vec(), ..UsageQuery::default() };
    let (user, model, month) = (GroupBy::User, GroupBy::Model, GroupBy::Month);
    assert_eq!(ask(by(&[model, user])).await, ["a 1 1", "a 2 2", "b 1 1"]);
    assert_eq!(ask(by(&[month, model])).await, ["2026-11 a 2", "2026-11 b 1", "2026-12 a 1"]);
    assert_eq!(
        ask(UsageQuery { user: Some(UserId(2)), ..by(&[GroupBy::Day]) }).await,
        ["2026-11-24 1", "2026-12-24 1"]
    );
    assert_eq!(ask(UsageQuery { key: Some(KeyId(10)), model: Some("b".into()), ..by(&[month]) }).await, ["2026-11 1"]);
    assert_eq!(ask(UsageQuery { upstream: Some("main".into()), ..by(&[]) }).await, ["4"]);
    assert_eq!(ask(UsageQuery { upstream: Some("other".into()), ..by(&[month]) }).await, [""; 0]);
}

/// Locks of a file belong to the process: what opens the file beside SQLite lets go of them when it closes it, and the next
/// program that ends its use takes the log away.
#[tokio::test]
async fn another_program_takes_nothing_away_after_a_second_store_was_opened() {
    let program = Program::new("[store]\nurl = \"sqlite://DIR/db\"\n[secrets]\nfernet_keys_file = \"DIR/keys\"\n");
    assert_eq!(program.run("init", "").code, 0);
    let url = format!("sqlite://{}/db", program.directory().display());
    let first = Store::open(&url).await.unwrap();
    assert_eq!(write(&first, &[record(1, "2026-11-23T10:00:00Z")]).await, 1);
    let second = Store::open(&url).await.unwrap();
    let file = program.directory().join("db");
    let look =
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT * FROM users').fetchall(); c.close()";
    assert!(std::process::Command::new("python3").args(["-c", look]).arg(&file).status().unwrap().success());
    assert!(program.directory().join("db-wal").exists(), "it is in use");
    assert_eq!(write(&first, &[record(2, "2026-11-23T10:00:01Z")]).await, 1);
    let seen: serde_json::Value = serde_json::from_str(&program.run("audit --json", "").stdout).unwrap();
    assert_eq!(seen.as_array().map(Vec::len), Some(2), "{seen}");
    second.close().await;
    first.close().await;
}
