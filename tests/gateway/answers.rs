//! What becomes of an upstream's answer that is an error, empty, late, or given up by the client.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};

use crate::support::{
    client::{Whole, h1, h2},
    gateway::{Gateway, PATIENCE},
    openai::{DONE, chat, chat_stream, completion, event, usage_event},
    upstream::{Answer, Upstream},
};

const CHAT: &str = "/v1/chat/completions";

fn error(status: u16, code: &str) -> Answer {
    Answer::json(status, &json!({ "error": { "message": "no", "type": code, "param": null, "code": code } }))
}

fn stream() -> Answer {
    Answer::sse([event("one", Some("null")), usage_event(9, 3), DONE.to_owned()])
}

fn code(answer: &Whole) -> (u16, Value) {
    (answer.status.as_u16(), answer.json()["error"]["code"].clone())
}

async fn state(gateway: &Gateway, state: &str) -> bool {
    gateway.metric(&format!("tollgate_upstream_state{{state=\"{state}\",upstream=\"main\"}}")).await == 1.0
}

#[tokio::test]
async fn answers_without_a_body_have_an_end_too() {
    let empty = |status| Answer::raw(format!("HTTP/1.1 {status} x\r\ncontent-length: 0\r\n\r\n"));
    let no_content = Answer::raw("HTTP/1.1 204 No Content\r\n\r\n");
    let cases = [
        (empty(500), 500, Some("upstream_error")),
        (empty(429), 429, Some("upstream_error")),
        (empty(401), 502, Some("upstream_error")),
        (empty(200), 502, Some("upstream_error")),
        (no_content, 502, Some("upstream_error")),
        (empty(404), 404, None),
    ];
    for (answer, status, code) in cases {
        for request in [chat(), chat_stream()] {
            let upstream = Upstream::start(answer.clone());
            let gateway = Gateway::before(&upstream.base_url());
            let answer = timeout(PATIENCE, gateway.ask(CHAT, &request)).await.expect("an end");
            assert_eq!((answer.status.as_u16(), answer.error.as_deref()), (status, None));
            match code {
                Some(code) => assert_eq!(answer.json()["error"]["code"], code),
                None => assert!(answer.body.is_empty()),
            }
            let row = gateway.rows(1).await.remove(0);
            assert_eq!((row.prompt_tokens, row.completion_tokens, row.interrupted), (0, 0, false), "{status}");
        }
    }
}

#[tokio::test]
async fn what_is_no_error_of_openai_is_told_as_one() {
    for body in ["<html>502 Bad Gateway</html>", "upstream connect error"] {
        let upstream = Upstream::start(Answer::text(503, "text/html", body));
        let gateway = Gateway::before(&upstream.base_url());
        let answer = gateway.ask(CHAT, &chat()).await;
        assert_eq!(code(&answer), (503, "upstream_error".into()));
        assert_eq!(answer.header("content-type"), Some("application/json"));
    }
}

#[tokio::test]
async fn an_error_leaves_both_connections_fit_for_the_next_request() {
    let limit = || error(429, "rate_limit_exceeded").header("retry-after-ms", "60000");
    let answers = [error(500, "server_error"), error(404, "x"), limit(), completion()];
    let upstream = Upstream::start(answers);
    let gateway = Gateway::builder().tables("[pool]\nwait = \"0s\"").upstream("main", &upstream.base_url(), "").start();
    for target in [h1(gateway.http()), h2(gateway.http())] {
        let mut connection = target.connect().await.unwrap();
        for status in [500, 404, 429, 503] {
            // Over HTTP/2 the account cools already.
            let status = if upstream.received().len() == 3 { 503 } else { status };
            let request = target.post(CHAT).bearer(&gateway.key).body_content_length(chat().to_string());
            let answer = connection.send(request).await.expect("the same connection").whole().await;
            assert_eq!((answer.status.as_u16(), answer.error.as_deref()), (status, None));
            assert_ne!(answer.header("connection"), Some("close"), "{status}");
        }
    }
    let connections: Vec<u64> = upstream.received().iter().map(|request| request.connection).collect();
    assert_eq!(connections.len(), 3);
    assert!(connections.iter().all(|connection| *connection == connections[0]), "{connections:?}");
}

