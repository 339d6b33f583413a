//! Five upstreams that fail in turn, in every way, under constant load: as long as one of them is well, no client notices.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::json;

use crate::support::{
    gateway::{Gateway, PATIENCE},
    openai::{DONE, chat, chat_stream, completion, event, usage_event},
    upstream::{Answer, Received, Script, Upstream},
};

const CHAT: &str = "/v1/chat/completions";
const UPSTREAMS: usize = 5;
const CLIENTS: usize = 24;
/// How long each scene lasts.
const SCENE: Duration = Duration::from_millis(1500);

/// What is wrong with an upstream.
#[derive(Clone, Copy, Debug)]
enum Fault {
    None,
    Limited,
    Errors,
    Blackhole,
    HalfHeaders,
    Resets,
    ErrorEvents,
    Drips,
    Html,
}

use Fault::{Blackhole, Drips, ErrorEvents, Errors, HalfHeaders, Html, Limited, None as Well, Resets};

/// Scene by scene, what is wrong with each of them. In each scene somebody is well.
const SCENES: [[Fault; UPSTREAMS]; 9] = [
    [Well, Well, Well, Well, Well],
    [Limited, Well, Well, Errors, Well],
    [Limited, Blackhole, Well, Errors, Well],
    [Resets, Blackhole, HalfHeaders, Well, Errors],
    [Well, Well, Well, Well, ErrorEvents],
    [ErrorEvents, Drips, Html, Well, Limited],
    [Well, Errors, Errors, Errors, Errors],
    [HalfHeaders, Well, Blackhole, Resets, Drips],
    [Well, Well, Well, Well, Well],
];

impl Fault {
    fn answer(self, request: &Received) -> Answer {
        let is_stream = request.body.windows(13).any(|part| part == b"\"stream\":true");
        let well = || {
            let stream = [event("one", Some("null")), event(" two", Some("null")), usage_event(9, 3), DONE.to_owned()];
            if is_stream { Answer::sse(stream) } else { completion() }
        };
        let error = |status| Answer::json(status, &json!({ "error": { "message": "no", "type": "server_error" } }));
        match self {
            Self::None => well(),
            Self::Limited => error(429).header("retry-after-ms", "700"),
            Self::Errors => error(500),
            Self::Blackhole => Answer::never(),
            Self::HalfHeaders => Answer::half_header(),
            Self::Resets => Answer::reset(),
            Self::ErrorEvents if is_stream => Answer::sse(["data: {\"error\":{\"message\":\"no\"}}\n\n"]),
            Self::ErrorEvents => error(503),
            Self::Drips => well().body_after(Duration::from_millis(150)).pause(Duration::from_millis(50)),
            Self::Html => Answer::text(200, "text/html", "<html>"),
        }
    }
}

struct Stage {
    scene: Arc<AtomicUsize>,
    upstreams: Vec<Upstream>,
    served: Arc<[AtomicU32; UPSTREAMS]>,
}

impl Stage {
    fn set() -> Self {
        let (scene, served) = (Arc::new(AtomicUsize::new(0)), Arc::new([const { AtomicU32::new(0) }; UPSTREAMS]));
        let upstream = |number: usize| {
            let (scene, served) = (Arc::clone(&scene), Arc::clone(&served));
            Upstream::start(Script::by(move |request| {
                served[number].fetch_add(1, Ordering::Relaxed);
                SCENES[scene.load(Ordering::Relaxed)][number].answer(request)
            }))
        };
        let upstreams = (0..UPSTREAMS).map(upstream).collect();
        Self { scene, upstreams, served }
    }

    fn gateway(&self) -> Gateway {
        let tables = "[pool]\nwait = \"3s\"\n\n[retry]\nattempts = 5\n\n[breaker]\nfailures = 3\nbackoff = \"200ms\"\nbackoff_max = \"800ms\"";
        let named = self.upstreams.iter().enumerate();
        let add = |builder: crate::support::gateway::Builder, (number, upstream): (usize, &Upstream)| {
            builder.upstream(&format!("u{number}"), &upstream.base_url(), "first_byte_timeout = \"400ms\"")
        };
        named.fold(Gateway::builder().tables(tables), add).start()
    }
}

/// One client: asks without a pause until the last scene is over; returns how long each answer took, and what went wrong.
async fn client(gateway: &Gateway, stage: &Stage, number: usize) -> (Vec<Duration>, Vec<String>) {
    let (mut took, mut wrong) = (Vec::new(), Vec::new());
    while stage.scene.load(Ordering::Relaxed) < SCENES.len() - 1 {
        let is_stream = (number + took.len()).is_multiple_of(2);
        let began = Instant::now();
        let answer = gateway.ask(CHAT, &if is_stream { chat_stream() } else { chat() }).await;
        took.push(began.elapsed());
        let text = String::from_utf8_lossy(&answer.body);
        let is_whole = if is_stream { text.ends_with(DONE) } else { text.contains("\"hi\"") };
        if answer.status != 200 || !is_whole {
            wrong.push(format!("scene {}: {} {text}", stage.scene.load(Ordering::Relaxed), answer.status));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    (took, wrong)
}

#[tokio::test]
async fn while_one_upstream_is_well_no_client_notices() {
    let stage = Stage::set();
    let gateway = stage.gateway();
    let director = async {
        for scene in 0..SCENES.len() {
            stage.scene.store(scene, Ordering::Relaxed);
            tokio::time::sleep(SCENE).await;
        }
    };
    let clients = futures::future::join_all((0..CLIENTS).map(|number| client(&gateway, &stage, number)));
    let (results, ()) = tokio::join!(clients, director);
    let mut took: Vec<Duration> = results.iter().flat_map(|(took, _)| took).copied().collect();
    let wrong: Vec<&String> = results.iter().flat_map(|(_, wrong)| wrong).collect();
    took.sort_unstable();
    let (count, p99) = (took.len(), took[took.len() * 99 / 100]);
    let retries = gateway.metric("tollgate_retries_total").await;
    println!("{count} requests, {} failed, {retries} retries, p50 {:?}, p99 {p99:?}", wrong.len(), took[count / 2]);
    assert!(wrong.len() * 10_000 <= count, "{} of {count} failed: {:#?}", wrong.len(), &wrong[..wrong.len().min(10)]);

    // All are well again: each is back within its backoff.
    let before: Vec<u32> = stage.served.iter().map(|served| served.load(Ordering::Relaxed)).collect();
    let deadline = Instant::now() + PATIENCE;
    let are_back = || (0..UPSTREAMS).all(|n| stage.served[n].load(Ordering::Relaxed) > before[n]);
    while !are_back() {
        assert!(Instant::now() < deadline, "not all are back");
        assert_eq!(gateway.ask(CHAT, &chat()).await.status, 200);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
