//! Nothing leaks: not the client's secrets to the provider, not the provider's to the client, and content nowhere but where it is
//! to be kept.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use http::StatusCode;
use memchr::memmem;
use serde_json::{Value, json};
use tollgate::secrets::generate_key;

use crate::support::{
    client::{h1, raw},
    gateway::{Gateway, PATIENCE},
    openai::{DONE, chat, completion, event},
    program::{Program, Serving},
    upstream::{Answer, Received, Script, Upstream},
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

/// What a request with one mode plants, in its prompt and by the echo of its upstream in its answer.
struct Planted {
    mode: &'static str,
    key: String,
    /// A word like any other.
    word: String,
    email: String,
    secret: String,
}

impl Planted {
    fn new(mode: &'static str, key: String) -> Self {
        let random = || generate_key().expose().replace(['-', '_', '='], "x");
        let (email, secret) = (format!("{}@example.com", random()), format!("sk-proj-{}1", random()));
        Self { mode, key, word: random(), email, secret }
    }

    fn text(&self) -> String {
        format!("{} {} {}", self.word, self.email, self.secret)
    }

    /// Each of it, but for a part that chance could put somewhere else.
    fn canaries(&self) -> [&[u8]; 3] {
        [&self.word, &self.email, &self.secret].map(|text| &text.as_bytes()[8..32])
    }
}

/// Says what it was told, in the form that was asked for, or breaks while it does.
fn echo(request: &Received) -> Answer {
    let asked: Value = serde_json::from_slice(&request.body).unwrap_or_default();
    let text = [&asked["messages"][0]["content"], &asked["input"]].into_iter().find_map(Value::as_str);
    let text = text.unwrap_or_default().to_owned();
    let (half, rest) = text.split_at(text.len() / 2);
    let events = [event(half, None), event(rest, None), DONE.to_owned()];
    let error = json!({ "error": { "message": text, "type": text, "code": text, "param": text } });
    match (asked["user"].as_str().unwrap_or_default(), asked["stream"].as_bool().unwrap_or_default()) {
        ("refuse", _) => Answer::json(400, &error),
        ("fail", _) => Answer::json(500, &error),
        ("limit", _) => Answer::json(429, &error),
        ("break", true) => Answer::sse(events).cut_after(200),
        ("error", true) => Answer::sse([event(half, None), format!("data: {error}\n\n")]),
        ("nonsense", _) => Answer::text(200, "application/json", text),
        ("html", _) => Answer::text(200, "text/html", text),
        (_, true) => Answer::sse(events),
        (_, false) => Answer::json(200, &json!({ "choices": [{ "message": { "content": text } }], "output": text })),
    }
}

/// Everything that a client may do with a text, and the number of rows that it leaves.
async fn ask_everything(gateway: &Serving, planted: &Planted) -> usize {
    let mut rows = 0;
    let mut ask = async |path: &str, body: String, is_booked: bool| {
        let request = h1(gateway.http()).post(path).bearer(&planted.key).body_content_length(body);
        if let Ok(answer) = request.send().await {
            answer.whole().await;
        }
        rows += usize::from(is_booked);
    };
    let message = |text: &str| json!([{ "role": "user", "content": text }]);
    for user in ["", "refuse", "fail", "limit", "break", "error", "nonsense", "html"] {
        for stream in [false, true] {
            let body = json!({ "model": "m", "user": user, "stream": stream, "messages": message(&planted.text()) });
            ask(CHAT, body.to_string(), true).await;
        }
    }
    ask("/v1/responses", json!({ "model": "m", "input": planted.text() }).to_string(), true).await;
    ask("/v1/embeddings", json!({ "model": "m", "input": planted.text() }).to_string(), true).await;
    ask(CHAT, json!({ "model": "none", "messages": message(&planted.text()) }).to_string(), true).await;
    ask(CHAT, format!("{{\"messages\":\"{}", planted.text()), true).await;
    ask(CHAT, format!("{{\"{0}\":1,\"{0}\":2}}", planted.word), true).await;
    ask(&format!("/v1/{}", planted.word), planted.text(), false).await;
    rows
}

/// The bytes of every file below a directory.
fn files(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let read = |path: std::path::PathBuf| match path.is_dir() {
        true => files(&path),
        false => vec![(path.display().to_string(), fs::read(&path).unwrap())],
    };
    entries.flat_map(read).collect()
}

fn is_in(canary: &[u8], place: &[u8]) -> bool {
    memmem::find(place, canary).is_some()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn content_is_seen_nowhere_but_where_it_is_to_be_kept() {
    let upstream = Upstream::start(Script::by(echo));
    let program = Program::new(&format!(
        "[server]\nlisten = ['127.0.0.1:0']\nadmin_listen = '127.0.0.1:0'\n[store]\nurl = 'sqlite://DIR/db'\n\
         [secrets]\nfernet_keys_file = 'DIR/fernet.key'\n[usage]\njournal = 'DIR/journal'\nflush_interval = '20ms'\n\
         [log]\nlevel = 'trace'\n[breaker]\nfailures = 0\nfailure_percent = 0\n\
         [[upstream]]\nname = 'echo'\nbase_url = '{}'\ncredential = 'sk-1'\nmodels = ['m']\n",
        upstream.base_url()
    ));
    let run = |line: &str| {
        let run = program.run(line, "");
        assert_eq!(run.code, 0, "{line}: {}", run.stderr);
        run.stdout
    };
    run("init");
    let modes = ["none", "hash", "redacted", "full"];
    let planted = modes.map(|mode| {
        run(&format!("user create --name {mode} --audit-content {mode}"));
        let made: Value = serde_json::from_str(&run(&format!("key create --user {mode} --json"))).unwrap();
        Planted::new(mode, made["key"].as_str().unwrap().to_owned())
    });
    let gateway = program.serve();
    let mut rows = 0;
    for planted in &planted {
        rows += ask_everything(&gateway, planted).await;
    }
    let metrics = h1(gateway.admin()).get("/metrics").send().await.unwrap().whole().await;
    let until = Instant::now() + PATIENCE;
    let listed = loop {
        let listed: Value = serde_json::from_str(&run("audit --limit 1000 --json")).unwrap();
        if listed.as_array().unwrap().len() >= rows {
            break listed;
        }
        assert!(Instant::now() < until, "{} of {rows} rows", listed.as_array().unwrap().len());
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    // While it runs, with what is only in the database's own journal; and after its end, with everything.
    let mut places = files(program.directory());
    let log = gateway.stop();
    places.extend(files(program.directory()));
    places.push(("the log".to_owned(), log.into_bytes()));
    places.push(("the metrics".to_owned(), metrics.body.to_vec()));
    places.push(("the request log".to_owned(), listed.to_string().into_bytes()));
    assert!(is_in(b"TRACE", &places[places.len() - 3].1) || is_in(b"DEBUG", &places[places.len() - 3].1));
    for planted in &planted {
        for canary in planted.canaries() {
            for (place, bytes) in &places {
                let canary = String::from_utf8_lossy(canary).into_owned();
                assert!(!is_in(canary.as_bytes(), bytes), "{canary} of mode {} is seen in {place}", planted.mode);
            }
        }
    }
    // And so that the search was not in vain: what was to be kept is there, and says what it may.
    for planted in &planted {
        let ids = listed.as_array().unwrap().iter().filter(|row| row["user"] == planted.mode);
        let shown: Vec<Value> = ids
            .map(|row| {
                serde_json::from_str(&run(&format!("audit show {} --json", row["request_id"].as_str().unwrap())))
                    .unwrap()
            })
            .collect();
        let kept = shown.iter().filter(|row| !row["content"].is_null()).count();
        let seen = Value::from(shown).to_string();
        let [word, email, secret] = planted.canaries().map(|canary| is_in(canary, seen.as_bytes()));
        let expected = match planted.mode {
            "none" => (0, [false, false, false]),
            "hash" => (18, [false, false, false]),
            "redacted" => (18, [true, false, false]),
            _ => (18, [true, true, true]),
        };
        assert_eq!((kept, [word, email, secret]), expected, "{}", planted.mode);
    }
}