#[tokio::test]
async fn no_client_can_take_an_upstream_away_from_the_others() {
    let forbidden = json!({ "error": {
        "message": "Project `proj_abc123` does not have access to model `gpt-9`",
        "type": "invalid_request_error", "param": null, "code": "model_not_found",
    } });
    let too_large = json!({ "error": {
        "message": "Request too large for gpt-4o in organization org-abc on tokens per min (TPM): Limit 30000, Requested 90000.",
        "type": "tokens", "param": null, "code": "rate_limit_exceeded",
    } });
    for (answer, status) in [(Answer::json(403, &forbidden), 502), (Answer::json(429, &too_large), 429)] {
        let upstream = Upstream::start(answer.header("retry-after", "30"));
        let gateway = Gateway::before(&upstream.base_url());
        for _ in 0..7 {
            let answer = gateway.ask(CHAT, &chat()).await;
            assert_eq!(answer.status.as_u16(), status);
            assert!(!String::from_utf8_lossy(&answer.body).contains("_abc"));
        }
        assert!(state(&gateway, "closed").await, "{status}");
        assert_eq!(upstream.received().len(), 7);
    }
}

#[tokio::test]
async fn a_probe_that_hangs_is_waited_for_no_longer_than_the_settings_say() {
    let upstream = Upstream::start([error(500, "x"), Answer::never(), completion()]);
    let gateway = Gateway::builder()
        .tables("[pool]\nwait = \"300ms\"\n[breaker]\nfailures = 1\nbackoff = \"100ms\"\nbackoff_max = \"100ms\"")
        .upstream("main", &upstream.base_url(), "")
        .start();
    let body = chat();
    assert_eq!(gateway.ask(CHAT, &body).await.status, 500);
    let probe = gateway.ask(CHAT, &body);
    let other = async {
        upstream.wait_for(2).await;
        timeout(PATIENCE, gateway.ask(CHAT, &body)).await.expect("an answer")
    };
    tokio::select! {
        _ = probe => panic!("the probe hangs"),
        other = other => assert_eq!(code(&other), (503, "upstream_unavailable".into())),
    }
    assert_eq!(gateway.rows(3).await.iter().filter(|row| row.interrupted).count(), 1, "the probe's client is gone");
}

#[tokio::test]
async fn clients_of_http2_see_as_little_of_what_failed() {
    let stall = Answer::sse([event("one", Some("null"))]).never_end();
    let overloaded = "data: {\"error\":{\"message\":\"overloaded\",\"type\":\"server_error\",\"code\":null}}\n\n";
    let cases = [
        ("an error event", Answer::sse([overloaded]).body_after(Duration::from_millis(50)), true),
        ("a used-up account", error(429, "insufficient_quota"), true),
        ("no answer in time", Answer::never(), true),
        ("a stall in the middle", stall, false),
    ];
    for (what, fault, is_whole) in cases {
        let (bad, good) = (Upstream::start(fault), Upstream::start(stream()));
        let settings = "first_byte_timeout = \"300ms\"\nchunk_timeout = \"300ms\"";
        let gateway = Gateway::builder()
            .upstream("bad", &bad.base_url(), settings)
            .upstream("good", &good.base_url(), "priority = 1")
            .start();
        let request = h2(gateway.http()).post(CHAT).bearer(&gateway.key);
        let request = request.body_content_length(chat_stream().to_string());
        let answer = request.send().await.unwrap().whole().await;
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        assert_eq!(answer.status, 200, "{what}");
        assert_eq!(is_whole, text.ends_with(DONE) && answer.error.is_none(), "{what}: {text}");
        assert!(text.contains("one") && !text.contains("overloaded"), "{what}: {text}");
    }
}

