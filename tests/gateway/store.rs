//! The store's conformance suite: every test runs against SQLite and against PostgreSQL.

mod changes;
mod content;
mod log;
mod owners;
mod upstreams;
mod usage;

use std::path::Path;

use chrono::{DateTime, Utc};
use tollgate::store::{AuditFilter, KeySpec, Store, StoreError, UpstreamSpec, UserSpec};
use tollgate_core::{
    content::ContentMode,
    id::{KeyId, UserId},
    key::ApiKey,
    limit::{Limits, ModelLimits},
    upstream::{BaseUrl, ModelEntry, Overrides, UpstreamKind},
    usage::{Attempt, Usage, UsageRecord, attempts_json},
};
use uuid::Uuid;

use crate::support::postgres;

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
    facts_are_recorded_once,
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

fn api_key(n: u8) -> ApiKey {
    ApiKey::from_random(&[n; 32])
}

fn model_limits() -> Vec<ModelLimits> {
    ["o3*=rpm:1,tpm:0,concurrency:2,monthly-tokens:3,monthly-usd:1000000", "gpt-4o=tpm:9"]
        .map(|text| text.parse().unwrap())
        .to_vec()
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

fn at(time: &str) -> DateTime<Utc> {
    time.parse().unwrap()
}

fn attempt() -> Attempt {
    Attempt { upstream: "main".into(), status: 200, duration_ms: 5, error: None }
}

/// Writes a batch, and says how many of it were new.
pub(crate) async fn write(store: &Store, records: &[UsageRecord<'_>]) -> usize {
    let is_new = store.write_usage(records.to_vec()).await.unwrap();
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
