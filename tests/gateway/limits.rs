//! Limits and quotas hold, in one process and through Redis, and say the truth to those they refuse.

use std::time::Duration;

use serde_json::{Value, json};
use tollgate::store::KeySpec;
use tollgate_core::limit::{Limits, ModelLimits};

use crate::support::{
    client::{Whole, h1},
    gateway::{Builder, Gateway},
    openai::{chat, chat_stream, completion, event},
    redis::Redis,
    upstream::{Answer, Script, Upstream},
};

const CHAT: &str = "/v1/chat/completions";

/// Where limits are held in a test: the same must be true of both.
enum Place {
    Process,
    Redis(Redis),
}

impl Place {
    fn both() -> [Self; 2] {
        [Self::Process, Self::Redis(Redis::start())]
    }

    fn gateway(&self) -> Builder {
        match self {
            Self::Process => Gateway::builder(),
            Self::Redis(redis) => {
                Gateway::builder().tables(&format!("[limiter]\nredis = \"{}\"\nredis_timeout = \"5s\"", redis.url()))
            }
        }
    }
}

fn key(limits: Limits) -> KeySpec {
    KeySpec { limits, ..KeySpec::default() }
}

fn rpm(rpm: u32) -> Limits {
    Limits { rpm: Some(rpm), ..Limits::default() }
}

