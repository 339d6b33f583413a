//! Bodies of any size and framing arrive whole, also at the second upstream.

use http::StatusCode;

use crate::support::{
    client::{Request, Target, h1, h2, raw},
    gateway::Gateway,
    openai::{chat_of, completion},
    upstream::{Answer, Upstream},
};

const KIB: usize = 1024;
/// Around the 64 KiB of Pingora's retry buffer, and far beyond it.
const SIZES: [usize; 7] = [100, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1, 200_000, 5_000_000, 30_000_000];

#[derive(Clone, Copy, Debug)]
enum Framing {
    Length,
    Pieces,
}

fn framed(request: Request, body: &str, framing: Framing) -> Request {
    match framing {
        Framing::Length => request.body_content_length(body.to_owned()),
        // A size that fits no buffer, so that pieces end anywhere.
        Framing::Pieces => request.body_chunked(body.to_owned(), 15_013),
    }
}

async fn arrives_whole(speak: fn(std::net::SocketAddr) -> Target, framing: Framing) {
    for size in SIZES {
        let first = Upstream::start(Answer::json(429, &serde_json::json!({})).header("retry-after", "1"));
        let second = Upstream::start(completion());
        let gateway = Gateway::builder()
            .upstream("first", &first.base_url(), "priority = 0")
            .upstream("second", &second.base_url(), "priority = 1")
            .start();
        let body = chat_of(size);
        let request = speak(gateway.http()).post("/v1/chat/completions").bearer(&gateway.key);
        let answer = framed(request, &body, framing).send().await.unwrap().whole().await;
        assert_eq!(answer.status, StatusCode::OK, "{size} {framing:?}: {:?}", answer.body);
        for upstream in [&first, &second] {
            let received = upstream.received();
            assert_eq!(received.len(), 1, "{size} {framing:?}");
            assert!(received[0].is_complete);
            assert!(received[0].body == body.as_bytes(), "{size} {framing:?}: the body changed on its way");
            assert_eq!(received[0].header("content-length"), Some(size.to_string().as_str()));
        }
    }
}

#[tokio::test]
async fn over_http1_with_a_length() {
    arrives_whole(h1, Framing::Length).await;
}

#[tokio::test]
async fn over_http1_chunked() {
    arrives_whole(h1, Framing::Pieces).await;
}

#[tokio::test]
async fn over_http2_with_a_length() {
    arrives_whole(h2, Framing::Length).await;
}

#[tokio::test]
async fn over_http2_without_a_length() {
    arrives_whole(h2, Framing::Pieces).await;
}

#[tokio::test]
async fn an_empty_body_and_a_tiny_one_are_refused_with_a_reason() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::before(&upstream.base_url());
    for speak in [h1, h2] {
        for (body, says) in [("", "empty"), ("0123456789", "JSON")] {
            for framing in [Framing::Length, Framing::Pieces] {
                let request = speak(gateway.http()).post("/v1/chat/completions").bearer(&gateway.key);
                let answer = framed(request, body, framing).send().await.unwrap().whole().await;
                assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{body:?} {framing:?}");
                assert_eq!(answer.json()["error"]["code"], "invalid_body");
                assert!(answer.json()["error"]["message"].as_str().unwrap().contains(says), "{:?}", answer.body);
            }
        }
    }
    assert!(upstream.received().is_empty());
}

#[tokio::test]
async fn a_connection_serves_one_body_after_the_other() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::before(&upstream.base_url());
    let target = h1(gateway.http());
    let mut connection = target.connect().await.unwrap();
    for size in [100, 200_000, 64 * KIB, 70_000, 300] {
        let request = target.post("/v1/chat/completions").bearer(&gateway.key).body_content_length(chat_of(size));
        let answer = connection.send(request).await.unwrap().whole().await;
        assert_eq!(answer.status, StatusCode::OK, "{size}");
    }
    let lengths: Vec<_> = upstream.received().iter().map(|received| received.body.len()).collect();
    assert_eq!(lengths, [100, 200_000, 64 * KIB, 70_000, 300]);
}

#[tokio::test]
async fn what_is_too_large_is_refused_after_it_was_read() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::builder().server("max_body = \"1 MiB\"").upstream("main", &upstream.base_url(), "").start();
    for speak in [h1, h2] {
        for framing in [Framing::Length, Framing::Pieces] {
            let request = speak(gateway.http()).post("/v1/chat/completions").bearer(&gateway.key);
            let answer = framed(request, &chat_of(1_100_000), framing).send().await.unwrap().whole().await;
            assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE, "{framing:?}");
            assert_eq!(answer.json()["error"]["code"], "request_too_large");
        }
    }
    let fits = gateway.post("/v1/chat/completions").body_content_length(chat_of(1024 * KIB));
    assert_eq!(fits.send().await.unwrap().status, StatusCode::OK);
    assert_eq!(upstream.received().len(), 1);
}

#[tokio::test]
async fn nothing_behind_a_broken_body_is_read_as_a_request() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::before(&upstream.base_url());
    let head = format!("POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n", gateway.key);
    let smuggled = "GET /health HTTP/1.1\r\nhost: x\r\n\r\n";
    let seen = raw(gateway.http(), &format!("{head}transfer-encoding: chunked\r\n\r\nnonsense\r\n{smuggled}")).await;
    assert_eq!(seen.matches("HTTP/1.1").count(), 1, "{seen}");
    assert!(seen.starts_with("HTTP/1.1 400"), "{seen}");
    assert!(seen.contains("invalid_body"), "{seen}");
}

#[tokio::test]
async fn leave_to_send_is_no_answer() {
    let upstream = Upstream::start([Answer::reset(), completion()]);
    let gateway = Gateway::builder()
        .upstream("one", &upstream.base_url(), "")
        .upstream("two", &upstream.base_url(), "priority = 1")
        .start();
    let request = gateway.post("/v1/chat/completions").header("expect", "100-continue");
    let answer = request.body_content_length(chat_of(100_000)).send().await.unwrap();
    assert_eq!(answer.status, StatusCode::OK, "the second upstream still gets its turn");
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 9000\r\n\r\n";
    let seen = raw(gateway.http(), head).await;
    assert!(seen.starts_with("HTTP/1.1 401"), "at once, without the body: {seen}");
}

#[tokio::test]
async fn a_client_that_waits_for_leave_to_send_gets_it() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::before(&upstream.base_url());
    let request = gateway.post("/v1/chat/completions").header("expect", "100-continue");
    let answer = request.body_content_length(chat_of(100_000)).send().await.unwrap();
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(upstream.received()[0].body.len(), 100_000);
    assert_eq!(upstream.received()[0].header("expect"), None);
}
