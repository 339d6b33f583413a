//! What leaves the books: usage and the log, as tables, JSON and CSV, whole or followed.

use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use rustix::process::Signal;
use serde_json::{Value, json};
use tollgate::store::{AuditFilter, Store, UserSpec};
use tollgate_core::{
    id::{KeyId, UserId},
    usage::UsageRecord,
};

use crate::{
    store::record,
    support::{
        cli::Cli,
        cutter::{Cutter, Mode},
        gateway::PATIENCE,
        postgres,
        program::{Program, Started},
    },
};

fn records(cli_rows: &[(&'static str, &'static str, &'static str, i64)]) -> Vec<UsageRecord<'static>> {
    let row =
        |(n, (day, model, upstream, user)): (usize, &(&'static str, &'static str, &'static str, i64))| UsageRecord {
            model: (*model).into(),
            upstream: Some((*upstream).into()),
            user_id: UserId(*user),
            key_id: KeyId(*user),
            ..record(n as u128 + 1, &format!("{day}T10:00:00Z"))
        };
    cli_rows.iter().enumerate().map(row).collect()
}

/// Two users with a key each, and seven requests.
async fn books() -> Cli {
    let cli = Cli::new().await;
    for name in ["alice", "bob"] {
        cli.text(&format!("user create --name {name}")).await;
        cli.text(&format!("key create --user {name} --name ci-{name}")).await;
    }
    let rows = [
        ("2026-11-22", "gpt-4o", "main", 1),
        ("2026-11-22", "o3", "main", 1),
        ("2026-11-22", "o3", "main", 2),
        ("2026-11-23", "o3", "spare", 2),
        ("2026-11-23", "gpt-4o", "main", 2),
        ("2026-11-30", "gpt-4o", "main", 1),
        ("2026-12-01", "gpt-4o", "main", 1),
    ];
    cli.store.write_usage(records(&rows)).await.unwrap();
    cli
}

#[tokio::test]
async fn usage_is_grouped_by_several_things_and_filtered() {
    let cli = books().await;
    let rows = async |line: &str, names: &[&str]| -> Vec<String> {
        let rows = cli.json(line).await;
        let row = |row: &Value| {
            let names =
                names.iter().map(|name| row[*name].as_str().map_or_else(|| row[*name].to_string(), str::to_owned));
            names.chain([row["requests"].to_string()]).collect::<Vec<_>>().join(" ")
        };
        rows.as_array().unwrap().iter().map(row).collect()
    };
    assert_eq!(
        rows("usage --by user,model", &["user", "user_id", "model"]).await,
        ["alice 1 gpt-4o 3", "alice 1 o3 1", "bob 2 gpt-4o 1", "bob 2 o3 2"]
    );
    assert_eq!(
        rows("usage --by month,upstream", &["month", "upstream"]).await,
        ["2026-11 main 5", "2026-11 spare 1", "2026-12 main 1"]
    );
    assert_eq!(
        rows("usage --by model,day,model --user alice", &["model", "day"]).await,
        ["gpt-4o 2026-11-22 1", "gpt-4o 2026-11-30 1", "gpt-4o 2026-12-01 1", "o3 2026-11-22 1"]
    );
    assert_eq!(rows("usage --by key --model o3", &["key", "user"]).await, ["ci-alice alice 1", "ci-bob bob 2"]);
    assert_eq!(rows("usage --by day --key bob/ci-bob --upstream spare", &["day"]).await, ["2026-11-23 1"]);
    assert_eq!(rows("usage --by user --since 2026-11-23 --until 2026-11-30", &["user"]).await, ["alice 1", "bob 2"]);
    assert_eq!(rows("usage --by user --model nothing", &["user"]).await, [""; 0]);
    assert!(cli.fails("usage --user nobody", "").await.0.contains("tollgate user list"));
    assert!(cli.fails("usage --key nothing", "").await.0.contains("tollgate key list"));
    let (error, code) = cli.fails("usage --csv --json", "").await;
    assert!(error.contains("choose one") && code == 2, "{error}");
}

#[tokio::test]
async fn usage_is_a_table_json_or_csv_of_the_same_rows() {
    let cli = books().await;
    let csv = cli.text("usage --by user,month --csv").await;
    let expected = "user,month,requests,prompt_tokens,completion_tokens,total_tokens,cached_tokens,cost_nano_usd\r\n\
        alice,2026-11,3,30,15,45,12,3000\r\nalice,2026-12,1,10,5,15,4,1000\r\nbob,2026-11,3,30,15,45,12,3000\r\n";
    assert_eq!(csv, expected);
    let table = cli.text("usage --by user,month").await;
    let cells: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(cells[0].len(), 8);
    assert_eq!(cells[3], ["bob", "2026-11", "3", "30", "15", "45", "12", "0.000003"]);
    assert_eq!(cli.json("usage --by user,month").await.as_array().unwrap().len(), 3);
    assert!(cli.text("usage --by key,model --csv").await.starts_with("key,model,user,requests,"));
}

#[tokio::test]
async fn the_log_has_every_column_as_csv_and_no_formula() {
    let cli = books().await;
    let bad = UsageRecord {
        user_agent: Some("=HYPERLINK(\"http://evil.example\"),\"x\"\n".into()),
        code: Some("upstream_error".into()),
        upstream: Some("spare".into()),
        client_request_id: Some("@SUM(1)".into()),
        ..record(50, "2026-12-02T00:00:00Z")
    };
    cli.store.write_usage([bad]).await.unwrap();
    let csv = cli.text("audit --csv --limit all").await;
    let mut reader = csv::Reader::from_reader(csv.as_bytes());
    let headers: Vec<String> = reader.headers().unwrap().iter().map(str::to_owned).collect();
    let rows: Vec<csv::StringRecord> = reader.records().collect::<Result<_, _>>().unwrap();
    assert_eq!(rows.len(), 8);
    let json = cli.json("audit --limit all").await;
    let fields: Vec<String> = json[0].as_object().unwrap().keys().cloned().collect();
    assert_eq!(headers, fields, "CSV has what JSON has");
    let cell = |name: &str| rows[0].get(headers.iter().position(|header| header == name).unwrap()).unwrap();
    assert_eq!(cell("user_agent"), "'=HYPERLINK(\"http://evil.example\"),\"x\"\n");
    assert_eq!(
        (cell("client_request_id"), cell("code"), cell("cost_nano_usd")),
        ("'@SUM(1)", "upstream_error", "1000")
    );
    assert_eq!((cell("served_model"), cell("image_tokens"), cell("stream")), ("gpt-4o-2024-08-06", "7", "true"));
    assert_eq!(json[0]["client_request_id"], json!("@SUM(1)"), "JSON needs no such care");

    let count = async |line: &str| cli.json(line).await.as_array().unwrap().len();
    assert_eq!(count("audit --code upstream_error").await, 1);
    assert_eq!(count("audit --code ok --limit all").await, 7);
    assert_eq!(count("audit --upstream spare").await, 2);
    assert_eq!(count("audit --upstream spare --code ok --user bob --since 2026-11-23 --until 2026-11-23").await, 1);
    assert_eq!(count("audit --limit 3").await, 3);
    let (error, code) = cli.fails("audit --follow --limit all", "").await;
    assert!(error.contains("--limit 10000 at most") && code == 2, "{error}");
}

/// A program beside a database of its own, with `rows` requests of as many users.
fn large(rows: u128) -> Program {
    let program = Program::new("[store]\nurl = \"sqlite://DIR/db\"\n[secrets]\nfernet_keys_file = \"DIR/keys\"\n");
    assert_eq!(program.run("init", "").code, 0);
    crate::support::gateway::block_on(async {
        let store = Store::open(&format!("sqlite://{}/db", program.directory().display())).await.unwrap();
        let begin: DateTime<Utc> = "2026-11-01T00:00:00Z".parse().unwrap();
        for batch in 0..rows / 5_000 {
            let row = |n: u128| UsageRecord {
                started_at: begin + TimeDelta::seconds(i64::try_from(n).unwrap()),
                user_id: UserId(i64::try_from(n).unwrap()),
                user_agent: Some("x".repeat(200).into()),
                ..record(n, "2026-11-01T00:00:00Z")
            };
            let batch: Vec<_> = (batch * 5_000..(batch + 1) * 5_000).map(row).collect();
            store.write_usage(batch).await.unwrap();
        }
        store.close().await;
    });
    program
}

#[test]
fn a_large_export_is_not_in_memory() {
    const ROWS: u128 = 40_000;
    let program = large(ROWS);
    for line in ["audit --limit all --csv", "usage --by day,user,model --csv"] {
        let mut started = program.start(line);
        for n in 0..ROWS * 9 / 10 {
            assert!(started.line().is_some(), "{line}: {n} lines");
        }
        let most_kb = started.most_memory_kb();
        assert!(most_kb < 80 * 1024, "{line}: {most_kb} KiB for rows that would take twice as much");
        let rest = std::iter::from_fn(|| started.line()).count() as u128;
        assert_eq!(rest, ROWS / 10 + 1, "{line}");
        assert_eq!(started.end(), Some(0), "{line}");
    }
}

fn id(line: &str) -> u128 {
    let row: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    u128::from_str_radix(&row["request_id"].as_str().unwrap().replace('-', ""), 16).unwrap()
}

/// The numbers of the next rows.
fn next(started: &mut Started, count: usize) -> Vec<u128> {
    (0..count).map(|_| id(&started.line().expect("another row"))).collect()
}

async fn write(store: &Store, numbers: impl IntoIterator<Item = (u128, &'static str)>) {
    let rows: Vec<_> = numbers.into_iter().map(|(n, time)| record(n, time)).collect();
    assert_eq!(crate::store::write(store, &rows).await, rows.len());
}

/// Waits until no transaction of another test on this server holds these rows up.
async fn settled(store: &Store, count: usize) {
    let start = Instant::now();
    loop {
        let booked_until = Some(store.bookmark().await.unwrap());
        let rows = store.audit(&AuditFilter { booked_until, limit: 100, ..AuditFilter::default() }).await.unwrap();
        if rows.len() == count {
            return;
        }
        assert!(start.elapsed() < PATIENCE);
    }
}

#[tokio::test]
async fn the_log_is_followed_in_the_order_of_booking_through_an_outage() {
    let (directory, name) = postgres::new_database();
    let cutter = Cutter::start(directory);
    let direct =
        Store::open(&format!("postgres://postgres@localhost/{name}?host={}", directory.display())).await.unwrap();
    direct.migrate().await.unwrap();
    let config = format!("[store]\nurl = \"{}\"\n[secrets]\nfernet_keys_file = \"DIR/keys\"\n", cutter.url(&name));
    let program = Program::new(&config);
    assert_eq!(program.run("init", "").code, 0);
    write(&direct, [(1, "2026-11-23T10:00:00Z"), (2, "2026-11-23T11:00:00Z"), (3, "2026-11-23T09:00:00Z")]).await;
    settled(&direct, 3).await;
    let mut started = program.start("audit --follow --json --limit 2");
    assert_eq!(next(&mut started, 2), [1, 2], "the newest two, oldest first");
    // What is booked late began long before what is printed.
    write(&direct, [(4, "2026-11-20T00:00:00Z")]).await;
    assert_eq!(next(&mut started, 1), [4]);
    cutter.set(Mode::Refuse);
    write(&direct, [(6, "2026-11-23T12:00:00Z"), (5, "2026-11-01T00:00:00Z")]).await;
    write(&direct, (100..2600).map(|n| (n, "2026-11-23T10:00:00Z"))).await;
    assert!(started.complaint().contains("followed on as soon as"), "it says that it waits");
    write(&direct, [(7, "2026-11-22T00:00:00Z")]).await;
    cutter.set(Mode::Pass);
    let rows = next(&mut started, 2503);
    assert_eq!(rows[..2], [5, 6], "what was booked together comes by time");
    assert_eq!(rows[2..2502], (100..2600).collect::<Vec<_>>());
    assert_eq!(rows[2502], 7);
    write(&direct, [(8, "2026-11-23T00:00:00Z")]).await;
    assert_eq!(next(&mut started, 1), [8], "nothing comes twice");
    started.signal(Signal::INT);
    assert_eq!((started.line(), started.end()), (None, Some(0)), "Ctrl-C is the proper end");
    direct.close().await;
}

#[tokio::test]
async fn following_ends_when_nobody_reads_any_more() {
    let program = Program::new("[store]\nurl = \"sqlite://DIR/db\"\n[secrets]\nfernet_keys_file = \"DIR/keys\"\n");
    assert_eq!(program.run("init", "").code, 0);
    let store = Store::open(&format!("sqlite://{}/db", program.directory().display())).await.unwrap();
    store.create_user(&UserSpec { name: "alice".into(), ..UserSpec::default() }, "test").await.unwrap();
    write(&store, [(1, "2026-11-23T10:00:00Z")]).await;
    for form in ["--csv", "--json", ""] {
        let mut started = program.start(&format!("audit --follow {form}"));
        let header = form == "--csv";
        let line = if header { started.line().and_then(|_| started.line()) } else { started.line() };
        assert!(line.is_some_and(|line| line.contains("00000000-0000-0000-0000-000000000001")), "{form}");
        started.stop_reading();
        let start = Instant::now();
        let code = loop {
            match started.try_end() {
                Some(code) => break code,
                None => assert!(start.elapsed() < PATIENCE, "{form}: it goes on for nobody"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        assert_eq!(code, Some(0), "{form}: {}", started.complaint());
    }
    store.close().await;
}
