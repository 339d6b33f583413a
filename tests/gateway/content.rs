//! What is kept of the content of requests, by whose word, and how it is seen again.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tollgate::{
    secrets::{FernetKeys, generate_key},
    store::{ContentRow, KeySpec, UserSpec},
};
use tollgate_core::content::ContentMode;
use uuid::Uuid;

use crate::support::{
    cli::Cli,
    gateway::{Gateway, PATIENCE},
    openai::{chat, chat_stream, completion, event, events},
    postgres,
    upstream::{Answer, Script, Upstream},
};

const CHAT: &str = "/v1/chat/completions";
const RESPONSES: &str = "/v1/responses";

/// A gateway that keeps content in this mode.
fn keeping(mode: &str, upstream: &Upstream) -> Gateway {
    let audit = format!("[audit]\ncontent = \"{mode}\"");
    Gateway::builder().tables(&audit).upstream("main", &upstream.base_url(), "").start()
}

/// What is kept of a request, as soon as it is.
async fn kept(gateway: &Gateway, request: Uuid) -> ContentRow {
    let store = gateway.store().await;
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(row) = store.find_content(request).await.unwrap() {
            store.close().await;
            return row;
        }
        assert!(Instant::now() < until, "no content of {request}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// What `tollgate audit show` says of the request that was answered last.
async fn shown(gateway: &Gateway) -> Value {
    let request = gateway.rows(1).await[0].request_id.parse().unwrap();
    kept(gateway, request).await;
    Cli::beside(gateway).await.json(&format!("audit show {request}")).await
}

fn prompt(text: &str) -> Value {
    json!({ "model": "gpt-4o", "messages": [{ "role": "user", "content": text }] })
}

#[tokio::test]
async fn nothing_is_kept_unless_somebody_says_so() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::before(&upstream.base_url());
    assert_eq!(gateway.ask(CHAT, &chat()).await.status, 200);
    let request = gateway.rows(1).await.remove(0).request_id;
    // Longer than it takes to write content, were there any.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let cli = Cli::beside(&gateway).await;
    let shown = cli.json(&format!("audit show {request}")).await;
    assert_eq!(
        (&shown["request_id"], &shown["content"], &shown["user"]),
        (&json!(request), &Value::Null, &json!("alice"))
    );
    let text = cli.text(&format!("audit show {request}")).await;
    assert!(text.lines().any(|line| line.split_whitespace().eq(["content", "none"])), "{text}");
    assert!(cli.store.contents_after(None, 10).await.unwrap().is_empty());
}

#[tokio::test]
async fn both_bodies_are_kept_as_they_are_and_encrypted() {
    let upstream = Upstream::start(completion());
    let gateway = keeping("full", &upstream);
    let body = "{ \"model\":\"gpt-4o\", \"seed\":12345678901234567890123,\n \"messages\":[{\"role\":\"user\",\"content\":\"joe@example.com caf\\u00e9\"}]}";
    let answer = gateway.post(CHAT).body_content_length(body).send().await.unwrap().whole().await;
    let shown = shown(&gateway).await;
    let content = &shown["content"];
    assert_eq!(
        (&content["mode"], &content["truncated"], &content["unreadable"]),
        (&json!("full"), &json!(false), &json!(false))
    );
    assert_eq!(content["request_bytes"], body.len());
    assert_eq!(content["answer_bytes"], answer.body.len());
    assert_eq!(content["request"]["messages"][0]["content"], "joe@example.com café");
    assert_eq!(content["answer"], answer.json());

    let cli = Cli::beside(&gateway).await;
    let id = shown["request_id"].as_str().unwrap();
    let text = cli.text(&format!("audit show {id}")).await;
    assert!(text.contains(&format!("\nrequest:\n{}\n", body)), "every byte of it: {text}");
    let row = kept(&gateway, id.parse().unwrap()).await;
    assert!(row.sealed.is_some_and(|sealed| sealed[0] == 0x80));
    let log = cli.store.admin_log(1).await.unwrap().remove(0);
    assert_eq!((log.action.as_str(), log.actor.as_str()), ("content.read", "cli:test"), "who reads is noted");
}

#[tokio::test]
async fn redacted_content_is_what_is_left() {
    let upstream = Upstream::start(Answer::json(
        200,
        &json!({ "choices": [{ "message": { "content": "call +49 30 1234567 about EMP-123456" } }], "usage": null }),
    ));
    let audit = "[audit]\ncontent = \"redacted\"\nredact = ['EMP-\\d{6}']";
    let gateway = Gateway::builder().tables(audit).upstream("main", &upstream.base_url(), "").start();
    let asked = "joe@example.com, 4111 1111 1111 1111, sk-proj-1234567890abcdef, see data:image/png;base64,AAAA";
    gateway.ask(CHAT, &prompt(asked)).await;
    let content = shown(&gateway).await["content"].clone();
    assert_eq!(
        content["request"]["messages"][0]["content"],
        "[redacted:email], [redacted:card], [redacted:secret], see [redacted:data image/png 3 bytes]"
    );
    assert_eq!(content["answer"]["choices"][0]["message"]["content"], "call [redacted:phone] about [redacted:custom]");
    assert_eq!((&content["mode"], &content["truncated"]), (&json!("redacted"), &json!(false)));
}

#[tokio::test]
async fn equal_prompts_are_found_by_their_hash() {
    let upstream = Upstream::start(completion());
    let gateway = keeping("hash", &upstream);
    for text in ["the same", "another", "the same"] {
        gateway.ask(CHAT, &prompt(text)).await;
    }
    let rows = gateway.rows(3).await;
    for row in &rows {
        kept(&gateway, row.request_id.parse().unwrap()).await;
    }
    let cli = Cli::beside(&gateway).await;
    let show = async |n: usize| cli.json(&format!("audit show {}", rows[n].request_id)).await["content"].clone();
    let (last, other, first) = (show(0).await, show(1).await, show(2).await);
    assert_eq!(last["prompt_hash"], first["prompt_hash"]);
    assert_ne!(last["prompt_hash"], other["prompt_hash"]);
    assert_eq!(
        (&last["same_prompt"], &first["same_prompt"]),
        (&json!([rows[2].request_id]), &json!([rows[0].request_id]))
    );
    assert_eq!(other["same_prompt"], json!([]));
    assert_eq!((&last["request"], &last["answer"], &last["mode"]), (&Value::Null, &Value::Null, &json!("hash")));
    assert!(cli.store.contents_after(None, 10).await.unwrap().is_empty(), "there is nothing to be read");
    assert!(cli.store.admin_log(10).await.unwrap().iter().all(|log| log.action != "content.read"));
}

#[tokio::test]
async fn a_secret_that_a_stream_cuts_in_two_is_found() {
    let upstream = Upstream::start(Script::by(|request| {
        let asks = String::from_utf8_lossy(&request.body).contains("include_usage");
        let words = ["my key is sk-proj-123", "4567890abc", "def and joe@exa", "mple.com"];
        Answer::sse(events(&words, asks))
    }));
    let gateway = keeping("redacted", &upstream);
    gateway.ask(CHAT, &chat_stream()).await;
    let content = shown(&gateway).await["content"].clone();
    let message = &content["answer"]["choices"][0]["message"];
    assert_eq!(message["content"], "my key is [redacted:secret] and [redacted:email]");
    assert_eq!(content["answer"]["object"], "chat.completion");
    assert_eq!(content["answer"]["usage"], Value::Null, "nobody but the gateway asked for it");
}

#[tokio::test]
async fn a_stream_is_kept_as_the_answer_that_it_adds_up_to() {
    let call = |index: u64, more: Value| {
        let mut call = json!({ "index": index });
        call.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let delta = json!({ "tool_calls": [call] });
        format!("data: {}\n\n", json!({ "id": "c1", "choices": [{ "index": 0, "delta": delta }] }))
    };
    let parts = [
        call(0, json!({ "id": "call_1", "type": "function", "function": { "name": "mail", "arguments": "" } })),
        call(0, json!({ "function": { "arguments": "{\"to\":" } })),
        call(0, json!({ "function": { "arguments": "\"you\"}" } })),
        "data: [DONE]\n\n".to_owned(),
    ];
    let last = json!({ "type": "response.completed", "response": { "id": "resp_1", "output": [{ "text": "hi" }] } });
    let upstream = Upstream::start([Answer::sse(parts), Answer::sse([format!("data: {last}\n\n")])]);
    let gateway = keeping("full", &upstream);
    gateway.ask(CHAT, &chat_stream()).await;
    let call = &shown(&gateway).await["content"]["answer"]["choices"][0]["message"]["tool_calls"][0];
    assert_eq!(
        (&call["id"], &call["function"]),
        (&json!("call_1"), &json!({ "name": "mail", "arguments": "{\"to\":\"you\"}" }))
    );
    gateway.ask(RESPONSES, &json!({ "model": "gpt-4o", "input": "hi", "stream": true })).await;
    gateway.rows(2).await;
    assert_eq!(shown(&gateway).await["content"]["answer"], last["response"]);
}

#[tokio::test]
async fn what_failed_or_broke_off_is_kept_as_far_as_the_client_saw_it() {
    let error = |message: &str| json!({ "error": { "message": message, "type": "x", "code": null, "param": null } });
    let half = event("half a sen", None);
    let upstream = Upstream::start([
        Answer::json(400, &error("bad org-abc123def456")),
        Answer::json(500, &error("first")),
        Answer::sse([half.clone(), half.clone()]).cut_after(half.len()),
    ]);
    let gateway = keeping("full", &upstream);
    let first = gateway.ask(CHAT, &chat()).await;
    assert_eq!(shown(&gateway).await["content"]["answer"], first.json());
    let second = gateway.ask(CHAT, &chat()).await;
    assert!(second.status.is_server_error());
    gateway.rows(2).await;
    assert_eq!(shown(&gateway).await["content"]["answer"], second.json());
    gateway.ask(CHAT, &chat_stream()).await;
    gateway.rows(3).await;
    let shown = shown(&gateway).await;
    assert_eq!(
        (&shown["interrupted"], &shown["content"]["answer"]["choices"][0]["message"]["content"]),
        (&json!(true), &json!("half a sen"))
    );
}

#[tokio::test]
async fn what_nobody_could_serve_is_kept_with_the_gateways_own_answer() {
    let gone = Gateway::builder().tables("[audit]\ncontent = \"full\"").upstream("gone", "http://127.0.0.1:1/v1", "");
    let gateway = gone.start();
    let answer = gateway.ask(CHAT, &chat()).await;
    assert!(answer.status.is_server_error());
    let content = shown(&gateway).await["content"].clone();
    assert_eq!((&content["request"], &content["answer"]), (&chat(), &answer.json()));
    let disabled = Gateway::builder().tables("[audit]\ncontent = \"full\"");
    let gateway = disabled.upstream("off", "http://127.0.0.1:1/v1", "enabled = false").start();
    let answer = gateway.ask(CHAT, &chat()).await;
    assert_eq!(answer.status, 503);
    assert_eq!(shown(&gateway).await["content"]["answer"], answer.json());
}

#[tokio::test]
async fn an_answer_that_broke_before_the_client_saw_any_of_it_is_not_kept() {
    let broken = Upstream::start(Answer::sse(["data: {\"choices\":[{\"delta\":{\"content\":\"unseen"]).cut_after(44));
    let gateway = keeping("full", &broken);
    let answer = gateway.ask(CHAT, &chat_stream()).await;
    let content = shown(&gateway).await["content"].clone();
    assert!(!content.to_string().contains("unseen"), "{content}");
    assert_eq!(content["answer"], answer.json());
}

#[tokio::test]
async fn an_answer_that_was_not_passed_on_is_not_kept() {
    let secret = "data: {\"error\":{\"message\":\"of the first\"}}\n\n";
    let first = Upstream::start(Answer::sse([secret]));
    let second = Upstream::start(Answer::sse(events(&["of the second"], false)));
    let gateway = Gateway::builder()
        .tables("[audit]\ncontent = \"full\"")
        .upstream("first", &first.base_url(), "")
        .upstream("second", &second.base_url(), "priority = 1")
        .start();
    gateway.ask(CHAT, &chat_stream()).await;
    let content = shown(&gateway).await["content"].to_string();
    assert!(content.contains("of the second") && !content.contains("of the first"), "{content}");
}

#[tokio::test]
async fn the_key_goes_before_its_user_and_the_user_before_the_default() {
    let upstream = Upstream::start(completion());
    let gateway = keeping("hash", &upstream);
    let cli = Cli::beside(&gateway).await;
    let mut asked = 0;
    for (user, key, expected) in [
        ("default", "default", Some(ContentMode::Hash)),
        ("full", "default", Some(ContentMode::Full)),
        ("full", "redacted", Some(ContentMode::Redacted)),
        ("full", "none", None),
        ("none", "default", None),
        ("none", "full", Some(ContentMode::Full)),
    ] {
        let updated = cli.json(&format!("user update alice --audit-content {user}")).await;
        assert_eq!(updated["audit_content"], if user == "default" { Value::Null } else { json!(user) });
        let updated = cli.json(&format!("key update first --audit-content {key}")).await;
        assert_eq!(updated["audit_content"], if key == "default" { Value::Null } else { json!(key) });
        // Longer than the gateway takes to see a change.
        tokio::time::sleep(Duration::from_millis(1_100)).await;
        gateway.ask(CHAT, &chat()).await;
        asked += 1;
        let request: Uuid = gateway.rows(asked).await[0].request_id.parse().unwrap();
        match expected {
            Some(mode) => assert_eq!(kept(&gateway, request).await.mode, mode, "{user} {key}"),
            None => {
                tokio::time::sleep(Duration::from_millis(200)).await;
                assert_eq!(cli.store.find_content(request).await.unwrap(), None, "{user} {key}");
            }
        }
    }
    let made = cli.json("user create --name bob --audit-content full").await;
    assert_eq!(made["audit_content"], "full");
    let made = cli.json("key create --user bob --audit-content none").await;
    assert_eq!(made["audit_content"], "none");
}

#[tokio::test]
async fn what_is_too_long_is_cut_and_says_so() {
    let long = "0123456789".repeat(3_000);
    let answer = Answer::json(200, &json!({ "choices": [{ "message": { "content": long } }] }));
    let upstream = Upstream::start(Script::by({
        let events = events(&[&"0123456789".repeat(1_000), &"0123456789".repeat(1_000)], false);
        move |request| match String::from_utf8_lossy(&request.body).contains("\"stream\":true") {
            true => Answer::sse(events.clone()),
            false => answer.clone(),
        }
    }));
    let audit = "[audit]\ncontent = \"full\"\nmax_content = \"10 KiB\"";
    let gateway = Gateway::builder().tables(audit).upstream("main", &upstream.base_url(), "").start();
    gateway.ask(CHAT, &prompt(&long)).await;
    let content = shown(&gateway).await["content"].clone();
    assert_eq!(content["truncated"], true);
    for (name, bytes) in [("request", "request_bytes"), ("answer", "answer_bytes")] {
        let text = content[name].as_str().unwrap();
        assert_eq!(text.len(), 10 * 1024, "{name}");
        assert!(content[bytes].as_u64().unwrap() > 30_000, "the sizes are those of the whole: {content}");
    }
    gateway.ask(CHAT, &chat_stream()).await;
    gateway.rows(2).await;
    let content = shown(&gateway).await["content"].clone();
    assert_eq!(content["truncated"], true);
    assert!(content["answer"].as_str().unwrap().len() <= 10 * 1024);
    assert_eq!(content["request"], chat_stream());
}

#[tokio::test]
async fn what_finds_no_room_is_dropped_and_counted_and_no_request_fails() {
    let upstream = Upstream::start(Script::by(|request| {
        if request.body.len() < 10_000 {
            completion()
        } else {
            Answer::json(200, &json!({ "text": "x".repeat(900_000) }))
        }
    }));
    let audit = "[audit]\ncontent = \"full\"\nbuffer = \"1 MiB\"";
    let gateway = Gateway::builder().tables(audit).upstream("main", &upstream.base_url(), "").start();
    let dropped = async || gateway.metric("tollgate_content_dropped_total").await;
    // One that has no room for its request.
    assert_eq!(gateway.ask(CHAT, &prompt(&"x".repeat(1 << 20))).await.status, 200);
    assert!((dropped().await - 1.0).abs() < 0.1);
    // One that has no room for its answer.
    assert_eq!(gateway.ask(CHAT, &prompt(&"x".repeat(900_000))).await.status, 200);
    assert!((dropped().await - 2.0).abs() < 0.1);
    assert_eq!(gateway.ask(CHAT, &chat()).await.status, 200);
    let rows = gateway.rows(3).await;
    kept(&gateway, rows[0].request_id.parse().unwrap()).await;
    let store = gateway.store().await;
    for row in &rows[1..] {
        assert_eq!(store.find_content(row.request_id.parse().unwrap()).await.unwrap(), None);
    }
    let until = Instant::now() + PATIENCE;
    while gateway.metric("tollgate_content_bytes").await > 0.0 {
        assert!(Instant::now() < until, "the room is not given back");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn what_waits_is_written_at_the_end() {
    let upstream = Upstream::start(completion());
    let audit = "[audit]\ncontent = \"full\"";
    let mut gateway = Gateway::builder().tables(audit).upstream("main", &upstream.base_url(), "").start();
    for _ in 0..20 {
        gateway.ask(CHAT, &chat()).await;
    }
    gateway.stop().unwrap();
    let rows = gateway.rows(20).await;
    let store = gateway.store().await;
    for row in rows {
        assert!(store.find_content(row.request_id.parse().unwrap()).await.unwrap().is_some());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_database_that_is_away_costs_content_but_neither_memory_nor_a_request() {
    let mut database = postgres::Own::start();
    let upstream = Upstream::start(completion());
    let audit = "[audit]\ncontent = \"full\"\nbuffer = \"1 MiB\"";
    let builder = Gateway::builder().store(&database.url()).tables(audit);
    let gateway = builder.upstream("main", &upstream.base_url(), "").start();
    gateway.ask(CHAT, &chat()).await;
    kept(&gateway, gateway.rows(1).await[0].request_id.parse().unwrap()).await;

    database.kill();
    for _ in 0..30 {
        assert_eq!(gateway.ask(CHAT, &prompt(&"x".repeat(100_000))).await.status, 200);
        assert!(gateway.metric("tollgate_content_bytes").await <= f64::from(1 << 20));
    }
    let dropped = gateway.metric("tollgate_content_dropped_total").await;
    assert!((15.0..30.0).contains(&dropped), "{dropped}");
    database.restart();
    let rows = gateway.rows(31).await;
    let until = Instant::now() + PATIENCE;
    while gateway.metric("tollgate_content_bytes").await > 0.0 {
        assert!(Instant::now() < until, "the content that waited is not written");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let store = gateway.store().await;
    let mut kept = 0.0;
    for row in &rows {
        kept += f64::from(u8::from(store.find_content(row.request_id.parse().unwrap()).await.unwrap().is_some()));
    }
    store.close().await;
    assert_eq!(
        (rows.len(), kept + dropped),
        (31, 31.0),
        "every request is on the books, and its content kept or counted"
    );
}

#[tokio::test]
async fn content_is_rotated_to_the_first_key_and_shown_only_with_one_that_fits() {
    let upstream = Upstream::start(completion());
    let gateway = keeping("full", &upstream);
    gateway.ask(CHAT, &prompt("a canary")).await;
    let id = shown(&gateway).await["request_id"].as_str().unwrap().to_owned();
    let old = std::fs::read_to_string(gateway.dir().join("fernet.key")).unwrap();
    let new = generate_key();
    let mut cli = Cli::beside(&gateway).await;
    let keys = |text: &str| FernetKeys::parse(&tollgate_core::secret::Secret::new(text.to_owned())).unwrap();

    cli.fernet = keys(new.expose());
    let unreadable = cli.json(&format!("audit show {id}")).await;
    assert_eq!((&unreadable["content"]["unreadable"], &unreadable["content"]["request"]), (&json!(true), &Value::Null));
    let text = cli.text(&format!("audit show {id}")).await;
    assert!(
        text.contains("The content cannot be decrypted: bring back the Fernet key") && !text.contains("canary"),
        "{text}"
    );

    cli.fernet = keys(&format!("{}\n{old}", new.expose()));
    assert_eq!(cli.json("secret rotate").await["content"], json!({ "rotated": 1, "already": 0, "failed": 0 }));
    assert_eq!(cli.json("secret rotate").await["content"], json!({ "rotated": 0, "already": 1, "failed": 0 }));
    assert!(
        cli.text("secret rotate")
            .await
            .contains("content of 0 requests encrypted with the first key; that of 1 had been already")
    );
    cli.fernet = keys(new.expose());
    let shown = cli.json(&format!("audit show {id}")).await;
    assert_eq!(shown["content"]["request"]["messages"][0]["content"], "a canary", "the first key does alone");

    // What is damaged keeps nothing else from being rotated.
    let newest = generate_key();
    cli.fernet = keys(&format!("{}\n{}", newest.expose(), new.expose()));
    let damaged = ContentRow {
        request_id: Uuid::now_v7(),
        sealed: Some(vec![0x80; 73]),
        ..kept(&gateway, id.parse().unwrap()).await
    };
    cli.store.write_contents(&[damaged]).await.unwrap();
    let (printed, error, code) = cli.fails_with("secret rotate --json", "").await;
    let counts: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(counts["content"], json!({ "rotated": 1, "already": 0, "failed": 1 }));
    assert!(
        error.contains("no Fernet key decrypts the content of 1 requests: bring back the key") && code == 1,
        "{error}"
    );
    cli.fernet = keys(newest.expose());
    assert_eq!(cli.json(&format!("audit show {id}")).await["content"]["unreadable"], false);
}

#[tokio::test]
async fn a_request_that_is_not_there_is_told() {
    let cli = Cli::new().await;
    let (error, code) = cli.fails(&format!("audit show {}", Uuid::now_v7()), "").await;
    assert!(
        error.contains("there is no request") && error.contains("`tollgate audit` shows what there is") && code == 1,
        "{error}"
    );
    let (error, _) = cli.fails("audit show 01234567-89ab-4def-8123-456789abcdef", "").await;
    assert!(error.contains("is no id of a request"), "{error}");
}

#[test]
fn wrong_settings_are_told_with_their_mend() {
    let text = "[audit]\ncontent = \"some\"\nmax_content = \"17 MiB\"\nbuffer = \"1 KiB\"\ncontent_retention_days = -1\n\
                redact = ['EMP-(', '[0-9]*', 'fine', '(?=x)']\nretention = 3\n";
    let errors = tollgate::config::parse(None, text, &|_| None).unwrap_err().to_string();
    for says in [
        "audit.content: \"some\" is not a choice: use \"none\", \"hash\", \"redacted\" or \"full\"",
        "audit.max_content: 17 MiB is not between 1 KiB and 16 MiB",
        "audit.buffer: 1 KiB is not between",
        "audit.content_retention_days",
        "audit.redact[0]: \"EMP-(\" is not a regular expression: unclosed group",
        "audit.redact[1]: \"[0-9]*\" matches the empty text",
        "audit.redact[3]: \"(?=x)\" is not a regular expression: look-around",
        "audit.retention: unknown setting",
    ] {
        assert!(errors.contains(says), "{says}: {errors}");
    }
    let small = "[audit]\nmax_content = \"1 MiB\"\nbuffer = \"2 MiB\"\n";
    let errors = tollgate::config::parse(None, small, &|_| None).unwrap_err().to_string();
    assert!(errors.contains("audit.buffer: is too small: four times max_content is the least"), "{errors}");
}

#[tokio::test]
async fn a_key_says_for_itself_from_the_start() {
    let upstream = Upstream::start(completion());
    let key = KeySpec { audit_content: Some(ContentMode::Full), ..KeySpec::default() };
    let gateway = Gateway::builder().key(key).upstream("main", &upstream.base_url(), "").start();
    gateway.ask(CHAT, &chat()).await;
    assert_eq!(shown(&gateway).await["content"]["request"], chat());
    assert_eq!(UserSpec::default().audit_content, None);
}
