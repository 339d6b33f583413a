//! The upstream of the comparison: as fast as it can be, and as strict about usage as the real one.
//!
//! It answers a chat request with a 1 KB `chat.completion`, or with a stream of [`CHUNKS`] chunks without pauses, each
//! written on its own as a model that has just made a token would: a burst that arrives in one read costs a proxy
//! next to nothing per chunk, and is not what a proxy of tokens sees. As at OpenAI, a stream asked with `stream_options.include_usage` carries `"usage":null` in each chunk and one more chunk
//! with the numbers: the gateway asks for that on its own, so what it has to cut out again is really there.

use anyhow::Context;
use bytes::Bytes;
use futures::stream::{self, StreamExt};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

/// Chunks with content in a stream, before `[DONE]`.
pub(crate) const CHUNKS: u16 = 200;

const ID: &str = "chatcmpl-C0mpar1s0nS1deBySide000001";
const USAGE: &str = r#"{"prompt_tokens":112,"completion_tokens":200,"total_tokens":312}"#;

type Answer = Response<BoxBody<Bytes, Infallible>>;

/// Every answer, made once.
pub(crate) struct Answers {
    /// The whole answer.
    pub(crate) json: Bytes,
    /// The stream as a client sees it that did not ask for usage.
    pub(crate) plain: Vec<Bytes>,
    with_usage: Vec<Bytes>,
}

impl Answers {
    pub(crate) fn new() -> Self {
        let content = "All work and no play makes a dull gateway. ".repeat(15);
        let json = format!(
            r#"{{"id":"{ID}","object":"chat.completion","created":1763856000,"model":"gpt-4o-2024-11-20","choices":[{{"index":0,"message":{{"role":"assistant","content":"{content}","refusal":null}},"logprobs":null,"finish_reason":"stop"}}],"usage":{USAGE},"system_fingerprint":"fp_0a1b2c3d4e"}}"#
        );
        let mut with_usage: Vec<Bytes> = (0..CHUNKS).map(|n| content_chunk(n, r#","usage":null"#)).collect();
        with_usage.push(chunk("", &format!(r#","usage":{USAGE}"#)));
        let mut plain: Vec<Bytes> = (0..CHUNKS).map(|n| content_chunk(n, "")).collect();
        for events in [&mut plain, &mut with_usage] {
            events.push(Bytes::from_static(b"data: [DONE]\n\n"));
        }
        Self { json: json.into(), plain, with_usage }
    }

    fn answer(&self, body: &str) -> Answer {
        if !body.contains(r#""stream":true"#) {
            return response(StatusCode::OK, "application/json", Full::new(self.json.clone()).boxed());
        }
        let events = if body.contains(r#""include_usage":true"#) { &self.with_usage } else { &self.plain };
        // `Bytes` are counted references, so this copies no text. The yield makes hyper flush what it has.
        let frames = stream::iter(events.clone()).then(async |event| {
            tokio::task::yield_now().await;
            Ok(Frame::data(event))
        });
        let body = BodyExt::boxed(StreamBody::new(frames));
        response(StatusCode::OK, "text/event-stream; charset=utf-8", body)
    }
}

fn content_chunk(number: u16, usage: &str) -> Bytes {
    let choice = format!(r#"{{"index":0,"delta":{{"content":" word{number}"}},"logprobs":null,"finish_reason":null}}"#);
    chunk(&choice, usage)
}

fn chunk(choices: &str, usage: &str) -> Bytes {
    format!(
        "data: {{\"id\":\"{ID}\",\"object\":\"chat.completion.chunk\",\"created\":1763856000,\"model\":\"gpt-4o-2024-11-20\",\"service_tier\":\"default\",\"system_fingerprint\":\"fp_0a1b2c3d4e\",\"choices\":[{choices}]{usage}}}\n\n"
    )
    .into()
}

fn response(status: StatusCode, content_type: &'static str, body: BoxBody<Bytes, Infallible>) -> Answer {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(content_type));
    response
}

/// Serves until the process is ended.
pub(crate) fn serve(address: SocketAddr) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, accept(address))
}

async fn accept(address: SocketAddr) -> anyhow::Result<()> {
    let answers = Arc::new(Answers::new());
    let listener = tokio::net::TcpListener::bind(address).await.with_context(|| format!("listen on {address}"))?;
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let answers = Arc::clone(&answers);
        tokio::task::spawn_local(async move {
            let service = hyper::service::service_fn(move |request| handle(request, Arc::clone(&answers)));
            // A client that goes away mid-stream is how each measured window ends.
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn handle(request: Request<Incoming>, answers: Arc<Answers>) -> Result<Answer, hyper::Error> {
    if request.method() != Method::POST || request.uri().path() != "/v1/chat/completions" {
        return Ok(response(StatusCode::NOT_FOUND, "text/plain", Full::default().boxed()));
    }
    let body = request.into_body().collect().await?.to_bytes();
    Ok(match std::str::from_utf8(&body) {
        Ok(body) => answers.answer(body),
        Err(_) => response(StatusCode::BAD_REQUEST, "text/plain", Full::default().boxed()),
    })
}
