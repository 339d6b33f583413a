//! Which upstream takes the next attempt: the one that was picked when the request was admitted, or, after a failure, another.

use pingora_core::{Error, ErrorSource, ErrorType, Result, upstreams::peer::HttpPeer};

use super::{ctx::RequestCtx, pick::pick};
use crate::shared::Shared;

/// Error type of a request that no upstream is left for.
const NO_UPSTREAM: ErrorType = ErrorType::new("NoUpstream");

/// The upstream of the next attempt: the one that was picked already, or another one.
///
/// # Errors
/// If there is none; why is in the context.
pub async fn next(shared: &Shared, ctx: &mut RequestCtx) -> Result<Box<HttpPeer>> {
    let picked = match ctx.picked.take() {
        Some(picked) => Ok(picked),
        None => pick(shared, ctx).await,
    };
    picked.map_err(|denial| {
        ctx.denial.get_or_insert(denial);
        Error::create(NO_UPSTREAM, ErrorSource::Internal, None, None)
    })
}
