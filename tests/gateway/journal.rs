//! The journal: what its directory must be, what may be in it, and what happens when there is no room.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use chrono::{DateTime, Utc};
use serde_json::json;
use tollgate::store::{AuditRow, KeySpec};
use tollgate_core::{
    id::{KeyId, UserId},
    journal::{
        entry::{Begin, Count, End},
        frame,
        segment::{self, name_of},
    },
    limit::Limits,
    usage::{Usage, UsageRecord},
};
use uuid::Uuid;

use crate::support::{
    client::Whole,
    cutter::{Cutter, Mode},
    gateway::{Builder, Gateway, PATIENCE},
    openai::{chat, completion},
    postgres,
    upstream::{Answer, Upstream},
};

const CHAT: &str = "/v1/chat/completions";

/// A file system of one's own, as only root can make it.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn new(options: &str) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(directory.path());
        let is_mounted = mount.output().is_ok_and(|done| done.status.success());
        if !is_mounted {
            eprintln!("not root, or not allowed to mount: this test shows nothing");
        }
        is_mounted.then_some(Self(directory))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: something may still be open.
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).output();
    }
}

#[tokio::test]
async fn a_journal_belongs_to_one_process() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::before(&upstream.base_url());
    let journal = gateway.dir().join("journal");
    let error = Gateway::builder().journal(&journal).refused();
    assert!(error.contains("[usage] journal: ") && error.contains("is in use by another process"), "{error}");
    gateway.ask(CHAT, &chat()).await;
    gateway.rows(1).await;
    drop(gateway);
    // The directory is gone with the gateway; another one may be made in its place.
    Gateway::builder().journal(&journal).upstream("main", &upstream.base_url(), "").start();
}

#[test]
fn a_directory_that_cannot_be_used_is_told_with_its_setting() {
    // Not even root can make something there.
    let error = Gateway::builder().journal(Path::new("/proc/tollgate")).refused();
    assert!(error.starts_with("[usage] journal: /proc/tollgate cannot be written to"), "{error}");
    if let Some(mounted) = Mounted::new("size=1m,ro") {
        let error = Gateway::builder().journal(mounted.0.path()).refused();
        assert!(error.contains("[usage] journal: ") && error.contains("Read-only file system"), "{error}");
        assert!(error.contains("make the directory writable"), "{error}");
    }
}

#[test]
fn a_journal_of_a_newer_version_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let mut head = segment::head(None);
    head[8] = 9;
    let checksum = crc32fast::hash(&head[..segment::HEAD - 4]);
    head[segment::HEAD - 4..].copy_from_slice(&checksum.to_le_bytes());
    fs::write(directory.path().join(name_of(1)), head).unwrap();
    let error = Gateway::builder().journal(directory.path()).refused();
    assert!(error.contains(&name_of(1)) && error.contains("version 9") && error.contains("newer tollgate"), "{error}");
    assert_eq!(fs::read(directory.path().join(name_of(1))).unwrap(), head);
}

/// A journal that an earlier process left behind.
#[derive(Default)]
struct Left {
    segments: Vec<Vec<u8>>,
}

impl Left {
    /// A new segment.
    fn segment(&mut self) -> &mut Self {
        self.segments.push(segment::head(None).to_vec());
        self
    }

    fn entry(&mut self, write: impl FnOnce(&mut Vec<u8>)) -> &mut Self {
        assert!(frame::put(self.segments.last_mut().unwrap(), write));
        self
    }

    fn begin(&mut self, n: u128) -> &mut Self {
        self.entry(|out| begin(n).write(out))
    }

    fn end(&mut self, n: u128, time: &str) -> &mut Self {
        self.entry(|out| end(n, time, false).write(out))
    }

    /// Writes it to a directory.
    fn write(&self, directory: &Path) {
        fs::create_dir_all(directory).unwrap();
        for (number, bytes) in self.segments.iter().enumerate() {
            fs::write(directory.join(name_of(number as u64 + 1)), bytes).unwrap();
        }
    }
}

fn begin(n: u128) -> Begin<'static> {
    Begin {
        request_id: Uuid::from_u128(n),
        started_at: "2026-11-23T10:00:00Z".parse().unwrap(),
        user_id: UserId(1),
        key_id: KeyId(1),
        ip: None,
        route: "chat_completions",
        model: "gpt-4o",
        stream: true,
        prompt_tokens: 30,
        output_tokens: 12,
        cost_nano_usd: 77,
    }
}

