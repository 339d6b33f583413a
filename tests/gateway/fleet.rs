//! Several gateways on one Redis: together they admit what the limit says, whatever happens to Redis or to one of them.
//!
//! What counts is what arrived upstream: the scripted upstream notes when each request came and what it was said to have
//! used, and afterwards every window of 60 s is looked at, wherever it begins.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use futures::future::join_all;
use serde_json::{Value, json};
use tokio::{
    sync::Mutex as AsyncMutex,
    time::{sleep, sleep_until},
};
use tollgate_core::limit::Limits;

use crate::support::{
    client::Response,
    fleet::Fleet,
    openai::{chat, chat_stream, event},
    redis::{Cluster, Redis},
    upstream::{Answer, Script, Upstream},
};

const RPM: u32 = 600;
const TPM: u64 = 60_000;
const WINDOW: Duration = Duration::from_secs(60);
/// How long clients ask: two whole windows, and some time to begin and to end.
const RUN: Duration = Duration::from_secs(130);
const CLIENTS: usize = 1000;
/// Clients do not come back all at once.
const JITTER_MS: u64 = 2000;

/// One rush at a time: several at once are more than a small machine bears, and would measure that.
static ALONE: AsyncMutex<()> = AsyncMutex::const_new(());

/// A request that arrived upstream.
#[derive(Clone, Copy)]
struct Arrival {
    at: Instant,
    tokens: u64,
}

type Arrivals = Arc<Mutex<Vec<Arrival>>>;

/// An upstream that notes what arrives; answers use 50 to 150 tokens, less than is estimated.
fn noting_upstream() -> (Upstream, Arrivals) {
    let arrivals = Arrivals::default();
    let notes = Arc::clone(&arrivals);
    let upstream = Upstream::start(Script::by(move |_| {
        let mut notes = notes.lock().unwrap();
        let completion = 30 + scattered(notes.len() as u64) % 101;
        notes.push(Arrival { at: Instant::now(), tokens: 20 + completion });
        using(20, completion)
    }));
    (upstream, arrivals)
}

