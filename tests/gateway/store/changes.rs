//! What a running gateway sees of changes, and what is written down of them.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::json;
use tollgate::store::{AdminLogRow, KeySpec, NewPrice, UserSpec};
use tollgate_core::price::{Price, Rates};

use super::{Database, alice, api_key, at, model_limits, on_both_databases, openai};

on_both_databases! {
    a_gateway_sees_what_changed_and_nothing_else,
    a_gateway_that_has_seen_more_than_there_is_starts_over,
    changes_are_announced,
    writers_at_once_leave_no_gap,
    every_change_leaves_a_row_in_the_admin_log,
    prices_are_kept_corrected_and_announced,
}

async fn a_gateway_sees_what_changed_and_nothing_else(database: Database) {
    let store = database.store().await;
    let empty = store.changes_since(0).await.unwrap();
    assert!(empty.is_empty() && empty.complete);
    let user = store.create_user(&alice(), "test").await.unwrap();
    let spec = KeySpec { name: "ci".into(), models: vec!["o3*".into()], ..KeySpec::default() };
    let key = store.create_key(user.id, &spec, &api_key(1), "test").await.unwrap();
    let upstream = store.create_upstream(&openai(), "test").await.unwrap();

    let all = store.changes_since(0).await.unwrap();
    assert!(all.complete);
    assert_eq!((all.users.len(), all.keys.len(), &*all.upstreams), (1, 1, &[upstream.clone()][..]));
    let (hash, entry) = &all.keys[0];
    assert_eq!((*hash, entry.id, entry.user.name.as_str()), (api_key(1).hash(), key.id, "alice"));
    assert_eq!(entry.models, ["o3*"]);
    assert!(store.changes_since(all.seq).await.unwrap().is_empty());

    store.update_user(user.id, "test", |user| user.disabled = true).await.unwrap();
    let next = store.changes_since(all.seq).await.unwrap();
    assert!(next.keys[0].1.user.disabled, "a key comes when its user changed");
    assert!(next.upstreams.is_empty() && !next.complete);

    store.revoke_key(key.id, "test").await.unwrap();
    store.remove_upstream(upstream.id, "test").await.unwrap();
    let last = store.changes_since(next.seq).await.unwrap();
    assert!(last.keys[0].1.revoked_at.is_some());
    assert!(last.keys[0].1.user.disabled, "a key comes with its user, changed or not");
    assert_eq!(last.removed_upstreams, [upstream.id]);
    assert!(last.upstreams.is_empty());
}

async fn a_gateway_that_has_seen_more_than_there_is_starts_over(database: Database) {
    let store = database.store().await;
    store.create_user(&alice(), "test").await.unwrap();
    let changes = store.changes_since(1_000).await.unwrap();
    assert!(changes.complete);
    assert_eq!((changes.seq, changes.users.len()), (1, 1));
}

async fn changes_are_announced(database: Database) {
    let store = database.store().await;
    let mut listener = store.listen().await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(50), listener.changed()).await.is_err());
    store.create_user(&alice(), "test").await.unwrap();
    let heard = tokio::time::timeout(Duration::from_secs(5), listener.changed());
    if database.url.starts_with("postgres") {
        heard.await.expect("within five seconds").unwrap();
    } else {
        drop(heard);
        let waiting = tokio::time::timeout(Duration::from_millis(50), listener.changed()).await;
        assert!(waiting.is_err(), "SQLite announces nothing: the timer beside it must see the change");
    }
}

async fn writers_at_once_leave_no_gap(database: Database) {
    let stores = [database.store().await, database.store().await];
    let mut writers = tokio::task::JoinSet::new();
    for n in 0..20 {
        let store = stores[n % 2].clone();
        writers.spawn(async move {
            let spec = UserSpec { name: format!("user-{n}"), ..UserSpec::default() };
            store.create_user(&spec, "test").await.unwrap();
        });
    }
    let (mut seen, mut seq) = (0, 0);
    while seen < 20 {
        let changes = stores[0].changes_since(seq).await.unwrap();
        assert_eq!(i64::try_from(changes.users.len()).unwrap(), changes.seq - seq, "one user per number");
        seen += changes.users.len();
        seq = changes.seq;
    }
    while let Some(done) = writers.join_next().await {
        done.unwrap();
    }
    assert_eq!(seq, 20);
}