fn end(n: u128, time: &str, is_uncounted: bool) -> End<'static> {
    let started_at: DateTime<Utc> = time.parse().unwrap();
    let usage = Usage { prompt_tokens: 3, completion_tokens: 4, ..Usage::default() };
    let record = UsageRecord {
        started_at,
        usage,
        status: 200,
        code: None,
        estimated: is_uncounted,
        interrupted: false,
        cost_nano_usd: 5,
        ..begin(n).interrupted()
    };
    End { record, is_uncounted, hold: None }
}

/// The number of a row's request.
fn number(row: &AuditRow) -> u128 {
    Uuid::parse_str(&row.request_id).unwrap().as_u128()
}

async fn numbers(gateway: &Gateway, count: usize) -> Vec<u128> {
    let mut numbers: Vec<_> = gateway.rows(count).await.iter().map(number).collect();
    numbers.sort_unstable();
    numbers
}

/// A gateway on what is left in a journal; the directory goes with it.
fn gateway_after(left: &Left) -> (Gateway, tempfile::TempDir, Upstream) {
    let (directory, upstream) = (tempfile::tempdir().unwrap(), Upstream::start(completion()));
    left.write(directory.path());
    // Its rows are of days that grow old.
    let builder = Gateway::builder().journal(directory.path()).tables("[audit]\nretention_days = 0");
    (builder.upstream("main", &upstream.base_url(), "").start(), directory, upstream)
}

fn segments_in(directory: &Path) -> Vec<PathBuf> {
    let all = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    all.filter(|path| path.extension().is_some_and(|extension| extension == "journal")).collect()
}

