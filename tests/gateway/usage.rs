//! Every answer is counted: from its JSON, from its stream, or with the tokenizer when neither says so.

use std::time::Duration;

use serde_json::{Value, json};
use tollgate::store::{AuditRow, GroupBy, KeySpec, UsageQuery};
use tollgate_core::key::ApiKey;

use crate::support::{
    client::{h1, h2},
    gateway::{Gateway, PATIENCE},
    openai::{DONE, chat, chat_stream, completion, event, events, usage_event},
    postgres,
    upstream::{Answer, Script, Upstream},
};

const CHAT: &str = "/v1/chat/completions";

fn counts(row: &AuditRow) -> (i64, i64, bool) {
    (row.prompt_tokens, row.completion_tokens, row.estimated)
}

/// An upstream that reports usage in a stream if it is asked to, as the provider does.
fn streaming(words: &'static [&'static str]) -> Upstream {
    Upstream::start(Script::by(move |request| {
        let body: Value = serde_json::from_slice(&request.body).unwrap();
        Answer::sse(events(words, body["stream_options"]["include_usage"] == json!(true)))
    }))
}

#[tokio::test]
async fn a_json_answer_is_counted_from_its_usage() {
    let upstream = Upstream::start(completion().header("x-request-id", "req_1"));
    let gateway = Gateway::builder()
        .upstream("main", &upstream.base_url(), "")
        .tables(
            "[models.\"gpt-4o\"]\ninput_usd_per_mtok = 2.5\ncached_input_usd_per_mtok = 1.25\noutput_usd_per_mtok = 10",
        )
        .start();
    let answer = gateway
        .post(CHAT)
        .header("user-agent", "test/1")
        .header("x-request-id", "mine")
        .body_content_length(chat().to_string())
        .send()
        .await
        .unwrap()
        .whole()
        .await;
    let row = gateway.rows(1).await.remove(0);
    assert_eq!(answer.header("x-request-id"), Some(row.request_id.as_str()), "the id is the gateway's own");
    assert_eq!(counts(&row), (7, 5, false));
    assert_eq!((row.cached_tokens, row.reasoning_tokens), (4, 2));
    assert_eq!(row.cost_nano_usd, 3 * 2500 + 4 * 1250 + 5 * 10_000);
    assert_eq!((row.user.as_deref(), row.key.as_deref()), (Some("alice"), Some("first")));
    assert_eq!((row.route.as_str(), row.model.as_str(), row.status), ("chat_completions", "gpt-4o", 200));
    assert_eq!((row.finish_reason.as_deref(), row.code, row.interrupted), (Some("stop"), None, false));
    assert_eq!(row.provider_request_id.as_deref(), Some("req_1"));
    assert_eq!(row.client_request_id.as_deref(), Some("mine"));
    assert_eq!(row.user_agent.as_deref(), Some("test/1"));
    assert_eq!(gateway.metric("tollgate_tokens_total{kind=\"prompt\",model=\"gpt-4o\"}").await, 7.0);
    let ok = "tollgate_requests_total{code=\"ok\",model=\"gpt-4o\",route=\"chat_completions\"}";
    assert_eq!(gateway.metric(ok).await, 1.0);
}

#[tokio::test]
async fn a_stream_is_asked_for_usage_and_the_client_does_not_notice() {
    let words = &["a", "\u{6f22}", "\"usage\":null", "c"];
    let upstream = streaming(words);
    let gateway = Gateway::before(&upstream.base_url());
    let answer = gateway.ask(CHAT, &chat_stream()).await;
    assert_eq!(String::from_utf8_lossy(&answer.body), events(words, false).concat());
    assert!(answer.header("content-type").unwrap().starts_with("text/event-stream"));
    let sent = &upstream.received()[0].body;
    let expected = chat_stream().to_string().replace('}', "").len();
    assert!(sent.len() > expected, "the body was spliced");
    let sent: Value = serde_json::from_slice(sent).unwrap();
    assert_eq!(sent["stream_options"], json!({ "include_usage": true }));
    let row = gateway.rows(1).await.remove(0);
    assert_eq!((counts(&row), row.stream, row.ttft_ms.is_some()), ((7, 4, false), true, true));
}

#[tokio::test]
async fn a_client_that_asks_for_usage_gets_the_stream_byte_for_byte() {
    let words = &["a", "b"];
    let upstream = streaming(words);
    let gateway = Gateway::before(&upstream.base_url());
    let mut body = chat_stream();
    body["stream_options"] = json!({ "include_usage": true });
    let answer = gateway.ask(CHAT, &body).await;
    assert_eq!(String::from_utf8_lossy(&answer.body), events(words, true).concat());
    assert_eq!(upstream.received()[0].body, body.to_string().into_bytes());
    assert_eq!(counts(&gateway.rows(1).await[0]), (7, 2, false));
}