async fn every_change_leaves_a_row_in_the_admin_log(database: Database) {
    let store = database.store().await;
    let user = store.create_user(&alice(), "cli:root").await.unwrap();
    let spec = KeySpec { name: "ci".into(), model_limits: model_limits(), ..KeySpec::default() };
    let key = store.create_key(user.id, &spec, &api_key(1), "cli:root").await.unwrap();
    store.rotate_key(key.id, &api_key(2), "cli:root").await.unwrap();
    store.revoke_key(key.id, "cli:root").await.unwrap();
    store.create_upstream(&openai(), "cli:root").await.unwrap();
    store.create_user(&alice(), "cli:root").await.unwrap_err();
    let log = store.admin_log(10).await.unwrap();
    let actions: Vec<_> = log.iter().map(|row| row.action.as_str()).collect();
    assert_eq!(actions, ["upstream.add", "key.revoke", "key.rotate", "key.create", "user.create"]);
    assert!(log.iter().all(|row| row.actor == "cli:root"));
    let detail = |row: &AdminLogRow| -> serde_json::Value { serde_json::from_str(&row.detail).unwrap() };
    assert_eq!(detail(&log[3])["model_limits"][1], json!({"model": "gpt-4o", "limits": {"tpm": 9}}));
    assert_eq!(detail(&log[4])["limits"]["monthly_nano_usd"], 12_500_000_000_u64);
    for row in &log {
        for secret in [api_key(1).expose(), api_key(2).expose(), "gAAAA"] {
            assert!(!row.detail.contains(secret), "{}", row.detail);
        }
    }
}

fn price(input: u64) -> Price {
    Price { batch: Some(Rates::flat(input / 2, 1)), ..Price::of(Rates::flat(input, 3)) }
}

async fn prices_are_kept_corrected_and_announced(database: Database) {
    let store = database.store().await;
    let new = |model: &str, from: &str, input| NewPrice {
        model: model.into(),
        effective_from: at(from),
        price: price(input),
    };
    let first = [
        new("b", "2026-12-01T00:00:00.123456Z", 4),
        new("a", "2026-12-01T00:00:00Z", 2),
        new("b", "2027-01-01T00:00:00Z", 6),
    ];
    store.import_prices(&first, "cli:me").await.unwrap();
    let listed = async || -> Vec<(String, DateTime<Utc>, Price)> {
        let prices = store.prices().await.unwrap();
        prices.into_iter().map(|price| (price.model, price.effective_from, price.price)).collect()
    };
    let row = |new: &NewPrice| (new.model.clone(), new.effective_from, new.price);
    assert_eq!(listed().await, [row(&first[1]), row(&first[0]), row(&first[2])]);
    let changes = store.changes_since(0).await.unwrap();
    assert_eq!((changes.prices.len(), changes.is_empty()), (3, false));

    let corrected = new("b", "2026-12-01T00:00:00.123456Z", 8);
    store.import_prices(std::slice::from_ref(&corrected), "cli:me").await.unwrap();
    assert_eq!(listed().await, [row(&first[1]), row(&corrected), row(&first[2])]);
    let changes = store.changes_since(changes.seq).await.unwrap();
    assert_eq!(changes.prices.iter().map(|price| price.price).collect::<Vec<_>>(), [price(8)], "only what changed");
    assert!(!changes.complete && store.changes_since(changes.seq).await.unwrap().is_empty());
    let log = store.admin_log(9).await.unwrap();
    assert_eq!(log.iter().map(|row| (&*row.action, &*row.actor)).collect::<Vec<_>>(), [("prices.import", "cli:me"); 2]);
    assert!(log[0].detail.contains(r#""model":"b""#), "{}", log[0].detail);
}
