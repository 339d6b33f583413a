//! The mock over HTTP, as a client meets it.
#![expect(clippy::unwrap_used, reason = "a helper of tests fails as they do")]

use std::time::{Duration, Instant};

use reqwest::{Client, RequestBuilder, Response};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::oneshot};
use tollgate::mock::{Faults, MockOptions, serve};

/// A running mock; it ends when this is dropped.
struct Mock {
    base: String,
    client: Client,
    _stop: oneshot::Sender<()>,
}

impl Mock {
    async fn start() -> Self {
        Self::with(MockOptions::default()).await
    }

    async fn with(options: MockOptions) -> Self {
        // Another test of this binary may have been first.
        drop(rustls::crypto::ring::default_provider().install_default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let (stop, stopped) = oneshot::channel::<()>();
        tokio::spawn(serve(listener, options, stopped));
        Self { base, client: Client::new(), _stop: stop }
    }

    fn post(&self, path: &str, body: &Value) -> RequestBuilder {
        self.client.post(format!("{}{path}", self.base)).bearer_auth("sk-any").json(body)
    }

    async fn json(&self, path: &str, body: &Value) -> Value {
        self.post(path, body).send().await.unwrap().json().await.unwrap()
    }

    async fn events(&self, path: &str, body: &Value) -> Vec<String> {
        let text = self.post(path, body).send().await.unwrap().text().await.unwrap();
        data(&text)
    }
}

/// The `data:` of the events in `text`.
fn data(text: &str) -> Vec<String> {
    text.lines().filter_map(|line| line.strip_prefix("data: ")).map(str::to_owned).collect()
}

fn parsed(events: &[String]) -> Vec<Value> {
    events.iter().filter(|event| *event != "[DONE]").map(|event| serde_json::from_str(event).unwrap()).collect()
}

fn chat(extra: Value) -> Value {
    let mut body = json!({"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]});
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn a_chat_is_answered_with_text_and_usage() {
    let mock = Mock::start().await;
    let answer = mock.json(CHAT, &chat(json!({"n": 2}))).await;
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], "gpt-4o-mini-2024-07-18");
    assert_eq!(answer["choices"].as_array().unwrap().len(), 2);
    assert!(answer["choices"][1]["message"]["content"].as_str().unwrap().contains("漢字"));
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["usage"]["prompt_tokens"], 8);
    let usage = &answer["usage"];
    assert_eq!(usage["total_tokens"].as_u64(), Some(8 + usage["completion_tokens"].as_u64().unwrap()));
}

#[tokio::test]
async fn limits_on_the_length_are_kept() {
    let mock = Mock::start().await;
    for name in ["max_tokens", "max_completion_tokens"] {
        let answer = mock.json(CHAT, &chat(json!({name: 5}))).await;
        assert_eq!(answer["choices"][0]["finish_reason"], "length");
        assert_eq!(answer["usage"]["completion_tokens"], 5);
    }
    let answer = mock.json(CHAT, &chat(json!({"user": "mock:tokens=1000"}))).await;
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["usage"]["completion_tokens"], 1000);
}

#[tokio::test]
async fn a_chat_stream_shows_usage_only_when_asked() {
    let mock = Mock::start().await;
    let plain = mock.events(CHAT, &chat(json!({"stream": true}))).await;
    assert_eq!(plain.last().map(String::as_str), Some("[DONE]"));
    let chunks = parsed(&plain);
    assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none() && chunk["choices"].as_array().unwrap().len() == 1));
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "stop");

    let asked = mock.events(CHAT, &chat(json!({"stream": true, "stream_options": {"include_usage": true}}))).await;
    let chunks = parsed(&asked);
    let (last, others) = chunks.split_last().unwrap();
    assert!(others.iter().all(|chunk| chunk.get("usage") == Some(&Value::Null)));
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["prompt_tokens"], 8);

    let whole = mock.json(CHAT, &chat(json!({}))).await;
    let text: String = others.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(Some(text.as_str()), whole["choices"][0]["message"]["content"].as_str());
    assert_eq!(last["usage"], whole["usage"]);
}

#[tokio::test]
async fn choices_are_streamed_side_by_side() {
    let mock = Mock::start().await;
    let chunks = parsed(&mock.events(CHAT, &chat(json!({"stream": true, "n": 3}))).await);
    let indexes: Vec<_> = chunks.iter().take(4).map(|chunk| chunk["choices"][0]["index"].as_u64().unwrap()).collect();
    assert_eq!(indexes, [0, 1, 2, 0]);
}

