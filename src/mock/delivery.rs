//! From an answer to bytes on the wire, with everything that may go wrong on the way.
//!
//! Without faults a stream is one write per event, as OpenAI's are. Cutting a connection is an error in the body's
//! stream: hyper then closes the socket without a last chunk, respectively short of its `content-length`.

use std::{io, time::Duration, vec};

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, header},
    response::Response,
};
use bytes::Bytes;
use futures::{Stream, stream};
use serde_json::{Value, json};

use super::{faults::Faults, headers::set_content_type};

/// How long what was written before a cut has to get out.
const FLUSH: Duration = Duration::from_millis(20);
/// Pause between the parts of a cut chunk, so that they do not travel together.
const APART: Duration = Duration::from_millis(1);
const HTML: &str = "<!DOCTYPE html><html><head><title>502 Bad Gateway</title></head>\
    <body><h1>502 Bad Gateway</h1><p>This is not the API you are looking for.</p></body></html>\n";

/// What an endpoint answers.
#[derive(Debug)]
pub(super) enum Answer {
    /// One JSON document.
    Whole(Bytes),
    /// A stream of events.
    Stream(Vec<Event>),
}

/// An event of a stream.
#[derive(Debug)]
pub(super) struct Event {
    name: Option<&'static str>,
    data: String,
}

impl Event {
    /// An event that is only data, as in chat streams.
    pub(super) fn data(data: &Value) -> Self {
        Self { name: None, data: data.to_string() }
    }

    /// An event with a name, as in streams of responses.
    pub(super) fn named(name: &'static str, data: &Value) -> Self {
        Self { name: Some(name), data: data.to_string() }
    }

    /// The end of a chat stream.
    pub(super) fn done() -> Self {
        Self { name: None, data: "[DONE]".to_owned() }
    }

    /// The error that ends a stream of this kind.
    fn error(named: bool) -> Self {
        const MESSAGE: &str = "The server had an error while processing your request. Sorry about that!";
        if named {
            let data = json!({"type": "error", "code": "server_error", "message": MESSAGE, "param": null});
            return Self::named("error", &data);
        }
        Self::data(&json!({"error": {"message": MESSAGE, "type": "server_error", "param": null, "code": null}}))
    }

    fn bytes(&self, crlf: bool) -> Bytes {
        let end = if crlf { "\r\n" } else { "\n" };
        let name = self.name.map(|name| format!("event: {name}{end}")).unwrap_or_default();
        Bytes::from(format!("{name}data: {}{end}{end}", self.data))
    }
}

/// The parts of a body, and how they are sent.
#[derive(Debug, PartialEq)]
struct Plan {
    parts: Vec<Bytes>,
    pause: Duration,
    is_cut: bool,
}

/// The 200 for `answer`, `faults` applied; `headers` are the provider's.
pub(super) fn deliver(answer: Answer, faults: &Faults, mut headers: HeaderMap) -> Response {
    let plan = match answer {
        _ if faults.html => {
            set_content_type(&mut headers, "text/html; charset=utf-8");
            return respond(headers, Body::from(HTML));
        }
        Answer::Whole(body) => {
            set_content_type(&mut headers, "application/json");
            headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
            plan_whole(body, faults)
        }
        Answer::Stream(events) => {
            set_content_type(&mut headers, "text/event-stream; charset=utf-8");
            headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
            plan_stream(events, faults)
        }
    };
    respond(headers, Body::from_stream(play(plan)))
}

/// A response with `headers` and `body`.
pub(super) fn respond(headers: HeaderMap, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.headers_mut() = headers;
    response
}

fn plan_whole(body: Bytes, faults: &Faults) -> Plan {
    let is_cut = faults.break_after.is_some();
    let body = if is_cut { body.slice(..body.len() / 2) } else { body };
    let parts = if faults.split_utf8 { split(&body) } else { vec![body] };
    Plan { parts, pause: if faults.split_utf8 { APART } else { Duration::ZERO }, is_cut }
}

