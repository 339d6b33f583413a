//! Which upstream is asked, how it wants to be asked, and what happens when it fails.

use std::time::Duration;

use http::StatusCode;
use serde_json::{Value, json};

use crate::support::{
    gateway::Gateway,
    openai::{chat, chat_stream, completion},
    upstream::{Answer, Upstream},
};

const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn the_work_is_shared_by_weight() {
    let (a, b) = (Upstream::start(completion()), Upstream::start(completion()));
    let gateway = Gateway::builder()
        .upstream("a", &a.base_url(), "weight = 3")
        .upstream("b", &b.base_url(), "weight = 1")
        .start();
    for _ in 0..12 {
        assert_eq!(gateway.ask(CHAT, &chat()).await.status, StatusCode::OK);
    }
    assert_eq!((a.received().len(), b.received().len()), (9, 3));
}

#[tokio::test]
async fn another_upstream_takes_over_before_the_first_byte() {
    let faults = [
        Answer::json(429, &json!({})),
        Answer::json(500, &json!({})),
        Answer::json(503, &json!({})),
        Answer::json(401, &json!({})),
        Answer::reset(),
        Answer::half_header(),
        Answer::raw("nonsense\r\n\r\n"),
    ];
    for fault in faults {
        let (bad, good) = (Upstream::start(fault), Upstream::start(completion()));
        let gateway = Gateway::builder()
            .upstream("bad", &bad.base_url(), "")
            .upstream("good", &good.base_url(), "priority = 1")
            .start();
        let answer = gateway.ask(CHAT, &chat()).await;
        assert_eq!(answer.status, StatusCode::OK);
        let row = gateway.rows(1).await.remove(0);
        let attempts: Value = serde_json::from_str(&row.attempts).unwrap();
        assert_eq!((attempts[0]["upstream"].as_str(), attempts[1]["upstream"].as_str()), (Some("bad"), Some("good")));
        assert_eq!(attempts[1]["status"], 200);
        assert!(attempts[0]["error"].is_string(), "{attempts}");
        assert_eq!((row.upstream.as_deref(), row.prompt_tokens), (Some("good"), 7));
        assert_eq!(gateway.metric("tollgate_retries_total").await, 1.0);
    }
}

#[tokio::test]
async fn an_upstream_that_does_not_listen_is_passed_over() {
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let good = Upstream::start(completion());
    let gateway = Gateway::builder()
        .upstream("gone", &format!("http://{gone}/v1"), "")
        .upstream("nameless", "http://does-not-exist.invalid/v1", "priority = 1")
        .upstream("good", &good.base_url(), "priority = 2")
        .start();
    assert_eq!(gateway.ask(CHAT, &chat()).await.status, StatusCode::OK);
}

#[tokio::test]
async fn when_all_fail_the_client_gets_a_true_error() {
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let gateway = Gateway::before(&format!("http://{gone}/v1"));
    let answer = gateway.ask(CHAT, &chat()).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["error"]["code"]), (502, &json!("upstream_error")));

    let busy =
        Upstream::start(Answer::json(429, &json!({ "error": { "message": "slow down" } })).header("retry-after", "2"));
    let gateway = Gateway::builder()
        .upstream("one", &busy.base_url(), "")
        .upstream("two", &busy.base_url(), "priority = 1")
        .start();
    let answer = gateway.ask(CHAT, &chat()).await;
    assert_eq!((answer.status.as_u16(), answer.header("retry-after")), (429, Some("2")));
    assert_eq!(busy.received().len(), 2);

    let silent = Upstream::start(Answer::never());
    let gateway = Gateway::builder().upstream("main", &silent.base_url(), "first_byte_timeout = \"300ms\"").start();
    let answer = gateway.ask(CHAT, &chat()).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["error"]["code"]), (504, &json!("upstream_timeout")));

    let gateway = Gateway::builder().upstream("main", &silent.base_url(), "weight = 0").start();
    let answer = gateway.ask(CHAT, &chat()).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["error"]["code"]), (503, &json!("upstream_unavailable")));
    assert!(answer.header("retry-after").is_some());
}

#[tokio::test]
async fn a_kept_connection_that_was_closed_is_replaced() {
    let closing = Upstream::start([completion(), Answer::reset(), completion()]);
    let builder = Gateway::builder().tables("[retry]\nattempts = 1");
    let gateway = builder.upstream("main", &closing.base_url(), "").start();
    assert_eq!(gateway.ask(CHAT, &chat()).await.status, StatusCode::OK);
    assert_eq!(gateway.ask(CHAT, &chat()).await.status, StatusCode::OK, "the same upstream, on a fresh connection");
    assert_eq!(closing.received().len(), 3);
}

#[tokio::test]
async fn connections_to_an_upstream_are_kept() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::builder().server("threads = 1").upstream("main", &upstream.base_url(), "").start();
    for _ in 0..5 {
        gateway.ask(CHAT, &chat()).await;
    }
    let connections: Vec<_> = upstream.received().iter().map(|request| request.connection).collect();
    assert!(connections.iter().all(|connection| *connection == connections[0]), "{connections:?}");
}