#[tokio::test]
async fn tools_are_called_whole_and_in_pieces() {
    let mock = Mock::start().await;
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}});
    let tools = json!([{"type": "function", "function": {"name": "weather", "parameters": parameters}}]);
    let whole = mock.json(CHAT, &chat(json!({"tools": tools}))).await;
    assert_eq!(whole["choices"][0]["finish_reason"], "tool_calls");
    let call = &whole["choices"][0]["message"]["tool_calls"][0];
    assert_eq!(call["function"]["name"], "weather");

    let chunks = parsed(&mock.events(CHAT, &chat(json!({"tools": tools, "stream": true}))).await);
    let deltas: Vec<_> = chunks.iter().map(|c| &c["choices"][0]["delta"]["tool_calls"][0]).collect();
    assert!(deltas[0]["id"].is_string() && deltas[1].get("id").is_none());
    let pieces: Vec<_> = deltas.iter().filter_map(|delta| delta["function"]["arguments"].as_str()).collect();
    assert!(pieces.len() > 3, "{pieces:?}");
    assert_eq!(Some(pieces.concat().as_str()), call["function"]["arguments"].as_str());
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");

    let spoken = mock.json(CHAT, &chat(json!({"tools": tools, "tool_choice": "none"}))).await;
    assert_eq!(spoken["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn completions_answer_every_prompt() {
    let mock = Mock::start().await;
    let body = json!({"model": "gpt-3.5-turbo-instruct", "prompt": ["one", "two"]});
    let answer = mock.json("/v1/completions", &body).await;
    assert_eq!(answer["object"], "text_completion");
    assert_eq!(answer["choices"][1]["finish_reason"], "length");
    assert_eq!(answer["usage"], json!({"prompt_tokens": 2, "completion_tokens": 32, "total_tokens": 34}));

    let body = json!({"model": "gpt-3.5-turbo-instruct", "prompt": "one", "stream": true, "max_tokens": 4});
    let chunks = parsed(&mock.events("/v1/completions", &body).await);
    assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none()));
    let body = json!({
        "model": "gpt-3.5-turbo-instruct", "prompt": "one", "stream": true, "max_tokens": 4,
        "stream_options": {"include_usage": true},
    });
    let chunks = parsed(&mock.events("/v1/completions", &body).await);
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], 4);
    assert_eq!(chunks.last().unwrap()["choices"], json!([]));
}

#[tokio::test]
async fn embeddings_are_the_same_in_both_encodings() {
    use base64::{Engine, engine::general_purpose::STANDARD};
    let mock = Mock::start().await;
    let body = |format: &str| json!({"model": "text-embedding-3-small", "input": ["a", "bb"], "encoding_format": format, "dimensions": 8});
    let floats = mock.json("/v1/embeddings", &body("float")).await;
    let base64 = mock.json("/v1/embeddings", &body("base64")).await;
    let bytes = STANDARD.decode(base64["data"][1]["embedding"].as_str().unwrap()).unwrap();
    let decoded: Vec<_> = bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()).to_string()).collect();
    let plain = floats["data"][1]["embedding"].as_array().unwrap();
    assert_eq!(plain.iter().map(ToString::to_string).collect::<Vec<_>>(), decoded);
    assert_eq!(floats["usage"], json!({"prompt_tokens": 2, "total_tokens": 2}));
    let tokens = json!({"model": "text-embedding-3-small", "input": [[1, 2, 3], [4]]});
    let answer = mock.json("/v1/embeddings", &tokens).await;
    assert_eq!(answer["usage"]["prompt_tokens"], 4);
    assert_eq!(answer["data"][0]["embedding"].as_array().unwrap().len(), 1536);
}

#[tokio::test]
async fn a_response_is_streamed_as_typed_events() {
    let mock = Mock::start().await;
    let body = json!({"model": "gpt-4o", "input": "Hello", "stream": true});
    let text = mock.post("/v1/responses", &body).send().await.unwrap().text().await.unwrap();
    let names: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("event: ")).collect();
    let mut kinds = names.clone();
    kinds.dedup();
    assert_eq!(
        kinds,
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
    );
    let events = parsed(&data(&text));
    for (i, event) in events.iter().enumerate() {
        assert_eq!((&event["type"], &event["sequence_number"]), (&json!(names[i]), &json!(i)));
    }
    let whole = mock.json("/v1/responses", &json!({"model": "gpt-4o", "input": "Hello"})).await;
    let streamed = &events.last().unwrap()["response"];
    assert_eq!(whole["usage"], streamed["usage"]);
    assert_eq!(whole["output"][0]["content"], streamed["output"][0]["content"]);
    assert_eq!(whole["status"], "completed");
}

