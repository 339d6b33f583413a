//! Who gets in, to what, and what everybody else is told. Nothing of what is refused reaches an upstream.

use http::StatusCode;
use serde_json::json;
use tollgate::store::{KeySpec, UserSpec};
use tollgate_core::key::{ApiKey, IpNet};

use crate::support::{
    client::h1,
    gateway::Gateway,
    openai::{chat, completion},
    upstream::Upstream,
};

const CHAT: &str = "/v1/chat/completions";

async fn code_of(gateway: &Gateway, header: Option<(&str, &str)>) -> (u16, String) {
    let mut request = h1(gateway.http()).post(CHAT).body_content_length(chat().to_string());
    if let Some((name, value)) = header {
        request = request.header(name, value);
    }
    let answer = request.send().await.unwrap().whole().await;
    (answer.status.as_u16(), answer.json()["error"]["code"].as_str().unwrap_or_default().to_owned())
}

#[tokio::test]
async fn a_key_is_taken_from_either_header() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::before(&upstream.base_url());
    let bearer = format!("Bearer {}", gateway.key);
    for header in [("authorization", bearer.as_str()), ("api-key", gateway.key.as_str())] {
        assert_eq!(code_of(&gateway, Some(header)).await, (200, String::new()), "{}", header.0);
    }
}

#[tokio::test]
async fn a_missing_unknown_or_malformed_key_is_a_401() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::before(&upstream.base_url());
    let unknown = format!("Bearer {}", ApiKey::from_random(&[9; 32]).expose());
    let padded = format!("Bearer {}x", gateway.key);
    let cases = [
        None,
        Some(("authorization", unknown.as_str())),
        Some(("authorization", padded.as_str())),
        Some(("authorization", "Bearer sk-proj-1")),
        Some(("authorization", "Basic dXNlcjpwYXNz")),
        Some(("api-key", "tg-")),
    ];
    for header in cases {
        assert_eq!(code_of(&gateway, header).await, (401, "invalid_api_key".into()), "{header:?}");
    }
    assert!(upstream.received().is_empty());
    assert!(gateway.metric("tollgate_denials_total{code=\"invalid_api_key\"}").await >= 6.0);
}

#[tokio::test]
async fn a_key_that_is_revoked_expired_or_elsewhere_says_so() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::before(&upstream.base_url());
    let store = gateway.store().await;
    let user = store.find_user("alice").await.unwrap();
    let bob = store.create_user(&UserSpec { name: "bob".into(), ..UserSpec::default() }, "test").await.unwrap();
    let key = |n: u8| ApiKey::from_random(&[n; 32]);
    let spec = |name: &str| KeySpec { name: name.into(), ..KeySpec::default() };
    let expired = KeySpec { expires_at: Some(chrono::Utc::now() - chrono::TimeDelta::hours(1)), ..spec("expired") };
    let elsewhere = KeySpec { allow_ip: vec![IpNet::parse("10.0.0.0/8").unwrap()], ..spec("elsewhere") };
    store.create_key(user.id, &expired, &key(1), "test").await.unwrap();
    store.create_key(user.id, &elsewhere, &key(2), "test").await.unwrap();
    let revoked = store.create_key(user.id, &spec("revoked"), &key(3), "test").await.unwrap();
    store.revoke_key(revoked.id, "test").await.unwrap();
    store.create_key(bob.id, &spec("bobs"), &key(4), "test").await.unwrap();
    store.update_user(bob.id, "test", |spec| spec.disabled = true).await.unwrap();
    // The last change is seen, so all are.
    let last = ApiKey::from_random(&[5; 32]);
    store.create_key(user.id, &spec("last"), &last, "test").await.unwrap();
    until_code(&gateway, &last, (200, "")).await;
    for (n, expected) in [(1, (401, "key_expired")), (2, (403, "ip_not_allowed")), (3, (401, "key_revoked"))] {
        assert_eq!(code_of(&gateway, Some(("api-key", key(n).expose()))).await, (expected.0, expected.1.into()));
    }
    assert_eq!(code_of(&gateway, Some(("api-key", key(4).expose()))).await, (401, "key_revoked".into()));
    assert_eq!(upstream.received().len(), 1);
}

async fn until_code(gateway: &Gateway, key: &ApiKey, expected: (u16, &str)) {
    let until = std::time::Instant::now() + crate::support::gateway::PATIENCE;
    while code_of(gateway, Some(("api-key", key.expose()))).await != (expected.0, expected.1.to_owned()) {
        assert!(std::time::Instant::now() < until, "the change is not seen");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn changes_are_seen_while_running() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::before(&upstream.base_url());
    let store = gateway.store().await;
    let old = store.find_key("first").await.unwrap();
    let new = ApiKey::from_random(&[7; 32]);
    store.rotate_key(old.id, &new, "test").await.unwrap();
    until_code(&gateway, &new, (200, "")).await;
    assert_eq!(code_of(&gateway, Some(("api-key", &gateway.key))).await, (401, "invalid_api_key".into()));
    store.revoke_key(old.id, "test").await.unwrap();
    until_code(&gateway, &new, (401, "key_revoked")).await;
}

#[tokio::test]
async fn a_model_must_be_known_and_allowed() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::builder()
        .upstream("main", &upstream.base_url(), "models = [\"gpt-4o\", \"o3\", \"ft:*\"]")
        .key(KeySpec { models: vec!["gpt-4o".into(), "ft:*".into(), "missing".into()], ..KeySpec::default() })
        .start();
    for (model, status) in [("gpt-4o", 200), ("ft:mine", 200), ("o3", 404), ("gpt-5", 404), ("missing", 404)] {
        let answer = gateway.ask(CHAT, &json!({ "messages": [], "model": model })).await;
        assert_eq!(answer.status.as_u16(), status, "{model}");
        if status == 404 {
            let error = &answer.json()["error"];
            assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")));
        }
    }
    assert_eq!(upstream.received().len(), 2);
}

