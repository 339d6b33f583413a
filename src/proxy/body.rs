//! Reading the whole request body, in a way that Pingora can send it on.
//!
//! The model stands in the body (and `messages` usually before it), so the body must be known before an upstream is
//! picked. Pingora forwards a body that was read early only from its retry buffer, which gives up at 64 KiB: read naively,
//! anything larger reaches the upstream as 0 bytes, or hangs. Two ways around it, both seen to work up to 30 MB and over
//! several attempts:
//!
//! * With `content-length`, retry buffering is switched on only for the last 64 KiB. The buffer then holds just the tail,
//!   is never truncated, and makes Pingora call `request_body_filter` once per attempt, where the whole body takes the
//!   tail's place.
//! * Without it there is no known tail. For a body that outgrew the buffer the session is wrapped in one that hands out
//!   the whole body as its retry buffer ([`downstream::replay`]).
//!
//! The body is bounded by `[server] max_body`. A body that is refused is drained, within that same bound, before the
//! answer: closing the connection under a client that still sends shows there as a broken pipe instead of the error.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, header};
use pingora_core::{Error, Result};
use pingora_proxy::Session;
use tollgate_core::denial::Denial;

use super::downstream::{self, Handle};

/// What Pingora's retry buffer holds.
const RETRY_BUFFER: usize = 64 * 1024;
/// No client makes us allocate more than this by its mere promise of a long body.
const FIRST_ALLOCATION: usize = 1024 * 1024;

/// Why there is no body.
#[derive(Debug)]
pub enum Failure {
    /// The client gets an answer.
    Denied(Denial),
    /// The client is gone.
    Gone(Box<Error>),
}

/// Reads the body and prepares the session to forward it.
///
/// # Errors
/// [`Failure::Denied`] if it is too large or does not arrive in time, [`Failure::Gone`] if the client left.
pub async fn read(
    session: &mut Session,
    downstream: &mut Option<Handle>,
    max: usize,
    patience: Duration,
) -> Result<Bytes, Failure> {
    let declared = declared_length(&session.req_header().headers);
    if declared.is_some_and(|length| length > max) {
        drain(session, max, patience).await;
        return Err(too_large(max));
    }
    if session.req_header().headers.contains_key(header::EXPECT) {
        session.write_continue_response().await.map_err(Failure::Gone)?;
    }
    let (body, in_buffer) = collect(session, declared, max, patience).await?;
    if !body.is_empty() && !(1..=RETRY_BUFFER).contains(&in_buffer) {
        downstream::replay(session, downstream, body.clone());
    }
    Ok(body)
}

/// Reads everything; returns it and how much of it went into the retry buffer.
async fn collect(
    session: &mut Session,
    declared: Option<usize>,
    max: usize,
    patience: Duration,
) -> Result<(Bytes, usize), Failure> {
    let mut first = Bytes::new();
    let mut all = BytesMut::new();
    let (mut length, mut in_buffer, mut buffering) = (0, 0, false);
    while !session.is_body_done() {
        if !buffering && declared.is_none_or(|declared| declared - length <= RETRY_BUFFER) {
            session.enable_retry_buffering();
            buffering = true;
        }
        let Some(chunk) = next_chunk(session, patience).await? else { break };
        length += chunk.len();
        if buffering {
            in_buffer += chunk.len();
        }
        if length > max {
            drop((all, first));
            drain(session, max, patience).await;
            return Err(too_large(max));
        }
        if first.is_empty() && all.is_empty() {
            first = chunk;
            continue;
        }
        if all.is_empty() {
            all.reserve(declared.unwrap_or_default().clamp(first.len() + chunk.len(), FIRST_ALLOCATION.max(length)));
            all.extend_from_slice(&std::mem::take(&mut first));
        }
        all.extend_from_slice(&chunk);
    }
    Ok((if all.is_empty() { first } else { all.freeze() }, in_buffer))
}

async fn next_chunk(session: &mut Session, patience: Duration) -> Result<Option<Bytes>, Failure> {
    match pingora_timeout::timeout(patience, session.downstream_session.read_request_body()).await {
        Ok(read) => read.map_err(|error| Failure::Gone(error.into_down())),
        Err(_elapsed) => {
            session.set_keepalive(None);
            Err(Failure::Denied(Denial::RequestTimeout))
        }
    }
}

/// Reads and discards what the client still sends, up to `max` bytes. Afterwards the connection may be used again only if
/// all of it was read.
pub async fn drain(session: &mut Session, max: usize, patience: Duration) {
    if session.response_written().is_none() && session.req_header().headers.contains_key(header::EXPECT) {
        // The client waits for leave to send, which it does not get.
        session.set_keepalive(None);
        return;
    }
    let until = Instant::now() + patience;
    let mut left = max;
    while !session.is_body_done() && left > 0 && Instant::now() < until {
        match next_chunk(session, patience).await {
            Ok(Some(chunk)) => left = left.saturating_sub(chunk.len()),
            Ok(None) => return,
            Err(_) => break,
        }
    }
    if !session.is_body_done() {
        session.set_keepalive(None);
    }
}

/// The length that the client announced, if it is the one that frames the body.
fn declared_length(headers: &HeaderMap) -> Option<usize> {
    if headers.contains_key(header::TRANSFER_ENCODING) {
        return None;
    }
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.trim().parse().ok()
}

fn too_large(max: usize) -> Failure {
    Failure::Denied(Denial::RequestTooLarge { limit_bytes: max as u64 })
}
