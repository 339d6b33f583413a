//! Redis is not there, goes away, freezes, forgets, refuses to write, or holds what is not ours: limits hold, and no
//! request waits for it.
//!
//! The bounds of time are generous: a machine that is busy with other tests must not fail these.

use std::{
    io::Write,
    sync::{Arc, Mutex, OnceLock},
    time::{Duration, Instant},
};

use futures::future::join_all;
use serde_json::{Value, json};
use tokio::time::sleep;
use tollgate::store::KeySpec;
use tollgate_core::limit::Limits;

use crate::support::{
    client::Whole,
    gateway::{Builder, Gateway, PATIENCE},
    openai::{chat, chat_stream, completion, event},
    redis::Redis,
    upstream::{Answer, Script, Upstream},
};

const CHAT: &str = "/v1/chat/completions";
const DEGRADED: &str = "tollgate_limiter_degraded";
/// Far more than a request may wait for a dead Redis, for a machine that is busy.
const BOUNDED: Duration = Duration::from_secs(5);
/// Longer than it takes a replica to look at Redis by itself.
const A_LOOK: Duration = Duration::from_millis(1200);

fn gateway(redis: &Redis, upstream: &Upstream, more: &str, limits: Limits) -> Builder {
    Gateway::builder()
        .upstream("main", &upstream.base_url(), "")
        .tables(&format!("[limiter]\nredis = \"{}\"\n{more}", redis.url()))
        .key(KeySpec { limits, ..KeySpec::default() })
}

fn rpm(rpm: u32) -> Limits {
    Limits { rpm: Some(rpm), ..Limits::default() }
}

async fn status(gateway: &Gateway) -> u16 {
    let start = Instant::now();
    let status = gateway.ask(CHAT, &chat()).await.status.as_u16();
    assert!(start.elapsed() < BOUNDED, "a request waited {:?}", start.elapsed());
    status
}

/// How many of `tries`, one after another, are admitted; all others are refused.
async fn admitted(gateway: &Gateway, tries: usize) -> usize {
    let mut count = 0;
    for _ in 0..tries {
        let status = status(gateway).await;
        assert!(matches!(status, 200 | 429), "{status}");
        count += usize::from(status == 200);
    }
    count
}

/// Waits until Redis is asked, or is not.
async fn until_degraded(gateway: &Gateway, is_degraded: bool) {
    let start = Instant::now();
    while gateway.metric(DEGRADED).await != f64::from(u8::from(is_degraded)) {
        assert!(start.elapsed() < PATIENCE, "{DEGRADED} does not become {}", u8::from(is_degraded));
        sleep(Duration::from_millis(20)).await;
    }
}

/// The name of the one key's state in Redis.
fn state_of_key(redis: &Redis) -> String {
    let names: Vec<String> = redis.command(&["KEYS", "tollgate:3:*:key:*"]);
    let [name] = &names[..] else { panic!("{names:?}") };
    name.clone()
}

