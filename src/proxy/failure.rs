//! What happens when an attempt, or the whole request, fails.
//!
//! An attempt may be followed by another only before the first byte of an answer went downstream. A connection that was
//! kept from an earlier request and turns out to be closed says nothing about its upstream, which gets a second try.

use bytes::Bytes;
use pingora_core::{Error, ErrorSource, ErrorType};
use pingora_proxy::{FailToProxy, Session};
use tollgate_core::{breaker::Outcome, denial::Denial};

use super::{
    attempt::NOT_PASSED,
    ctx::{Meter, RequestCtx},
    downstream::{self, OVERDUE},
    judge::last_answer,
    reply,
};
use crate::shared::Shared;

/// No connection came about.
pub fn to_connect(shared: &Shared, ctx: &mut RequestCtx, mut error: Box<Error>) -> Box<Error> {
    note(shared, ctx, &error);
    error.set_retry(ctx.may_retry(shared, false));
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
    if *error.etype() == OVERDUE {
        error.as_up();
    }
    if *error.etype() == NOT_PASSED {
        return error;
    }
    let upstream_broke = *error.esource() == ErrorSource::Upstream && ctx.denial.is_none();
    if !upstream_broke || reply::answered(session).is_some() {
        if upstream_broke {
            ctx.broke_off = true;
            note(shared, ctx, &error);
        }
        error.set_retry(false);
        return error;
    }
    let was_stale = ctx.stale_retries == 0
        && reused
        && ctx.attempt.as_ref().is_some_and(|current| current.status == 0)
        && ctx.ask.as_ref().is_some_and(|ask| !ask.head.background)
        && is_closed(&error);
    if was_stale {
        ctx.conclude(shared, Outcome::Neutral, "stale", Some("stale"));
        ctx.tried.pop();
        ctx.stale_retries += 1;
        error.set_retry(true);
        return error;
    }
    note(shared, ctx, &error);
    error.set_retry(ctx.may_retry(shared, true));
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

/// Puts the failed attempt on the record.
fn note(shared: &Shared, ctx: &mut RequestCtx, error: &Error) {
    let (outcome, label) = match label(error) {
        "timeout" if ctx.is_cut_by_deadline(shared) => (Outcome::Neutral, "deadline"),
        label => (Outcome::Failure, label),
    };
    if let Some(current) = &ctx.attempt {
        tracing::warn!(
            upstream = current.upstream.name,
            request_id = %ctx.request_id,
            outcome = label,
            error = error.etype().as_str(),
            "an attempt failed"
        );
    }
    ctx.conclude(shared, outcome, label, Some(label));
}

fn label(error: &Error) -> &'static str {
    match error.etype() {
        ErrorType::ConnectTimedout
        | ErrorType::TLSHandshakeTimedout
        | ErrorType::ReadTimedout
        | ErrorType::WriteTimedout => "timeout",
        etype if *etype == OVERDUE => "timeout",
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
        if ctx.ending.is_none() {
            ctx.denial = Some(denial_of(error));
            break_off(session, ctx).await;
        }
        session.shutdown().await;
        return nothing_more;
    }
    // Pingora ends the connection after a failed attempt, which the client must know; and what follows a body that is not
    // valid HTTP must never be read as the next request.
    downstream::restore(session, &mut ctx.downstream);
    session.set_keepalive(None);
    let answer = match last_answer(shared, ctx, || denial_of(error)) {
        Ok(answer) => answer,
        Err(defect) => {
            tracing::error!(request_id = %ctx.request_id, error = %defect, "an error cannot be told");
            return nothing_more;
        }
    };
    ctx.replace_content(&answer.body);
    let error_code = answer.header.status.as_u16();
    if let Err(gone) = answer.send(session).await {
        tracing::debug!(request_id = %ctx.request_id, error = %gone, "the client is gone");
    }
    FailToProxy { error_code, can_reuse_downstream: false }
}

fn denial_of(error: &Error) -> Denial {
    match (error.esource(), label(error)) {
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
}
