//! The pool through the gateway: who is asked, who is left alone, and what the client gets when nobody is left.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::support::{
    client::Whole,
    gateway::{Gateway, PATIENCE},
    openai::{DONE, chat, chat_stream, completion, event, usage_event},
    redis::Redis,
    upstream::{Answer, Script, Upstream},
};

const CHAT: &str = "/v1/chat/completions";
const RESPONSES: &str = "/v1/responses";

fn error(status: u16, code: &str) -> Answer {
    Answer::json(status, &json!({ "error": { "message": "no", "type": code, "param": null, "code": code } }))
}

fn stream() -> Answer {
    Answer::sse([event("one", Some("null")), usage_event(9, 3), DONE.to_owned()])
}

async fn state(gateway: &Gateway, upstream: &str, state: &str) -> bool {
    gateway.metric(&format!("tollgate_upstream_state{{state=\"{state}\",upstream=\"{upstream}\"}}")).await == 1.0
}

async fn until(gateway: &Gateway, upstream: &str, wanted: &str) {
    let deadline = Instant::now() + PATIENCE;
    while !state(gateway, upstream, wanted).await {
        assert!(Instant::now() < deadline, "{upstream} is not {wanted}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn code(answer: &Whole) -> (u16, Value) {
    (answer.status.as_u16(), answer.json()["error"]["code"].clone())
}

async fn statuses(gateway: &Gateway, count: usize) -> Vec<u16> {
    let mut statuses = Vec::new();
    for _ in 0..count {
        statuses.push(gateway.ask(CHAT, &chat()).await.status.as_u16());
    }
    statuses
}

/// An upstream that fails until it is healed.
fn sick(fault: Answer) -> (Upstream, Arc<AtomicBool>) {
    let healed = Arc::new(AtomicBool::new(false));
    let is_healed = Arc::clone(&healed);
    let script = Script::by(move |_| if is_healed.load(Ordering::Relaxed) { completion() } else { fault.clone() });
    (Upstream::start(script), healed)
}

#[tokio::test]
async fn who_fails_is_left_alone_and_comes_back() {
    let ((bad, healed), good) = (sick(error(500, "server_error")), Upstream::start(completion()));
    let gateway = Gateway::builder()
        .tables("[breaker]\nbackoff = \"300ms\"\nbackoff_max = \"300ms\"")
        .upstream("bad", &bad.base_url(), "")
        .upstream("good", &good.base_url(), "priority = 1")
        .start();
    assert_eq!(statuses(&gateway, 20).await, [200; 20]);
    assert_eq!(bad.received().len(), 5, "five failures are enough");
    assert!(state(&gateway, "bad", "open").await);
    until(&gateway, "bad", "half_open").await;
    assert_eq!(statuses(&gateway, 3).await, [200; 3]);
    assert_eq!(bad.received().len(), 6, "one request finds out");
    healed.store(true, Ordering::Relaxed);
    until(&gateway, "bad", "half_open").await;
    assert_eq!(statuses(&gateway, 3).await, [200; 3]);
    assert!(state(&gateway, "bad", "closed").await);
    assert_eq!(bad.received().len(), 9);
}

#[tokio::test]
async fn client_errors_say_nothing_about_an_upstream() {
    for status in [400, 404, 413, 422] {
        let strict = Upstream::start(error(status, "invalid_request_error"));
        let gateway = Gateway::before(&strict.base_url());
        assert_eq!(statuses(&gateway, 12).await, [status; 12]);
        assert!(state(&gateway, "main", "closed").await, "{status}");
    }
}

#[tokio::test]
async fn a_429_cools_for_as_long_as_it_says() {
    for (name, value) in [("retry-after", "1"), ("retry-after-ms", "800"), ("x-ratelimit-reset-requests", "900ms")] {
        let limit = error(429, "rate_limit_exceeded").header(name, value).header("x-ratelimit-remaining-requests", "0");
        let upstream = Upstream::start([limit, completion()]);
        let builder = Gateway::builder().tables("[pool]\nwait = \"0s\"");
        let gateway = builder.upstream("main", &upstream.base_url(), "").start();
        let began = Instant::now();
        let answer = gateway.ask(CHAT, &chat()).await;
        assert_eq!(code(&answer), (429, "rate_limit_exceeded".into()), "a 429 stays a 429");
        let wait_ms: u64 = answer.header("retry-after-ms").unwrap().parse().unwrap();
        assert!((500..=1000).contains(&wait_ms), "{name}: {wait_ms}");
        assert!(state(&gateway, "main", "cooling").await);
        let answer = gateway.ask(CHAT, &chat()).await;
        assert_eq!(code(&answer), (503, "upstream_unavailable".into()));
        let wait_ms: u64 = answer.header("retry-after-ms").unwrap().parse().unwrap();
        tokio::time::sleep(Duration::from_millis(wait_ms)).await;
        assert_eq!(gateway.ask(CHAT, &chat()).await.status, 200, "{name}: who waits as told is served");
        assert!(began.elapsed() >= Duration::from_millis(800));
        assert_eq!(upstream.received().len(), 2, "nobody asked meanwhile");
    }
}

#[tokio::test]
async fn a_request_waits_for_an_upstream_that_will_be_ready_in_a_moment() {
    let limit = || error(429, "rate_limit_exceeded").header("retry-after-ms", "600");
    let upstream = Upstream::start([limit(), completion(), completion(), completion()]);
    let gateway = Gateway::before(&upstream.base_url());
    assert_eq!(gateway.ask(CHAT, &chat()).await.status, 429);
    let body = chat();
    let (a, b, c) = tokio::join!(gateway.ask(CHAT, &body), gateway.ask(CHAT, &body), gateway.ask(CHAT, &body));
    assert_eq!([a.status, b.status, c.status].map(|status| status.as_u16()), [200; 3]);
    assert_eq!(upstream.received().len(), 4);
}

#[tokio::test]
async fn when_all_are_limited_the_soonest_is_named() {
    let slow = Upstream::start(error(429, "rate_limit_exceeded").header("retry-after", "60"));
    let fast = Upstream::start(error(429, "rate_limit_exceeded").header("retry-after", "7"));
    let broken = Upstream::start(error(500, "server_error"));
    let gateway = Gateway::builder()
        .upstream("slow", &slow.base_url(), "")
        .upstream("fast", &fast.base_url(), "priority = 1")
        .upstream("broken", &broken.base_url(), "priority = 2")
        .start();
    let answer = gateway.ask(CHAT, &chat()).await;
    assert_eq!(answer.status, 429, "more useful than the 500 that came last");
    assert_eq!(broken.received().len(), 1);
    let wait: u64 = answer.header("retry-after").unwrap().parse().unwrap();
    assert!(wait <= 7, "{wait}");
    let row = gateway.rows(1).await.remove(0);
    assert_eq!((row.status, row.code.as_deref()), (429, Some("http_429")));
}

#[tokio::test]
async fn a_bad_credential_is_quarantined_until_a_slow_probe_or_an_operator_frees_it() {
    let ((bad, healed), good) = (sick(error(401, "invalid_api_key")), Upstream::start(completion()));
    let gateway = Gateway::builder()
        .tables("[breaker]\nquarantine_probe = \"400ms\"\nquarantine_probe_max = \"400ms\"")
        .upstream("bad", &bad.base_url(), "")
        .upstream("good", &good.base_url(), "priority = 1")
        .start();
    assert_eq!(statuses(&gateway, 3).await, [200; 3]);
    assert_eq!(bad.received().len(), 1, "no time heals a credential");
    assert!(state(&gateway, "bad", "quarantined").await);
    // The scripted upstream lists its models whatever the credential: the probe thinks that it is well.
    until(&gateway, "bad", "half_open").await;
    assert_eq!(statuses(&gateway, 3).await, [200; 3]);
    assert_eq!(bad.received().len(), 2, "one request found out that it is not");
    healed.store(true, Ordering::Relaxed);
    until(&gateway, "bad", "half_open").await;
    assert_eq!(statuses(&gateway, 2).await, [200; 2]);
    assert!(state(&gateway, "bad", "closed").await);
    assert_eq!(bad.received().len(), 4);
}

#[tokio::test]
async fn a_used_up_account_is_told_from_a_rate_limit_though_its_body_comes_late() {
    let exhausted = error(429, "insufficient_quota").body_after(Duration::from_millis(100));
    let (bad, good) = (Upstream::start(exhausted.clone()), Upstream::start(completion()));
    let gateway = Gateway::builder()
        .upstream("bad", &bad.base_url(), "")
        .upstream("good", &good.base_url(), "priority = 1")
        .start();
    assert_eq!(statuses(&gateway, 2).await, [200; 2]);
    assert!(state(&gateway, "bad", "quarantined").await);
    assert_eq!(gateway.metric("tollgate_upstream_requests_total{outcome=\"exhausted\",upstream=\"bad\"}").await, 1.0);
    let alone = Upstream::start(exhausted);
    let gateway = Gateway::before(&alone.base_url());
    assert_eq!(
        code(&gateway.ask(CHAT, &chat()).await),
        (502, "upstream_error".into()),
        "our account is not the client's"
    );
    assert_eq!(code(&gateway.ask(CHAT, &chat()).await), (503, "upstream_unavailable".into()));
}

#[tokio::test]
async fn what_cannot_be_an_answer_goes_to_the_next_upstream() {
    let error_event = "data: {\"error\":{\"message\":\"overloaded\",\"type\":\"server_error\",\"code\":null}}\n\n";
    let late = Duration::from_millis(50);
    let faults = [
        ("an error as the first event", Answer::sse([error_event]).body_after(late)),
        ("a stream of nothing", Answer::sse(Vec::<String>::new()).body_after(late)),
        ("a stream that breaks before its first event", Answer::sse([": hm"]).body_after(late).cut_after(2)),
        ("HTML", Answer::text(200, "text/html", "<html>Welcome</html>")),
        ("compressed", completion().header("content-encoding", "gzip")),
        ("a redirect", Answer::text(302, "text/plain", "").header("location", "http://127.0.0.1:1/")),
        ("an error without an end", error(500, "server_error").never_end().declare_length(900_000)),
        ("an error without its body", error(503, "server_error").declare_length(500)),
    ];
    for (what, fault) in faults {
        let (bad, good) = (Upstream::start(fault), Upstream::start(stream()));
        let gateway = Gateway::builder()
            .upstream("bad", &bad.base_url(), "chunk_timeout = \"300ms\"")
            .upstream("good", &good.base_url(), "priority = 1")
            .start();
        let answer = gateway.ask(CHAT, &chat_stream()).await;
        assert_eq!((answer.status.as_u16(), answer.error.as_deref()), (200, None), "{what}");
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        assert!(text.contains("one") && !text.contains("overloaded") && text.ends_with(DONE), "{what}: {text}");
        assert_eq!((bad.received().len(), good.received().len()), (1, 1), "{what}");
        let row = gateway.rows(1).await.remove(0);
        assert_eq!((row.prompt_tokens, row.interrupted), (9, false), "{what}");
    }
}

#[tokio::test]
async fn an_error_within_an_answer_counts_though_it_is_passed_on() {
    let overloaded = json!({ "error": { "message": "overloaded", "type": "server_error" } });
    let error_event = format!("data: {overloaded}\n\n");
    let cases = [
        (chat(), Answer::json(200, &overloaded)),
        (chat_stream(), Answer::sse([event("one", Some("null")), error_event, DONE.to_owned()])),
    ];
    for (request, answer) in cases {
        let bad = Upstream::start(answer);
        let gateway = Gateway::before(&bad.base_url());
        for _ in 0..5 {
            let answer = gateway.ask(CHAT, &request).await;
            assert_eq!(answer.status, 200);
            assert!(String::from_utf8_lossy(&answer.body).contains("overloaded"));
        }
        assert!(state(&gateway, "main", "open").await);
    }
}

#[tokio::test]
async fn each_wait_has_its_own_timeout() {
    let ms = Duration::from_millis;
    let slow_stream = || Answer::sse([event("one", Some("null")), event("two", Some("null")), DONE.to_owned()]);
    let slow_json = Answer::text(200, "application/json", "{\"choices\":").declare_length(500).never_end();
    let stall = Answer::sse([event("one", Some("null"))]).never_end();
    let cases = [
        ("first byte", "first_byte_timeout = \"200ms\"", completion().after(ms(900)), 504),
        ("first byte of the body", "first_byte_timeout = \"200ms\"", completion().body_after(ms(900)), 200),
        ("total before the first byte", "total_timeout = \"200ms\"", completion().after(ms(900)), 504),
        ("between chunks", "chunk_timeout = \"200ms\"", slow_stream().pause(ms(900)), 200),
        ("between chunks of JSON", "chunk_timeout = \"200ms\"", slow_json, 200),
        ("total", "total_timeout = \"300ms\"", slow_stream().pause(ms(200)), 200),
        ("a stall for ever", "chunk_timeout = \"200ms\"", stall, 200),
    ];
    for (what, setting, answer, status) in cases {
        let upstream = Upstream::start(answer);
        let gateway = Gateway::builder().upstream("main", &upstream.base_url(), setting).start();
        let answer = gateway.ask(CHAT, &chat_stream()).await;
        assert_eq!(answer.status.as_u16(), status, "{what}");
        assert_eq!(answer.error.is_some(), status == 200, "{what}: {answer:?}");
        let timeouts = gateway.metric("tollgate_upstream_requests_total{outcome=\"timeout\",upstream=\"main\"}").await;
        assert_eq!(timeouts, 1.0, "{what}");
    }
    // None of them ends what is merely long.
    let upstream = Upstream::start(slow_stream().pause(ms(150)));
    let settings = "first_byte_timeout = \"250ms\"\nchunk_timeout = \"250ms\"";
    let gateway = Gateway::builder().upstream("main", &upstream.base_url(), settings).start();
    let answer = gateway.ask(CHAT, &chat_stream()).await;
    assert_eq!((answer.status.as_u16(), answer.error), (200, None));
}

#[tokio::test]
async fn what_follows_the_end_of_a_stream_is_not_waited_for() {
    let upstream = Upstream::start(Answer::sse([event("one", Some("null")), DONE.to_owned()]).never_end());
    let gateway = Gateway::before(&upstream.base_url());
    let answer = gateway.ask(CHAT, &chat_stream()).await;
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    assert!(text.ends_with(DONE) && answer.error.is_some(), "{answer:?}");
    let row = gateway.rows(1).await.remove(0);
    assert_eq!((row.status, row.interrupted), (200, false));
    let series = "tollgate_upstream_requests_total{outcome=\"ok\",upstream=\"main\"}";
    assert_eq!(gateway.metric(series).await, 1.0);
}

#[tokio::test]
async fn after_its_deadline_a_request_is_given_to_nobody_else() {
    let (slow, good) = (Upstream::start(Answer::never()), Upstream::start(completion()));
    for (deadline, status) in [("250ms", 504), ("5s", 200)] {
        let gateway = Gateway::builder()
            .tables(&format!("[retry]\ndeadline = \"{deadline}\""))
            .upstream("slow", &slow.base_url(), "first_byte_timeout = \"400ms\"")
            .upstream("good", &good.base_url(), "priority = 1")
            .start();
        let began = Instant::now();
        assert_eq!(gateway.ask(CHAT, &chat()).await.status.as_u16(), status);
        assert!(began.elapsed() >= Duration::from_millis(250));
    }
    assert_eq!(good.received().len(), 1);
}

#[tokio::test]
async fn attempts_carry_one_idempotency_key() {
    let (bad, good) = (Upstream::start(error(500, "server_error")), Upstream::start(completion()));
    let gateway = Gateway::builder()
        .upstream("bad", &bad.base_url(), "")
        .upstream("good", &good.base_url(), "priority = 1")
        .start();
    let answer = gateway.ask(CHAT, &chat()).await;
    let keys: Vec<_> =
        [&bad, &good].map(|upstream| upstream.received()[0].header("idempotency-key").map(str::to_owned)).to_vec();
    assert_eq!(
        keys,
        [answer.header("x-request-id").map(str::to_owned), answer.header("x-request-id").map(str::to_owned)]
    );
    // A client's own key stays one of its own: nobody else can use it, or be answered by it.
    for _ in 0..2 {
        let request = gateway.post(CHAT).header("idempotency-key", "mine");
        request.body_content_length(chat().to_string()).send().await.unwrap().whole().await;
    }
    let keys: Vec<_> =
        good.received()[1..].iter().map(|request| request.header("idempotency-key").map(str::to_owned)).collect();
    assert!(keys[0].is_some() && keys[0] == keys[1] && keys[0].as_deref() != Some("mine"), "{keys:?}");
}

#[tokio::test]
async fn work_that_would_be_done_twice_is_asked_for_once() {
    let body = json!({ "model": "gpt-4o", "input": "hi", "background": true });
    let (bad, good) = (Upstream::start(error(500, "server_error")), Upstream::start(completion()));
    let gateway = Gateway::builder()
        .upstream("bad", &bad.base_url(), "")
        .upstream("good", &good.base_url(), "priority = 1")
        .start();
    assert_eq!(gateway.ask(RESPONSES, &body).await.status, 500);
    assert_eq!(good.received().len(), 0, "it may have been begun");
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let gateway = Gateway::builder()
        .upstream("gone", &format!("http://{gone}/v1"), "")
        .upstream("good", &good.base_url(), "priority = 1")
        .start();
    assert_eq!(gateway.ask(RESPONSES, &body).await.status, 200, "nothing was sent");
}

#[tokio::test]
async fn a_prompt_cache_stays_warm() {
    let upstreams: Vec<Upstream> = (0..4).map(|_| Upstream::start(completion())).collect();
    let names: Vec<String> = (0..4).map(|n| format!("u{n}")).collect();
    let start = |without: Option<usize>| {
        let members = upstreams.iter().zip(&names).enumerate().filter(|(n, _)| Some(*n) != without);
        let builder = Gateway::builder().tables("[pool]\nstrategy = \"sticky\"");
        members.fold(builder, |builder, (_, (upstream, name))| builder.upstream(name, &upstream.base_url(), "")).start()
    };
    let place_of = async |gateway: &Gateway, key: usize| {
        let mut body = chat();
        body["prompt_cache_key"] = format!("conversation-{key}").into();
        let before: Vec<usize> = upstreams.iter().map(|upstream| upstream.received().len()).collect();
        for _ in 0..2 {
            assert_eq!(gateway.ask(CHAT, &body).await.status, 200);
        }
        let served: Vec<usize> = (0..4).filter(|&n| upstreams[n].received().len() > before[n]).collect();
        assert_eq!(served.len(), 1, "both go to the same");
        served[0]
    };
    let all = start(None);
    let mut places = Vec::new();
    for key in 0..24 {
        places.push(place_of(&all, key).await);
    }
    assert!(places.iter().collect::<BTreeSet<_>>().len() >= 3, "many conversations are spread: {places:?}");
    let fewer = start(Some(places[0]));
    for (key, place) in places.iter().enumerate() {
        let now = place_of(&fewer, key).await;
        assert_eq!(now == *place, *place != places[0], "only those of the one that is gone move");
    }
}

#[tokio::test]
async fn the_one_with_the_least_to_do_is_next() {
    let (slow, fast) = (Upstream::start(completion().after(Duration::from_millis(600))), Upstream::start(completion()));
    let gateway = Gateway::builder()
        .tables("[models.\"gpt-4o\"]\nstrategy = \"least_in_flight\"")
        .upstream("slow", &slow.base_url(), "")
        .upstream("fast", &fast.base_url(), "")
        .start();
    let body = chat();
    let together = async {
        for _ in 0..10 {
            assert_eq!(gateway.ask(CHAT, &body).await.status, 200);
        }
    };
    let together = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        together.await;
    };
    tokio::join!(gateway.ask(CHAT, &body), gateway.ask(CHAT, &body), together);
    assert!(slow.received().len() <= 2, "{}", slow.received().len());
}

#[tokio::test]
async fn an_upstream_is_passed_over_before_it_has_to_refuse() {
    let said =
        |n: &str| completion().header("x-ratelimit-remaining-requests", n).header("x-ratelimit-reset-requests", "30s");
    let said = [said("1"), said("0")];
    let (spent, other) = (Upstream::start(said), Upstream::start(completion()));
    let gateway = Gateway::builder()
        .upstream("spent", &spent.base_url(), "")
        .upstream("other", &other.base_url(), "priority = 1")
        .start();
    assert_eq!(statuses(&gateway, 5).await, [200; 5]);
    assert_eq!((spent.received().len(), other.received().len()), (2, 3));
    let remaining = gateway.metric("tollgate_upstream_remaining{kind=\"requests\",upstream=\"spent\"}").await;
    assert_eq!(remaining, 0.0);

    let (known, other) = (Upstream::start(completion()), Upstream::start(completion()));
    let gateway = Gateway::builder()
        .upstream("known", &known.base_url(), "rpm = 3")
        .upstream("other", &other.base_url(), "priority = 1")
        .start();
    assert_eq!(statuses(&gateway, 8).await, [200; 8]);
    assert_eq!((known.received().len(), other.received().len()), (3, 5));
    let alone = Gateway::builder().upstream("known", &known.base_url(), "rpm = 1").start();
    assert_eq!(statuses(&alone, 4).await, [200; 4], "foresight never refuses a client");
}

#[tokio::test]
async fn an_active_probe_brings_an_upstream_back_without_a_client() {
    let healed = Arc::new(AtomicBool::new(false));
    let is_healed = Arc::clone(&healed);
    let bad = Upstream::without_list(Script::by(move |request| {
        match (is_healed.load(Ordering::Relaxed), request.method.as_str()) {
            (false, _) => error(500, "server_error"),
            (true, "GET") => Answer::json(200, &json!({ "object": "list", "data": [] })),
            (true, _) => completion(),
        }
    }));
    let gateway = Gateway::builder()
        .tables("[breaker]\nbackoff = \"1h\"\nbackoff_max = \"1h\"")
        .upstream("main", &bad.base_url(), "probe_interval = \"1s\"")
        .start();
    let answers = statuses(&gateway, 8).await;
    // The probe that is sent at the start may be one of the five failures.
    assert!((4..=5).contains(&answers.iter().filter(|status| **status == 500).count()), "{answers:?}");
    assert_eq!(answers.last(), Some(&503));
    healed.store(true, Ordering::Relaxed);
    until(&gateway, "main", "closed").await;
    assert_eq!(statuses(&gateway, 2).await, [200; 2]);
}

#[tokio::test]
async fn replicas_tell_each_other_what_a_provider_said() {
    let redis = Redis::start();
    let limiter = format!("[limiter]\nredis = \"{}\"", redis.url());
    let limited = Upstream::start(error(429, "rate_limit_exceeded").header("retry-after", "30"));
    let refused = Upstream::start(error(401, "invalid_api_key"));
    let start = || {
        Gateway::builder()
            .tables(&limiter)
            .upstream("limited", &limited.base_url(), "")
            .upstream("refused", &refused.base_url(), "priority = 1")
            .start()
    };
    let (one, other) = (start(), start());
    assert_eq!(one.ask(CHAT, &chat()).await.status, 429);
    for gateway in [&other, &start()] {
        until(gateway, "limited", "cooling").await;
        until(gateway, "refused", "quarantined").await;
        assert_eq!(code(&gateway.ask(CHAT, &chat()).await), (503, "upstream_unavailable".into()));
    }
    assert_eq!((limited.received().len(), refused.received().len()), (1, 1), "one replica found out for all");
}

#[tokio::test]
async fn an_outage_is_not_multiplied() {
    let served = Arc::new(Mutex::new(0_u32));
    let counting = |fault: Answer| {
        let served = Arc::clone(&served);
        Upstream::start(Script::by(move |_| {
            *served.lock().unwrap() += 1;
            fault.clone()
        }))
    };
    let upstreams: Vec<Upstream> = (0..3).map(|_| counting(error(500, "server_error"))).collect();
    // Breakers that never open: the budget alone has to hold.
    let builder = Gateway::builder().tables("[breaker]\nfailures = 0\nfailure_percent = 0");
    let named = upstreams.iter().zip(["a", "b", "c"]);
    let gateway =
        named.fold(builder, |builder, (upstream, name)| builder.upstream(name, &upstream.base_url(), "")).start();
    let (requests, body) = (3_000, chat());
    let began = Instant::now();
    let workers = (0..50).map(|_| async {
        for _ in 0..requests / 50 {
            assert_eq!(gateway.ask(CHAT, &body).await.status, 500);
        }
    });
    futures::future::join_all(workers).await;
    let seconds = u32::try_from(began.elapsed().as_secs()).unwrap() + 1;
    let reached = *served.lock().unwrap();
    println!(
        "{requests} requests in {seconds} s, {reached} reached the upstreams: {:.3} times",
        f64::from(reached) / f64::from(requests)
    );
    assert!(reached > requests, "some are retried");
    assert!(reached <= requests * 12 / 10 + 10 + seconds, "{reached} of {requests} in {seconds} s");
    assert!(gateway.metric("tollgate_retries_refused_total").await > 0.0);
}

#[tokio::test]
async fn a_wrapped_connection_is_used_again() {
    let upstream = Upstream::start(Script::by(|request| {
        if request.body.windows(8).any(|part| part == b"\"stream\"") { stream() } else { completion() }
    }));
    let gateway = Gateway::before(&upstream.base_url());
    let mut connection = crate::support::client::h1(gateway.http()).connect().await.unwrap();
    let large = crate::support::openai::chat_of(200_000);
    for round in 0..3 {
        let answer = connection
            .send(gateway.post(CHAT).body_content_length(chat_stream().to_string()))
            .await
            .unwrap()
            .whole()
            .await;
        assert_eq!((answer.status.as_u16(), answer.error), (200, None), "{round}");
        let answer =
            connection.send(gateway.post(CHAT).body_chunked(large.clone(), 10_000)).await.unwrap().whole().await;
        assert_eq!((answer.status.as_u16(), answer.error.as_deref()), (200, None), "{round}");
        assert_ne!(answer.header("connection"), Some("close"));
    }
}
