//! What the journal costs a request, and how fast it is emptied into the databases: `cargo bench --bench journal`.
//!
//! **Entries**: CPU time per request, for both of its entries together, on the thread of the request and of the whole process
//! (the keeper's share and the reading included, but no database). At once: the end comes before the beginning is
//! written, as most do. Late: twenty thousand requests are always open, for longer than beginnings wait, so each writes
//! both entries.
//!
//! **Writer**: rows per second from a journal that is full of them, with SQLite and with a PostgreSQL of our own, 1000 at a
//! time as if it kept up, and as it catches up. Part of it is reading the journal.

use std::{
    collections::VecDeque,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use arc_swap::ArcSwap;
use chrono::Utc;
use prometheus::IntCounter;
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::Notify;
use tollgate::{
    content::{self, Contents},
    jobs::usage_writer::UsageWriter,
    journal::{Fsync, Journal, OnFull, Options},
    limiter::{self, Limiter, gate::Gate},
    metrics::Metrics,
    peers::Peers,
    shared::{KeyDirectory, Notices, Requests, Settings, Shared, View},
    store::Store,
};
use tollgate_core::{
    content::ContentMode,
    id::{KeyId, UserId},
    journal::entry::{Begin, End},
    limit::policy::Policy,
    retry::{Budget, Rules},
    secret::Secret,
    snapshot::Snapshot,
    usage::{Attempt, Usage, UsageRecord, attempts_json},
};
use uuid::Uuid;

#[path = "../tests/gateway/support"]
#[expect(dead_code, clippy::unwrap_used, reason = "it is made for tests, which need more of a server and may panic")]
mod support {
    pub mod postgres;
    pub mod process;
}

const REQUESTS: u32 = 400_000;
const ROWS: u32 = 100_000;
/// Requests that are open at a time, where they are open for long.
const OPEN: usize = 20_000;

fn main() -> anyhow::Result<()> {
    if !std::env::args().any(|argument| argument == "--bench") {
        println!("measures only under `cargo bench`");
        return Ok(());
    }
    for (name, fsync) in [("never synced", Fsync::Never), ("synced every second", Fsync::Every(Duration::from_secs(1)))]
    {
        for (when, open) in [("at once", 0), ("late", OPEN)] {
            let (own, all) = entries(fsync, open)?;
            println!("entries, {name}, ended {when}: {own:.2} us of the request's thread, {all:.2} us of the process");
        }
    }
    let directory = tempfile::tempdir()?;
    let sqlite = format!("sqlite://{}/tollgate.db", directory.path().display());
    for (name, url) in [("SQLite", sqlite), ("PostgreSQL", support::postgres::database())] {
        for (how, batch) in [("1000 at a time", 1000), ("catching up", 8000)] {
            let rate = runtime()?.block_on(writer(&url, batch))?;
            println!("writer, {name}, {how}: {rate:.0} rows/s");
        }
    }
    Ok(())
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// Microseconds of CPU per request: of its thread, and of the process.
fn entries(fsync: Fsync, open: usize) -> anyhow::Result<(f64, f64)> {
    let directory = tempfile::tempdir()?;
    let journal = journal(directory.path(), fsync, &limiter()?)?;
    let kept = journal.clone();
    // It ends with the process.
    std::thread::spawn(move || runtime().map(|runtime| runtime.block_on(kept.keep())));
    let mut under_way = VecDeque::new();
    let attempts = attempts();
    let round = |under_way: &mut VecDeque<_>, n: u32| {
        let id = Uuid::from_u128(n.into());
        under_way.push_back((id, journal.begin(&begin(id))));
        if under_way.len() > open
            && let Some((id, begun)) = under_way.pop_front()
        {
            journal.end(begun, end(id, &attempts), None);
        }
        if n.is_multiple_of(10_000) {
            let batch = journal.read(10_000, true);
            journal.booked(batch);
        }
    };
    (0..REQUESTS / 4).for_each(|n| round(&mut under_way, n));
    let began = (cpu(ClockId::ThreadCPUTime), cpu(ClockId::ProcessCPUTime));
    (0..REQUESTS).for_each(|n| round(&mut under_way, n));
    let us = |clock, began: Duration| (cpu(clock) - began).as_secs_f64() * 1e6 / f64::from(REQUESTS);
    Ok((us(ClockId::ThreadCPUTime, began.0), us(ClockId::ProcessCPUTime, began.1)))
}

fn cpu(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    Duration::new(time.tv_sec.cast_unsigned(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Rows per second.
async fn writer(url: &str, batch: usize) -> anyhow::Result<f64> {
    let directory = tempfile::tempdir()?;
    let limiter = limiter()?;
    let journal = journal(directory.path(), Fsync::Never, &limiter)?;
    let attempts = attempts();
    (0..ROWS).for_each(|_| journal.end(None, end(Uuid::now_v7(), &attempts), None));
    let shared = shared(journal, limiter)?;
    let writer = UsageWriter::new(Arc::clone(&shared), Secret::new(url.to_owned()), Duration::from_millis(1), batch);
    let store = Store::open(url).await?;
    store.migrate().await?;
    let began = Instant::now();
    while shared.journal.pending() > 0 {
        writer.step_of(&store, batch, true).await?;
    }
    let rate = f64::from(ROWS) / began.elapsed().as_secs_f64();
    store.close().await;
    Ok(rate)
}

fn journal(directory: &Path, fsync: Fsync, limiter: &Limiter) -> anyhow::Result<Journal> {
    let counter = || IntCounter::new("counter", "A counter").context("a valid name");
    Journal::open(Options {
        directory: directory.join("journal"),
        max_bytes: 1 << 30,
        on_full: OnFull::Refuse,
        fsync,
        batch: 1000,
        limiter: limiter.clone(),
        lost: counter()?,
        damaged: counter()?,
    })
}

fn limiter() -> anyhow::Result<Limiter> {
    Limiter::try_new(limiter::Options {
        policy: Policy::default(),
        assumed_output_tokens: 512,
        redis: None,
        refuses_without_redis: false,
    })
}

fn shared(journal: Journal, limiter: Limiter) -> anyhow::Result<Arc<Shared>> {
    let empty = View {
        snapshot: Snapshot::new(0, Vec::new(), Default::default(), Default::default(), Default::default()),
        peers: Peers::new(Vec::new()),
    };
    Ok(Arc::new(Shared {
        view: ArcSwap::from_pointee(empty),
        keys: KeyDirectory::default(),
        journal,
        contents: Contents::new(content::Options {
            mode: ContentMode::None,
            max_content_bytes: 0,
            buffer_bytes: 0,
            dropped: IntCounter::new("dropped", "none is kept")?,
        }),
        gate: Gate::new(0, 0),
        limiter,
        metrics: Metrics::try_new()?,
        settings: Settings {
            max_body_bytes: 1,
            max_attempts: 1,
            wait: Duration::ZERO,
            deadline: None,
            trusted_proxies: Vec::new(),
            client_timeout: Duration::from_secs(1),
        },
        in_flight: Requests::default(),
        retry_budget: Budget::new(Rules::default()),
        upstream_changed: Notify::new(),
        notices: Notices::default(),
        started: Instant::now(),
    }))
}

fn attempts() -> String {
    attempts_json(&[Attempt { upstream: "openai-1".into(), status: 200, duration_ms: 742, error: None }], None)
}

fn begin(request_id: Uuid) -> Begin<'static> {
    Begin {
        request_id,
        started_at: Utc::now(),
        user_id: UserId(1),
        key_id: KeyId(1),
        ip: Some("10.1.2.3".parse().expect("an address")),
        route: "chat_completions",
        model: "gpt-4o",
        stream: false,
        prompt_tokens: 100,
        output_tokens: 500,
        cost_nano_usd: 1_000,
    }
}

/// The end of a usual request: of one of a hundred keys, to one of four models.
fn end(request_id: Uuid, attempts: &str) -> End<'_> {
    let number = i64::from(request_id.as_bytes()[15]);
    let model = ["gpt-4o", "gpt-4o-mini", "o3", "text-embedding-3-small"][usize::from(request_id.as_bytes()[14] % 4)];
    let record = UsageRecord {
        key_id: KeyId(number % 100),
        user_id: UserId(number % 20),
        model: model.into(),
        upstream_model: Some(model.into()),
        upstream: Some("openai-1".into()),
        attempts: attempts.into(),
        status: 200,
        code: None,
        usage: Usage { prompt_tokens: 112, completion_tokens: 208, cached_tokens: 64, ..Usage::default() },
        estimated: false,
        interrupted: false,
        ttft_ms: Some(741),
        duration_ms: 2_310,
        overhead_us: 48,
        finish_reason: Some("stop".into()),
        user_agent: Some("OpenAI/Python 1.99.0".into()),
        client_request_id: None,
        provider_request_id: Some("req_8a7f3c5be0d94f2ab1c6d7e8f9a0b1c2".into()),
        ..begin(request_id).interrupted()
    };
    End { record, is_uncounted: false, hold: None }
}
