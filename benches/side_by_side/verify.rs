//! A system that answers wrongly is not measured: both answers are read by a real HTTP client first.

use crate::mock::Answers;
use crate::systems::System;
use anyhow::{Context, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use std::sync::Arc;

/// The path of every request of the comparison.
const PATH: &str = "/v1/chat/completions";

/// The two requests, each as body and as the bytes of a whole HTTP/1.1 request.
pub(crate) struct Requests {
    json_body: String,
    stream_body: String,
}

impl Requests {
    pub(crate) fn new() -> Self {
        // As openai-python sends it: `messages` before `model`. About 500 bytes.
        let prompt =
            "Tell me, in one paragraph and without lists, why a toll on a road is paid at the gate. ".repeat(4);
        let head = format!(
            r#"{{"messages":[{{"role":"system","content":"You are brief."}},{{"role":"user","content":"{prompt}"}}],"model":"gpt-4o","max_tokens":256"#
        );
        let json_body = format!("{head}}}");
        let stream_body = format!(r#"{head},"stream":true}}"#);
        Self { json_body, stream_body }
    }

    /// The request for a whole answer.
    pub(crate) fn json(&self, system: &System) -> Arc<[u8]> {
        bytes(system, &self.json_body)
    }

    /// The request for a stream.
    pub(crate) fn stream(&self, system: &System) -> Arc<[u8]> {
        bytes(system, &self.stream_body)
    }

    /// Checks that the client sees exactly what the upstream would have told it, byte for byte.
    pub(crate) async fn verify(&self, system: &System) -> anyhow::Result<()> {
        let answers = Answers::new();
        same("the JSON answer", &fetch(system, &self.json_body).await?, &answers.json)?;
        same("the stream", &fetch(system, &self.stream_body).await?, &answers.plain.concat())
    }
}

/// `system.key` is the caller's secret; systems that know no keys pass it on.
fn bytes(system: &System, body: &str) -> Arc<[u8]> {
    let System { address, key, .. } = system;
    let length = body.len();
    format!(
        "POST {PATH} HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n\
         accept: application/json\r\nuser-agent: side_by_side\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
    .into()
}

async fn fetch(system: &System, body: &str) -> anyhow::Result<Bytes> {
    let stream = tokio::net::TcpStream::connect(system.address).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::task::spawn_local(connection);
    let request = Request::builder()
        .method(Method::POST)
        .uri(PATH)
        .header("host", system.address.to_string())
        .header("authorization", format!("Bearer {}", system.key))
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body.to_owned())))?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = response.into_body().collect().await.context("read the body")?.to_bytes();
    connection.abort();
    ensure!(status == StatusCode::OK, "answered {status}: {}", String::from_utf8_lossy(&body));
    Ok(body)
}

fn same(what: &str, got: &[u8], wanted: &[u8]) -> anyhow::Result<()> {
    let at = got.iter().zip(wanted).take_while(|(got, wanted)| got == wanted).count();
    let around = |bytes: &[u8]| {
        let end = bytes.len().min(at + 60);
        String::from_utf8_lossy(&bytes[at.saturating_sub(60).min(end)..end]).into_owned()
    };
    ensure!(got == wanted, "{what} differs at byte {at}:\n  got    {:?}\n  wanted {:?}", around(got), around(wanted));
    Ok(())
}
