//! The store's conformance suite: every test runs against SQLite and against PostgreSQL.

use std::{path::Path, sync::Arc, time::Duration};

use chrono::{DateTime, NaiveDate, Utc};
use serde_json::json;
use tollgate::store::{
    AdminLogRow, AuditFilter, Bookmark, ContentRow, GroupBy, KeySpec, NewPrice, Store, StoreError, UpstreamSpec,
    UsageQuery, UserSpec,
};
use tollgate_core::{
    content::ContentMode,
    id::{KeyId, UserId},
    key::{ApiKey, IpNet},
    limit::{Amount, Limits, MAX_LIMIT, ModelLimits, Month},
    price::{Price, Rates},
    upstream::{BaseUrl, ModelEntry, Overrides, UpstreamKind},
    usage::{Attempt, BookedAddress, Usage, UsageRecord, attempts_json},
};
use uuid::Uuid;

use crate::support::{gateway::PATIENCE, postgres};

/// A database that goes with the test.
pub(crate) struct Database {
    pub(crate) url: String,
    _directory: Option<tempfile::TempDir>,
}

impl Database {
    pub(crate) fn sqlite() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}/made/tollgate.db", directory.path().display());
        Self { url, _directory: Some(directory) }
    }

    pub(crate) fn postgres() -> Self {
        Self { url: postgres::database(), _directory: None }
    }

    /// Another handle, as another process would have it.
    pub(crate) async fn store(&self) -> Store {
        let store = Store::open(&self.url).await.unwrap();
        store.migrate().await.unwrap();
        store
    }
}

