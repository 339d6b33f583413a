//! What is sent upstream: a request made anew, not the client's with something taken out.
//!
//! Headers pass by an allow-list. The client's key, its organization, its cookies and its proxy's notes have no business at
//! the provider; what is not known here does not leave.
//!
//! The headers are put into the map directly: Pingora's own setters keep the case of names, which costs a copy and a parse
//! of each.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use pingora::http::RequestHeader;
use pingora_core::{Error, ErrorType, Result};
use pingora_proxy::Session;

use super::{ctx::RequestCtx, reply::id_value};

static IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Headers of the client that the provider gets.
static PASSED: [HeaderName; 5] = [
    header::ACCEPT,
    header::CONTENT_TYPE,
    header::USER_AGENT,
    HeaderName::from_static("idempotency-key"),
    HeaderName::from_static("openai-beta"),
];

/// Makes the request of this attempt.
///
/// # Errors
/// If there is no attempt, or its path is none: a defect.
pub fn filter(session: &Session, upstream_request: &mut RequestHeader, ctx: &RequestCtx) -> Result<()> {
    let (Some(current), Some(route)) = (&ctx.attempt, ctx.route) else {
        return Error::e_explain(ErrorType::InternalError, "no attempt under way");
    };
    let (mut parts, ()) = http::Request::new(()).into_parts();
    parts.method = Method::POST;
    let target = current.peer.target(route.path, &current.model);
    parts.uri = target.map_err(|error| Error::because(ErrorType::InternalError, "the path of an upstream", error))?;
    let headers = &mut parts.headers;
    headers.reserve(10);
    headers.insert(header::HOST, current.peer.host().clone());
    pass(&session.req_header().headers, headers);
    // The same for every attempt, so that a provider that knows it does the work once.
    if !headers.contains_key(&IDEMPOTENCY_KEY) {
        headers.insert(&IDEMPOTENCY_KEY, id_value(ctx.request_id)?);
    }
    let (name, credential) = current.peer.credential();
    headers.insert(name, credential);
    headers.insert(header::CONTENT_LENGTH, current.body.len().into());
    // A compressed answer could not be metered on its way through.
    headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    *upstream_request = parts.into();
    Ok(())
}

fn pass(from: &HeaderMap, to: &mut HeaderMap) {
    for name in &PASSED {
        if let Some(value) = from.get(name) {
            to.insert(name, value.clone());
        }
    }
}

/// Puts the body of this attempt in the place of what Pingora read.
pub fn body(body: &mut Option<Bytes>, end_of_stream: bool, ctx: &RequestCtx) {
    *body = ctx.attempt.as_ref().filter(|_| end_of_stream).map(|current| current.body.clone());
}
