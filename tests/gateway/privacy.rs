//! Nothing leaks: not the client's secrets to the provider, not the provider's to the client.

use http::StatusCode;
use serde_json::json;

use crate::support::{
    client::raw,
    gateway::Gateway,
    openai::{chat, completion},
    upstream::{Answer, Upstream},
};

const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn the_provider_sees_its_own_credential_and_nothing_of_the_client() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::before(&upstream.base_url());
    let request = gateway
        .post(CHAT)
        .header("api-key", &gateway.key)
        .header("x-api-key", "also-secret")
        .header("cookie", "session=1")
        .header("openai-organization", "org-client")
        .header("openai-project", "proj_client")
        .header("x-forwarded-for", "10.1.2.3")
        .header("x-stainless-lang", "python")
        .header("idempotency-key", "idem-1")
        .header("openai-beta", "assistants=v2")
        .header("accept-encoding", "gzip, br")
        .header("content-type", "application/json");
    request.body_content_length(chat().to_string()).send().await.unwrap().whole().await;
    let received = upstream.received().remove(0);
    let mut names: Vec<_> = received.headers.iter().map(|(name, _)| name.to_lowercase()).collect();
    names.sort();
    assert_eq!(
        names,
        [
            "accept-encoding",
            "authorization",
            "content-length",
            "content-type",
            "host",
            "idempotency-key",
            "openai-beta"
        ]
    );
    assert_eq!(received.header("authorization"), Some("Bearer sk-main"));
    assert_eq!(received.header("accept-encoding"), Some("identity"));
    assert_eq!(received.header("host"), Some(upstream.addr().to_string().as_str()));
    assert!(!format!("{received:?}").contains(&gateway.key));
    assert_eq!(received.body, chat().to_string().into_bytes(), "what needs no change is passed byte for byte");
}

#[tokio::test]
async fn the_client_sees_nothing_of_the_provider() {
    let upstream = Upstream::start(
        completion()
            .header("openai-organization", "org-secret")
            .header("openai-project", "proj_secret")
            .header("openai-version", "2020-10-01")
            .header("openai-processing-ms", "12")
            .header("x-request-id", "req_theirs")
            .header("x-ratelimit-remaining-requests", "3")
            .header("set-cookie", "__cf_bm=1")
            .header("cf-ray", "1-FRA")
            .header("alt-svc", "h3=\":443\"")
            .header("strict-transport-security", "max-age=1")
            .header("server", "cloudflare"),
    );
    let gateway = Gateway::before(&upstream.base_url());
    let answer = gateway.ask(CHAT, &chat()).await;
    assert_eq!(answer.status, StatusCode::OK);
    let mut names: Vec<_> = answer.headers.keys().map(|name| name.as_str().to_owned()).collect();
    names.sort();
    assert_eq!(names, ["connection", "content-length", "content-type", "date", "x-request-id"]);
}

#[tokio::test]
async fn early_hints_of_the_provider_stay_there() {
    let answer = "HTTP/1.1 103 Early Hints\r\nset-cookie: __cf_bm=1\r\n\r\n\
                  HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}";
    let upstream = Upstream::start(Answer::raw(answer));
    let gateway = Gateway::before(&upstream.base_url());
    let body = chat().to_string();
    let request = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        gateway.key,
        body.len()
    );
    let seen = raw(gateway.http(), &request).await;
    assert!(seen.starts_with("HTTP/1.1 200 OK"), "{seen}");
    assert!(!seen.contains("__cf_bm"), "{seen}");
}

#[tokio::test]
async fn errors_pass_without_what_names_the_account() {
    let message =
        "Rate limit reached for gpt-4o in organization org-abc123def456 on requests per min. Key sk-proj-abcdef123456.";
    let error =
        json!({ "error": { "message": message, "type": "requests", "param": null, "code": "rate_limit_exceeded" } });
    let upstream =
        Upstream::start(Answer::json(429, &error).header("retry-after", "7").header("retry-after-ms", "6500"));
    let gateway = Gateway::before(&upstream.base_url());
    let answer = gateway.ask(CHAT, &chat()).await;
    assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
    // What is left of the wait that the provider asked for: a little less than it was.
    let number = |name: &str| answer.header(name).unwrap().parse::<u64>().unwrap();
    assert!((1..=6500).contains(&number("retry-after-ms")), "{:?}", answer.headers);
    assert_eq!(number("retry-after"), number("retry-after-ms").div_ceil(1000));
    let shown = answer.json()["error"].clone();
    assert_eq!((&shown["code"], &shown["type"]), (&json!("rate_limit_exceeded"), &json!("requests")));
    let shown = shown["message"].as_str().unwrap();
    assert!(shown.starts_with("Rate limit reached for gpt-4o in organization ["), "{shown}");
    assert!(!shown.contains("abc123") && !shown.contains("sk-proj"), "{shown}");
}

#[tokio::test]
async fn a_refused_credential_is_the_gateways_trouble_not_the_clients() {
    for status in [401, 403, 302] {
        let upstream = Upstream::start(
            Answer::json(status, &json!({ "error": { "message": "Incorrect API key provided: sk-main" } }))
                .header("location", "https://elsewhere.example/"),
        );
        let gateway = Gateway::before(&upstream.base_url());
        let answer = gateway.ask(CHAT, &chat()).await;
        assert_eq!(
            (answer.status.as_u16(), &answer.json()["error"]["code"]),
            (502, &json!("upstream_error")),
            "{status}"
        );
        assert!(!String::from_utf8_lossy(&answer.body).contains("sk-main"));
        assert_eq!(answer.header("location"), None);
        let row = gateway.rows(1).await.remove(0);
        assert_eq!(
            (row.prompt_tokens, row.estimated, row.interrupted),
            (0, false, false),
            "what was refused costs nothing"
        );
    }
}
