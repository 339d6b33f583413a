//! What the head of an upstream's answer means, and which of its headers the client sees.
//!
//! What is certain from the head is decided here. Where the body has a say, because it tells a used-up account from a rate
//! limit, or because the first event of a stream may be an error, the answer is held back until [`meter`](super::meter) has
//! seen it.

use std::time::SystemTime;

use http::{HeaderMap, HeaderName, HeaderValue, header};
use pingora::http::ResponseHeader;
use pingora_core::Result;
use pingora_proxy::Session;
use tollgate_core::{
    allowance::{Report, cooling_ms},
    openai::{response::JsonMeter, sse::StreamMeter},
    verdict::{Class, class},
};

use super::{
    ctx::{Meter, RequestCtx},
    downstream,
    judge::{self, reject},
    reply::{header_of, sign},
};
use crate::shared::Shared;

/// Headers of the provider that the client sees. `content-length` is among them only where the body passes unchanged.
static PASSED: [HeaderName; 5] = [
    header::CONTENT_TYPE,
    header::RETRY_AFTER,
    HeaderName::from_static("retry-after-ms"),
    HeaderName::from_static("x-should-retry"),
    header::TRANSFER_ENCODING,
];
/// What says how much is left of the provider's own limits.
static REMAINING: [HeaderName; 2] = [
    HeaderName::from_static("x-ratelimit-remaining-requests"),
    HeaderName::from_static("x-ratelimit-remaining-tokens"),
];
/// What a provider calls the request.
static REQUEST_IDS: [HeaderName; 2] =
    [HeaderName::from_static("x-request-id"), HeaderName::from_static("apim-request-id")];
/// How much of an upstream's error is held back to be cleaned.
const ERROR_BODY: usize = 4096;

/// Takes note of the answer; ends the attempt if the head alone shows that it is no answer.
///
/// # Errors
/// [`NOT_PASSED`](super::attempt::NOT_PASSED), to be retried if another upstream may do better.
pub fn classify(shared: &Shared, answer: &ResponseHeader, ctx: &mut RequestCtx) -> Result<()> {
    if answer.status.is_informational() {
        return Ok(());
    }
    let (status, headers) = (answer.status.as_u16(), &answer.headers);
    let id = REQUEST_IDS.iter().find_map(|name| headers.get(name));
    // It is written down, so it must not be what only the provider and we know.
    let is_credential = |id: &str| ctx.attempt.as_ref().is_some_and(|a| id.contains(a.upstream.credential.expose()));
    let id = id.and_then(|id| id.to_str().ok()).filter(|id| !is_credential(id));
    ctx.provider_request_id = id.map(|id| id.chars().take(128).collect());
    ctx.ends_by_close =
        !headers.contains_key(header::CONTENT_LENGTH) && !headers.contains_key(header::TRANSFER_ENCODING);
    let Some(current) = &mut ctx.attempt else { return Ok(()) };
    current.status = status;
    let took = current.began.elapsed();
    current.answered_after = Some(took);
    let name = &current.upstream.name;
    shared.metrics.upstream_response_seconds.with_label_values(&[name]).observe(took.as_secs_f64());
    if REMAINING.iter().any(|name| headers.contains_key(name)) {
        let report = Report::parse(headers);
        current.health.see_allowance(&report, shared.now_ms());
        shared.metrics.upstream_remaining(name, &report);
    }
    if status == 429 {
        current.cooling_ms = cooling_ms(headers, unix_ms());
    }
    let has_body = status != 204 && headers.get(header::CONTENT_LENGTH).is_none_or(|length| length != "0");
    let unusable = match class(status) {
        Class::Good => unusable(headers).or_else(|| (!has_body).then_some("empty")),
        Class::Unexpected => Some("unexpected"),
        // What has no body never comes to the meter.
        Class::Trouble if !has_body => {
            ctx.meter = Meter::Trouble(Vec::new());
            return Err(judge::give_up(shared, ctx));
        }
        Class::ClientFault if !has_body => {
            judge::end(shared, ctx);
            None
        }
        Class::ClientFault | Class::Trouble => None,
    };
    unusable.map_or(Ok(()), |label| Err(reject(shared, ctx, label)))
}

/// Why a good status is none: the body is compressed, which was not asked for and cannot be metered, or is of a kind that
/// no model makes.
fn unusable(headers: &HeaderMap) -> Option<&'static str> {
    let is = |name, kinds: &[&[u8]]| {
        headers.get(name).is_none_or(|value| {
            let value = value.as_bytes().trim_ascii_start();
            kinds.iter().any(|kind| value.get(..kind.len()).is_some_and(|start| start.eq_ignore_ascii_case(kind)))
        })
    };
    if !is(header::CONTENT_ENCODING, &[b"identity"]) {
        return Some("encoded");
    }
    (!is(header::CONTENT_TYPE, &[b"application/json", b"text/event-stream"])).then_some("unexpected")
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Makes the header that the client sees, and decides how the body is read.
///
/// # Errors
/// If a header cannot be built: a defect.
pub fn filter(session: &mut Session, answer: &mut ResponseHeader, ctx: &mut RequestCtx) -> Result<()> {
    if answer.status.is_informational() {
        *answer = ResponseHeader::build(answer.status, Some(0))?;
        return Ok(());
    }
    ctx.meter = meter_for(answer, ctx);
    if matches!(ctx.meter, Meter::Stream(_) | Meter::Trouble(_)) {
        downstream::hold(session, &mut ctx.downstream);
    }
    let mut shown = HeaderMap::with_capacity(PASSED.len() + 8);
    for name in &PASSED {
        if let Some(value) = answer.headers.get(name) {
            shown.insert(name, value.clone());
        }
    }
    let unchanged = match &ctx.meter {
        Meter::None | Meter::Json(_) => true,
        Meter::Stream(_) => ctx.attempt.as_ref().is_none_or(|current| !current.asked_usage),
        Meter::Fault(_) | Meter::Trouble(_) => false,
    };
    if let Some(length) = answer.headers.get(header::CONTENT_LENGTH) {
        let (name, value) = match unchanged {
            true => (header::CONTENT_LENGTH, length.clone()),
            false => (header::TRANSFER_ENCODING, HeaderValue::from_static("chunked")),
        };
        shown.insert(name, value);
    }
    sign(&mut shown, ctx.request_id, &ctx.standing)?;
    *answer = header_of(answer.status, shown);
    Ok(())
}

fn meter_for(answer: &ResponseHeader, ctx: &RequestCtx) -> Meter {
    let (Some(ask), Some(current)) = (&ctx.ask, &ctx.attempt) else { return Meter::None };
    let is_stream =
        || answer.headers.get(header::CONTENT_TYPE).is_some_and(|v| v.as_bytes().starts_with(b"text/event-stream"));
    match class(answer.status.as_u16()) {
        Class::Trouble => Meter::Trouble(Vec::with_capacity(ERROR_BODY)),
        Class::ClientFault => Meter::Fault(Vec::with_capacity(ERROR_BODY)),
        Class::Good | Class::Unexpected if is_stream() => {
            Meter::Stream(Box::new(StreamMeter::new(ask.dialect, current.asked_usage)))
        }
        Class::Good | Class::Unexpected => Meter::Json(Box::new(JsonMeter::new(ask.dialect))),
    }
}
