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

use sha2::{Digest, Sha256};
use tollgate_core::id::KeyId;
use uuid::Uuid;

use super::{ctx::RequestCtx, downstream, reply::id_value};
use crate::shared::Shared;

static IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Headers of the client that the provider gets.
static PASSED: [HeaderName; 4] =
    [header::ACCEPT, header::CONTENT_TYPE, header::USER_AGENT, HeaderName::from_static("openai-beta")];

/// Makes the request of this attempt.
///
/// # Errors
/// If there is no attempt, or its path is none: a defect.
pub fn filter(
    shared: &Shared,
    session: &mut Session,
    upstream_request: &mut RequestHeader,
    ctx: &mut RequestCtx,
) -> Result<()> {
    let left = ctx.time_left(shared);
    let (Some(current), Some(route)) = (&ctx.attempt, ctx.route) else {
        return Error::e_explain(ErrorType::InternalError, "no attempt under way");
    };
    if let Some(first_byte) = current.peer.first_byte_within(left) {
        downstream::await_first(session, &mut ctx.downstream, first_byte);
    }
    let (mut parts, ()) = http::Request::new(()).into_parts();
    parts.method = Method::POST;
    let target = current.peer.target(route.path, &current.model);
    parts.uri = target.map_err(|error| Error::because(ErrorType::InternalError, "the path of an upstream", error))?;
    let headers = &mut parts.headers;
    headers.reserve(10);
    headers.insert(header::HOST, current.peer.host().clone());
    pass(&ctx.asked, headers);
    headers.insert(&IDEMPOTENCY_KEY, idempotency_key(ctx)?);
    let (name, credential) = current.peer.credential();
    headers.insert(name, credential);
    headers.insert(header::CONTENT_LENGTH, current.body.len().into());
    // A compressed answer could not be metered on its way through.
    headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    *upstream_request = parts.into();
    Ok(())
}

/// The same for every attempt, so that a provider that knows it does the work once. Behind one credential there are many
/// clients: what one of them chose must never get it another one's answer.
fn idempotency_key(ctx: &RequestCtx) -> Result<HeaderValue> {
    let (Some(chosen), Some(key)) = (ctx.asked.get(&IDEMPOTENCY_KEY), &ctx.key) else {
        return id_value(ctx.request_id);
    };
    id_value(namespaced(key.id, chosen.as_bytes()))
}

fn namespaced(key: KeyId, chosen: &[u8]) -> Uuid {
    let digest = Sha256::new().chain_update(key.0.to_le_bytes()).chain_update(chosen).finalize();
    uuid::Builder::from_custom_bytes(std::array::from_fn(|index| digest[index])).into_uuid()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_two_clients_chose_alike_is_not_the_same() {
        let of = |key, chosen: &str| namespaced(KeyId(key), chosen.as_bytes());
        assert_eq!(of(1, "a"), of(1, "a"));
        assert_ne!(of(1, "a"), of(2, "a"));
        assert_ne!(of(1, "a"), of(1, "b"));
    }
}