#[tokio::test]
async fn the_model_list_is_what_this_key_may_use() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::builder()
        .upstream("main", &upstream.base_url(), "models = [\"gpt-4o=prod\", \"o3\"]")
        .tables("[models.\"gpt-4o\"]\naliases = [\"smart\"]")
        .key(KeySpec { models: vec!["gpt-*".into()], ..KeySpec::default() })
        .start();
    let get = async |path: &str| h1(gateway.http()).get(path).bearer(&gateway.key).send().await.unwrap().whole().await;
    let list = get("/v1/models").await.json();
    let names: Vec<_> = list["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!((list["object"].as_str(), names), (Some("list"), vec!["gpt-4o", "smart"]));
    let one = get("/v1/models/gpt-4o").await;
    assert_eq!((one.status.as_u16(), one.json()["object"].as_str()), (200, Some("model")));
    assert_eq!(get("/v1/models/o3").await.json()["error"]["code"], "model_not_found");
    let nobody = h1(gateway.http()).get("/v1/models").send().await.unwrap();
    assert_eq!(nobody.status, StatusCode::UNAUTHORIZED);
    assert!(upstream.received().is_empty(), "the list is the gateway's own");
}

#[tokio::test]
async fn an_upstream_for_every_model_is_asked_what_it_lists() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::builder()
        .upstream("main", &upstream.base_url(), "")
        .tables("[models.\"gpt-4o\"]\naliases = [\"org/smart\"]")
        .start();
    let until = std::time::Instant::now() + crate::support::gateway::PATIENCE;
    loop {
        let list = h1(gateway.http()).get("/v1/models").bearer(&gateway.key).send().await.unwrap().whole().await.json();
        let models = list["data"].as_array().unwrap();
        let names: Vec<_> = models.iter().map(|model| model["id"].as_str().unwrap()).collect();
        if names == ["gpt-4o", "listed-only", "org/smart"] {
            break;
        }
        assert!(std::time::Instant::now() < until, "{names:?}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let shown =
        h1(gateway.http()).get("/v1/models/org%2Fsmart").bearer(&gateway.key).send().await.unwrap().whole().await;
    assert_eq!(shown.json()["id"], "org/smart");
}

#[tokio::test]
async fn paths_and_methods_outside_the_table_are_not_forwarded() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::before(&upstream.base_url());
    for path in ["/", "/v1", "/v1/organization/users", "/v1/chat/completions/", "/v1/chat/../chat/completions", "/v2/x"]
    {
        let answer = gateway.ask(path, &chat()).await;
        assert_eq!((answer.status.as_u16(), &answer.json()["error"]["code"]), (404, &json!("unknown_url")), "{path}");
    }
    let answer = h1(gateway.http()).get(CHAT).bearer(&gateway.key).send().await.unwrap().whole().await;
    assert_eq!((answer.status.as_u16(), answer.header("allow")), (405, Some("POST")));
    assert_eq!(answer.json()["error"]["code"], "method_not_allowed");
    assert!(upstream.received().is_empty());
}

#[tokio::test]
async fn bodies_that_cannot_be_acted_upon_are_a_400_with_a_reason() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::before(&upstream.base_url());
    let deep = format!("{{\"model\":\"gpt-4o\",\"x\":{}", "[".repeat(100_000));
    let cases: [(&[u8], &str); 13] = [
        (b"not json", ""),
        (b"[]", ""),
        (b"\"text\"", ""),
        (br#"{"model":"gpt-4o","messages":["#, ""),
        (br#"{"model":"gpt-4o"} trailing"#, ""),
        (br#"{"messages":[]}"#, "model"),
        (br#"{"model":7}"#, "model"),
        (br#"{"model":null}"#, "model"),
        (br#"{"model":""}"#, "model"),
        (br#"{"model":"gpt-4o","messages":[],"model":"o3"}"#, "model"),
        (br#"{"model":"gpt-4o","messages":[],"mod\u0065l":"o3"}"#, "model"),
        (b"{\"model\":\"gpt-4o\",\"x\":\"\xff\xfe\"}", ""),
        (deep.as_bytes(), ""),
    ];
    for (body, param) in cases {
        let shown = String::from_utf8_lossy(&body[..body.len().min(60)]).into_owned();
        let answer = gateway.post(CHAT).body_content_length(body.to_vec()).send().await.unwrap().whole().await;
        let error = answer.json()["error"].clone();
        assert_eq!((answer.status.as_u16(), &error["code"]), (400, &json!("invalid_body")), "{shown}");
        assert_eq!(error["type"], "invalid_request_error");
        assert_eq!(error["param"].as_str().unwrap_or_default(), param, "{shown}");
        assert!(error["message"].as_str().unwrap().len() > 10, "{shown}");
    }
    let compressed = gateway.post(CHAT).header("content-encoding", "gzip").body_content_length(vec![31, 139, 8]);
    let answer = compressed.send().await.unwrap().whole().await;
    assert_eq!((answer.status.as_u16(), &answer.json()["error"]["code"]), (400, &json!("invalid_body")));
    assert!(upstream.received().is_empty());
}

#[tokio::test]
async fn health_needs_no_key() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::before(&upstream.base_url());
    let answer = h1(gateway.http()).get("/health").send().await.unwrap().whole().await;
    assert_eq!((answer.status.as_u16(), &answer.json()["status"]), (200, &json!("ok")));
}