fn using(prompt: u64, completion: u64) -> Answer {
    let usage =
        json!({ "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion });
    Answer::json(200, &json!({ "object": "chat.completion", "model": "gpt-4o", "choices": [], "usage": usage }))
}

fn body(max_tokens: u64) -> String {
    let mut body = chat();
    body["max_tokens"] = json!(max_tokens);
    body.to_string()
}

/// Numbers without order, the same in every run (the finaliser of SplitMix64).
fn scattered(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

/// A client: asks, and when it is refused, comes back when it was told to.
async fn client(fleet: &Fleet, number: usize, until: Instant) {
    let (body, mut tries) = (body(130), 0);
    while Instant::now() < until {
        let answer = fleet.ask(number % fleet.len(), &body).await.expect("an answer");
        tries += 1;
        match answer.status.as_u16() {
            200 => {}
            429 => {
                let told: Option<u64> = answer.header("retry-after-ms").and_then(|ms| ms.parse().ok());
                let jitter = scattered(number as u64 * 1_000_000 + tries) % JITTER_MS;
                let wait = Duration::from_millis(told.expect("a time to come back") + jitter);
                sleep_until((Instant::now() + wait).min(until).into()).await;
            }
            status => panic!("{status}: {}", String::from_utf8_lossy(&answer.body)),
        }
    }
}

/// Limits are counted by the second in which a request was admitted; it arrives upstream a moment later. The first burst
/// begins with a second, so that it is no moment which decides into which one it falls.
fn until_next_second() -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    Duration::from_secs(now.as_secs() + 1) - now
}

/// A thousand clients ask a fleet for a while; what came through, with the time of the start.
async fn rush(redis: &str, meanwhile: impl Future<Output = ()>) -> (Instant, Vec<Arrival>) {
    let _alone = ALONE.lock().await;
    let (upstream, arrivals) = noting_upstream();
    let limits = Limits { rpm: Some(RPM), tpm: Some(TPM), ..Limits::default() };
    let fleet = Arc::new(Fleet::start(3, redis, &upstream.base_url(), limits));
    sleep(until_next_second()).await;
    let start = Instant::now();
    let clients = (0..CLIENTS).map(|number| {
        let fleet = Arc::clone(&fleet);
        tokio::spawn(async move { client(&fleet, number, start + RUN).await })
    });
    let clients: Vec<_> = clients.collect();
    let (ended, ()) = tokio::join!(join_all(clients), meanwhile);
    ended.into_iter().for_each(|ended| ended.unwrap());
    println!("{}", fleet.warnings());
    let arrivals = arrivals.lock().unwrap().clone();
    (start, arrivals)
}

/// Requests and tokens in the 60 s from `from` on.
fn in_window(arrivals: &[Arrival], from: Instant) -> (u64, u64) {
    let first = arrivals.partition_point(|arrival| arrival.at < from);
    let end = arrivals.partition_point(|arrival| arrival.at < from + WINDOW);
    let window = &arrivals[first..end];
    (window.len() as u64, window.iter().map(|arrival| arrival.tokens).sum())
}

/// No window, wherever it begins, holds more than the limit. A window that holds the most begins with an arrival.
fn assert_never_exceeded(start: Instant, arrivals: &[Arrival]) {
    for arrival in arrivals {
        let (requests, tokens) = in_window(arrivals, arrival.at);
        let from = arrival.at - start;
        assert!(requests <= u64::from(RPM) && tokens <= TPM, "{requests} requests, {tokens} tokens from {from:?} on");
    }
}

/// The share of each limit that was used in the mean over all whole windows of the run.
fn utilisation(name: &str, start: Instant, arrivals: &[Arrival]) -> (f64, f64) {
    let starts = (0..).map(|n| start + Duration::from_millis(100) * n).take_while(|from| *from + WINDOW <= start + RUN);
    let windows: Vec<_> = starts.map(|from| in_window(arrivals, from)).collect();
    let mean = |of: fn(&(u64, u64)) -> u64| windows.iter().map(of).sum::<u64>() as f64 / windows.len() as f64;
    let (requests, tokens) = (mean(|w| w.0) / f64::from(RPM), mean(|w| w.1) / TPM as f64);
    let most = |of: fn(&(u64, u64)) -> u64| arrivals.iter().map(|a| of(&in_window(arrivals, a.at))).max().unwrap_or(0);
    println!(
        "{name}: utilisation {:.1} % of the requests, {:.1} % of the tokens; at most {} and {} in a window; {} in all",
        100.0 * requests,
        100.0 * tokens,
        most(|w| w.0),
        most(|w| w.1),
        arrivals.len()
    );
    (requests, tokens)
}

fn assert_used_well(name: &str, (start, arrivals): (Instant, Vec<Arrival>)) {
    let (requests, tokens) = utilisation(name, start, &arrivals);
    assert_never_exceeded(start, &arrivals);
    assert!(requests.max(tokens) >= 0.9, "one of the two limits is used");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_gateways_together_use_a_limit_and_never_exceed_it() {
    let redis = Redis::start();
    assert_used_well("one Redis", rush(&redis.url(), async {}).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_gateways_on_a_cluster_use_a_limit_and_never_exceed_it() {
    let cluster = Cluster::start();
    assert_used_well("a cluster", rush(&cluster.urls(), async {}).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_holds_while_redis_is_away_and_when_it_is_back_without_its_memory() {
    let mut redis = Redis::start();
    let url = redis.url();
    let mut back = None;
    let (start, arrivals) = rush(&url, async {
        sleep(RUN / 2).await;
        redis.stop();
        sleep(Duration::from_secs(3)).await;
        redis.restart();
        back = Some(Instant::now());
    })
    .await;
    utilisation("Redis restarted", start, &arrivals);
    assert_never_exceeded(start, &arrivals);
    let later = back.expect("it was restarted") + Duration::from_secs(10);
    let after = arrivals.iter().filter(|arrival| arrival.at > later).count();
    assert!(after >= 300, "only {after} requests when Redis was back");
}

#[tokio::test]
async fn what_a_killed_gateway_had_in_flight_is_free_after_its_time() {
    let upstream = Upstream::start(Script::by(|_| {
        Answer::sse([event("a", None), event("b", None)]).pause(Duration::from_secs(120))
    }));
    let redis = Redis::start();
    let limits = Limits { concurrency: Some(4), ..Limits::default() };
    let mut fleet = Fleet::start(2, &redis.url(), &upstream.base_url(), limits);
    let streams = streams(&fleet, 0).await;
    assert_eq!(refusal(&fleet, 1).await, 429, "the other one knows of them");

    fleet.kill(0);
    let killed = Instant::now();
    drop(streams);
    let mut first = fleet.send(1, &chat_stream().to_string()).await.unwrap();
    while first.status == 429 {
        assert!(killed.elapsed() < Duration::from_secs(35), "they are still counted");
        sleep(Duration::from_millis(250)).await;
        first = fleet.send(1, &chat_stream().to_string()).await.unwrap();
    }
    let freed = killed.elapsed();
    println!("free {freed:?} after the kill");
    assert!((10..=32).contains(&freed.as_secs()), "{freed:?}");
    drop(first);
    sleep(Duration::from_millis(500)).await;
    let _streams = self::streams(&fleet, 1).await;
    assert_eq!(refusal(&fleet, 1).await, 429, "and no more than four");
}

/// Four streams that have begun.
async fn streams(fleet: &Fleet, replica: usize) -> Vec<Response> {
    let begun = (0..4).map(|_| async {
        let mut stream = fleet.send(replica, &chat_stream().to_string()).await.unwrap();
        assert_eq!(stream.status, 200);
        stream.chunk().await.unwrap().unwrap();
        stream
    });
    join_all(begun).await
}

async fn refusal(fleet: &Fleet, replica: usize) -> u16 {
    fleet.send(replica, &chat_stream().to_string()).await.unwrap().status.as_u16()
}

#[tokio::test]
async fn a_hundred_at_once_over_three_gateways_do_not_walk_through_a_quota_for_ten() {
    let _alone = ALONE.lock().await;
    let upstream = Upstream::start(using(40, 60));
    let redis = Redis::start();
    let limits = Limits { monthly_tokens: Some(1000), ..Limits::default() };
    let fleet = Fleet::start(3, &redis.url(), &upstream.base_url(), limits);
    let body = body(80); // and a prompt of some 25: a hundred each
    let answers = join_all((0..100).map(|n| fleet.ask(n % 3, &body))).await;
    let answers: Vec<_> = answers.into_iter().map(Result::unwrap).collect();
    let refused = |code: &Value| code == "insufficient_quota";
    assert!(answers.iter().all(|answer| answer.status == 200 || refused(&answer.json()["error"]["code"])));
    let admitted = answers.iter().filter(|answer| answer.status == 200).count();
    // What is held until an answer is there is an estimate that is at most 1.2 times too high or low.
    assert!((8..=10).contains(&admitted), "{admitted} admitted");
    assert_eq!(upstream.received().len(), admitted);
    sleep(Duration::from_millis(300)).await; // lines of the log are collected for a moment
    assert_eq!(fleet.warnings().trim(), "", "nobody takes a burst of first requests for a loss");
}