#[tokio::test]
async fn a_response_that_is_cut_short_is_incomplete() {
    let mock = Mock::start().await;
    let body = json!({"model": "gpt-4o", "input": "Hello", "max_output_tokens": 16});
    let answer = mock.json("/v1/responses", &body).await;
    assert_eq!(answer["status"], "incomplete");
    assert_eq!(answer["incomplete_details"]["reason"], "max_output_tokens");
    assert_eq!(answer["usage"]["output_tokens"], 16);
}

#[tokio::test]
async fn models_are_listed_and_shown() {
    let mock = Mock::start().await;
    let get = async |path: &str| {
        let request = mock.client.get(format!("{}{path}", mock.base)).bearer_auth("sk-any");
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.json::<Value>().await.unwrap())
    };
    let (_, list) = get("/v1/models").await;
    assert!(list["data"].as_array().unwrap().iter().any(|model| model["id"] == "gpt-4o"));
    assert_eq!(get("/v1/models/gpt-4o").await.1["object"], "model");
    assert_eq!(get("/v1/models/unknown-x").await.0, 404);
}

#[tokio::test]
async fn answers_carry_the_headers_of_the_provider() {
    let mock = Mock::start().await;
    let openai = mock.post(CHAT, &chat(json!({}))).send().await.unwrap();
    for name in [
        "openai-organization",
        "openai-processing-ms",
        "openai-version",
        "x-request-id",
        "x-ratelimit-limit-requests",
        "x-ratelimit-reset-tokens",
        "set-cookie",
        "cf-ray",
        "alt-svc",
        "strict-transport-security",
    ] {
        assert!(openai.headers().contains_key(name), "{name}");
    }
    let azure = mock.post("/openai/v1/chat/completions", &chat(json!({}))).send().await.unwrap();
    assert!(azure.headers().contains_key("apim-request-id") && azure.headers().contains_key("x-ms-region"));
    assert!(!azure.headers().contains_key("openai-organization"));
}

async fn code(response: Response) -> (u16, Value) {
    let status = response.status().as_u16();
    (status, response.json::<Value>().await.unwrap()["error"]["code"].clone())
}

#[tokio::test]
async fn bad_requests_get_the_errors_of_openai() {
    let mock = Mock::start().await;
    let url = format!("{}{CHAT}", mock.base);
    let good = chat(json!({}));
    let send = async |request: RequestBuilder| code(request.send().await.unwrap()).await;
    assert_eq!(send(mock.client.post(&url).json(&good)).await, (401, Value::Null));
    assert_eq!(send(mock.client.post(&url).bearer_auth("invalid").json(&good)).await, (401, json!("invalid_api_key")));
    assert_eq!(send(mock.client.post(&url).bearer_auth("k").body("{\"model\":")).await, (400, Value::Null));
    assert_eq!(send(mock.client.put(&url).bearer_auth("k")).await, (405, json!("method_not_allowed")));
    assert_eq!(send(mock.post("/v1/nothing", &good)).await, (404, Value::Null));
    for (body, expected) in [
        (json!({"messages": []}), (400, Value::Null)),
        (json!({"model": "gpt-4o"}), (400, json!("missing_required_parameter"))),
        (chat(json!({"messages": []})), (400, json!("empty_array"))),
        (chat(json!({"messages": "hello"})), (400, json!("invalid_type"))),
        (chat(json!({"messages": [{"content": "hello"}]})), (400, json!("missing_required_parameter"))),
        (chat(json!({"model": "unknown-model"})), (404, json!("model_not_found"))),
        (chat(json!({"max_tokens": 0})), (400, json!("integer_below_min_value"))),
        (chat(json!({"n": 4_000_000})), (400, json!("integer_above_max_value"))),
        (chat(json!({"stream_options": {"include_usage": true}})), (400, Value::Null)),
    ] {
        assert_eq!(send(mock.post(CHAT, &body)).await, expected, "{body}");
    }
}

