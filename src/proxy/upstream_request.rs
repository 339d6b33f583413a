//! What is sent upstream: a request made anew, not the client's with something taken out.
//!
//! Headers pass by an allow-list. The client's key, its organization, its cookies and its proxy's notes have no business at
//! the provider; what is not known here does not leave.

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, header};
use pingora::http::RequestHeader;
use pingora_core::{Error, ErrorType, Result};
use pingora_proxy::Session;
use tollgate_core::{
    azure, openai,
    upstream::{Upstream, UpstreamKind},
};

use super::ctx::RequestCtx;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Headers of the client that the provider gets.
const PASSED: [HeaderName; 5] =
    [header::ACCEPT, header::CONTENT_TYPE, header::USER_AGENT, IDEMPOTENCY_KEY, HeaderName::from_static("openai-beta")];

/// Makes the request of this attempt.
///
/// # Errors
/// If a credential or path cannot stand in a request: a defect, since both were checked when they were read.
pub fn filter(session: &Session, upstream_request: &mut RequestHeader, ctx: &RequestCtx) -> Result<()> {
    let (Some(current), Some(route)) = (&ctx.attempt, ctx.route) else {
        return Error::e_explain(ErrorType::InternalError, "no attempt under way");
    };
    let upstream = &*current.upstream;
    let mut request =
        RequestHeader::build_no_case(Method::POST, path(upstream, route.path, &current.model).as_bytes(), Some(10))?;
    request.insert_header(header::HOST, upstream.base_url.authority.as_str())?;
    for name in PASSED {
        if let Some(value) = session.req_header().headers.get(&name) {
            request.insert_header(name, value.clone())?;
        }
    }
    // The same for every attempt, so that a provider that knows it does the work once.
    if !request.headers.contains_key(&IDEMPOTENCY_KEY) {
        request.insert_header(&IDEMPOTENCY_KEY, ctx.request_id.to_string())?;
    }
    authorize(&mut request, upstream)?;
    request.insert_header(header::CONTENT_LENGTH, current.body.len())?;
    // A compressed answer could not be metered on its way through.
    request.insert_header(header::ACCEPT_ENCODING, "identity")?;
    *upstream_request = request;
    Ok(())
}

/// Puts the body of this attempt in the place of what Pingora read.
pub fn body(body: &mut Option<Bytes>, end_of_stream: bool, ctx: &RequestCtx) {
    *body = ctx.attempt.as_ref().filter(|_| end_of_stream).map(|current| current.body.clone());
}

fn path(upstream: &Upstream, endpoint: &str, model: &str) -> String {
    let base = &upstream.base_url.path;
    match upstream.kind {
        UpstreamKind::OpenAi => openai::path(base, endpoint),
        UpstreamKind::Azure => azure::path(base, endpoint, model, upstream.api_version.as_deref()),
    }
}

fn authorize(request: &mut RequestHeader, upstream: &Upstream) -> Result<()> {
    let credential = upstream.credential.expose();
    let (name, text) = match upstream.kind {
        UpstreamKind::OpenAi => (header::AUTHORIZATION, zeroize::Zeroizing::new(format!("Bearer {credential}"))),
        UpstreamKind::Azure => (HeaderName::from_static("api-key"), zeroize::Zeroizing::new(credential.to_owned())),
    };
    let mut value = HeaderValue::from_str(&text)
        .map_err(|_| Error::explain(ErrorType::InternalError, "the credential cannot stand in a header"))?;
    value.set_sensitive(true);
    request.insert_header(name, value)
}