#[tokio::test]
async fn a_model_has_another_name_at_the_upstream() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::builder()
        .upstream("main", &upstream.base_url(), "models = [\"gpt-4o=gpt-4o-2024\"]")
        .tables("[models.\"gpt-4o\"]\naliases = [\"smart\"]")
        .start();
    let body =
        r#"{"messages":[{"role":"user","content":"1.0e400 \u00e9"}],"seed":12345678901234567890,"model" : "smart"}"#;
    gateway.post(CHAT).body_content_length(body).send().await.unwrap().whole().await;
    let sent = String::from_utf8(upstream.received().remove(0).body).unwrap();
    assert_eq!(sent, body.replace("\"smart\"", "\"gpt-4o-2024\""), "every other byte stays");
    let row = gateway.rows(1).await.remove(0);
    assert_eq!((row.model.as_str(), row.upstream_model.as_deref()), ("gpt-4o", Some("gpt-4o-2024")));
}

#[tokio::test]
async fn azure_is_asked_in_its_own_way() {
    let upstream = Upstream::start(completion());
    let base = upstream.base_url().replace("/v1", "");
    let azure = "kind = \"azure\"\ncredential = \"azure-secret\"\nmodels = [\"gpt-4o=prod-4o\"]\n";
    let gateway = Gateway::builder().upstream("dated", &base, &format!("{azure}api_version = \"2024-10-21\"")).start();
    gateway.ask(CHAT, &chat()).await;
    gateway.ask(CHAT, &chat_stream()).await;
    gateway.ask("/v1/responses", &json!({ "input": "x", "model": "gpt-4o" })).await;
    let received = upstream.received();
    let targets: Vec<_> = received.iter().map(|request| request.target.as_str()).collect();
    let deployment = "/openai/deployments/prod-4o/chat/completions?api-version=2024-10-21";
    assert_eq!(targets, [deployment, deployment, "/openai/responses?api-version=2024-10-21"]);
    for request in &received {
        assert_eq!((request.header("api-key"), request.header("authorization")), (Some("azure-secret"), None));
    }
    let streamed: Value = serde_json::from_slice(&received[1].body).unwrap();
    assert_eq!(streamed["stream_options"]["include_usage"], true);

    let v1 = Upstream::start(completion());
    let base = v1.base_url().replace("/v1", "/openai/v1");
    let gateway = Gateway::builder().upstream("v1", &base, azure).start();
    gateway.ask(CHAT, &chat()).await;
    let request = v1.received().remove(0);
    assert_eq!(
        (request.target.as_str(), request.header("api-key")),
        ("/openai/v1/chat/completions", Some("azure-secret"))
    );
    let sent: Value = serde_json::from_slice(&request.body).unwrap();
    assert_eq!(sent["model"], "prod-4o");
}

#[tokio::test]
async fn upstreams_of_the_database_come_and_go_while_running() {
    let (first, second) = (Upstream::start(completion()), Upstream::start(completion()));
    let gateway = Gateway::builder().upstream("file", &first.base_url(), "models = [\"other\"]").start();
    assert_eq!(gateway.ask(CHAT, &chat()).await.status, StatusCode::NOT_FOUND);
    let store = gateway.store().await;
    let keys = tollgate::secrets::FernetKeys::from_file(&gateway.dir().join("fernet.key")).unwrap();
    let spec = tollgate::store::UpstreamSpec {
        name: "stored".into(),
        kind: tollgate_core::upstream::UpstreamKind::OpenAi,
        base_url: tollgate_core::upstream::BaseUrl::parse(&second.base_url()).unwrap(),
        credential: keys.encrypt(&tollgate_core::secret::Secret::new("sk-stored".into())),
        models: vec![],
        weight: 1,
        priority: 0,
        api_version: None,
        overrides: tollgate_core::upstream::Overrides::default(),
        disabled: false,
    };
    let stored = store.create_upstream(&spec, "test").await.unwrap();
    until_status(&gateway, StatusCode::OK).await;
    assert_eq!(second.received()[0].header("authorization"), Some("Bearer sk-stored"));
    store.update_upstream(stored.id, "test", |spec| spec.disabled = true).await.unwrap();
    until_status(&gateway, StatusCode::SERVICE_UNAVAILABLE).await;
    store.update_upstream(stored.id, "test", |spec| spec.disabled = false).await.unwrap();
    until_status(&gateway, StatusCode::OK).await;
    store.remove_upstream(stored.id, "test").await.unwrap();
    until_status(&gateway, StatusCode::NOT_FOUND).await;
}

#[tokio::test]
async fn an_upstream_that_cannot_be_used_does_not_hide_other_changes() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::builder().start();
    let store = gateway.store().await;
    let secret = tollgate_core::secret::Secret::new("sk-x".into());
    let others = tollgate::secrets::FernetKeys::try_new([&tollgate::secrets::generate_key()]).unwrap();
    let ours = tollgate::secrets::FernetKeys::from_file(&gateway.dir().join("fernet.key")).unwrap();
    for (name, keys) in [("foreign", others), ("ours", ours)] {
        let spec = tollgate::store::UpstreamSpec {
            name: name.into(),
            kind: tollgate_core::upstream::UpstreamKind::OpenAi,
            base_url: tollgate_core::upstream::BaseUrl::parse(&upstream.base_url()).unwrap(),
            credential: keys.encrypt(&secret),
            models: vec![],
            weight: 1,
            priority: 0,
            api_version: None,
            overrides: tollgate_core::upstream::Overrides::default(),
            disabled: false,
        };
        store.create_upstream(&spec, "test").await.unwrap();
    }
    until_status(&gateway, StatusCode::OK).await;
}

async fn until_status(gateway: &Gateway, status: StatusCode) {
    let until = std::time::Instant::now() + crate::support::gateway::PATIENCE;
    while gateway.ask(CHAT, &chat()).await.status != status {
        assert!(std::time::Instant::now() < until, "the change is not seen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