#[tokio::test]
async fn azure_wants_a_version_and_opens_streams_with_its_filter() {
    let mock = Mock::start().await;
    let body = json!({"messages": [{"role": "user", "content": "Hello"}], "stream": true});
    let path = "/openai/deployments/my-gpt/chat/completions";
    let post = |path: String, body: &Value| {
        mock.client.post(format!("{}{path}", mock.base)).header("api-key", "azure-key").json(body)
    };
    assert_eq!(code(post(path.into(), &body).send().await.unwrap()).await, (404, json!("404")));
    let dated = format!("{path}?api-version=2024-10-21");
    let chunks = parsed(&data(&post(dated.clone(), &body).send().await.unwrap().text().await.unwrap()));
    assert_eq!((&chunks[0]["choices"], &chunks[0]["id"]), (&json!([]), &json!("")));
    assert!(chunks[0]["prompt_filter_results"].is_array());
    assert!(chunks[1]["choices"][0]["content_filter_results"].is_object());
    assert_eq!(chunks[1]["model"], "my-gpt");

    let whole = json!({"messages": [{"role": "user", "content": "Hello"}]});
    let answer: Value = post(dated, &whole).send().await.unwrap().json().await.unwrap();
    assert_eq!(answer["usage"]["prompt_tokens"], 8);
    let unknown = "/openai/deployments/unknown/chat/completions?api-version=1".to_owned();
    assert_eq!(code(post(unknown, &whole).send().await.unwrap()).await, (404, json!("DeploymentNotFound")));
    let responses = "/openai/responses?api-version=preview".to_owned();
    let answer = post(responses, &json!({"model": "my-gpt", "input": "x"})).send().await.unwrap();
    assert_eq!(answer.status(), 200);
}

#[tokio::test]
async fn directives_make_answers_fail() {
    let mock = Mock::start().await;
    let by_header = mock.post(CHAT, &chat(json!({}))).header("x-mock", "status=429;retry-after=3;retry-after-ms=2500");
    let by_user = mock.post(CHAT, &chat(json!({"user": "mock:status=429;retry-after=3;retry-after-ms=2500"})));
    let by_model = mock.post(CHAT, &chat(json!({"model": "m@status=429;retry-after=3;retry-after-ms=2500"})));
    for request in [by_header, by_user, by_model] {
        let response = request.send().await.unwrap();
        assert_eq!(response.headers()["retry-after"], "3");
        assert_eq!(response.headers()["retry-after-ms"], "2500");
        assert_eq!(code(response).await, (429, json!("rate_limit_exceeded")));
    }
    for status in [401, 403, 500, 503] {
        let body = chat(json!({"model": format!("m@status={status}")}));
        assert_eq!(mock.post(CHAT, &body).send().await.unwrap().status().as_u16(), status);
    }
    let quota = chat(json!({"model": "m@status=429;code=insufficient_quota"}));
    assert_eq!(code(mock.post(CHAT, &quota).send().await.unwrap()).await, (429, json!("insufficient_quota")));
    let typo = mock.post(CHAT, &chat(json!({}))).header("x-mock", "stauts=500").send().await.unwrap();
    let error: Value = typo.json().await.unwrap();
    assert!(error["error"]["message"].as_str().unwrap().contains("stauts"));
}

#[tokio::test]
async fn a_break_is_seen_as_one() {
    let mock = Mock::start().await;
    for body in [json!({"user": "mock:break=3"}), json!({"user": "mock:break=3", "stream": true})] {
        let mut response = mock.post(CHAT, &chat(body)).send().await.unwrap();
        assert_eq!(response.status(), 200);
        let mut arrived = Vec::new();
        let error = loop {
            match response.chunk().await {
                Ok(Some(chunk)) => arrived.extend_from_slice(&chunk),
                Ok(None) => panic!("the answer ended properly"),
                Err(error) => break error,
            }
        };
        assert!(error.is_body() || error.is_decode(), "{error:?}");
        assert!(!arrived.is_empty());
        let events = data(&String::from_utf8(arrived).unwrap());
        assert!(events.is_empty() || events.len() == 3);
    }
}