macro_rules! on_both_databases {
    ($($name:ident,)+) => {
        mod sqlite {
            $(#[tokio::test] async fn $name() { super::$name(crate::store::Database::sqlite()).await; })+
        }
        mod postgresql {
            $(#[tokio::test] async fn $name() { super::$name(crate::store::Database::postgres()).await; })+
        }
    };
}
pub(crate) use on_both_databases;

on_both_databases! {
    migrating_twice_and_at_once_is_harmless,
    what_an_earlier_version_wrote_is_kept,
    an_empty_database_says_how_to_make_its_tables,
    users_keep_what_was_said_about_them,
    names_are_unique_and_checked,
    keys_keep_what_was_said_about_them,
    limits_of_models_are_checked,
    a_key_is_found_by_id_name_and_owner,
    upstreams_keep_what_was_said_and_only_ciphertext,
    a_gateway_sees_what_changed_and_nothing_else,
    a_gateway_that_has_seen_more_than_there_is_starts_over,
    changes_are_announced,
    writers_at_once_leave_no_gap,
    every_change_leaves_a_row_in_the_admin_log,
    usage_is_counted_once,
    addresses_are_counted_once_and_only_if_asked_for,
    batches_at_once_are_counted_once,
    no_record_can_block_a_batch,
    sums_stop_at_the_largest_number,
    usage_is_reported_by_everything,
    the_log_is_read_newest_first_in_pages,
    the_log_is_filtered,
    the_log_is_followed_as_it_grows,
    prices_are_kept_corrected_and_announced,
    sums_are_what_the_log_says_across_the_end_of_a_month,
    usage_is_filtered_and_grouped_by_several_things,
    facts_are_recorded_once,
    a_ciphertext_is_replaced_unless_it_changed,
    content_is_kept_once_and_found_by_its_request,
    content_is_sealed_anew_page_by_page,
    only_ciphertext_is_taken_for_content,
}

async fn migrating_twice_and_at_once_is_harmless(database: Database) {
    let opened = [Store::open(&database.url).await.unwrap(), Store::open(&database.url).await.unwrap()];
    let (a, b) = tokio::join!(opened[0].migrate(), opened[1].migrate());
    a.unwrap();
    b.unwrap();
    opened[0].migrate().await.unwrap();
    assert_eq!(opened[0].users().await.unwrap(), vec![]);
}

/// Makes only the first tables, with one key and one request in them.
macro_rules! make_first_tables {
    ($pool:ty, $migrations:literal, $url:expr) => {{
        let pool = <$pool>::connect($url).await.unwrap();
        let mut migrations = sqlx::migrate!($migrations);
        migrations.migrations.to_mut().retain(|migration| migration.version == 1);
        migrations.run(&pool).await.unwrap();
        let user = "INSERT INTO users (name, created_at, changed_seq) VALUES ('alice', $1, 0)";
        sqlx::query(user).bind(Utc::now()).execute(&pool).await.unwrap();
        let key =
            "INSERT INTO api_keys (user_id, name, key_hash, prefix, models, allow_ip, rpm, created_at, changed_seq)
                   VALUES (1, 'ci', $1, 'tg-', '[]', '[]', 7, $2, 0)";
        sqlx::query(key).bind(&[7_u8; 32][..]).bind(Utc::now()).execute(&pool).await.unwrap();
        let row =
            "INSERT INTO request_log (request_id, started_at, user_id, key_id, route, model, attempts, status, stream,
                prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens, audio_tokens, estimated, interrupted,
                cost_nano_usd, duration_ms, overhead_us)
            VALUES ('00000000-0000-0000-0000-000000000001', $1, 1, 1, 'r', 'm', '[]', 200, false, 3, 2, 1, 0, 0, false,
                false, 9, 1, 1)";
        sqlx::query(row).bind(Utc::now()).execute(&pool).await.unwrap();
        pool.close().await;
    }};
}

async fn what_an_earlier_version_wrote_is_kept(database: Database) {
    if let Some(file) = database.url.strip_prefix("sqlite://") {
        std::fs::create_dir_all(Path::new(file).parent().unwrap()).unwrap();
        make_first_tables!(sqlx::SqlitePool, "migrations/sqlite", &format!("{}?mode=rwc", database.url));
    } else {
        make_first_tables!(sqlx::PgPool, "migrations/postgres", &database.url);
    }
    let store = database.store().await;
    let key = store.find_key("alice/ci").await.unwrap();
    let limits = Limits { rpm: Some(7), ..Limits::default() };
    assert_eq!(key.spec, KeySpec { name: "ci".into(), limits, ..KeySpec::default() });
    let filter =
        AuditFilter { booked_until: Some(store.bookmark().await.unwrap()), limit: 9, ..AuditFilter::default() };
    let row = store.audit(&filter).await.unwrap().remove(0);
    assert_eq!((row.prompt_tokens, row.cost_nano_usd, row.image_tokens, row.cache_write_tokens), (3, 9, 0, 0));
    assert_eq!((row.served_model, row.service_tier), (None, None));
}

async fn an_empty_database_says_how_to_make_its_tables(database: Database) {
    let store = Store::open(&database.url).await.unwrap();
    let error = store.users().await.unwrap_err();
    assert!(matches!(error, StoreError::NotInitialised(_)), "{error:?}");
    assert!(error.to_string().contains("tollgate init"), "{error}");
}

fn alice() -> UserSpec {
    UserSpec {
        name: "alice".into(),
        disabled: false,
        limits: Limits {
            rpm: Some(60),
            tpm: Some(u64::MAX),
            concurrency: None,
            monthly_tokens: Some(1_000_000),
            monthly_nano_usd: Some(12_500_000_000),
        },
        audit_content: Some(ContentMode::Redacted),
    }
}

async fn users_keep_what_was_said_about_them(database: Database) {
    let store = database.store().await;
    let user = store.create_user(&alice(), "test").await.unwrap();
    // A number too large for the column becomes the largest that fits.
    let stored = UserSpec { limits: Limits { tpm: Some(i64::MAX as u64), ..alice().limits }, ..alice() };
    assert_eq!(user.spec, stored);
    assert!((Utc::now() - user.created_at).num_seconds() < 60);
    assert_eq!(store.find_user("alice").await.unwrap(), user);
    assert_eq!(store.find_user(&user.id.to_string()).await.unwrap(), user);
    assert_eq!(store.users().await.unwrap().as_slice(), std::slice::from_ref(&user));

    let changed = store
        .update_user(user.id, "test", |spec| {
            spec.disabled = true;
            spec.limits.tpm = None;
            spec.limits.monthly_nano_usd = Some(0);
            spec.audit_content = None;
        })
        .await
        .unwrap();
    let limits = Limits { tpm: None, monthly_nano_usd: Some(0), ..stored.limits };
    assert_eq!(changed.spec, UserSpec { disabled: true, limits, audit_content: None, ..stored });
    assert_eq!((user.to_user().audit_content, changed.to_user().audit_content), (Some(ContentMode::Redacted), None));
    assert_eq!(changed.to_user().limits, limits);
    let again = store.update_user(user.id, "test", |spec| spec.disabled = true).await.unwrap();
    assert_eq!(again.disabled_at, changed.disabled_at, "disabling again keeps the time");
    assert_eq!(store.find_user("alice").await.unwrap(), again);
    assert!(again.to_user().disabled);
    assert_eq!(store.update_user(user.id, "test", |spec| spec.disabled = false).await.unwrap().disabled_at, None);
}

async fn names_are_unique_and_checked(database: Database) {
    let store = database.store().await;
    let user = store.create_user(&alice(), "test").await.unwrap();
    let bob = store.create_user(&UserSpec { name: "bob".into(), ..alice() }, "test").await.unwrap();
    let text = |error: StoreError| {
        assert!(error.is_client_error(), "{error:?}");
        error.to_string()
    };
    let taken = "a user named \"alice\" exists already";
    assert_eq!(text(store.create_user(&alice(), "test").await.unwrap_err()), taken);
    assert_eq!(text(store.update_user(bob.id, "test", |b| b.name = "alice".into()).await.unwrap_err()), taken);
    assert!(text(store.find_user("carol").await.unwrap_err()).contains("tollgate user list"));
    assert!(text(store.update_user(UserId(99), "test", |_| {}).await.unwrap_err()).contains("99"));
    assert!(
        text(store.create_user(&UserSpec { name: "42".into(), ..alice() }, "test").await.unwrap_err()).contains("id")
    );

    let spec = KeySpec { name: "ci".into(), ..KeySpec::default() };
    let key = store.create_key(user.id, &spec, &api_key(1), "test").await.unwrap();
    assert!(text(store.create_key(user.id, &spec, &api_key(2), "test").await.unwrap_err()).contains("\"ci\" already"));
    store.revoke_key(key.id, "test").await.unwrap();
    store.create_key(user.id, &spec, &api_key(2), "test").await.expect("a revoked key gives its name free");
    store.create_upstream(&openai(), "test").await.unwrap();
    assert_eq!(
        text(store.create_upstream(&openai(), "test").await.unwrap_err()),
        "an upstream named \"main\" exists already"
    );
    assert_eq!(store.users().await.unwrap().len(), 2, "a refused change leaves nothing");
}

fn api_key(n: u8) -> ApiKey {
    ApiKey::from_random(&[n; 32])
}

fn model_limits() -> Vec<ModelLimits> {
    ["o3*=rpm:1,tpm:0,concurrency:2,monthly-tokens:3,monthly-usd:1000000", "gpt-4o=tpm:9"]
        .map(|text| text.parse().unwrap())
        .to_vec()
}

async fn keys_keep_what_was_said_about_them(database: Database) {
    let store = database.store().await;
    let user = store.create_user(&alice(), "test").await.unwrap();
    let spec = KeySpec {
        name: "ci".into(),
        models: vec!["gpt-4o".into(), "o3*".into()],
        allow_ip: vec![IpNet::parse("10.0.0.0/8").unwrap(), IpNet::parse("::1").unwrap()],
        limits: Limits {
            rpm: Some(1),
            tpm: None,
            concurrency: Some(u32::MAX),
            monthly_tokens: Some(7),
            monthly_nano_usd: Some(MAX_LIMIT),
        },
        model_limits: model_limits(),
        audit_content: Some(ContentMode::Hash),
        expires_at: Some("2030-01-02T03:04:05.678901Z".parse().unwrap()),
    };
    let key = store.create_key(user.id, &spec, &api_key(1), "test").await.unwrap();
    assert_eq!((&key.spec, key.user_name.as_str(), key.prefix.as_str()), (&spec, "alice", api_key(1).prefix()));
    assert_eq!(key.hash, api_key(1).hash());
    assert_eq!(store.find_key("ci").await.unwrap(), key);

    let entry = key.to_entry(Arc::new(user.to_user()));
    assert_eq!((entry.model_limits, entry.audit_content), (model_limits(), Some(ContentMode::Hash)));

    let edit = |spec: &mut KeySpec| {
        spec.models = vec![];
        spec.model_limits.truncate(1);
        spec.limits.monthly_nano_usd = None;
        spec.audit_content = Some(ContentMode::None);
    };
    let changed = store.update_key(key.id, "test", edit).await.unwrap();
    let limits = Limits { monthly_nano_usd: None, ..spec.limits };
    let model_limits = model_limits()[..1].to_vec();
    let audit_content = Some(ContentMode::None);
    assert_eq!(changed.spec, KeySpec { models: vec![], limits, model_limits, audit_content, ..spec });
    assert_eq!(store.find_key("ci").await.unwrap(), changed);
    let rotated = store.rotate_key(key.id, &api_key(9), "test").await.unwrap();
    assert_eq!((rotated.id, rotated.hash), (key.id, api_key(9).hash()));
    assert_eq!(rotated.prefix, api_key(9).prefix());

    store.revoke_key(key.id, "test").await.unwrap();
    let revoked = store.find_key("ci").await.unwrap();
    assert!(revoked.revoked_at.is_some());
    store.revoke_key(key.id, "test").await.unwrap();
    assert_eq!(store.find_key("ci").await.unwrap(), revoked, "revoking again keeps the time");
    let error = store.rotate_key(key.id, &api_key(3), "test").await.unwrap_err();
    assert!(error.to_string().contains("revoked"), "{error}");
}

async fn limits_of_models_are_checked(database: Database) {
    let store = database.store().await;
    let user = store.create_user(&alice(), "test").await.unwrap();
    let entry = |model: &str| ModelLimits { model: model.into(), limits: Limits::default() };
    let with = |model_limits| KeySpec { name: "ci".into(), model_limits, ..KeySpec::default() };
    let key = store.create_key(user.id, &with(model_limits()), &api_key(1), "test").await.unwrap();
    for (bad, says) in [
        (vec![entry("gpt-4o"), entry("o3"), entry("gpt-4o")], "\"gpt-4o\" is limited twice"),
        (vec![entry("")], "\"\" is not a model"),
        (vec![entry("a=b")], "\"a=b\" is not a model"),
    ] {
        let created = store.create_key(user.id, &with(bad.clone()), &api_key(2), "test").await.unwrap_err();
        let updated = store.update_key(key.id, "test", |spec| spec.model_limits = bad).await.unwrap_err();
        for error in [created, updated] {
            assert!(matches!(error, StoreError::Invalid(_)) && error.to_string().contains(says), "{error:?}");
        }
    }
    assert_eq!(store.keys(None).await.unwrap(), [key], "a refused change leaves nothing");
}

async fn a_key_is_found_by_id_name_and_owner(database: Database) {
    let store = database.store().await;
    let spec = KeySpec { name: "ci".into(), ..KeySpec::default() };
    let alice = store.create_user(&alice(), "test").await.unwrap();
    let bob = store.create_user(&UserSpec { name: "bob".into(), ..UserSpec::default() }, "test").await.unwrap();
    let first = store.create_key(alice.id, &spec, &api_key(1), "test").await.unwrap();
    let second = store.create_key(bob.id, &spec, &api_key(2), "test").await.unwrap();
    let error = store.find_key("ci").await.unwrap_err().to_string();
    assert!(error.contains("alice/ci") && error.contains("bob/ci"), "{error}");
    assert_eq!(store.find_key("bob/ci").await.unwrap(), second);
    assert_eq!(store.find_key(&first.id.to_string()).await.unwrap(), first);
    assert_eq!(store.keys(Some(alice.id)).await.unwrap().as_slice(), std::slice::from_ref(&first));
    assert_eq!(store.keys(None).await.unwrap(), [first.clone(), second.clone()]);
    store.revoke_key(second.id, "test").await.unwrap();
    assert_eq!(store.find_key("ci").await.unwrap(), first, "the live key is meant");
    assert!(store.find_key("carol/ci").await.unwrap_err().to_string().contains("tollgate key list"));
}

fn openai() -> UpstreamSpec {
    UpstreamSpec {
        name: "main".into(),
        kind: UpstreamKind::OpenAi,
        base_url: BaseUrl::parse("https://api.openai.com/v1").unwrap(),
        credential: "gAAAAAB-ciphertext".into(),
        models: vec![ModelEntry::parse("gpt-4o=prod").unwrap(), ModelEntry::parse("o3*").unwrap()],
        weight: 3,
        priority: 1,
        api_version: None,
        overrides: Overrides { chunk_timeout_ms: Some(7_000), rpm: Some(60), ..Overrides::default() },
        disabled: false,
    }
}

async fn upstreams_keep_what_was_said_and_only_ciphertext(database: Database) {
    let store = database.store().await;
    let upstream = store.create_upstream(&openai(), "test").await.unwrap();
    assert_eq!(upstream.spec, openai());
    assert_eq!(store.find_upstream("main").await.unwrap(), upstream);
    let plain = UpstreamSpec { name: "other".into(), credential: "sk-plain".into(), ..openai() };
    let error = store.create_upstream(&plain, "test").await.unwrap_err();
    assert!(matches!(error, StoreError::Database(_)), "{error:?}");

    let changed = store
        .update_upstream(upstream.id, "test", |spec| {
            spec.kind = UpstreamKind::Azure;
            spec.api_version = Some("2024-10-21".into());
            spec.disabled = true;
        })
        .await
        .unwrap();
    assert_eq!(store.upstreams().await.unwrap(), [changed]);
    store.remove_upstream(upstream.id, "test").await.unwrap();
    assert_eq!(store.upstreams().await.unwrap(), []);
    assert!(store.find_upstream("main").await.unwrap_err().to_string().contains("tollgate upstream list"));
    store.create_upstream(&openai(), "test").await.expect("a removed upstream gives its name free");
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

fn at(time: &str) -> DateTime<Utc> {
    time.parse().unwrap()
}

fn attempt() -> Attempt {
    Attempt { upstream: "main".into(), status: 200, duration_ms: 5, error: None }
}

/// Writes a batch, and says how many of it were new.
pub(crate) async fn write(store: &Store, records: &[UsageRecord<'_>]) -> usize {
    let is_new = store.write_usage(records).await.unwrap();
    assert_eq!(is_new.len(), records.len());
    is_new.into_iter().filter(|is_new| *is_new).count()
}

pub(crate) fn record(n: u128, started_at: &str) -> UsageRecord<'static> {
    UsageRecord {
        request_id: Uuid::from_u128(n),
        started_at: at(started_at),
        user_id: UserId(1),
        key_id: KeyId(1),
        ip: Some("10.1.2.3".parse().unwrap()),
        route: "chat_completions".into(),
        model: "gpt-4o".into(),
        upstream_model: Some("prod".into()),
        served_model: Some("gpt-4o-2024-08-06".into()),
        upstream: Some("main".into()),
        attempts: attempts_json(&[attempt()], None).into(),
        status: 200,
        stream: true,
        code: None,
        service_tier: Some("default".into()),
        usage: Usage {
            prompt_tokens: 10,
            completion_tokens: 5,
            cached_tokens: 4,
            cache_write_tokens: 3,
            reasoning_tokens: 2,
            audio_tokens: 5,
            output_audio_tokens: 1,
            image_tokens: 7,
            output_image_tokens: 2,
        },
        estimated: false,
        interrupted: true,
        cost_nano_usd: 1_000,
        ttft_ms: Some(7),
        duration_ms: 20,
        overhead_us: 300,
        finish_reason: Some("stop".into()),
        user_agent: Some("test/1".into()),
        client_request_id: Some("mine".into()),
        provider_request_id: Some("req_1".into()),
    }
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

async fn a_ciphertext_is_replaced_unless_it_changed(database: Database) {
    let store = database.store().await;
    let spec = |name: &str| UpstreamSpec {
        name: name.into(),
        kind: UpstreamKind::OpenAi,
        base_url: BaseUrl::parse("https://a.example/v1").unwrap(),
        credential: format!("gAAAA-old-{name}"),
        models: vec![],
        weight: 1,
        priority: 0,
        api_version: None,
        overrides: Overrides::default(),
        disabled: false,
    };
    let a = store.create_upstream(&spec("a"), "test").await.unwrap();
    let b = store.create_upstream(&spec("b"), "test").await.unwrap();
    let gone = store.create_upstream(&spec("gone"), "test").await.unwrap();
    let all = store.credentials().await.unwrap();
    assert_eq!(
        all.iter().map(|c| (c.id, c.ciphertext.as_str())).collect::<Vec<_>>()[..2],
        [(a.id, "gAAAA-old-a"), (b.id, "gAAAA-old-b")]
    );
    store.remove_upstream(gone.id, "test").await.unwrap();
    store.update_upstream(b.id, "test", |spec| spec.credential = "gAAAA-renewed".into()).await.unwrap();
    let seq = store.changes_since(0).await.unwrap().seq;

    assert!(store.replace_ciphertext(&all[0], "gAAAA-new-a", "cli:me").await.unwrap());
    assert!(!store.replace_ciphertext(&all[1], "gAAAA-new-b", "cli:me").await.unwrap(), "it was renewed meanwhile");
    assert!(!store.replace_ciphertext(&all[2], "gAAAA-new-gone", "cli:me").await.unwrap(), "it was removed meanwhile");
    let now = store.credentials().await.unwrap();
    assert_eq!(now.iter().map(|c| c.ciphertext.as_str()).collect::<Vec<_>>(), ["gAAAA-new-a", "gAAAA-renewed"]);
    assert!(
        store.changes_since(seq).await.unwrap().is_empty(),
        "it is the same credential: nothing to tell the gateways"
    );
    let log = store.admin_log(1).await.unwrap().remove(0);
    let logged = (log.action.as_str(), log.actor.as_str(), log.subject_id, log.detail.as_str());
    assert_eq!(logged, ("upstream.rotate_credential", "cli:me", Some(a.id.0), r#"{"name":"a"}"#));

    store.meta_or_insert("fact", "old").await.unwrap();
    store.replace_meta("fact", "another", "new").await.unwrap();
    assert_eq!(store.meta("fact").await.unwrap().as_deref(), Some("old"));
    store.replace_meta("fact", "old", "new").await.unwrap();
    assert_eq!(store.meta("fact").await.unwrap().as_deref(), Some("new"));
}

/// An id of a request that began at `time`, as the gateway makes them.
fn id_at(time: &str, n: u8) -> Uuid {
    let ms = u64::try_from(at(time).timestamp_millis()).unwrap();
    uuid::Builder::from_unix_timestamp_millis(ms, &[n; 10]).into_uuid()
}

fn content(n: u8, time: &str, mode: ContentMode) -> ContentRow {
    ContentRow {
        request_id: id_at(time, n),
        started_at: at(time),
        mode,
        prompt_hash: [n % 2; 32],
        sealed: mode.keeps_bodies().then(|| vec![0x80, n, 0, 0xff]),
        request_bytes: u64::from(n) + 1,
        answer_bytes: u64::MAX,
        truncated: n.is_multiple_of(2),
    }
}

async fn content_is_kept_once_and_found_by_its_request(database: Database) {
    let store = database.store().await;
    let modes = [ContentMode::Hash, ContentMode::Redacted, ContentMode::Full];
    let rows: Vec<_> = (0..3).zip(modes).map(|(n, mode)| content(n, "2026-11-23T10:00:00.123456Z", mode)).collect();
    store.write_contents(&rows).await.unwrap();
    let again: Vec<_> = rows.iter().map(|row| ContentRow { request_bytes: 99, ..row.clone() }).collect();
    store.write_contents(&again).await.unwrap();
    store.write_contents(&[]).await.unwrap();
    for row in &rows {
        let stored = ContentRow { answer_bytes: i64::MAX as u64, ..row.clone() };
        assert_eq!(store.find_content(row.request_id).await.unwrap(), Some(stored));
    }
    assert_eq!(store.find_content(id_at("2026-11-23T10:00:00Z", 9)).await.unwrap(), None);
    let error = store.find_content(Uuid::from_u128(7)).await.unwrap_err();
    assert!(error.to_string().contains("is no id of a request: `tollgate audit` shows them"), "{error}");
    let same: Vec<String> = [2, 0].map(|n| rows[n].request_id.hyphenated().to_string()).into();
    let mut found = store.requests_of_prompt(&[0; 32], 9).await.unwrap();
    found.sort_by(|a, b| b.cmp(a));
    assert_eq!(found, same);
    assert_eq!(store.requests_of_prompt(&[0; 32], 1).await.unwrap().len(), 1);

    let logged = UsageRecord { request_id: rows[0].request_id, ..record(1, "2026-11-23T10:00:00.123456Z") };
    write(&store, &[logged]).await;
    let row = store.find_request(rows[0].request_id).await.unwrap();
    assert_eq!(row.request_id, rows[0].request_id.hyphenated().to_string());
    let error = store.find_request(rows[1].request_id).await.unwrap_err().to_string();
    assert!(error.contains("ask again in a moment"), "{error}");
    store.note_content_read(rows[0].request_id, "cli:test").await.unwrap();
    let log = store.admin_log(1).await.unwrap().remove(0);
    assert_eq!((log.action.as_str(), log.actor.as_str(), log.subject_id), ("content.read", "cli:test", None));
    assert!(log.detail.contains(&rows[0].request_id.hyphenated().to_string()), "{}", log.detail);
}

async fn content_is_sealed_anew_page_by_page(database: Database) {
    let store = database.store().await;
    let mut rows: Vec<_> = (0..6).map(|n| content(n, "2026-11-23T10:00:00Z", ContentMode::Redacted)).collect();
    rows.push(content(6, "2026-11-23T10:00:01Z", ContentMode::Full));
    rows.push(content(7, "2026-11-23T10:00:01Z", ContentMode::Hash));
    store.write_contents(&rows).await.unwrap();
    let (mut seen, mut after) = (Vec::new(), None);
    loop {
        let page = store.contents_after(after.as_ref(), 2).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some((last.started_at, last.request_id.clone()));
        let anew: Vec<_> = page.iter().map(|old| (old.clone(), [&old.content[..], b"x"].concat())).collect();
        store.replace_contents(&anew).await.unwrap();
        seen.extend(page.into_iter().map(|old| old.content));
    }
    assert_eq!(seen, rows[..7].iter().map(|row| row.sealed.clone().unwrap()).collect::<Vec<_>>());
    for row in &rows {
        let now = store.find_content(row.request_id).await.unwrap().unwrap();
        assert_eq!(now.sealed, row.sealed.as_ref().map(|sealed| [&sealed[..], b"x"].concat()));
    }
}

async fn only_ciphertext_is_taken_for_content(database: Database) {
    let store = database.store().await;
    let row = |mode, sealed: Option<&[u8]>| ContentRow {
        sealed: sealed.map(<[u8]>::to_vec),
        ..content(1, "2026-11-23T10:00:00Z", mode)
    };
    for bad in [
        row(ContentMode::Full, Some(b"{\"messages\":[]}")),
        row(ContentMode::Full, None),
        row(ContentMode::Hash, Some(&[0x80])),
        row(ContentMode::None, None),
    ] {
        store.write_contents(std::slice::from_ref(&bad)).await.expect_err("it must be refused");
        assert_eq!(store.find_content(bad.request_id).await.unwrap(), None);
    }
}

async fn facts_are_recorded_once(database: Database) {
    let stores = [database.store().await, database.store().await];
    assert_eq!(stores[0].meta("fact").await.unwrap(), None);
    assert_eq!(stores[0].meta_or_insert("fact", "first").await.unwrap(), "first");
    assert_eq!(stores[1].meta_or_insert("fact", "second").await.unwrap(), "first");
}

#[tokio::test]
async fn urls_that_cannot_be_meant_name_the_setting() {
    for url in
        ["", "mysql://x", "sqlite://", "sqlite://:memory:", "sqlite://a?mode=ro", "postgres://h:notaport/x", "data.db"]
    {
        let error = Store::open(url).await.expect_err(url).to_string();
        assert!(error.starts_with("[store] url: "), "{url}: {error}");
    }
    let error = Store::open("sqlite:///proc/no/such/db").await.unwrap_err().to_string();
    assert!(error.contains("/proc/no/such"), "{error}");
}

#[tokio::test]
async fn the_files_of_sqlite_are_private() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let made = directory.path().join("made");
    let store = Store::open(&format!("sqlite://{}/tollgate.db", made.display())).await.unwrap();
    store.migrate().await.unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&made), 0o700);
    let files: Vec<_> = std::fs::read_dir(&made).unwrap().map(|file| file.unwrap().path()).collect();
    assert!(files.len() > 1, "the write-ahead log is there: {files:?}");
    assert!(files.iter().all(|file| mode(file) == 0o600), "{files:?}");
}

#[tokio::test]
async fn a_store_does_not_show_the_password() {
    let store = Store::open("postgres://me:hunter2@db.example/tollgate").await.unwrap();
    let shown = format!("{store:?} {store:#?}");
    assert!(!shown.contains("hunter2"), "{shown}");
}

#[tokio::test]
async fn a_database_that_is_not_there_is_told_without_its_password() {
    let store = Store::open("postgres://tollgate:hunter2@127.0.0.1:1/db").await.unwrap();
    let error = store.users().await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
    assert!(!format!("{error} {error:?}").contains("hunter2"));
}