fn plan_stream(mut events: Vec<Event>, faults: &Faults) -> Plan {
    if let Some(after) = faults.error_event {
        let named = events.first().is_some_and(|event| event.name.is_some());
        events.truncate(after);
        events.push(Event::error(named));
    }
    let is_cut = faults.break_after.is_some_and(|after| after < events.len());
    events.truncate(faults.break_after.unwrap_or(usize::MAX));
    let mut parts: Vec<_> = events.iter().map(|event| event.bytes(faults.crlf)).collect();
    let mut pause = faults.chunk_delay;
    if faults.split_utf8 {
        parts = parts.iter().flat_map(split).collect();
        pause = pause.max(APART);
    }
    Plan { parts, pause, is_cut }
}

/// Cuts `chunk` inside each of its multi-byte characters, in its middle, and before its last byte (which, in an event,
/// is inside the pair of line ends that closes it).
fn split(chunk: &Bytes) -> Vec<Bytes> {
    let inside = |at: usize| chunk[at] & 0b1100_0000 == 0b1000_0000;
    let cuts = (1..chunk.len()).filter(|&at| inside(at) || at == chunk.len() / 2 || at + 1 == chunk.len());
    let ends = cuts.chain([chunk.len()]);
    ends.scan(0, |from, to| Some(chunk.slice(std::mem::replace(from, to)..to))).collect()
}

/// Sends the parts, with pauses between them. Even a pause of zero lets hyper write out what it has.
fn play(plan: Plan) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    struct State {
        parts: vec::IntoIter<Bytes>,
        pause: Duration,
        is_cut: bool,
        is_first: bool,
    }
    let state = State { parts: plan.parts.into_iter(), pause: plan.pause, is_cut: plan.is_cut, is_first: true };
    stream::unfold(state, async |mut state| {
        if let Some(part) = state.parts.next() {
            match (state.is_first, state.pause) {
                (true, _) => {}
                (false, Duration::ZERO) => tokio::task::yield_now().await,
                (false, pause) => tokio::time::sleep(pause).await,
            }
            state.is_first = false;
            return Some((Ok(part), state));
        }
        if !std::mem::take(&mut state.is_cut) {
            return None;
        }
        tokio::time::sleep(FLUSH).await;
        Some((Err(io::Error::other("the mock cuts the connection")), state))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(n: usize) -> Vec<Event> {
        (0..n).map(|i| Event::data(&json!({"i": i, "text": "é漢🚪"}))).chain([Event::done()]).collect()
    }

    fn joined(plan: &Plan) -> String {
        String::from_utf8(plan.parts.concat()).unwrap()
    }

    #[test]
    fn a_split_changes_no_byte_and_cuts_characters_lines_and_events() {
        let plain = plan_stream(events(3), &Faults::default());
        let split = plan_stream(events(3), &Faults { split_utf8: true, ..Faults::default() });
        assert_eq!(joined(&plain), joined(&split));
        assert_eq!(split.pause, APART);
        assert!(split.parts.iter().filter(|part| std::str::from_utf8(part).is_err()).count() >= 3 * 6);
        assert!(split.parts.iter().any(|part| part.as_ref() == b"\n"));
        assert!(split.parts.iter().all(|part| !part.is_empty()));
    }

    #[test]
    fn a_break_leaves_n_events_and_a_later_one_none() {
        let broken = plan_stream(events(3), &Faults { break_after: Some(2), ..Faults::default() });
        assert!(broken.is_cut);
        assert_eq!(broken.parts.len(), 2);
        let whole = plan_stream(events(3), &Faults { break_after: Some(9), ..Faults::default() });
        assert!(!whole.is_cut);
        assert!(joined(&whole).ends_with("data: [DONE]\n\n"));
    }

    #[test]
    fn a_whole_answer_breaks_in_half() {
        let plan = plan_whole(Bytes::from_static(b"12345678"), &Faults { break_after: Some(1), ..Faults::default() });
        assert_eq!((plan.parts, plan.is_cut), (vec![Bytes::from_static(b"1234")], true));
    }

    #[test]
    fn an_error_event_is_the_last() {
        let plan = plan_stream(events(5), &Faults { error_event: Some(1), ..Faults::default() });
        assert_eq!(plan.parts.len(), 2);
        assert!(joined(&plan).contains("\"type\":\"server_error\"") && !joined(&plan).contains("[DONE]"));
    }

    #[test]
    fn crlf_ends_every_line() {
        let plan = plan_stream(events(1), &Faults { crlf: true, ..Faults::default() });
        assert_eq!(joined(&plan).matches('\n').count(), joined(&plan).matches("\r\n").count());
    }
}