#[tokio::test]
async fn the_first_event_does_not_wait_for_the_second() {
    let parts = [event("a", Some("null")), event("b", Some("null")), usage_event(7, 2), DONE.into()];
    let upstream = Upstream::start(Answer::sse(parts).pause(Duration::from_secs(2)));
    let gateway = Gateway::before(&upstream.base_url());
    let request = gateway.post(CHAT).body_content_length(chat_stream().to_string());
    let mut response = request.send().await.unwrap();
    let first = tokio::time::timeout(Duration::from_secs(1), response.chunk()).await;
    let first = first.expect("the first event comes before the pause ends").unwrap().unwrap();
    assert_eq!(String::from_utf8_lossy(&first.bytes), event("a", None));
}

#[tokio::test]
async fn a_silent_provider_is_counted_by_the_tokenizer() {
    let silent = json!({ "choices": [{ "index": 0, "finish_reason": "stop",
        "message": { "role": "assistant", "content": "hello world, how are you" } }] });
    let upstream = Upstream::start([
        Answer::json(200, &silent),
        Answer::sse([event("hello world,", None), event(" how are you", None), DONE.to_owned()]),
    ]);
    let gateway = Gateway::before(&upstream.base_url());
    gateway.ask(CHAT, &chat()).await;
    gateway.ask(CHAT, &chat_stream()).await;
    let rows = gateway.rows(2).await;
    // "hello world" is 2 tokens, its role 1, and a message's frame is 3 + 3; the answer is 6.
    for row in &rows {
        assert_eq!(counts(row), (9, 6, true), "stream: {}", row.stream);
    }
}

#[tokio::test]
async fn a_client_that_hangs_up_pays_for_what_was_produced() {
    let first = event("one two three four five six seven eight", Some("null"));
    let upstream = Upstream::start(Answer::sse([first]).never_end());
    let gateway = Gateway::before(&upstream.base_url());
    let request = gateway.post(CHAT).body_content_length(chat_stream().to_string());
    let mut response = request.send().await.unwrap();
    assert!(response.chunk().await.unwrap().is_ok());
    assert_eq!(upstream.hang_ups(), 0);
    drop(response);
    upstream.wait_for_hang_ups(1).await;
    let row = gateway.rows(1).await.remove(0);
    assert_eq!((counts(&row), row.interrupted), ((9, 8, true), true));
    assert_eq!(row.code.as_deref(), Some("client_closed"));
}

/// What models write, in the tokens in which they write it.
const TEXTS: [&str; 5] = [
    "The committee had met three times before anyone noticed that the minutes of its first session described a vote which, \
     according to everybody present, had never taken place. It wasn't fraud; it was Tuesday.\n\n1. **Costs** rose by 4.7 %.\n",
    "Die Donaudampfschifffahrtsgesellschaft hat übrigens geantwortet: Überweisungen über 12.500,00 € würden künftig binnen \
     zwei Werktagen ausgeführt – äußerst erfreulich, wenn man bedenkt, daß es früher Wochen dauerte.\n",
    "敏捷的棕色狐狸跳过了懒狗。北京的秋天天高气爽，香山的红叶吸引了无数游客。それは面白いですね、明日また話しましょう。\n",
    "fn merge(mut a: Vec<u64>, b: &[u64]) -> Result<Vec<u64>, Error> {\n    a.extend_from_slice(b);\n    a.sort_unstable();\n    \
     a.dedup();\n    if a.len() > 0xFFFF { return Err(Error::TooLong { len: a.len() }); }\n    Ok(a)\n}\n",
    "{\"id\":\"a81bc81b-dead-4e5d-abff-90865d1e13b1\",\"ok\":true,\"items\":[1,2.5e-3,null],\"note\":\"👍🏽 naïve café — done ✅\"}\n",
];

#[tokio::test]
async fn what_a_client_that_hung_up_had_is_counted_as_its_provider_counts() {
    for text in TEXTS {
        // One event per token, as providers send them; a character that takes several comes with its last one.
        let tokenizer = bpe_openai::o200k_base();
        let (mut events, mut produced, mut piece) = (Vec::new(), 0_u64, Vec::new());
        for token in tokenizer.encode(text.repeat(8).as_str()).into_iter().take(400) {
            piece.extend(tokenizer.bpe.decode_tokens(&[token]));
            produced += 1;
            if let Ok(whole) = std::str::from_utf8(&piece) {
                events.push(event(whole, Some("null")));
                piece.clear();
            }
        }
        let expected = produced - u64::from(!piece.is_empty());
        let all = events.len();
        let upstream = Upstream::start(Answer::sse(events).never_end());
        let gateway = Gateway::before(&upstream.base_url());
        let mut response = gateway.post(CHAT).body_content_length(chat_stream().to_string()).send().await.unwrap();
        let (mut seen, ends) = (Vec::new(), |seen: &[u8]| seen.windows(2).filter(|pair| pair == b"\n\n").count());
        while ends(&seen) < all {
            seen.extend(response.chunk().await.unwrap().unwrap().bytes);
        }
        drop(response);
        let row = gateway.rows(1).await.remove(0);
        assert_eq!((row.code.as_deref(), row.estimated), (Some("client_closed"), true));
        let counted = u64::try_from(row.completion_tokens).unwrap();
        assert!(counted.abs_diff(expected) * 100 <= expected, "{counted} of {expected}: {text}");
    }
}