/// What all tests of this process log from here on.
fn log() -> &'static Log {
    static LOG: OnceLock<Log> = OnceLock::new();
    LOG.get_or_init(|| {
        let log = Log::default();
        let writer = log.clone();
        let fmt = tracing_subscriber::fmt().with_max_level(tracing::Level::WARN).with_ansi(false);
        fmt.with_writer(move || writer.clone()).try_init().expect("no other test reads the log");
        log
    })
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn lines_with(&self, part: &str) -> usize {
        let bytes = self.0.lock().unwrap();
        String::from_utf8_lossy(&bytes).lines().filter(|line| line.contains(part)).count()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn without_redis_at_the_start_limits_hold_and_still_hold_when_it_comes() {
    let mut redis = Redis::start();
    redis.stop();
    let upstream = Upstream::start(completion());
    let gateway = gateway(&redis, &upstream, "", rpm(3)).start();
    assert_eq!(admitted(&gateway, 2).await, 2);
    assert_eq!(gateway.metric(DEGRADED).await, 1.0);
    redis.restart();
    until_degraded(&gateway, false).await;
    assert_eq!(admitted(&gateway, 3).await, 1, "two were used before");
}

#[tokio::test]
async fn when_redis_goes_away_and_comes_back_limits_hold_all_along() {
    let mut redis = Redis::start();
    let upstream = Upstream::start(completion());
    let gateway = gateway(&redis, &upstream, "", rpm(6)).start();
    until_degraded(&gateway, false).await;
    assert_eq!(admitted(&gateway, 2).await, 2);
    redis.stop();
    assert_eq!(admitted(&gateway, 2).await, 2);
    until_degraded(&gateway, true).await;
    redis.restart();
    until_degraded(&gateway, false).await;
    assert_eq!(admitted(&gateway, 4).await, 2, "four were used before");
    assert_eq!(upstream.received().len(), 6);
}

#[tokio::test]
async fn a_redis_that_freezes_holds_nobody_up() {
    let redis = Redis::start();
    let upstream = Upstream::start(completion());
    let gateway = gateway(&redis, &upstream, "", rpm(10)).start();
    until_degraded(&gateway, false).await;
    assert_eq!(admitted(&gateway, 4).await, 4);
    redis.pause();
    let start = Instant::now();
    let body = chat();
    let burst = join_all((0..30).map(|_| gateway.ask(CHAT, &body))).await;
    assert!(start.elapsed() < BOUNDED, "{:?}", start.elapsed());
    assert_eq!(burst.iter().filter(|answer| answer.status == 200).count(), 6);
    until_degraded(&gateway, true).await;
    assert_eq!(admitted(&gateway, 5).await, 0);
    redis.resume();
    until_degraded(&gateway, false).await;
    assert_eq!(admitted(&gateway, 5).await, 0);
}

#[tokio::test]
async fn deny_answers_503_until_redis_is_back() {
    let mut redis = Redis::start();
    let upstream = Upstream::start(completion());
    let gateway = gateway(&redis, &upstream, "on_redis_down = \"deny\"", rpm(5)).start();
    until_degraded(&gateway, false).await;
    assert_eq!(status(&gateway).await, 200);
    redis.stop();
    let refused = gateway.ask(CHAT, &chat()).await;
    assert_eq!(code(&refused), (503, "limiter_unavailable".to_owned()));
    assert_eq!(refused.header("retry-after"), Some("1"));
    until_degraded(&gateway, true).await;
    assert_eq!(status(&gateway).await, 503);
    redis.restart();
    until_degraded(&gateway, false).await;
    assert_eq!(admitted(&gateway, 9).await, 4);
    assert_eq!(upstream.received().len(), 5);
}

fn code(answer: &Whole) -> (u16, String) {
    let body: Value = serde_json::from_slice(&answer.body).unwrap();
    (answer.status.as_u16(), body["error"]["code"].as_str().unwrap().to_owned())
}

#[tokio::test]
async fn a_redis_that_does_not_write_is_as_good_as_none() {
    let ways: [[&[&str]; 2]; 2] = [
        [&["REPLICAOF", "127.0.0.1", "1"], &["REPLICAOF", "NO", "ONE"]],
        [&["CONFIG", "SET", "min-replicas-to-write", "1"], &["CONFIG", "SET", "min-replicas-to-write", "0"]],
    ];
    for [stop_writing, write_again] in ways {
        let redis = Redis::start();
        let upstream = Upstream::start(completion());
        let gateway = gateway(&redis, &upstream, "", rpm(5)).start();
        until_degraded(&gateway, false).await;
        assert_eq!(admitted(&gateway, 2).await, 2);
        let () = redis.command(stop_writing);
        assert_eq!(admitted(&gateway, 2).await, 2);
        until_degraded(&gateway, true).await;
        let () = redis.command(write_again);
        until_degraded(&gateway, false).await;
        assert_eq!(admitted(&gateway, 4).await, 1);
    }
}

#[tokio::test]
async fn what_is_not_ours_is_left_alone_and_named() {
    let log = log();
    let upstream = Upstream::start(completion());
    // As long as a state, nearly, and like one where that says whose it is.
    let long = "3".repeat(620);
    let foreign: [[&[&str]; 2]; 3] = [
        [&["RPUSH", "KEY", "a", "b"], &["LRANGE", "KEY", "0", "-1"]],
        [&["SET", "KEY", "somebody else's"], &["GET", "KEY"]],
        [&["SET", "KEY", &long], &["GET", "KEY"]],
    ];
    for [put, read] in foreign {
        let redis = Redis::start();
        let gateway = gateway(&redis, &upstream, "", rpm(4)).start();
        until_degraded(&gateway, false).await;
        assert_eq!(admitted(&gateway, 2).await, 2);
        let name = state_of_key(&redis);
        let on = |words: &[&str]| -> Vec<String> {
            words.iter().map(|word| if *word == "KEY" { name.clone() } else { (*word).to_owned() }).collect()
        };
        let run = |words: &[&str]| -> redis::Value {
            redis.command(&on(words).iter().map(String::as_str).collect::<Vec<_>>())
        };
        let () = redis.command(&["DEL", &name]);
        run(put);
        let before = run(read);
        assert_eq!(admitted(&gateway, 5).await, 2, "two of four were used before");
        sleep(A_LOOK).await;
        assert_eq!(run(read), before);
        assert!(log.lines_with(&name) > 0, "the log names the key");
        assert_eq!(gateway.metric(DEGRADED).await, 0.0, "Redis is well");
    }
}

#[tokio::test]
async fn a_redis_that_is_emptied_gives_nothing_twice() {
    let upstream = Upstream::start(Script::by(|request| {
        let body: Value = serde_json::from_slice(&request.body).unwrap();
        if body["stream"] == json!(true) {
            return Answer::sse([event("a", None), event("b", None)]).pause(Duration::from_secs(5));
        }
        completion()
    }));
    for looks_first in [false, true] {
        let redis = Redis::start();
        let gateway = gateway(&redis, &upstream, "", rpm(5)).start();
        until_degraded(&gateway, false).await;
        let request = gateway.post(CHAT).body_content_length(chat_stream().to_string());
        let mut in_flight = request.send().await.unwrap();
        assert_eq!(in_flight.status, 200);
        in_flight.chunk().await.unwrap().unwrap();
        assert_eq!(admitted(&gateway, 4).await, 4);
        let () = redis.command(&["FLUSHALL"]);
        if looks_first {
            sleep(A_LOOK).await;
        }
        assert_eq!(admitted(&gateway, 3).await, 0, "looks first: {looks_first}");
        until_degraded(&gateway, false).await;
        assert_eq!(admitted(&gateway, 3).await, 0);
    }
}

#[tokio::test]
async fn a_redis_that_lost_its_scripts_is_given_them_again() {
    let redis = Redis::start();
    let upstream = Upstream::start(completion());
    let gateway = gateway(&redis, &upstream, "", rpm(6)).start();
    until_degraded(&gateway, false).await;
    assert_eq!(admitted(&gateway, 2).await, 2);
    let () = redis.command(&["SCRIPT", "FLUSH"]);
    assert_eq!(admitted(&gateway, 2).await, 2);
    sleep(A_LOOK).await;
    until_degraded(&gateway, false).await;
    assert_eq!(admitted(&gateway, 4).await, 2);
}

#[tokio::test]
async fn two_gateways_hold_one_limit_and_one_quota() {
    let redis = Redis::start();
    let usage = json!({ "prompt_tokens": 50, "completion_tokens": 50, "total_tokens": 100 });
    let upstream = Upstream::start(Answer::json(200, &json!({ "choices": [], "usage": usage })));
    let quota = Limits { monthly_tokens: Some(1000), ..Limits::default() };
    for limits in [rpm(10), quota] {
        let () = redis.command(&["FLUSHALL"]);
        let first = gateway(&redis, &upstream, "", limits).start();
        let second = gateway(&redis, &upstream, "", limits).beside(&first).start();
        until_degraded(&first, false).await;
        until_degraded(&second, false).await;
        let mut count = 0;
        for _ in 0..10 {
            count += admitted(&first, 1).await + admitted(&second, 1).await;
        }
        assert_eq!(count, 10, "{limits:?}");
    }
}

#[tokio::test]
async fn two_gateways_that_lose_redis_stay_within_one_limit() {
    let mut redis = Redis::start();
    let upstream = Upstream::start(completion());
    let first = gateway(&redis, &upstream, "", rpm(20)).start();
    let second = gateway(&redis, &upstream, "", rpm(20)).beside(&first).start();
    until_degraded(&first, false).await;
    until_degraded(&second, false).await;
    sleep(A_LOOK).await; // both know of each other
    assert_eq!(admitted(&first, 6).await + admitted(&second, 4).await, 10);
    sleep(A_LOOK).await; // both know what the other one did
    redis.stop();
    let alone = admitted(&first, 20).await + admitted(&second, 20).await;
    assert!((6..=10).contains(&alone), "{alone} of the 10 that were left");
    redis.restart();
    until_degraded(&first, false).await;
    until_degraded(&second, false).await;
    let again = admitted(&first, 20).await + admitted(&second, 20).await;
    assert!(alone + again <= 10, "{alone} and {again} of the 10 that were left");
}