#[tokio::test]
async fn a_client_that_leaves_while_an_error_is_held_back_pays_nothing() {
    let upstream = Upstream::start(error(429, "rate_limit_exceeded").never_end().declare_length(5_000).never_end());
    let gateway = Gateway::before(&upstream.base_url());
    let body = chat();
    let impatient = timeout(Duration::from_millis(400), gateway.ask(CHAT, &body));
    assert!(impatient.await.is_err());
    upstream.wait_for_hang_ups(1).await;
    let row = gateway.rows(1).await.remove(0);
    assert_eq!((row.prompt_tokens, row.completion_tokens), (0, 0));
}

#[tokio::test]
async fn an_attempt_that_had_no_time_left_says_nothing_about_its_upstream() {
    let (slow, late) = (Upstream::start(Answer::never()), Upstream::start(Answer::never()));
    let gateway = Gateway::builder()
        .tables("[retry]\ndeadline = \"600ms\"\n[breaker]\nfailures = 1")
        .upstream("slow", &slow.base_url(), "first_byte_timeout = \"400ms\"")
        .upstream("main", &late.base_url(), "priority = 1")
        .start();
    let answer = gateway.ask(CHAT, &chat()).await;
    assert_eq!(code(&answer), (504, "upstream_timeout".into()));
    assert_eq!(late.received().len(), 1);
    assert!(state(&gateway, "closed").await);
    let cut_off = gateway.metric("tollgate_upstream_requests_total{outcome=\"deadline\",upstream=\"main\"}").await;
    assert_eq!(cut_off, 1.0);
    // Whoever had all the time there is has failed.
    let gateway = Gateway::builder()
        .tables("[retry]\ndeadline = \"200ms\"\n[breaker]\nfailures = 1")
        .upstream("main", &late.base_url(), "")
        .start();
    assert_eq!(code(&gateway.ask(CHAT, &chat()).await), (504, "upstream_timeout".into()));
    assert!(state(&gateway, "open").await);
}

#[tokio::test]
async fn a_slow_reader_is_not_its_upstreams_fault() {
    let piece = event(&"x".repeat(1 << 20), Some("null"));
    let pieces = (0..32).map(|_| piece.clone()).chain([usage_event(9, 3), DONE.to_owned()]);
    let upstream = Upstream::start(Answer::sse(pieces));
    let gateway = Gateway::builder().upstream("main", &upstream.base_url(), "chunk_timeout = \"300ms\"").start();
    let mut client = TcpStream::connect(gateway.http()).await.unwrap();
    let body = chat_stream().to_string();
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {}\r\ncontent-length: {}\r\n\r\n",
        gateway.key,
        body.len()
    );
    client.write_all((head + &body).as_bytes()).await.unwrap();
    sleep(Duration::from_millis(1_200)).await;
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.unwrap();
    assert!(answer.ends_with(b"0\r\n\r\n"), "the stream is whole");
    assert!(state(&gateway, "closed").await);
}

#[tokio::test]
async fn an_error_within_a_stream_does_not_name_the_account() {
    let error = "data: {\"error\":{\"message\":\"org-abc123def is over its limit\",\"type\":\"tokens\"}}\n\n";
    let upstream = Upstream::start(Answer::sse([event("one", Some("null")), error.to_owned()]));
    let gateway = Gateway::before(&upstream.base_url());
    let answer = gateway.ask(CHAT, &chat_stream()).await;
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    assert!(text.contains("is over its limit") && !text.contains("org-abc"), "{text}");
}

#[tokio::test]
async fn the_first_token_is_measured_once_though_a_comment_came_first() {
    let mut parts = vec![": wait\n\n".to_owned()];
    parts.extend([event("one", Some("null")), event("two", Some("null")), usage_event(9, 3), DONE.to_owned()]);
    let upstream = Upstream::start(Answer::sse(parts).pause(Duration::from_millis(30)));
    let gateway = Gateway::before(&upstream.base_url());
    assert_eq!(gateway.ask(CHAT, &chat_stream()).await.status, 200);
    let count = gateway.metric("tollgate_upstream_first_token_seconds_count{upstream=\"main\"}").await;
    assert_eq!(count, 1.0);
}