#[tokio::test]
async fn an_http2_client_that_resets_its_stream_has_hung_up() {
    let first = event("one two three", Some("null"));
    let upstream = Upstream::start(Answer::sse([first]).never_end());
    let gateway = Gateway::before(&upstream.base_url());
    let request = h2(gateway.http()).post(CHAT).bearer(&gateway.key).body_content_length(chat_stream().to_string());
    let mut response = request.send().await.unwrap();
    assert!(response.chunk().await.unwrap().is_ok());
    drop(response);
    upstream.wait_for_hang_ups(1).await;
    let row = gateway.rows(1).await.remove(0);
    assert_eq!((counts(&row), row.code.as_deref()), ((9, 3, true), Some("client_closed")));
}

#[tokio::test]
async fn what_outlives_the_grace_period_is_on_the_books() {
    let first = event("one two three", Some("null"));
    let upstream = Upstream::start(Answer::sse([first]).never_end());
    let builder = Gateway::builder().server("grace_period = \"100ms\"");
    let mut gateway = builder.upstream("main", &upstream.base_url(), "").start();
    let request = gateway.post(CHAT).body_content_length(chat_stream().to_string());
    let mut response = request.send().await.unwrap();
    assert!(response.chunk().await.unwrap().is_ok());
    let gateway = tokio::task::spawn_blocking(move || {
        gateway.stop().unwrap();
        gateway
    });
    let gateway = gateway.await.unwrap();
    let row = gateway.rows(1).await.remove(0);
    assert_eq!((counts(&row), row.interrupted), ((9, 3, true), true));
    assert_eq!(row.code.as_deref(), Some("interrupted"));
}

#[tokio::test]
async fn a_stream_that_breaks_is_not_ended_cleanly_and_is_counted() {
    let parts = [event("one two three", Some("null")), event(" four", Some("null"))];
    let into_the_second = parts[0].len() + 20;
    let answer = Answer::sse(parts).pause(Duration::from_millis(200)).cut_after(into_the_second);
    let upstream = Upstream::start(answer);
    let gateway = Gateway::before(&upstream.base_url());
    let answer = gateway.ask(CHAT, &chat_stream()).await;
    assert!(answer.error.is_some(), "the connection is cut: {answer:?}");
    let text = String::from_utf8_lossy(&answer.body);
    assert!(text.starts_with(&event("one two three", None)), "{text}");
    assert!(text.contains("\"code\":\"upstream_error\""), "{text}");
    assert!(!text.contains("[DONE]"), "{text}");
    let row = gateway.rows(1).await.remove(0);
    assert_eq!((counts(&row), row.interrupted), ((9, 3, true), true));
    assert_eq!((row.status, row.code.as_deref()), (200, Some("upstream_error")));
}

#[tokio::test]
async fn a_stream_without_end_mark_or_length_does_not_pass_for_whole() {
    let unframed = format!("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n{}", event("one", Some("null")));
    let upstream = Upstream::start(Answer::raw(unframed));
    let gateway = Gateway::before(&upstream.base_url());
    let answer = gateway.ask(CHAT, &chat_stream()).await;
    // Whether the header was sent by then depends on how the network cut the answer.
    assert!(answer.error.is_some() || answer.status == 502, "{answer:?}");
}

