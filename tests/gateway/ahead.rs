//! Admissions made ahead: that they spare Redis, and that limits hold all the same.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use chrono::Utc;
use prometheus::IntGauge;
use tokio::{task::JoinSet, time::sleep};
use tollgate::limiter::{Admission, Limiter, Options, Request, redis};
use tollgate_core::{
    id::{KeyId, UserId},
    key::KeyEntry,
    limit::{Amount, Limits, policy::Policy},
    openai::request::{RequestHead, parse},
    route::Dialect,
    secret::Secret,
    user::User,
};

use crate::support::redis::Redis;

const BODY: &str = r#"{"model":"m","max_tokens":90,"messages":[{"role":"user","content":"Hello"}]}"#;
/// Callers at once in each replica.
const CALLERS: usize = 8;

/// A limiter as a gateway has it.
#[derive(Clone)]
struct Replica {
    limiter: Limiter,
    key: Arc<KeyEntry>,
    head: Arc<RequestHead>,
    model: Arc<str>,
}

impl Replica {
    async fn start(server: &Redis, limits: Limits) -> Self {
        let degraded = IntGauge::new("degraded", "degraded").unwrap();
        let limiter = Limiter::try_new(Options {
            policy: Policy { key: limits, ..Policy::default() },
            assumed_output_tokens: 100,
            redis: Some(redis::Options {
                nodes: Secret::new(server.url()),
                patience: Duration::from_secs(5),
                degraded: degraded.clone(),
            }),
            refuses_without_redis: true,
        });
        let limiter = limiter.unwrap();
        let kept = limiter.clone();
        tokio::spawn(async move { kept.keep_linked().await });
        while degraded.get() == 1 {
            sleep(Duration::from_millis(5)).await;
        }
        let (user, head) = (User { id: UserId(1), ..user() }, parse(BODY.as_bytes()).unwrap());
        Self { limiter, key: Arc::new(key(user)), head: Arc::new(head), model: "m".into() }
    }

    async fn admit(&self) -> Option<Admission> {
        let request = Request {
            key: &self.key,
            ip: None,
            model: &self.model,
            body: BODY.as_bytes(),
            head: &self.head,
            dialect: Dialect::Chat,
            price: None,
            at: Utc::now(),
        };
        self.limiter.admit(request).await.ok()
    }

    /// Sends requests from all callers for a while; returns how many were admitted. All of them are over when it returns.
    async fn hammer(&self, during: Duration) -> u64 {
        let (until, admitted) = (Instant::now() + during, Arc::new(AtomicU64::new(0)));
        let mut callers = JoinSet::new();
        for _ in 0..CALLERS {
            let (replica, admitted) = (self.clone(), Arc::clone(&admitted));
            callers.spawn(async move {
                while Instant::now() < until {
                    match replica.admit().await {
                        Some(admission) => {
                            admitted.fetch_add(1, Ordering::Relaxed);
                            sleep(Duration::from_millis(1)).await;
                            let hold = admission.reservation.settle(Amount { tokens: 40, nano_usd: 0 });
                            assert!(hold.is_none(), "there is no quota");
                        }
                        None => sleep(Duration::from_millis(2)).await,
                    }
                }
            });
        }
        callers.join_all().await;
        admitted.load(Ordering::Relaxed)
    }
}

fn user() -> User {
    User { id: UserId(1), name: "u".into(), disabled: false, limits: Limits::default(), audit_content: None }
}

fn key(user: User) -> KeyEntry {
    KeyEntry {
        id: KeyId(1),
        name: "k".into(),
        prefix: "tg-".into(),
        user: Arc::new(user),
        models: Vec::new(),
        allow_ip: Vec::new(),
        limits: Limits::default(),
        model_limits: Vec::new(),
        audit_content: None,
        expires_at: None,
        revoked_at: None,
    }
}

fn calls(server: &Redis) -> u64 {
    let stats: String = server.command(&["INFO", "commandstats"]);
    let calls = stats.lines().find_map(|line| line.strip_prefix("cmdstat_evalsha:calls="));
    calls.and_then(|rest| rest.split(',').next()).map_or(0, |calls| calls.parse().unwrap())
}

/// What Redis has counted of the key in this minute, by asking for one more: requests, and tokens.
async fn counted(replica: &Replica) -> (u64, u64) {
    let admission = replica.admit().await.unwrap();
    let (requests, tokens) = (admission.standing.requests.unwrap(), admission.standing.tokens.unwrap());
    let need = admission.need.amount.tokens;
    (requests.limit - requests.remaining - 1, tokens.limit - tokens.remaining - need)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_sends_much_seldom_waits_for_redis_and_is_counted_exactly() {
    let server = Redis::start();
    let limits =
        Limits { rpm: Some(100_000_000), tpm: Some(100_000_000_000), concurrency: Some(100_000), ..Limits::default() };
    let replica = Replica::start(&server, limits).await;
    let before = calls(&server);
    let admitted = replica.hammer(Duration::from_secs(3)).await;
    let asked = calls(&server) - before;
    assert!(asked * 3 < admitted, "Redis was asked {asked} times for {admitted} requests");
    // Once in 20 ms for more, and what is given back goes along.
    assert!(asked < 600, "Redis was asked {asked} times in three seconds");
    // What was not used is given back within a cell and a sweep, and corrections are carried by then.
    sleep(Duration::from_millis(1_600)).await;
    assert_eq!(counted(&replica).await, (admitted, 40 * admitted));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_that_take_ahead_share_a_limit_exactly() {
    const LIMIT: u32 = 12_000;
    let server = Redis::start();
    let limits = Limits { rpm: Some(LIMIT), tpm: Some(100_000_000_000), ..Limits::default() };
    let (one, other) = (Replica::start(&server, limits).await, Replica::start(&server, limits).await);
    let began = Instant::now();
    let mut admitted = 0;
    // A slow machine needs longer to use the limit up; all of it happens within one window.
    while admitted < u64::from(LIMIT) && began.elapsed() < Duration::from_secs(40) {
        let during = Duration::from_millis(1_500);
        let (of_one, of_other) = tokio::join!(one.hammer(during), other.hammer(during));
        admitted += of_one + of_other;
        sleep(Duration::from_millis(300)).await;
    }
    assert!(began.elapsed() < Duration::from_secs(55), "the window is over");
    assert_eq!(admitted, u64::from(LIMIT), "all of the limit, and no more");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_taken_ahead_of_a_tight_limit() {
    let server = Redis::start();
    let limits = Limits { rpm: Some(100_000_000), concurrency: Some(60), ..Limits::default() };
    let replica = Replica::start(&server, limits).await;
    replica.hammer(Duration::from_millis(500)).await;
    let held: Vec<_> = {
        let mut held = Vec::new();
        while let Some(admission) = replica.admit().await {
            held.push(admission);
        }
        held
    };
    assert_eq!(held.len(), 60, "every slot can be had at any moment");
}
