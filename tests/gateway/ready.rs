//! `/readyz`: it says what is missing, in words, and takes a gateway out of use only when callers would notice.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tollgate::store::{KeySpec, Store};
use tollgate_core::limit::Limits;

use crate::support::{
    client::h1,
    gateway::{Gateway, PATIENCE},
    openai::{chat, chat_stream, completion, event},
    postgres::Own,
    redis::Redis,
    upstream::{Answer, Upstream},
};

const CHAT: &str = "/v1/chat/completions";

async fn readyz(gateway: &Gateway) -> (u16, Value) {
    let (status, text) = gateway.admin("/readyz").await;
    (status, serde_json::from_str(&text).unwrap())
}

/// Asks for work again and again, each of which must be done, until `/readyz` says this of a part: its status, and a word of its
/// reason.
async fn served_until(gateway: &Gateway, part: &str, status: &str, word: &str) -> (u16, Value) {
    let start = Instant::now();
    loop {
        assert_eq!(gateway.ask(CHAT, &chat()).await.status, 200, "callers are answered all the while");
        let (code, page) = readyz(gateway).await;
        let reason = page["parts"][part]["reason"].as_str().unwrap_or_default();
        if page["parts"][part]["status"] == status && reason.contains(word) {
            return (code, page);
        }
        assert!(start.elapsed() < PATIENCE * 2, "{part} is not {status} ({word}): {page:#}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn until(gateway: &Gateway, is_so: impl Fn(u16, &Value) -> bool) -> (u16, Value) {
    let start = Instant::now();
    loop {
        let (code, page) = readyz(gateway).await;
        if is_so(code, &page) {
            return (code, page);
        }
        assert!(start.elapsed() < PATIENCE, "{code}: {page:#}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn all_is_well_part_by_part() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::before(&upstream.base_url());
    let (status, page) = until(&gateway, |_, page| page["status"] == "ok").await;
    let parts = ["listeners", "keys", "upstreams", "journal", "limiter", "store"];
    let parts: serde_json::Map<_, _> =
        parts.map(|part| (part.to_owned(), json!({"status": "ok"}))).into_iter().collect();
    assert_eq!((status, page), (200, json!({"ready": true, "status": "ok", "parts": parts})));

    let text = h1(gateway.addresses.admin.unwrap()).get("/readyz").header("accept", "text/plain");
    let text = text.send().await.unwrap().whole().await;
    assert_eq!(text.header("content-type"), Some("text/plain; charset=utf-8"));
    let text = String::from_utf8(text.body.to_vec()).unwrap();
    assert_eq!(text, "ready\nlisteners: ok\nkeys: ok\nupstreams: ok\njournal: ok\nlimiter: ok\nstore: ok\n");
}

#[tokio::test]
async fn what_nobody_could_be_served_without_is_told_with_its_mend() {
    let bare = Gateway::builder().start();
    let (status, page) = readyz(&bare).await;
    assert_eq!((status, &page["ready"]), (503, &json!(false)));
    let part = json!({"status": "unavailable", "reason": "there is no upstream: tollgate upstream add"});
    assert_eq!(page["parts"]["upstreams"], part);
    assert_eq!(page["parts"]["keys"], json!({"status": "ok"}));

    let off = Gateway::builder().upstream("off", "http://127.0.0.1:1/v1", "enabled = false").start();
    let (status, page) = readyz(&off).await;
    assert_eq!(status, 503);
    assert!(page["parts"]["upstreams"]["reason"].as_str().unwrap().contains("tollgate upstream enable"), "{page:#}");

    // Its only key is revoked: it is still known, but a database without keys is another matter.
    let keyless = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}/empty.db", keyless.path().display());
    let store = Store::open(&url).await.unwrap();
    store.migrate().await.unwrap();
    store.close().await;
    let (status, page) = readyz(&Gateway::builder().store(&url).without_key().start()).await;
    assert_eq!(status, 503);
    assert!(page["parts"]["keys"]["reason"].as_str().unwrap().contains("tollgate key create"), "{page:#}");
}

#[tokio::test]
async fn upstreams_that_rest_are_named_and_all_of_them_are_too_many() {
    let refusing = Upstream::start(Answer::json(401, &json!({"error": {"message": "no", "code": "invalid_api_key"}})));
    let well = Upstream::start(completion());
    let gateway = Gateway::builder()
        .upstream("bad", &refusing.base_url(), "")
        .upstream("good", &well.base_url(), "priority = 1")
        .start();
    let (status, page) = served_until(&gateway, "upstreams", "degraded", "bad (quarantined").await;
    assert_eq!((status, &page["ready"], &page["status"]), (200, &json!(true), &json!("degraded")));
    let reason = page["parts"]["upstreams"]["reason"].as_str().unwrap();
    assert!(reason.contains("tollgate upstream test") && !reason.contains("good"), "{reason}");

    let alone = Gateway::before(&refusing.base_url());
    assert_ne!(alone.ask(CHAT, &chat()).await.status, 200);
    let (_, page) = until(&alone, |status, _| status == 503).await;
    let reason = page["parts"]["upstreams"]["reason"].as_str().unwrap();
    assert!(reason.starts_with("no upstream can be asked now: main (quarantined"), "{reason}");

    let cooling =
        Upstream::start(Answer::json(429, &json!({"error": {"message": "slow"}})).header("retry-after", "60"));
    let cooling = Gateway::before(&cooling.base_url());
    assert_eq!(cooling.ask(CHAT, &chat()).await.status, 429);
    let (_, page) = until(&cooling, |status, _| status == 503).await;
    let reason = page["parts"]["upstreams"]["reason"].as_str().unwrap();
    assert!(reason.contains("main (cooling for ") && reason.ends_with(" s)"), "{reason}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_killed_frozen_and_back_again_is_told_and_nobody_notices() {
    let mut server = Own::start();
    let upstream = Upstream::start(completion());
    let gateway = Gateway::builder().store(&server.url()).upstream("main", &upstream.base_url(), "").start();
    served_until(&gateway, "store", "ok", "").await;
    assert_eq!(gateway.metric("tollgate_store_up").await, 1.0);
    server.kill();
    let (status, page) = served_until(&gateway, "store", "degraded", "does not answer").await;
    assert_eq!((status, &page["ready"], &page["status"]), (200, &json!(true), &json!("degraded")));
    assert_eq!(gateway.metric("tollgate_store_up").await, 0.0);
    server.restart();
    let (status, page) = served_until(&gateway, "store", "ok", "").await;
    assert_eq!((status, &page["status"]), (200, &json!("ok")));
    assert_eq!(gateway.metric("tollgate_store_up").await, 1.0);
    server.freeze();
    let (status, _) = served_until(&gateway, "store", "degraded", "usage waits in the journal (").await;
    assert_eq!(status, 200);
    server.thaw();
    served_until(&gateway, "store", "ok", "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_that_is_killed_and_back_again_is_told_and_nobody_notices() {
    let mut redis = Redis::start();
    let upstream = Upstream::start(completion());
    let limits = Limits { rpm: Some(100_000), ..Limits::default() };
    let with = |more: &str| {
        Gateway::builder()
            .upstream("main", &upstream.base_url(), "")
            .tables(&format!("[limiter]\nredis = \"{}\"\n{more}", redis.url()))
            .key(KeySpec { limits, ..KeySpec::default() })
            .start()
    };
    let (gateway, denying) = (with(""), with("on_redis_down = \"deny\""));
    served_until(&gateway, "limiter", "ok", "").await;
    served_until(&denying, "limiter", "ok", "").await;
    redis.stop();
    let (status, page) = served_until(&gateway, "limiter", "degraded", "its share of every limit").await;
    assert_eq!((status, &page["ready"]), (200, &json!(true)));
    // Where nobody is served without it, others may be better off.
    let (_, page) = until(&denying, |status, _| status == 503).await;
    assert!(page["parts"]["limiter"]["reason"].as_str().unwrap().contains("on_redis_down"), "{page:#}");
    redis.restart();
    served_until(&gateway, "limiter", "ok", "").await;
    until(&denying, |status, page| status == 200 && page["parts"]["limiter"]["status"] == "ok").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_drains_is_not_ready_and_finishes() {
    let upstream = Upstream::start(Answer::sse([event("one", None)]).never_end());
    let mut gateway = Gateway::before(&upstream.base_url());
    let stream = gateway.post(CHAT).body_content_length(chat_stream().to_string()).send().await.unwrap();
    gateway.ask_to_stop();
    let (_, page) = until(&gateway, |status, _| status == 503).await;
    assert_eq!(page["parts"]["listeners"]["status"], "unavailable");
    assert!(page["parts"]["listeners"]["reason"].as_str().unwrap().contains("takes nothing new"), "{page:#}");
    drop(stream);
    gateway.stop().unwrap();
}