#[tokio::test]
async fn usage_can_be_left_out_everywhere() {
    let mock =
        Mock::with(MockOptions { faults: Faults { no_usage: true, ..Faults::default() }, fail: Vec::new() }).await;
    assert!(mock.json(CHAT, &chat(json!({}))).await.get("usage").is_none());
    let embeddings = json!({"model": "text-embedding-3-small", "input": "a"});
    assert!(mock.json("/v1/embeddings", &embeddings).await.get("usage").is_none());
    assert_eq!(mock.json("/v1/responses", &json!({"model": "m", "input": "a"})).await["usage"], Value::Null);
    let asked = chat(json!({"stream": true, "stream_options": {"include_usage": true}}));
    assert!(parsed(&mock.events(CHAT, &asked).await).iter().all(|chunk| chunk.get("usage").is_none()));
}

#[tokio::test]
async fn split_and_crlf_change_only_the_framing() {
    let mock = Mock::start().await;
    let text = |events: Vec<String>| -> String {
        let pieces = parsed(&events).into_iter();
        pieces.filter_map(|c| c["choices"][0]["delta"]["content"].as_str().map(str::to_owned)).collect()
    };
    let plain = text(mock.events(CHAT, &chat(json!({"stream": true}))).await);
    for fault in ["split-utf8", "crlf", "split-utf8;crlf"] {
        let body = chat(json!({"stream": true, "user": format!("mock:{fault}")}));
        assert_eq!(text(mock.events(CHAT, &body).await), plain);
    }
    let mut response = mock.post(CHAT, &chat(json!({"stream": true, "user": "mock:split-utf8"}))).send().await.unwrap();
    let mut broken = 0;
    while let Some(chunk) = response.chunk().await.unwrap() {
        broken += usize::from(std::str::from_utf8(&chunk).is_err());
    }
    assert!(broken > 0);
    let whole = mock.json(CHAT, &chat(json!({"user": "mock:split-utf8"}))).await;
    assert_eq!(whole["choices"][0]["message"]["content"], plain);
}

#[tokio::test]
async fn slow_chunk_delay_and_stall_take_their_time() {
    let mock = Mock::start().await;
    let timed = async |body: Value| {
        let started = Instant::now();
        mock.post(CHAT, &chat(body)).send().await.unwrap().text().await.unwrap();
        started.elapsed()
    };
    assert!(timed(json!({"user": "mock:slow=150"})).await >= Duration::from_millis(150));
    assert!(timed(json!({"user": "mock:chunk-delay=20;tokens=5", "stream": true})).await >= Duration::from_millis(100));
    let stalled = mock.post(CHAT, &chat(json!({"user": "mock:stall"}))).timeout(Duration::from_millis(200)).send();
    assert!(stalled.await.unwrap_err().is_timeout());
}

#[tokio::test]
async fn html_and_error_events_are_sent() {
    let mock = Mock::start().await;
    let html = mock.post(CHAT, &chat(json!({"user": "mock:html"}))).send().await.unwrap();
    assert_eq!(
        (html.status().as_u16(), html.headers()["content-type"].to_str().unwrap()),
        (200, "text/html; charset=utf-8")
    );
    assert!(html.text().await.unwrap().starts_with("<!DOCTYPE html>"));
    let events = mock.events(CHAT, &chat(json!({"user": "mock:error-event=2", "stream": true}))).await;
    assert_eq!(events.len(), 3);
    assert_eq!(parsed(&events)[2]["error"]["type"], "server_error");
    let body = json!({"model": "m@error-event=2", "input": "x", "stream": true});
    let events = parsed(&mock.events("/v1/responses", &body).await);
    assert_eq!(events[2]["type"], "error");
}

#[tokio::test]
async fn rules_fail_their_share_and_directives_come_first() {
    let fail = vec!["503:0.5".parse().unwrap()];
    let mock = Mock::with(MockOptions { fail, ..MockOptions::default() }).await;
    let mut statuses = Vec::new();
    for _ in 0..4 {
        statuses.push(mock.post(CHAT, &chat(json!({}))).send().await.unwrap().status().as_u16());
    }
    assert_eq!(statuses, [200, 503, 200, 503]);
    let told = mock.post(CHAT, &chat(json!({"model": "m@status=418"}))).send().await.unwrap();
    assert_eq!(told.status().as_u16(), 418);
}

#[tokio::test]
async fn a_body_of_64_mebibytes_is_taken() {
    let mock = Mock::start().await;
    let content = "word ".repeat((64 << 20) / 5);
    let answer = mock.json(CHAT, &chat(json!({"messages": [{"role": "user", "content": content}]}))).await;
    let tokens = answer["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(tokens.abs_diff((64 << 20) / 5) < 1 << 18, "{tokens}");
}