#[tokio::test]
async fn what_an_earlier_process_left_is_booked_though_its_clock_jumped() {
    let mut left = Left::default();
    left.segment().begin(1).begin(2).end(2, "2026-11-23T10:00:00Z");
    // An hour back, a day back, and a kind of entry that is not known.
    left.segment().end(3, "2026-11-23T09:00:00Z").entry(|out| out.extend([99; 40])).end(4, "2026-11-22T09:00:00Z");
    left.segment().begin(5).end(1, "2026-11-23T10:00:00Z");
    let (gateway, directory, _upstream) = gateway_after(&left);
    let rows = gateway.rows(5).await;
    let row = |n| rows.iter().find(|row| number(row) == n).unwrap();
    for n in 1..=4 {
        assert_eq!((row(n).prompt_tokens, row(n).completion_tokens, row(n).interrupted), (3, 4, false), "{n}");
    }
    let cut_off = row(5);
    assert_eq!((cut_off.prompt_tokens, cut_off.completion_tokens, cut_off.cost_nano_usd), (30, 12, 77));
    assert_eq!((cut_off.interrupted, cut_off.estimated, cut_off.status), (true, true, 0));
    assert_eq!((cut_off.code.as_deref(), cut_off.stream), (Some("interrupted"), true));
    assert_eq!(gateway.metric("tollgate_journal_corrupt_bytes_total").await, 0.0);
    // The database shows the rows a moment before the journal knows that it does.
    let start = Instant::now();
    while gateway.metric("tollgate_journal_pending_records").await > 0.0 || segments_in(directory.path()).len() > 2 {
        assert!(start.elapsed() < PATIENCE, "{:?}", segments_in(directory.path()));
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    // A restart hands nothing over again, and what is written is written to a new segment.
    drop(gateway);
    assert!(segments_in(directory.path()).iter().all(|path| !path.ends_with(name_of(1))));
}

#[tokio::test]
async fn damage_costs_what_is_damaged() {
    let mut left = Left::default();
    left.segment();
    for n in 1..=30 {
        left.end(n, "2026-11-23T10:00:00Z");
    }
    left.segment().end(31, "2026-11-23T10:00:00Z");
    left.segment().end(32, "2026-11-23T10:00:00Z").end(33, "2026-11-23T10:00:00Z");
    let length = (left.segments[0].len() - segment::HEAD) / 30;
    let at = |n: usize| segment::HEAD + (n - 1) * length;
    // A bit in 10, all of 20 and 21, a head, and a tail that is torn in the middle of 33.
    left.segments[0][at(10) + 50] ^= 4;
    left.segments[0][at(20)..at(22)].fill(0xAA);
    left.segments[1][..segment::HEAD].fill(b'x');
    let torn = left.segments[2].len() - 20;
    left.segments[2].truncate(torn);
    left.segments[2].extend([0; 5000]);
    let (gateway, _directory, _upstream) = gateway_after(&left);
    let expected: Vec<u128> = (1..=32).filter(|n| ![10, 20, 21].contains(n)).collect();
    assert_eq!(numbers(&gateway, expected.len()).await, expected);
    assert!(gateway.metric("tollgate_journal_corrupt_bytes_total").await >= 3.0 * length as f64);
    gateway.ask(CHAT, &chat()).await;
    assert_eq!(numbers(&gateway, expected.len() + 1).await.len(), expected.len() + 1, "and it goes on");
}

#[tokio::test]
async fn counts_are_found_and_where_there_is_none_the_rough_numbers_stand() {
    let time = "2026-11-23T10:00:00Z";
    let usage = Usage { prompt_tokens: 8, completion_tokens: 9, ..Usage::default() };
    let count = Count { request_id: Uuid::from_u128(1), usage, cost_nano_usd: 6 };
    let mut left = Left::default();
    left.segment().entry(|out| end(1, time, true).write(out)).entry(|out| end(2, time, true).write(out));
    left.end(3, time).entry(|out| count.write(out));
    let (gateway, _directory, _upstream) = gateway_after(&left);
    let mut rows = gateway.rows(3).await;
    rows.sort_unstable_by_key(number);
    let all: Vec<_> = rows.iter().map(|row| (row.prompt_tokens, row.completion_tokens, row.cost_nano_usd)).collect();
    assert_eq!(all, [(8, 9, 6), (3, 4, 5), (3, 4, 5)]);
    assert_eq!(rows.iter().map(|row| row.estimated).collect::<Vec<_>>(), [true, true, false]);
}

#[tokio::test]
async fn a_journal_that_is_read_again_is_not_booked_again() {
    let mut left = Left::default();
    left.segment();
    for n in 1..=500 {
        left.end(n, "2026-11-23T10:00:00Z");
    }
    let (gateway, directory, upstream) = gateway_after(&left);
    gateway.rows(100).await;
    let store_url = gateway.store_url.clone();
    let again = tempfile::tempdir().unwrap();
    // All of it, and some more.
    for n in 501..=600 {
        left.end(n, "2026-11-23T10:00:00Z");
    }
    left.write(again.path());
    let second = Gateway::builder().beside(&gateway).journal(again.path());
    let second = second.upstream("main", &upstream.base_url(), "").start();
    let store = second.store().await;
    let start = Instant::now();
    loop {
        let rows = crate::support::mortal::rows(&store).await;
        if rows.len() == 600 {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "{} rows in {store_url}", rows.len());
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let query = tollgate::store::UsageQuery::by(tollgate::store::GroupBy::Day);
    let days = store.usage(&query).await.unwrap();
    assert_eq!(days.iter().map(|day| (day.requests, day.prompt_tokens)).collect::<Vec<_>>(), [(600, 1800)]);
    store.close().await;
    drop((second, gateway, directory));
}

/// A gateway whose database can be taken away, and a journal that is full after some hundred requests.
fn with_little_room(on_full: &str, upstream: &Upstream) -> (Builder, Cutter) {
    let (directory, name) = postgres::new_database();
    let cutter = Cutter::start(directory);
    let usage = format!("journal_max = \"1 MiB\"\non_journal_full = \"{on_full}\"");
    let builder = Gateway::builder().usage(&usage).store(&cutter.url(&name)).upstream("main", &upstream.base_url(), "");
    (builder, cutter)
}

/// A request whose record is large.
async fn ask(gateway: &Gateway) -> Whole {
    let request = gateway.post(CHAT).header("user-agent", &"x".repeat(1000)).header("x-request-id", &"y".repeat(1000));
    request.body_content_length(chat().to_string()).send().await.unwrap().whole().await
}

#[tokio::test]
async fn a_full_journal_refuses_until_there_is_room_again() {
    let upstream = Upstream::start(completion());
    let (builder, cutter) = with_little_room("refuse", &upstream);
    let gateway = builder.start();
    cutter.set(Mode::Refuse);
    let (mut answered, start) = (0, Instant::now());
    let refused = loop {
        let answer = ask(&gateway).await;
        if answer.status != 200 {
            break answer;
        }
        answered += 1;
        assert!(start.elapsed() < PATIENCE * 2, "{answered} answers and no end");
    };
    assert!(answered > 200, "a mebibyte takes more than {answered}");
    assert_eq!((refused.status.as_u16(), refused.header("retry-after")), (503, Some("1")));
    assert_eq!(
        (&refused.json()["error"]["code"], &refused.json()["error"]["type"]),
        (&json!("journal_full"), &json!("server_error"))
    );
    for _ in 0..50 {
        assert_eq!(ask(&gateway).await.status, 503);
    }
    let (status, page) = gateway.admin("/readyz").await;
    assert!(
        status == 503 && page.contains("no requests are taken: it is full ([usage] journal_max)"),
        "{status}: {page}"
    );
    assert_eq!(upstream.received().len(), answered, "nothing of those goes upstream");
    assert!(gateway.metric("tollgate_denials_total{code=\"journal_full\"}").await >= 51.0);
    assert!(gateway.metric("tollgate_journal_bytes").await <= f64::from(1 << 20));
    assert_eq!(gateway.metric("tollgate_journal_pending_records").await, answered as f64);
    cutter.set(Mode::Pass);
    let start = Instant::now();
    while ask(&gateway).await.status != 200 {
        assert!(start.elapsed() < PATIENCE, "it takes requests again");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(booked(&gateway, answered + 1).await, answered + 1, "and nothing is lost");
}

/// How many rows there are, once there are `count`.
async fn booked(gateway: &Gateway, count: usize) -> usize {
    let (store, start) = (gateway.store().await, Instant::now());
    loop {
        let rows = crate::support::mortal::rows(&store).await.len();
        if rows >= count {
            store.close().await;
            return rows;
        }
        assert!(start.elapsed() < PATIENCE, "only {rows} of {count}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_full_journal_drops_the_oldest_if_it_is_told_to() {
    let upstream = Upstream::start(completion());
    let (builder, cutter) = with_little_room("drop_oldest", &upstream);
    let gateway = builder.start();
    cutter.set(Mode::Refuse);
    let (mut asked, start) = (Vec::new(), Instant::now());
    let lost = loop {
        let answer = ask(&gateway).await;
        assert_eq!(answer.status, 200);
        asked.push(answer.header("x-request-id").unwrap().to_owned());
        let lost = gateway.metric("tollgate_journal_lost_records_total").await;
        if lost > 100.0 && asked.len() > 700 {
            break lost;
        }
        assert!(start.elapsed() < PATIENCE * 3, "{} answers and {lost} lost", asked.len());
    };
    let (status, page) = gateway.admin("/readyz").await;
    assert!(status == 200 && page.contains("the oldest usage is lost: it is full"), "{status}: {page}");
    // The next segment does not wait for the oldest to go.
    assert!(gateway.metric("tollgate_journal_bytes").await <= f64::from((1 << 20) + (1 << 17)));
    cutter.set(Mode::Pass);
    let left = asked.len() - format!("{lost:.0}").parse::<usize>().unwrap();
    assert_eq!(booked(&gateway, left).await, left, "{} asked, {lost} lost", asked.len());
    assert_eq!(gateway.metric("tollgate_journal_lost_records_total").await, lost);
    // The database shows the rows a moment before the journal knows that it does.
    let start = Instant::now();
    while gateway.metric("tollgate_journal_pending_records").await > 0.0 {
        assert!(start.elapsed() < PATIENCE, "the journal is empty");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let store = gateway.store().await;
    let rows = crate::support::mortal::rows(&store).await;
    for id in &asked[asked.len() - 100..] {
        assert!(rows.iter().any(|row| row.request_id == *id), "the newest are there");
    }
    store.close().await;
}

#[tokio::test]
async fn a_full_disk_refuses_and_loses_nothing() {
    let Some(mounted) = Mounted::new("size=600k") else { return };
    let upstream = Upstream::start(completion());
    // Segments of 128 KiB, and four of them fit on the disk.
    let (builder, cutter) = with_little_room("refuse", &upstream);
    let gateway = builder.journal(mounted.0.path()).start();
    cutter.set(Mode::Refuse);
    let (mut answered, start) = (0, Instant::now());
    while ask(&gateway).await.status == 200 {
        answered += 1;
        assert!(start.elapsed() < PATIENCE * 2, "{answered} answers and no end");
    }
    let (status, page) = gateway.admin("/readyz").await;
    assert!(status == 503 && page.contains("the disk is full"), "{status}: {page}");
    cutter.set(Mode::Pass);
    let start = Instant::now();
    while ask(&gateway).await.status != 200 {
        assert!(start.elapsed() < PATIENCE, "it takes requests again");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(gateway.admin("/readyz").await.0, 200);
    assert_eq!(booked(&gateway, answered + 1).await, answered + 1);
}

#[tokio::test]
async fn a_disk_that_is_full_at_the_start_is_no_reason_not_to_start() {
    let Some(mounted) = Mounted::new("size=300k") else { return };
    fs::write(mounted.0.path().join("filler"), vec![7; 250 << 10]).unwrap();
    let upstream = Upstream::start(completion());
    let builder = Gateway::builder().usage("journal_max = \"1 MiB\"").journal(mounted.0.path());
    let gateway = builder.upstream("main", &upstream.base_url(), "").start();
    assert_eq!(ask(&gateway).await.status, 503);
    fs::remove_file(mounted.0.path().join("filler")).unwrap();
    let start = Instant::now();
    while ask(&gateway).await.status != 200 {
        assert!(start.elapsed() < PATIENCE, "it takes requests once there is room");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    gateway.rows(1).await;
}

#[tokio::test]
async fn what_waits_for_the_database_counts_against_quotas_once() {
    let upstream = Upstream::start(completion());
    let (directory, name) = postgres::new_database();
    let cutter = Cutter::start(directory);
    let limits = Limits { monthly_tokens: Some(45), ..Limits::default() };
    let builder = Gateway::builder().store(&cutter.url(&name)).key(KeySpec { limits, ..KeySpec::default() });
    let gateway = builder.upstream("main", &upstream.base_url(), "").start();
    let mut body = chat();
    body["max_tokens"] = json!(5);
    cutter.set(Mode::Refuse);
    // 12 tokens each; before it is known, 27.
    assert_eq!(gateway.ask(CHAT, &body).await.status, 200);
    assert_eq!(gateway.ask(CHAT, &body).await.status, 200);
    assert_eq!(gateway.ask(CHAT, &body).await.status, 429, "24 are held, and the third may take 27");
    cutter.set(Mode::Pass);
    booked(&gateway, 2).await;
    let answer = gateway.ask(CHAT, &body).await;
    assert_eq!(answer.status, 429, "they are booked instead of held, not gone and not twice");
    let limits = Limits { monthly_tokens: Some(55), ..Limits::default() };
    let store = gateway.store().await;
    let key = store.find_key("first").await.unwrap();
    store.update_key(key.id, "test", |spec| spec.limits = limits).await.unwrap();
    store.close().await;
    let start = Instant::now();
    while gateway.ask(CHAT, &body).await.status != 200 {
        assert!(start.elapsed() < PATIENCE, "55 is enough for 24 and one more, and not for 48");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn whoever_reads_a_stream_to_its_mark_has_had_it() {
    // The body does not end when the stream does.
    let parts = ["data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"}}]}\n\n", "data: [DONE]\n\n"];
    let upstream = Upstream::start(Answer::sse(parts).never_end());
    let gateway = Gateway::before(&upstream.base_url());
    let mut body = chat();
    body["stream"] = json!(true);
    let mut response = gateway.post(CHAT).body_content_length(body.to_string()).send().await.unwrap();
    let mut text = Vec::new();
    while !text.ends_with(b"data: [DONE]\n\n") {
        text.extend(response.chunk().await.unwrap().unwrap().bytes);
    }
    let row = gateway.rows(1).await.remove(0);
    assert_eq!((row.code, row.interrupted, row.completion_tokens), (None, false, 1));
    drop(response);
}
