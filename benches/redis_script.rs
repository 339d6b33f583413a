//! What the scripts cost in Redis: `cargo bench --bench redis_script`.
//!
//! Redis runs one script at a time, so its time bounds how many requests all replicas together can admit. It is Redis's
//! own figure (`INFO commandstats`), at limits of 10,000 RPM, near which the subjects are all the time (on a simulated
//! clock), and at limits a thousand times as high, to show that it does not grow. Every subject has a limit of each kind.
//! An address, a user, a key, and a model within it are all that one request has; a fifth is for good measure. Requests at
//! once share a call, so the figure is given for one that is alone, for eight at once and for eight that are decided on
//! together, each with what an earlier one gave back. What a script costs that does nothing stands beside it: the figures
//! of a machine that is disturbed grow together. Medians of interleaved rounds, with the least and the most.

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use prometheus::IntGauge;
use redis::Commands;
use tollgate::limiter::{
    redis::{Asked, Clock, Counted, Options, Redis, Reserved, Verdict},
    redis_wire::{Change, Known, key_of},
};
use tollgate_core::{
    id::{KeyId, UserId},
    limit::{
        Amount, Caps, Month, Subject,
        state::{Demand, Need},
    },
    secret::Secret,
};

/// Requests of a round.
const REQUESTS: u64 = 2_000;
const ROUNDS: usize = 15;
/// Rounds before them, in which the windows fill.
const FIRST_ROUNDS: usize = 5;

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // At the end there is nobody left to tell.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn main() -> anyhow::Result<()> {
    if !std::env::args().any(|argument| argument == "--bench") {
        println!("measures only under `cargo bench`");
        return Ok(());
    }
    let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port().to_string();
    let server = Command::new("redis-server")
        .args(["--bind", "127.0.0.1", "--port", &port, "--save", "", "--appendonly", "no"])
        .stdout(Stdio::null())
        .spawn()
        .context("redis-server is needed (apt-get install redis-server)")?;
    let _server = Server(server);
    std::thread::sleep(Duration::from_millis(500));
    let url = format!("redis://127.0.0.1:{port}");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(compare(&url))
}

async fn compare(url: &str) -> anyhow::Result<()> {
    let mut control = redis::Client::open(url)?.get_connection()?;
    let mut cases = Vec::new();
    for rpm in [10_000, 10_000_000] {
        for (subjects, at_once, may_join) in [(4, 1, false), (5, 1, false), (5, 8, false), (5, 8, true)] {
            let demands = some_subjects(subjects, cases.len(), rpm);
            cases.push(Case::new(url, rpm, at_once, may_join, demands).await?);
        }
    }
    let (mut empty, mut figures) = (Vec::new(), vec![Vec::new(); cases.len()]);
    for round in 0..FIRST_ROUNDS + ROUNDS {
        let nothing = empty_script(&mut control)?;
        let mut us = Vec::new();
        for case in &mut cases {
            us.push(case.round(&mut control).await?);
        }
        if round >= FIRST_ROUNDS {
            empty.push(nothing);
            figures.iter_mut().zip(us).for_each(|(figures, us)| figures.push(us));
        }
    }
    println!("microseconds of Redis's time, median [least..most] of {ROUNDS} rounds of {REQUESTS} requests");
    println!("a script that does nothing, per call: {}", median(&mut empty));
    for (case, figures) in cases.iter().zip(&mut figures) {
        let how = if case.may_join { "together" } else { "at once" };
        let (subjects, rpm, at_once) = (case.demands.len(), case.rpm, case.at_once);
        println!("{subjects} subjects at {rpm} RPM, {at_once} {how}, per request: {}", median(figures));
    }
    Ok(())
}

fn median(figures: &mut [f64]) -> String {
    figures.sort_by(f64::total_cmp);
    format!("{:.1} [{:.1}..{:.1}]", figures[figures.len() / 2], figures[0], figures[figures.len() - 1])
}

/// What the call itself costs, with as many keys and as long arguments.
fn empty_script(control: &mut redis::Connection) -> anyhow::Result<f64> {
    let script: String = redis::cmd("SCRIPT").arg("LOAD").arg("return 1").query(control)?;
    let () = redis::cmd("CONFIG").arg("RESETSTAT").query(control)?;
    let keys: Vec<String> = some_subjects(5, 0, 1).iter().map(|demand| key_of(&demand.subject)).collect();
    for _ in 0..REQUESTS {
        let call =
            redis::cmd("EVALSHA").arg(&script).arg(keys.len()).arg(&keys).arg([0_u8; 190].as_slice()).query(control);
        let _one: i64 = call?;
    }
    Ok(script_usec(control)? / REQUESTS as f64)
}