#[tokio::test]
async fn other_endpoints_are_counted_in_their_own_words() {
    let responses = json!({ "id": "resp_1", "object": "response", "status": "completed", "output": [],
        "usage": { "input_tokens": 11, "output_tokens": 3, "input_tokens_details": { "cached_tokens": 2 },
            "output_tokens_details": { "reasoning_tokens": 1 } } });
    let embeddings = json!({ "object": "list", "data": [{ "embedding": "AAAA" }],
        "usage": { "prompt_tokens": 8, "total_tokens": 8 } });
    let completions = json!({ "choices": [{ "text": "x", "finish_reason": "length" }],
        "usage": { "prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3 } });
    let streamed = [
        "event: response.created\ndata: {\"type\":\"response.created\",\"response\":{\"status\":\"in_progress\"}}\n\n"
            .to_owned(),
        format!(
            "event: response.completed\ndata: {}\n\n",
            json!({ "type": "response.completed", "response": responses })
        ),
    ];
    let upstream = Upstream::start([
        Answer::json(200, &responses),
        Answer::json(200, &embeddings),
        Answer::json(200, &completions),
        Answer::sse(streamed.clone()),
    ]);
    let gateway = Gateway::before(&upstream.base_url());
    gateway.ask("/v1/responses", &json!({ "model": "gpt-4o", "input": "x" })).await;
    gateway.ask("/v1/embeddings", &json!({ "model": "e", "input": "x" })).await;
    gateway.ask("/v1/completions", &json!({ "model": "c", "prompt": "x" })).await;
    let body = json!({ "model": "gpt-4o", "input": "x", "stream": true });
    let answer = gateway.ask("/v1/responses", &body).await;
    assert_eq!(String::from_utf8_lossy(&answer.body), streamed.concat());
    let received = upstream.received();
    assert_eq!(received[3].body, body.to_string().into_bytes(), "responses always report usage: nothing is asked for");
    let targets: Vec<_> = received.iter().map(|request| request.target.as_str()).collect();
    assert_eq!(targets, ["/v1/responses", "/v1/embeddings", "/v1/completions", "/v1/responses"]);
    let rows = gateway.rows(4).await;
    let all: Vec<_> =
        rows.iter().rev().map(|row| (row.route.as_str(), row.prompt_tokens, row.completion_tokens)).collect();
    assert_eq!(all, [("responses", 11, 3), ("embeddings", 8, 0), ("completions", 2, 1), ("responses", 11, 3)]);
    assert!(rows.iter().all(|row| !row.estimated));
}

#[tokio::test]
async fn the_books_may_be_in_postgresql() {
    let upstream = Upstream::start(completion());
    let gateway = Gateway::builder().store(&postgres::database()).upstream("main", &upstream.base_url(), "").start();
    for _ in 0..3 {
        gateway.ask(CHAT, &chat()).await;
    }
    let rows = gateway.rows(3).await;
    assert!(rows.iter().all(|row| counts(row) == (7, 5, false)));
    let store = gateway.store().await;
    let query = UsageQuery { by: GroupBy::User, since: None, until: None };
    let sums = store.usage(query).await.unwrap();
    assert_eq!(sums.iter().map(|sum| (sum.requests, sum.total_tokens)).collect::<Vec<_>>(), [(3, 36)]);
    let other = ApiKey::from_random(&[42; 32]);
    let user = store.find_user("alice").await.unwrap();
    store.create_key(user.id, &KeySpec { name: "other".into(), ..KeySpec::default() }, &other, "test").await.unwrap();
    let until = std::time::Instant::now() + PATIENCE;
    loop {
        let request = h1(gateway.http()).post(CHAT).bearer(other.expose());
        if request.body_content_length(chat().to_string()).send().await.unwrap().status == 200 {
            break;
        }
        assert!(std::time::Instant::now() < until, "the new key is not seen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn refused_requests_are_on_the_log_and_cost_nothing() {
    let upstream = Upstream::start(Answer::json(400, &json!({ "error": { "message": "bad", "code": "x" } })));
    let gateway = Gateway::before(&upstream.base_url());
    gateway.ask(CHAT, &json!({ "messages": [] })).await;
    gateway.ask(CHAT, &chat()).await;
    let rows = gateway.rows(2).await;
    let all: Vec<_> = rows.iter().rev().map(|row| (row.status, row.code.as_deref(), counts(row))).collect();
    assert_eq!(all, [(400, Some("invalid_body"), (0, 0, false)), (400, Some("http_400"), (0, 0, false))]);
}

#[tokio::test]
async fn what_is_under_way_at_the_end_is_finished_and_booked() {
    let parts = [event("a", Some("null")), usage_event(7, 1), DONE.into()];
    let upstream = Upstream::start(Answer::sse(parts).pause(Duration::from_millis(300)));
    let mut gateway = Gateway::before(&upstream.base_url());
    let request = gateway.post(CHAT).body_content_length(chat_stream().to_string());
    let mut response = request.send().await.unwrap();
    assert!(response.chunk().await.unwrap().is_ok());
    let stopped = tokio::task::spawn_blocking(move || {
        gateway.stop().unwrap();
        gateway
    });
    let rest = response.whole().await;
    assert_eq!(rest.error, None, "the stream ends as it should");
    let gateway = stopped.await.unwrap();
    let row = gateway.rows(1).await.remove(0);
    assert_eq!(counts(&row), (7, 1, false));
}
