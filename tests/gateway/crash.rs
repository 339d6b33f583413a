//! What happens when something dies: the gateway, the database, or the way between them. Clients keep their own record of what
//! they got, and it is compared with the books.
//!
//! `make crash` runs more rounds; their number is in `TOLLGATE_CRASH_ROUNDS`.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::support::{
    cutter::{Cutter, Mode},
    gateway::PATIENCE,
    mortal::{Books, Mortal, bytes_in, rows, upstream},
    postgres::{self, Own},
};

const CLIENTS: usize = 8;

/// How many rounds, unless it is said otherwise.
fn rounds(usual: u32) -> u32 {
    std::env::var("TOLLGATE_CRASH_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(usual)
}

/// Moments that differ from round to round, up to `most`.
fn moment(most: Duration) -> Duration {
    let mut random = [0; 4];
    getrandom::fill(&mut random).unwrap();
    most.mul_f64(f64::from(u32::from_le_bytes(random)) / f64::from(u32::MAX))
}

/// The gateway is killed again and again under load.
async fn killed_at_any_moment(store_url: Option<&str>, usage: &str, user_agent: &str, rounds: u32) {
    let upstream = upstream();
    let mut program = Mortal::new(store_url, None, &upstream.base_url(), usage);
    user_agent.clone_into(&mut program.user_agent);
    program.may_be_full = usage.contains("journal_max");
    let mut seen = Books::new();
    for _ in 0..rounds {
        let address = program.start();
        let clients = program.clients(address, CLIENTS);
        clients.wait_for(1).await;
        tokio::time::sleep(moment(Duration::from_millis(400))).await;
        program.kill();
        seen.extend(clients.stop().await);
    }
    program.start();
    program.stop();
    assert!(seen.values().filter(|is_whole| **is_whole).count() > rounds as usize, "{seen:?}");
    program.check(&seen).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_is_killed_loses_no_answer_with_sqlite() {
    killed_at_any_moment(None, "", "test", rounds(8)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_is_killed_loses_no_answer_with_postgresql() {
    killed_at_any_moment(Some(&postgres::database()), "batch = 7", "test", rounds(8)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_is_killed_goes_from_segment_to_segment() {
    // Segments of 128 KiB, and entries of more than a kilobyte.
    let usage = "journal_max = \"1 MiB\"\nfsync = \"always\"";
    killed_at_any_moment(None, usage, &"x".repeat(1_000), rounds(3)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_that_are_cut_off_are_neither_lost_nor_doubled() {
    let (directory, name) = postgres::new_database();
    let direct = format!("postgres://postgres@localhost/{name}?host={}", directory.display());
    let cutter = Cutter::start(directory);
    let upstream = upstream();
    let mut program = Mortal::new(Some(&direct), Some(&cutter.url(&name)), &upstream.base_url(), "batch = 50");
    let address = program.start();
    let clients = program.clients(address, CLIENTS);
    clients.wait_for(50).await;
    cutter.set(Mode::CutCommits);
    let start = Instant::now();
    while cutter.cuts() < 6 {
        assert!(start.elapsed() < PATIENCE, "only {} commits", cutter.cuts());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    cutter.set(Mode::Pass);
    let seen = clients.stop().await;
    program.stop();
    program.check(&seen).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_killed_or_frozen_keeps_nobody_and_loses_nothing() {
    let mut server = Own::start();
    let upstream = upstream();
    let mut program = Mortal::new(Some(&server.url()), None, &upstream.base_url(), "batch = 50");
    let address = program.start();
    let mut seen = Books::new();
    for _ in 0..rounds(2) {
        let clients = program.clients(address, CLIENTS);
        clients.wait_for(20).await;
        server.kill();
        clients.wait_for(clients.count() + 100).await;
        server.restart();
        clients.wait_for(clients.count() + 50).await;
        server.freeze();
        clients.wait_for(clients.count() + 100).await;
        server.thaw();
        clients.wait_for(clients.count() + 20).await;
        seen.extend(clients.stop().await);
    }
    // One that is frozen while the gateway is killed.
    let clients = program.clients(address, CLIENTS);
    server.freeze();
    clients.wait_for(50).await;
    program.kill();
    server.thaw();
    seen.extend(clients.stop().await);
    program.start();
    program.stop();
    program.check(&seen).await;
}

/// Another program that uses the database of SQLite, and holds its write lock.
struct Holder(Child);

impl Holder {
    fn start(database: &Path) -> Self {
        const HOLD: &str = "import sqlite3, sys
c = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
c.execute('BEGIN IMMEDIATE'); print('held', flush=True); sys.stdin.read(); c.execute('ROLLBACK'); c.close()";
        let mut python = Command::new("python3");
        let python = python.args(["-c", HOLD]).arg(database).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = python.spawn().unwrap();
        let mut said = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut said).unwrap();
        assert_eq!(said, "held\n");
        Self(child)
    }

    /// Lets go, and ends its use of the file in order.
    fn end(mut self) {
        drop(self.0.stdin.take());
        assert!(self.0.wait().unwrap().success());
    }
}

/// Long enough for the second thread of the writer to take over, with a store of its own.
#[tokio::test(flavor = "multi_thread")]
async fn another_program_that_holds_the_file_of_sqlite_makes_nothing_lost() {
    let upstream = upstream();
    // Small batches: the calm thread has to end its own before the other one can take over.
    let mut program = Mortal::new(None, None, &upstream.base_url(), "batch = 50");
    let address = program.start();
    let clients = program.clients(address, 2);
    clients.wait_for(20).await;
    let holder = Holder::start(Path::new(program.store_url.trim_start_matches("sqlite://")));
    let start = Instant::now();
    // Each of the two threads says it once.
    while program.log().matches("usage cannot be written to the database").count() < 2 {
        assert!(start.elapsed() < 2 * PATIENCE, "{}", program.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    tokio::task::spawn_blocking(|| holder.end()).await.unwrap();
    let (store, count) = (tollgate::store::Store::open(&program.store_url).await.unwrap(), clients.count());
    while rows(&store).await.len() < count {
        assert!(start.elapsed() < 3 * PATIENCE, "{}", program.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    store.close().await;
    clients.wait_for(clients.count() + 200).await;
    program.kill();
    let seen = clients.stop().await;
    program.start();
    program.stop();
    program.check(&seen).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_costs_disk_and_not_memory() {
    let (directory, name) = postgres::new_database();
    let direct = format!("postgres://postgres@localhost/{name}?host={}", directory.display());
    let cutter = Cutter::start(directory);
    let upstream = upstream();
    let mut program = Mortal::new(Some(&direct), Some(&cutter.url(&name)), &upstream.base_url(), "batch = 100");
    let address = program.start();
    let clients = program.clients(address, 2 * CLIENTS);
    clients.wait_for(500).await;
    cutter.set(Mode::Refuse);
    clients.wait_for(clients.count() + 500).await;
    let (bytes, resident) = (used(&program.journal()), program.resident_kb());
    clients.wait_for(clients.count() + 5_000).await;
    let (bytes_after, resident_after) = (used(&program.journal()), program.resident_kb());
    // Five thousand entries are 1 MB, but for those that are still on their way. Thrice as much memory is what heaps do by
    // themselves.
    assert!(bytes_after > bytes + 800_000, "{bytes_after} after {bytes}");
    assert!(resident_after < resident + 3_000, "{resident_after} KiB after {resident}");
    cutter.set(Mode::Pass);
    let seen = clients.stop().await;
    let (start, store) = (Instant::now(), tollgate::store::Store::open(&direct).await.unwrap());
    while rows(&store).await.len() < seen.len() {
        assert!(start.elapsed() < PATIENCE, "the backlog is not gone");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    store.close().await;
    program.stop();
    program.check(&seen).await;
    assert!(bytes_in(&program.journal()) < 40 << 20, "what is booked is removed");
}

/// Bytes of entries in a journal: segments are made with more room than is used.
fn used(journal: &Path) -> usize {
    let segments = std::fs::read_dir(journal).unwrap().map(|entry| entry.unwrap().path());
    let segments = segments.filter(|path| path.extension().is_some_and(|extension| extension == "journal"));
    segments.map(|path| std::fs::read(path).unwrap().iter().filter(|byte| **byte != 0).count()).sum()
}