fn options(url: impl Into<String>) -> Options {
    let degraded = IntGauge::new("degraded", "degraded").expect("a valid name");
    Options { nodes: Secret::new(url.into()), patience: Duration::from_secs(2), degraded }
}

/// Requests at one limit, so many at once.
struct Case {
    rpm: u64,
    at_once: u64,
    /// Are they admitted together, as they are where limits leave ample room?
    may_join: bool,
    limiter: Redis,
    clock: Arc<AtomicU64>,
    now_us: u64,
    demands: Arc<[Demand]>,
}

impl Case {
    async fn new(url: &str, rpm: u64, at_once: u64, may_join: bool, demands: Arc<[Demand]>) -> anyhow::Result<Self> {
        let clock = Arc::new(AtomicU64::new(1_800_000_000_000));
        let limiter = Redis::new(options(url), *b"bench---", Clock::Given(Arc::clone(&clock)));
        limiter.connect(0).await?;
        let now_us = clock.load(Ordering::Relaxed) * 1000;
        Ok(Self { rpm, at_once, may_join, limiter, clock, now_us, demands })
    }

    /// Microseconds of Redis's time per request.
    async fn round(&mut self, control: &mut redis::Connection) -> anyhow::Result<f64> {
        let Self { rpm, at_once, may_join, limiter, clock, now_us, demands } = self;
        let () = redis::cmd("CONFIG").arg("RESETSTAT").query(control)?;
        // 9 of 10 of what the limit allows, so that the windows are nearly full and every request is admitted.
        let step = 60_000_000 / (*rpm * 9 / 10);
        for _ in 0..REQUESTS / *at_once {
            *now_us += step.max(1) * *at_once;
            clock.store(*now_us / 1000, Ordering::Relaxed);
            let one = || {
                let known = || vec![Known::default(); demands.len()];
                let need = Need::from(Amount { tokens: 100, nano_usd: 100_000 });
                let asked = Asked { may_join: *may_join, ..Asked::alone(demands, need, Month(24_322)) };
                limiter.admit(asked, 0, known)
            };
            for verdict in futures::future::join_all((0..*at_once).map(|_| one())).await {
                let Ok(Verdict { decision: Ok(counted), .. }) = verdict else { anyhow::bail!("{verdict:?}") };
                give_back(limiter, demands, counted);
            }
        }
        Ok(script_usec(control)? / REQUESTS as f64)
    }
}

/// The request is over, and used less than was reserved.
fn give_back(limiter: &Redis, demands: &[Demand], counted: Counted) {
    let reserved = Reserved { session: Some(counted.session), cells: Some(counted.cells) };
    let hold = Amount { tokens: 60, nano_usd: 60_000 };
    let change = |demand: &Demand| Change {
        ended: 1,
        cell: counted.cells[0],
        tokens: 40,
        hold,
        ..Change::of(demand.subject.clone())
    };
    limiter.change(reserved, || demands.iter().map(change).collect());
}

/// Microseconds that scripts took since the figures were reset.
fn script_usec(control: &mut redis::Connection) -> anyhow::Result<f64> {
    let () = control.ping()?;
    let stats: String = redis::cmd("INFO").arg("commandstats").query(control)?;
    let line = stats.lines().find(|line| line.starts_with("cmdstat_evalsha:")).context("no script was called")?;
    let figure =
        line.split(',').find_map(|part| part.strip_prefix("usec=").or(part.split_once("usec=").map(|(_, n)| n)));
    Ok(figure.context("no such figure")?.parse()?)
}

/// So many subjects (up to 5), of a user of their own for each case.
fn some_subjects(count: usize, number: usize, rpm: u64) -> Arc<[Demand]> {
    let number = u32::try_from(number).unwrap_or(0);
    let user = UserId(number.into());
    let key = KeyId(1);
    let tpm = rpm * 100;
    let caps = Caps { rpm, tpm, concurrency: 1_000_000, monthly_tokens: 1_000_000_000_000, monthly_nano_usd: 0 };
    let subjects = [
        Subject::Ip(std::net::Ipv4Addr::from_bits(number).into()),
        Subject::User(user),
        Subject::Key(user, key),
        Subject::KeyModel(user, key, "gpt-4o".into()),
        Subject::KeyModel(user, key, "gpt-4o-mini".into()),
    ];
    subjects.into_iter().take(count).map(|subject| Demand { subject, caps }).collect()
}
