//! Which upstream is asked, how it wants to be asked, and what happens when it fails.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use http::StatusCode;
use serde_json::{Value, json};

use crate::support::{
    cli::Cli,
    gateway::{Gateway, PATIENCE},
    openai::{DONE, chat, chat_stream, completion, event},
    upstream::{Answer, Script, Upstream},
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

#[test]
fn a_long_timeout_that_nobody_waits_for_any_longer_takes_no_memory() {
    let upstream = Upstream::start(completion());
    let _gateway = Gateway::builder().upstream("a", &upstream.base_url(), "").start();
    let cheap = pingora_timeout::fast_timeout::fast_timeout_to_tokio_threshold().unwrap();
    // Ten minutes are the default for the first byte.
    assert!(cheap <= Duration::from_secs(90), "timeouts up to {cheap:?} stay until their time has come");
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
    let until = std::time::Instant::now() + PATIENCE;
    while gateway.ask(CHAT, &chat()).await.status != status {
        assert!(std::time::Instant::now() < until, "the change is not seen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A gateway whose only upstream is in the database, and the command line beside it.
async fn with_stored(upstream: &Upstream) -> (Gateway, Cli) {
    let gateway = Gateway::builder().start();
    let cli = Cli::beside(&gateway).await;
    cli.run(&format!("upstream add --name stored --base-url {}", upstream.base_url()), "sk-stored").await.unwrap();
    until_state(&cli, "closed").await;
    (gateway, cli)
}

/// Waits until the upstream `stored` is in this state for the gateway.
async fn until_state(cli: &Cli, state: &str) {
    let until = std::time::Instant::now() + PATIENCE;
    loop {
        let rows = cli.json("upstream list").await;
        let row = rows.as_array().unwrap().iter().find(|row| row["name"] == "stored").unwrap().clone();
        if row["state"] == state {
            return;
        }
        assert!(std::time::Instant::now() < until, "waited for {state}: {row}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn the_list_shows_how_the_gateway_sees_each_upstream() {
    let upstream = Upstream::start(Answer::sse([event("a", None)]).never_end());
    let gateway = Gateway::builder().upstream("file", &upstream.base_url(), "").start();
    let cli = Cli { file_upstreams: vec![in_file("file")], ..Cli::beside(&gateway).await };
    cli.run("upstream add --name stored --base-url http://127.0.0.1:1/v1 --models other", "sk-1").await.unwrap();
    until_state(&cli, "closed").await;
    cli.text("upstream disable stored").await;
    until_state(&cli, "disabled").await;
    let mut stream = gateway.post(CHAT).body_content_length(chat_stream().to_string()).send().await.unwrap();
    stream.chunk().await.unwrap().unwrap();
    let rows = cli.json("upstream list").await;
    let seen = |row: &Value| (row["state"].clone(), row["in_flight"].clone());
    assert_eq!((seen(&rows[0]), seen(&rows[1])), ((json!("closed"), json!(1)), (json!("disabled"), json!(0))));
    assert_eq!(seen(&cli.json("upstream show file").await), (json!("closed"), json!(1)));
    let table = cli.text("upstream list").await;
    let words = |line: usize| table.lines().nth(line).unwrap().split_whitespace().rev().take(3).collect::<Vec<_>>();
    assert_eq!((words(1), words(2)), (vec!["1", "closed", "no"], vec!["0", "disabled", "yes"]), "{table}");

    // The file's upstream goes before one of the same name in the database.
    let spec = cli.store.find_upstream("stored").await.unwrap().spec;
    cli.store.create_upstream(&tollgate::store::UpstreamSpec { name: "file".into(), ..spec }, "test").await.unwrap();
    let rows = cli.json("upstream list").await;
    assert_eq!((&rows[2]["name"], seen(&rows[2])), (&json!("file"), (Value::Null, Value::Null)));
    drop(stream);
    upstream.wait_for_hang_ups(1).await;
}

fn in_file(name: &str) -> std::sync::Arc<tollgate_core::upstream::Upstream> {
    std::sync::Arc::new(tollgate_core::upstream::Upstream {
        id: None,
        name: name.to_owned(),
        kind: tollgate_core::upstream::UpstreamKind::OpenAi,
        base_url: tollgate_core::upstream::BaseUrl::parse("http://127.0.0.1:1/v1").unwrap(),
        credential: tollgate_core::secret::Secret::new("sk-in-file".into()),
        models: vec![],
        weight: 1,
        priority: 0,
        api_version: None,
        handling: tollgate_core::upstream::Handling::default(),
        ca_pem: None,
        disabled: false,
    })
}

#[tokio::test]
async fn draining_waits_for_what_is_in_flight() {
    let events = (0..12).map(|n| event(&n.to_string(), None)).chain([DONE.to_owned()]);
    let upstream = Upstream::start(Answer::sse(events).pause(Duration::from_millis(150)));
    let (gateway, cli) = with_stored(&upstream).await;
    let mut stream = gateway.post(CHAT).body_content_length(chat_stream().to_string()).send().await.unwrap();
    stream.chunk().await.unwrap().unwrap();

    let (printed, error, exit) = cli.fails_with("upstream drain stored --timeout 1s --json", "").await;
    let object: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!((&object["drained"], &object["in_flight"], exit), (&json!(false), &json!(1), 1));
    assert!(error.contains("1 attempt in flight") && error.contains("stays disabled"), "{error}");
    assert_eq!(gateway.ask(CHAT, &chat()).await.status, StatusCode::SERVICE_UNAVAILABLE, "it gets no new work");

    let (drained, whole) = tokio::join!(cli.json("upstream drain stored"), stream.whole());
    assert!(whole.error.is_none() && String::from_utf8_lossy(&whole.body).ends_with("[DONE]\n\n"));
    assert_eq!(
        (&drained["drained"], &drained["in_flight"], &drained["disabled"]),
        (&json!(true), &json!(0), &json!(true))
    );
    assert!(drained["waited_ms"].as_u64().is_some_and(|ms| ms > 0));
    assert_eq!(gateway.metric("tollgate_upstream_in_flight{upstream=\"stored\"}").await, 0.0);
    assert_eq!(
        cli.text("upstream drain stored").await,
        format!("drained upstream stored (id 1, {}): nothing is in flight there\n", upstream.base_url())
    );
}

#[tokio::test]
async fn no_client_notices_how_the_pool_changes() {
    let stream =
        || Answer::sse([event("one", None), event("two", None), DONE.to_owned()]).pause(Duration::from_millis(20));
    let (first, second) = (Upstream::start(stream()), Upstream::start(stream()));
    let (gateway, cli) = with_stored(&first).await;
    let (stop, body) = (AtomicBool::new(false), chat_stream());
    let client = async || {
        let mut whole = 0_usize;
        while !stop.load(Ordering::Relaxed) {
            let answer = gateway.ask(CHAT, &body).await;
            assert_eq!((answer.status, answer.error.as_deref()), (StatusCode::OK, None));
            assert!(String::from_utf8_lossy(&answer.body).ends_with("[DONE]\n\n"));
            whole += 1;
        }
        whole
    };
    let operator = async {
        let seen = |upstream: &'static str, wanted: f64| {
            let (gateway, series) =
                (&gateway, format!("tollgate_upstream_state{{state=\"disabled\",upstream=\"{upstream}\"}}"));
            async move {
                let until = std::time::Instant::now() + PATIENCE;
                while (gateway.metric(&series).await - wanted).abs() > 0.5 {
                    assert!(std::time::Instant::now() < until, "{series} is not {wanted}");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        };
        cli.run(&format!("upstream add --name other --base-url {}", second.base_url()), "sk-other").await.unwrap();
        second.wait_for(3).await;
        cli.run("upstream disable stored", "").await.unwrap();
        seen("stored", 1.0).await;
        cli.run("upstream update other --weight 7", "").await.unwrap();
        cli.run("upstream enable stored", "").await.unwrap();
        let asked = first.received().len();
        first.wait_for(asked + 3).await;
        assert!(cli.json("upstream drain other").await["drained"].as_bool().unwrap());
        cli.run("upstream remove other", "").await.unwrap();
        let asked = first.received().len();
        first.wait_for(asked + 20).await;
        stop.store(true, Ordering::Relaxed);
    };
    let clients = async { futures::future::join_all((0..8).map(|_| client())).await.into_iter().sum::<usize>() };
    let (whole, ()) = tokio::join!(clients, operator);
    assert_eq!(whole, first.received().len() + second.received().len(), "each was asked once");
}

#[tokio::test]
async fn draining_believes_only_a_gateway_that_has_seen_it() {
    let mut cli = Cli::new().await;
    cli.run("upstream add --name stored", "sk-1").await.unwrap();
    let metrics = |state: &str, in_flight: u32| {
        let text = format!(
            "tollgate_upstream_in_flight{{upstream=\"stored\"}} {in_flight}\n\
             tollgate_upstream_state{{state=\"{state}\",upstream=\"stored\"}} 1\n"
        );
        Answer::text(200, "text/plain", text)
    };
    let unaware = Upstream::start(metrics("closed", 0));
    cli.admin = Some(unaware.addr());
    let (_, error, exit) = cli.fails_with("upstream drain stored --timeout 1s", "").await;
    assert!(error.contains("the gateway has not seen yet that it is disabled") && exit == 1, "{error}");

    // Nothing once is no proof: a request may have been about to come.
    let calm = || metrics("disabled", 0);
    let late = Upstream::start([calm(), metrics("disabled", 1), calm(), calm(), calm(), calm(), calm()]);
    cli.admin = Some(late.addr());
    assert_eq!(cli.json("upstream drain stored").await["drained"], true);
    assert_eq!(late.received().len(), 7);

    // One that does not know it has nothing in flight there.
    let other = Upstream::start(Answer::text(200, "text/plain", "tollgate_store_up 1\n"));
    cli.admin = Some(other.addr());
    assert_eq!(cli.json("upstream drain stored").await["drained"], true);

    // One that ends while we wait.
    let mut first = Some(metrics("disabled", 2));
    let ending = Upstream::start(Script::by(move |_| first.take().unwrap_or_else(Answer::reset)));
    cli.admin = Some(ending.addr());
    let (printed, error, exit) = cli.fails_with("upstream drain stored --json", "").await;
    assert!(printed.contains("\"in_flight\":2") && printed.contains("\"drained\":false"), "{printed}");
    assert!(
        error.contains("does not answer any more") && error.contains("2 attempts in flight") && exit == 1,
        "{error}"
    );
}

#[tokio::test]
async fn an_operators_word_gives_a_quarantined_upstream_another_chance() {
    let refusing = std::sync::Arc::new(AtomicBool::new(true));
    let asked = std::sync::Arc::clone(&refusing);
    let upstream = Upstream::start(Script::by(move |_| {
        let is_refusing = asked.load(Ordering::Relaxed);
        if is_refusing { Answer::json(401, &json!({})) } else { completion() }
    }));
    let (gateway, cli) = with_stored(&upstream).await;
    // Enabled though it was not disabled; enabled after it was; changed.
    for lines in [
        &["upstream enable stored"][..],
        &["upstream disable stored", "upstream enable stored"],
        &["upstream update stored --weight 2"],
    ] {
        refusing.store(true, Ordering::Relaxed);
        gateway.ask(CHAT, &chat()).await;
        until_state(&cli, "quarantined").await;
        refusing.store(false, Ordering::Relaxed);
        for line in lines {
            cli.text(line).await;
        }
        until_state(&cli, "half_open").await;
        assert_eq!(gateway.ask(CHAT, &chat()).await.status, StatusCode::OK, "{lines:?}");
        until_state(&cli, "closed").await;
    }
    let entered = |state: &str| format!("tollgate_upstream_transitions_total{{state=\"{state}\",upstream=\"stored\"}}");
    assert_eq!(gateway.metric(&entered("quarantined")).await, 3.0);
    assert_eq!(gateway.metric(&entered("half_open")).await, 3.0);
}

#[tokio::test]
async fn a_change_of_others_frees_nobody() {
    let upstream = Upstream::start(Answer::json(401, &json!({})));
    let (gateway, cli) = with_stored(&upstream).await;
    gateway.ask(CHAT, &chat()).await;
    until_state(&cli, "quarantined").await;
    cli.run("upstream add --name other --base-url http://127.0.0.1:1/v1 --models other", "sk-1").await.unwrap();
    cli.text("user update alice --rpm 100").await;
    let until = std::time::Instant::now() + PATIENCE;
    while cli.json("upstream show other").await["state"] != "closed" {
        assert!(std::time::Instant::now() < until, "the change is not seen");
    }
    until_state(&cli, "quarantined").await;
}

#[tokio::test]
async fn a_credential_that_the_gateway_cannot_decrypt_leaves_it_with_the_old_one() {
    let upstream = Upstream::start(completion());
    let (gateway, cli) = with_stored(&upstream).await;
    let file = gateway.dir().join("fernet.key");
    let kept = std::fs::read_to_string(&file).unwrap();
    // A new first key that the gateway was not told of.
    std::fs::write(&file, format!("{}\n{kept}", tollgate::secrets::generate_key().expose())).unwrap();
    let cli = cli.with_keys_of(&file);
    cli.run("upstream update stored --new-credential --models gpt-4o,new", "sk-new").await.unwrap();
    let new = json!({ "messages": [], "model": "new" });
    let until = std::time::Instant::now() + PATIENCE;
    while gateway.ask(CHAT, &new).await.status != StatusCode::OK
        || cli.json("upstream list").await[0]["state"] != "closed"
    {
        assert!(std::time::Instant::now() < until, "the change is not seen");
    }
    assert_eq!(gateway.ask(CHAT, &chat()).await.status, StatusCode::OK);
    let sent: Vec<_> =
        upstream.received().iter().map(|request| request.header("authorization").unwrap().to_owned()).collect();
    assert!(sent.iter().all(|sent| sent == "Bearer sk-stored"), "{sent:?}");

    // At another address it may mean another account.
    let elsewhere = Upstream::start(completion());
    cli.text(&format!("upstream update stored --base-url {}", elsewhere.base_url())).await;
    until_status(&gateway, StatusCode::NOT_FOUND).await;
    assert_eq!(elsewhere.received().len(), 0, "a secret goes where it was meant to go");
}
