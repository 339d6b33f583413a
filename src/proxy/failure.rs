//! What happens when an attempt, or the whole request, fails.
//!
//! An attempt may be followed by another only before the first byte of an answer went downstream. A connection that was
//! kept from an earlier request and turns out to be closed says nothing about its upstream, which gets a second try.

use bytes::Bytes;
use pingora_core::{Error, ErrorSource, ErrorType};
use pingora_proxy::{FailToProxy, Session};
use tollgate_core::denial::Denial;

use super::{
    ctx::{Meter, RequestCtx},
    reply,
};
use crate::shared::Shared;

/// No connection came about.
pub fn to_connect(shared: &Shared, ctx: &mut RequestCtx, mut error: Box<Error>) -> Box<Error> {
    note(shared, ctx, &error);
    error.set_retry(may_try_next(shared, ctx));
    error
}

/// The attempt failed after the connection was made.
pub fn while_proxying(
    shared: &Shared,
    session: &Session,
    ctx: &mut RequestCtx,
    mut error: Box<Error>,
    reused: bool,
) -> Box<Error> {
    if ctx.attempt.is_none() && error.retry() {
        return error;
    }
    let upstream_broke = *error.esource() == ErrorSource::Upstream && ctx.denial.is_none();
    if !upstream_broke || reply::answered(session).is_some() {
        error.set_retry(false);
        return error;
    }
    let was_stale = ctx.stale_retries == 0
        && reused
        && ctx.attempt.as_ref().is_some_and(|current| current.status == 0)
        && is_closed(&error);
    note(shared, ctx, &error);
    if was_stale {
        ctx.tried.pop();
        ctx.stale_retries += 1;
    }
    error.set_retry(may_try_next(shared, ctx));
    error
}

fn is_closed(error: &Error) -> bool {
    matches!(error.etype(), ErrorType::ConnectionClosed | ErrorType::ReadError | ErrorType::WriteError)
}

/// Is there nobody left to answer? An HTTP/2 client that resets its stream shows as an error of the protocol; and once an
/// answer has begun, whatever fails on the client's side ends it.
fn is_client_gone(session: &Session, error: &Error) -> bool {
    *error.esource() == ErrorSource::Downstream
        && (is_closed(error) || *error.etype() == ErrorType::H2Error || reply::answered(session).is_some())
}

fn may_try_next(shared: &Shared, ctx: &RequestCtx) -> bool {
    ctx.has_untried() && ctx.counted_attempts() < shared.settings.max_attempts
}

/// Puts the failed attempt on the record.
fn note(shared: &Shared, ctx: &mut RequestCtx, error: &Error) {
    let outcome = outcome(error);
    if let Some(current) = &ctx.attempt {
        shared.metrics.upstream_requests_total.with_label_values(&[&current.upstream.name, outcome]).inc();
        tracing::warn!(
            upstream = current.upstream.name,
            request_id = %ctx.request_id,
            outcome,
            error = error.etype().as_str(),
            "an attempt failed"
        );
    }
    ctx.end_attempt(Some(outcome));
}

fn outcome(error: &Error) -> &'static str {
    match error.etype() {
        ErrorType::ConnectTimedout
        | ErrorType::TLSHandshakeTimedout
        | ErrorType::ReadTimedout
        | ErrorType::WriteTimedout => "timeout",
        ErrorType::TLSHandshakeFailure | ErrorType::InvalidCert | ErrorType::HandshakeError => "tls",
        ErrorType::ConnectRefused | ErrorType::ConnectNoRoute | ErrorType::ConnectError | ErrorType::SocketError => {
            "connect"
        }
        _ => "broken",
    }
}

/// Gives the client the answer that is left.
pub async fn answer(shared: &Shared, session: &mut Session, ctx: &mut RequestCtx, error: &Error) -> FailToProxy {
    let nothing_more = FailToProxy { error_code: 0, can_reuse_downstream: false };
    if is_client_gone(session, error) {
        return nothing_more;
    }
    if reply::answered(session).is_some() {
        // The error is written into a stream before its connection is cut: a clean end would pass for a whole answer.
        ctx.denial = Some(denial_of(error));
        break_off(session, ctx).await;
        return nothing_more;
    }
    let denial = ctx.denial.clone().unwrap_or_else(|| denial_of(error));
    shared.metrics.denial(&denial);
    // What follows a body that is not valid HTTP must never be read as the next request.
    let is_broken = *error.esource() == ErrorSource::Downstream;
    if is_broken {
        session.set_keepalive(None);
    }
    let sent = reply::deny(session, ctx.request_id, &ctx.standing, &denial).await;
    let status = denial.status();
    ctx.denial = Some(denial);
    FailToProxy { error_code: status, can_reuse_downstream: sent.is_ok() && !is_broken }
}

fn denial_of(error: &Error) -> Denial {
    match (error.esource(), outcome(error)) {
        (ErrorSource::Upstream, "timeout") => Denial::UpstreamTimeout,
        (ErrorSource::Upstream, _) => Denial::UpstreamError,
        (ErrorSource::Downstream, "timeout") => Denial::RequestTimeout,
        (ErrorSource::Downstream, _) => {
            Denial::InvalidBody { message: "The request is not valid HTTP.".to_owned(), param: None }
        }
        (ErrorSource::Internal | ErrorSource::Unset, _) => Denial::Internal,
    }
}

/// Tells a client in the middle of a stream that no more will come.
async fn break_off(session: &mut Session, ctx: &mut RequestCtx) {
    if let (Meter::Stream(_), Some(denial)) = (&ctx.meter, &ctx.denial) {
        let mut event = b"\n\ndata: ".to_vec();
        event.extend(denial.body());
        event.extend_from_slice(b"\n\n");
        if let Err(gone) = session.write_response_body(Some(Bytes::from(event)), false).await {
            tracing::debug!(request_id = %ctx.request_id, error = %gone, "the client is gone");
        }
    }
    session.shutdown().await;
}