/// Answers with this usage.
fn using(prompt: u64, completion: u64) -> Answer {
    Answer::json(
        200,
        &json!({
            "object": "chat.completion", "model": "gpt-4o",
            "choices": [{ "index": 0, "finish_reason": "stop", "message": { "role": "assistant", "content": "hi" } }],
            "usage": { "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion },
        }),
    )
}

fn error(answer: &Whole) -> (u16, String, String) {
    let body: Value = serde_json::from_slice(&answer.body).unwrap();
    let text = |name: &str| body["error"][name].as_str().unwrap_or_default().to_owned();
    (answer.status.as_u16(), text("type"), text("code"))
}

fn rate_limited() -> (u16, String, String) {
    (429, "rate_limit_error".to_owned(), "rate_limit_exceeded".to_owned())
}

fn quota_exceeded() -> (u16, String, String) {
    (429, "insufficient_quota".to_owned(), "insufficient_quota".to_owned())
}

fn number(answer: &Whole, header: &str) -> u64 {
    answer.header(header).unwrap_or_else(|| panic!("no {header}")).parse().unwrap()
}

#[tokio::test]
async fn requests_per_minute_hold_and_the_answer_says_when_to_come_back() {
    for place in Place::both() {
        let upstream = Upstream::start(completion());
        let gateway = place.gateway().upstream("main", &upstream.base_url(), "").key(key(rpm(3))).start();
        for left in [2, 1, 0] {
            let answer = gateway.ask(CHAT, &chat()).await;
            assert_eq!(answer.status, 200);
            assert_eq!(number(&answer, "x-ratelimit-limit-requests"), 3);
            assert_eq!(number(&answer, "x-ratelimit-remaining-requests"), left);
            assert!(answer.header("x-ratelimit-reset-requests").unwrap().contains('s'));
            assert_eq!(answer.header("x-ratelimit-limit-tokens"), None, "no such limit");
        }
        let refused = gateway.ask(CHAT, &chat()).await;
        assert_eq!(error(&refused), rate_limited());
        let (seconds, ms) = (number(&refused, "retry-after"), number(&refused, "retry-after-ms"));
        assert!((58_000..=61_000).contains(&ms), "{ms}");
        assert_eq!(seconds, ms.div_ceil(1000));
        assert_eq!(number(&refused, "x-ratelimit-remaining-requests"), 0);
        assert_eq!(refused.header("x-should-retry"), None);
        assert_eq!(upstream.received().len(), 3, "nothing of the fourth went upstream");
        assert_eq!(gateway.metric("tollgate_denials_total{code=\"rate_limit_exceeded\"}").await, 1.0);
    }
}

#[tokio::test]
async fn tokens_are_reserved_by_estimate_and_settled_by_the_truth() {
    for place in Place::both() {
        let upstream = Upstream::start(using(10, 20));
        let limits = Limits { tpm: Some(1000), ..Limits::default() };
        let gateway = place.gateway().upstream("main", &upstream.base_url(), "").key(key(limits)).start();
        let mut body = chat();
        body["max_tokens"] = json!(900);
        let first = gateway.ask(CHAT, &body).await;
        assert_eq!(first.status, 200);
        assert!(number(&first, "x-ratelimit-remaining-tokens") < 100, "900 are reserved while it runs");
        let second = gateway.ask(CHAT, &body).await;
        assert_eq!(second.status, 200, "30 of them were used, the rest is free again");
        body["max_tokens"] = json!(990);
        assert_eq!(error(&gateway.ask(CHAT, &body).await), rate_limited(), "60 used and 990 and the prompt");
        for most in [json!(1000), json!(9_223_372_036_854_775_808_u64), json!(1e300)] {
            body["max_tokens"] = most;
            let answer = gateway.ask(CHAT, &body).await;
            assert_eq!(error(&answer), rate_limited());
            assert_eq!(answer.header("x-should-retry"), Some("false"), "it never fits");
            assert_eq!(answer.header("retry-after"), None);
        }
        assert_eq!(upstream.received().len(), 2);
    }
}

#[tokio::test]
async fn a_client_that_hangs_up_has_used_what_was_produced() {
    for place in Place::both() {
        let produced = event("one two three four five six seven eight", Some("null"));
        let upstream = Upstream::start(Answer::sse([produced]).never_end());
        let limits = Limits { tpm: Some(1000), ..Limits::default() };
        let gateway = place.gateway().upstream("main", &upstream.base_url(), "").key(key(limits)).start();
        let mut body = chat_stream();
        body["max_tokens"] = json!(900);
        let begin = || async {
            let mut answer = gateway.post(CHAT).body_content_length(body.to_string()).send().await.unwrap();
            assert_eq!(answer.status, 200);
            answer.chunk().await.unwrap().unwrap();
            let left: u64 = answer.headers["x-ratelimit-remaining-tokens"].to_str().unwrap().parse().unwrap();
            (answer, left)
        };
        let (first, left) = begin().await;
        assert!(left < 100, "900 are reserved while it runs");
        drop(first);
        gateway.rows(1).await;
        // What it produced is estimated by its size until it is counted.
        let used = left - begin().await.1;
        assert!((17..60).contains(&used), "{used}");
    }
}

#[tokio::test]
async fn requests_at_once_are_counted_until_the_answer_is_over() {
    for place in Place::both() {
        let upstream = Upstream::start(Script::by(|request| {
            let body: Value = serde_json::from_slice(&request.body).unwrap();
            if body["stream"] == json!(true) {
                return Answer::sse([event("a", None), event("b", None)]).pause(Duration::from_secs(30));
            }
            completion()
        }));
        let limits = Limits { concurrency: Some(2), ..Limits::default() };
        let gateway = place.gateway().upstream("main", &upstream.base_url(), "").key(key(limits)).start();
        let stream = || async {
            let mut response = gateway.post(CHAT).body_content_length(chat_stream().to_string()).send().await.unwrap();
            assert_eq!(response.status, 200);
            response.chunk().await.unwrap().unwrap();
            response
        };
        let first = stream().await;
        for _ in 0..20 {
            assert_eq!(
                gateway.ask(CHAT, &chat()).await.status,
                200,
                "its place is free as soon as its answer is there"
            );
        }
        let second = stream().await;
        let refused = gateway.ask(CHAT, &chat()).await;
        assert_eq!(error(&refused), rate_limited());
        assert!(number(&refused, "retry-after-ms") > 0);
        drop((first, second));
        let mut tries = 0;
        while gateway.ask(CHAT, &chat()).await.status != 200 {
            tries += 1;
            assert!(tries < 100, "a client that hung up gives its place back");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

#[tokio::test]
async fn a_quota_is_used_up_and_stays_so_after_a_restart() {
    for place in Place::both() {
        let upstream = Upstream::start(using(40, 10));
        let limits = Limits { monthly_tokens: Some(200), ..Limits::default() };
        let mut gateway = place.gateway().upstream("main", &upstream.base_url(), "").key(key(limits)).start();
        for _ in 0..4 {
            assert_eq!(gateway.ask(CHAT, &chat()).await.status, 200);
        }
        let refused = gateway.ask(CHAT, &chat()).await;
        assert_eq!(error(&refused), quota_exceeded());
        assert_eq!(refused.header("x-should-retry"), Some("false"));
        gateway.rows(4).await;
        assert_eq!(error(&gateway.ask(CHAT, &chat()).await), quota_exceeded(), "also when it is booked");
        if let Place::Redis(redis) = &place {
            let () = redis.command(&["FLUSHALL"]);
            assert_eq!(error(&gateway.ask(CHAT, &chat()).await), quota_exceeded(), "the database remembers");
        }
        gateway.restart();
        assert_eq!(error(&gateway.ask(CHAT, &chat()).await), quota_exceeded());
        assert_eq!(upstream.received().len(), 4);
    }
}

#[tokio::test]
async fn a_quota_of_dollars_goes_by_the_price() {
    for place in Place::both() {
        let upstream = Upstream::start(using(1000, 1000));
        let limits = Limits { monthly_nano_usd: Some(30_000_000), ..Limits::default() };
        let prices = "[models.\"gpt-4o\"]\ninput_usd_per_mtok = 2\noutput_usd_per_mtok = 8";
        let gateway =
            place.gateway().upstream("main", &upstream.base_url(), "").tables(prices).key(key(limits)).start();
        let mut statuses = Vec::new();
        for _ in 0..5 {
            statuses.push(gateway.ask(CHAT, &chat()).await.status);
        }
        assert_eq!(statuses, [200, 200, 200, 429, 429], "a cent each");
    }
}

#[tokio::test]
async fn a_hundred_at_once_do_not_walk_through_a_quota_for_ten() {
    for place in Place::both() {
        let upstream = Upstream::start(using(40, 60));
        let limits = Limits { monthly_tokens: Some(1000), ..Limits::default() };
        let gateway = place.gateway().upstream("main", &upstream.base_url(), "").key(key(limits)).start();
        let mut body = chat();
        body["max_tokens"] = json!(80); // and a prompt of some 20: a hundred each
        let asked = (0..100).map(|_| gateway.ask(CHAT, &body));
        let answers = futures::future::join_all(asked).await;
        let admitted = answers.iter().filter(|answer| answer.status == 200).count();
        assert!(answers.iter().all(|answer| answer.status == 200 || error(answer) == quota_exceeded()));
        // What is held until an answer is there is an estimate that is at most 1.2 times too high or low.
        assert!((8..=10).contains(&admitted), "{admitted} admitted");
    }
}

#[tokio::test]
async fn every_subject_has_limits_of_its_own() {
    for place in Place::both() {
        let upstream = Upstream::start(completion());
        let start = |tables: &str, spec: KeySpec| {
            // Each gateway has a database of its own, and so the same ids.
            if let Place::Redis(redis) = &place {
                let () = redis.command(&["FLUSHALL"]);
            }
            place.gateway().upstream("main", &upstream.base_url(), "").tables(tables).key(spec).start()
        };
        let statuses = async |gateway: &Gateway, model: &str| {
            let mut body = chat();
            body["model"] = json!(model);
            [gateway.ask(CHAT, &body).await.status, gateway.ask(CHAT, &body).await.status]
        };
        let by_default = start("[limits.default_key]\nrpm = 1", KeySpec::default());
        assert_eq!(statuses(&by_default, "gpt-4o").await, [200, 429]);
        let overridden = start("[limits.default_key]\nrpm = 1", key(rpm(0)));
        assert_eq!(statuses(&overridden, "gpt-4o").await, [200, 200], "0 is none");
        let user = start("[limits.default_user]\nrpm = 1", KeySpec::default());
        assert_eq!(statuses(&user, "gpt-4o").await, [200, 429]);
        let ip = start("[limits.ip]\nrpm = 1", KeySpec::default());
        assert_eq!(statuses(&ip, "gpt-4o").await, [200, 429]);
        let model = start("[limits.models.\"gpt-4o\"]\nrpm = 1", KeySpec::default());
        assert_eq!(statuses(&model, "gpt-4o").await, [200, 429]);
        assert_eq!(statuses(&model, "gpt-4o-mini").await, [200, 200]);
        let model_limits = vec![ModelLimits { model: "gpt-4o-*".into(), limits: rpm(1) }];
        let of_key = start("", KeySpec { model_limits, ..KeySpec::default() });
        assert_eq!(statuses(&of_key, "gpt-4o-mini").await, [200, 429]);
        assert_eq!(statuses(&of_key, "gpt-4o").await, [200, 200]);
    }
}

#[tokio::test]
async fn a_refusal_costs_nothing_anywhere() {
    for place in Place::both() {
        let upstream = Upstream::start(completion());
        let tables = "[limits.default_user]\nrpm = 10\n[limits.models.\"gpt-4o\"]\nrpm = 1";
        let gateway = place.gateway().upstream("main", &upstream.base_url(), "").tables(tables).start();
        for _ in 0..8 {
            gateway.ask(CHAT, &chat()).await;
        }
        let mut body = chat();
        body["model"] = json!("gpt-4o-mini");
        let answer = gateway.ask(CHAT, &body).await;
        assert_eq!(number(&answer, "x-ratelimit-remaining-requests"), 8, "two of ten, the seven refused did not count");
    }
}

#[tokio::test]
async fn guessing_keys_is_slowed_down_and_a_forged_address_does_not_help() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::builder()
        .upstream("main", &upstream.base_url(), "")
        .tables("[limits.gate]\nfailed_keys_per_minute = 5")
        .start();
    let wrong = format!("tg-{}", "A".repeat(43));
    let guess = |from: String| {
        let request = h1(gateway.http()).post(CHAT).bearer(&wrong).header("x-forwarded-for", &from);
        async move { request.body_content_length(chat().to_string()).send().await.unwrap().whole().await }
    };
    for n in 0..5 {
        assert_eq!(guess(format!("10.0.0.{n}")).await.status, 401);
    }
    let refused = guess("10.0.0.9".to_owned()).await;
    assert_eq!(error(&refused), rate_limited());
    assert!(number(&refused, "retry-after-ms") <= 60_000);
    assert_eq!(gateway.ask(CHAT, &chat()).await.status, 429, "nobody from there gets to try a key");
}

#[tokio::test]
async fn addresses_count_behind_trusted_proxies() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::builder()
        .upstream("main", &upstream.base_url(), "")
        .server("trusted_proxies = [\"127.0.0.0/8\"]")
        .tables("[limits.ip]\nrpm = 1")
        .start();
    let ask = |from: &str| {
        let request = gateway.post(CHAT).header("x-forwarded-for", from);
        async move { request.body_content_length(chat().to_string()).send().await.unwrap().whole().await.status }
    };
    assert_eq!(ask("192.0.2.1").await, 200);
    assert_eq!(ask("192.0.2.1").await, 429);
    assert_eq!(ask("192.0.2.2").await, 200);
    assert_eq!(ask("9.9.9.9, 192.0.2.2").await, 429, "what a client claims itself is not believed");
    assert_eq!(ask("2001:db8:1:2::1").await, 200);
    assert_eq!(ask("2001:db8:1:2:ffff::9").await, 429, "one subscriber");
    assert_eq!(ask("2001:db8:1:3::1").await, 200);
}

#[tokio::test]
async fn an_address_uses_up_its_quota_and_stays_so_after_a_restart() {
    for place in Place::both() {
        let upstream = Upstream::start(using(40, 10));
        let mut gateway = place
            .gateway()
            .upstream("main", &upstream.base_url(), "")
            .server("trusted_proxies = [\"127.0.0.0/8\"]")
            .tables("[limits.ip]\nmonthly_tokens = 200")
            .start();
        let ask = async |gateway: &Gateway, from: &str| {
            let request = gateway.post(CHAT).header("x-forwarded-for", from);
            request.body_content_length(chat().to_string()).send().await.unwrap().whole().await
        };
        let (one, same) = ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9");
        for from in [one, same, one, same] {
            assert_eq!(ask(&gateway, from).await.status, 200);
        }
        assert_eq!(error(&ask(&gateway, one).await), quota_exceeded());
        gateway.rows(4).await;
        assert_eq!(error(&ask(&gateway, same).await), quota_exceeded(), "also when it is booked");
        assert_eq!(ask(&gateway, "192.0.2.1").await.status, 200, "another address has its own");
        if let Place::Redis(redis) = &place {
            let () = redis.command(&["FLUSHALL"]);
            assert_eq!(error(&ask(&gateway, one).await), quota_exceeded(), "the database remembers");
        }
        gateway.restart();
        assert_eq!(error(&ask(&gateway, one).await), quota_exceeded());
        assert_eq!(upstream.received().len(), 5);
    }
}

#[tokio::test]
async fn gateways_on_one_database_learn_what_an_address_used_at_the_other() {
    let upstream = Upstream::start(using(40, 10));
    let start = |builder: Builder| {
        builder.upstream("main", &upstream.base_url(), "").tables("[limits.ip]\nmonthly_tokens = 200")
    };
    let first = start(Gateway::builder()).start();
    let second = start(Gateway::builder()).beside(&first).start();
    for gateway in [&first, &first, &first, &second] {
        assert_eq!(gateway.ask(CHAT, &chat()).await.status, 200);
    }
    first.rows(4).await;
    let mut tries = 0;
    while second.metric("tollgate_quota_corrections_total{place=\"memory\"}").await < 1.0 {
        tries += 1;
        assert!(tries < 300, "the books were not compared with the database");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(error(&second.ask(CHAT, &chat()).await), quota_exceeded());
}
