//! What an upstream's answer means, and which of its headers the client sees.

use http::{HeaderName, header};
use pingora::http::ResponseHeader;
use pingora_core::{Error, ErrorSource, ErrorType, Result};
use tollgate_core::{
    denial::Denial,
    openai::{response::JsonMeter, sse::StreamMeter},
};

use super::{
    ctx::{Meter, RequestCtx},
    reply::sign,
};
use crate::shared::Shared;

/// Error type of an attempt whose answer is not passed on: another upstream gets its turn.
pub const TRY_NEXT: ErrorType = ErrorType::new("TryNext");
/// Error type of an answer that the client must not see as it is.
pub const REFUSED: ErrorType = ErrorType::new("Refused");

/// Headers of the provider that the client sees. `content-length` is among them only where the body passes unchanged.
const PASSED: [HeaderName; 6] = [
    header::CONTENT_TYPE,
    header::CONTENT_ENCODING,
    header::RETRY_AFTER,
    HeaderName::from_static("retry-after-ms"),
    HeaderName::from_static("x-should-retry"),
    header::TRANSFER_ENCODING,
];
/// How much of an upstream's error is held back to be cleaned.
const ERROR_BODY: usize = 4096;

/// Takes note of the answer and decides whether another upstream is tried instead.
///
/// # Errors
/// [`TRY_NEXT`], to be retried, or [`REFUSED`], with the denial in the context.
pub fn classify(shared: &Shared, answer: &ResponseHeader, ctx: &mut RequestCtx) -> Result<()> {
    let status = answer.status.as_u16();
    if answer.status.is_informational() {
        return Ok(());
    }
    let id = ["x-request-id", "apim-request-id"].iter().find_map(|name| answer.headers.get(*name));
    ctx.provider_request_id = id.and_then(|id| id.to_str().ok()).map(|id| id.chars().take(128).collect());
    ctx.ends_by_close =
        !answer.headers.contains_key(header::CONTENT_LENGTH) && !answer.headers.contains_key(header::TRANSFER_ENCODING);
    let Some(current) = &mut ctx.attempt else { return Ok(()) };
    current.status = status;
    current.answered_after = Some(current.began.elapsed());
    let outcome = outcome(status);
    shared.metrics.upstream_requests_total.with_label_values(&[&current.upstream.name, outcome]).inc();
    if says_nothing_about_the_request(status)
        && ctx.has_untried()
        && ctx.counted_attempts() + 1 < shared.settings.max_attempts
    {
        ctx.end_attempt(Some(outcome));
        let mut error = Error::create(TRY_NEXT, ErrorSource::Upstream, None, None);
        error.set_retry(true);
        return Err(error);
    }
    if matches!(status, 401 | 403 | 300..=399) {
        if let Some(current) = &ctx.attempt {
            tracing::error!(upstream = current.upstream.name, status, "the upstream refuses the gateway itself");
        }
        ctx.end_attempt(Some(outcome));
        ctx.denial = Some(Denial::UpstreamError);
        return Err(Error::create(REFUSED, ErrorSource::Upstream, None, None));
    }
    Ok(())
}

/// Would another upstream perhaps answer better? 401 and 403 are about the gateway's credential.
fn says_nothing_about_the_request(status: u16) -> bool {
    matches!(status, 300..=399 | 401 | 403 | 408 | 409 | 429 | 500..=599)
}

fn outcome(status: u16) -> &'static str {
    match status {
        200..=299 => "ok",
        401 | 403 => "refused",
        408 => "timeout",
        429 => "rate_limited",
        400..=499 => "client_error",
        500..=599 => "server_error",
        _ => "unexpected",
    }
}

/// Makes the header that the client sees, and decides how the body is read.
///
/// # Errors
/// If a header cannot be built: a defect.
pub fn filter(answer: &mut ResponseHeader, ctx: &mut RequestCtx) -> Result<()> {
    if answer.status.is_informational() {
        *answer = ResponseHeader::build(answer.status, Some(0))?;
        return Ok(());
    }
    ctx.meter = meter_for(answer, ctx);
    let mut shown = ResponseHeader::build_no_case(answer.status, Some(PASSED.len() + 8))?;
    for name in PASSED {
        if let Some(value) = answer.headers.get(&name) {
            shown.insert_header(name, value.clone())?;
        }
    }
    let unchanged = match &ctx.meter {
        Meter::None | Meter::Json(_) => true,
        Meter::Stream(_) => ctx.attempt.as_ref().is_none_or(|current| !current.asked_usage),
        Meter::Error(_) => false,
    };
    match answer.headers.get(header::CONTENT_LENGTH) {
        Some(length) if unchanged => shown.insert_header(header::CONTENT_LENGTH, length.clone())?,
        Some(_) => shown.insert_header(header::TRANSFER_ENCODING, "chunked")?,
        None => {}
    }
    sign(&mut shown, ctx.request_id, &ctx.standing)?;
    *answer = shown;
    Ok(())
}

fn meter_for(answer: &ResponseHeader, ctx: &RequestCtx) -> Meter {
    let (Some(ask), Some(current)) = (&ctx.ask, &ctx.attempt) else { return Meter::None };
    let header_is = |name, text: &[u8]| answer.headers.get(name).is_some_and(|v| v.as_bytes().starts_with(text));
    if answer.headers.contains_key(header::CONTENT_ENCODING) && !header_is(header::CONTENT_ENCODING, b"identity") {
        return Meter::None;
    }
    if answer.status.is_client_error() || answer.status.is_server_error() {
        return Meter::Error(Vec::with_capacity(ERROR_BODY));
    }
    if header_is(header::CONTENT_TYPE, b"text/event-stream") {
        return Meter::Stream(Box::new(StreamMeter::new(ask.dialect, current.asked_usage)));
    }
    Meter::Json(Box::new(JsonMeter::new(ask.dialect)))
}
