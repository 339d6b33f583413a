//! How long a listing of the request log takes when there is much of it: `cargo run --example growth -- [OPTIONS]`.
//!
//! It makes a database with so many rows, runs each kind of listing that `tollgate audit` can ask for, and prints how many rows
//! came, the median time, and how the database found them. A PostgreSQL of its own, with its default settings, is started where
//! none is named; PostgreSQL must be installed for that. Times are those of a warm cache, of a whole call: two questions
//! and their answers.
//!
//! ```text
//! --rows N         how many rows there are to be (1,000,000); 50 million are some 25 GB
//! --on DATABASE    sqlite, postgres, or the URL of a database; what is missing there is added, what is there stays
//! ```

#![expect(clippy::print_stdout, reason = "that is what it is for")]

use std::time::{Duration, Instant};

use anyhow::Context;
use chrono::{DateTime, TimeDelta, Utc};
use tollgate::store::{AuditFilter, Store};
use tollgate_core::{
    id::{KeyId, UserId},
    retention::Kept,
};

#[path = "../tests/gateway/support"]
#[expect(dead_code, clippy::unwrap_used, reason = "it is made for tests, which need more of a server and may panic")]
mod support {
    pub mod many;
    pub mod postgres;
    pub mod process;
}

/// Rows that are added by one statement.
const CHUNK: u64 = 1_000_000;
const RUNS: usize = 15;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let option = |name: &str| arguments.iter().position(|word| word == name).and_then(|at| arguments.get(at + 1));
    let rows: u64 = option("--rows").map_or(Ok(1_000_000), |rows| rows.parse()).context("--rows takes a number")?;
    anyhow::ensure!(rows >= 1_000, "--rows: at least 1000");
    let directory = tempfile::tempdir()?;
    let url = match option("--on").map_or("postgres", String::as_str) {
        "sqlite" => format!("sqlite://{}/tollgate.db", directory.path().display()),
        "postgres" => support::postgres::database(),
        url => url.to_owned(),
    };
    let store = Store::open(&url).await?;
    store.migrate().await?;
    fill(&store, &url, rows).await?;
    measure(&store).await
}

async fn newest(store: &Store) -> anyhow::Result<Option<DateTime<Utc>>> {
    let page = store.audit(&AuditFilter { limit: 1, ..AuditFilter::default() }).await?;
    Ok(page.first().map(|row| row.started_at))
}

/// Makes the rows, unless there are some.
async fn fill(store: &Store, url: &str, rows: u64) -> anyhow::Result<()> {
    if newest(store).await?.is_some() {
        println!("the database has rows: they are measured as they are");
        return Ok(());
    }
    let (end, began) = (Utc::now(), Instant::now());
    // The months that the rows are of, as if they had been made in their time.
    let kept = Kept { table: "request_log", days: 0, is_exact: false };
    for days in [90, 60, 30, 0] {
        while store.sweep(&kept, end - TimeDelta::days(days)).await?.is_something() {}
    }
    let mut first = 1;
    while first <= rows {
        let last = rows.min(first + CHUNK - 1);
        support::many::add(url, (first, last), rows, end).await;
        println!("{last} rows after {} s", began.elapsed().as_secs());
        first = last + 1;
    }
    support::many::settle(url).await;
    Ok(())
}

/// Every kind of listing, by a name.
fn listings(newest: DateTime<Utc>) -> Vec<(&'static str, AuditFilter)> {
    let of = AuditFilter { limit: 50, ..AuditFilter::default() };
    let user = |id| AuditFilter { user: Some(UserId(id)), ..of.clone() };
    let model = |name: &str| AuditFilter { model: Some(name.into()), ..of.clone() };
    let upstream = |name: &str| AuditFilter { upstream: Some(name.into()), ..of.clone() };
    let status = |status| AuditFilter { status: Some(status), ..of.clone() };
    let code = |code: &str| AuditFilter { code: Some(code.into()), ..of.clone() };
    let key = AuditFilter { key: Some(KeyId(4)), ..of.clone() };
    let month_ago = newest - TimeDelta::days(30);
    let (status_500, code_ok) = (Some(500), Some("ok".to_owned()));
    vec![
        ("nothing", of.clone()),
        ("--until 30d", AuditFilter { until: Some(month_ago), ..of.clone() }),
        ("--user (14 % of the rows)", user(1)),
        ("--user (1 %)", user(30)),
        ("--user nobody", user(999)),
        ("--key", key.clone()),
        ("--key --until 30d", AuditFilter { until: Some(month_ago), ..key.clone() }),
        ("--model (45 %)", model("gpt-4o")),
        ("--model (out of use for 30 days)", model("gpt-4")),
        ("--model (40 rows)", model("rare-model")),
        ("--upstream (60 %)", upstream("openai-1")),
        ("--upstream (30 rows)", upstream("spare")),
        ("--status 200", status(200)),
        ("--status 500 (1 %)", status(500)),
        ("--status 404 (none)", status(404)),
        ("--code insufficient_quota (20 rows)", code("insufficient_quota")),
        ("--user --status 500", AuditFilter { status: status_500, ..user(7) }),
        ("--user --model (a few rows)", AuditFilter { model: Some("rare-model".into()), ..user(1) }),
        ("--user --code insufficient_quota", AuditFilter { code: Some("insufficient_quota".into()), ..user(1) }),
        ("--key --model --status 500", AuditFilter { model: Some("o3".into()), status: status_500, ..key.clone() }),
        ("--key --upstream --code ok", AuditFilter { upstream: Some("spare".into()), code: code_ok, ..key }),
        (
            "--model --upstream (never together)",
            AuditFilter { upstream: Some("azure-west".into()), ..model("text-embedding-3-small") },
        ),
        (
            "--model --status 500 --since 1h",
            AuditFilter { status: status_500, since: Some(newest - TimeDelta::hours(1)), ..model("gpt-4o-mini") },
        ),
    ]
}

async fn measure(store: &Store) -> anyhow::Result<()> {
    let newest = newest(store).await?.context("there are no rows")?;
    println!("| listing | rows | median | slowest | how |\n|---|---|---|---|---|");
    for (name, filter) in listings(newest) {
        let (mut times, mut rows) = (Vec::with_capacity(RUNS), 0);
        for _ in 0..RUNS {
            let began = Instant::now();
            rows = store.audit(&filter).await?.len();
            times.push(began.elapsed());
        }
        times.sort_unstable();
        let how = how(&store.audit_plan(&filter).await?);
        println!("| {name} | {rows} | {} | {} | {how} |", ms(times[RUNS / 2]), ms(times[RUNS - 1]));
    }
    Ok(())
}

fn ms(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

/// The indexes of the log that a plan goes by, and what it goes through whole.
fn how(plan: &[String]) -> String {
    let mut used = Vec::new();
    for line in plan {
        let words = ["_user", "_key", "_class", "autoindex", "pkey"];
        let is_whole = line.contains("Seq Scan on request_log") && !line.contains("actual rows=0 ");
        let index = words.iter().find(|word| line.contains("request_log") && line.contains(**word));
        let word = if is_whole { Some("everything") } else { index.map(|word| word.trim_start_matches('_')) };
        if let Some(word) = word.filter(|word| !used.contains(word)) {
            used.push(word);
        }
    }
    used.join(", ")
}
