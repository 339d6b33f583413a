//! Reads an answer on its way through.
//!
//! JSON and streams pass as they are, but for the usage that only the gateway asked for. An upstream's error is held back
//! until it is whole, because a name that must not be seen could be cut in two; it is short by nature, and what exceeds
//! [`ERROR_CAP`] is cut off.

use std::time::Instant;

use bytes::Bytes;
use pingora_core::{Error, ErrorSource, ErrorType, Result};
use pingora_proxy::Session;
use tollgate_core::openai::error::scrub;

use super::ctx::{Meter, Outcome, RequestCtx};

/// Longest error body that is passed on.
const ERROR_CAP: usize = 64 * 1024;

/// Meters one piece of the body, and changes it where the client must see something else.
///
/// # Errors
/// If a stream ends by a closed connection before its end mark: passed on as a clean end, it would pass for whole.
pub fn filter(session: &Session, body: &mut Option<Bytes>, end_of_stream: bool, ctx: &mut RequestCtx) -> Result<()> {
    // Who reads a stream is done with it at its end mark, and need not wait for the end of the body.
    let mut is_over = end_of_stream;
    if ctx.first_byte.is_none() && body.as_ref().is_some_and(|chunk| !chunk.is_empty()) {
        ctx.first_byte = Some(Instant::now());
    }
    match &mut ctx.meter {
        Meter::None => {}
        Meter::Json(meter) => {
            if let Some(chunk) = body {
                meter.feed(chunk);
            }
        }
        Meter::Stream(meter) => {
            let now = body.take().map(|chunk| meter.feed(chunk)).unwrap_or_default();
            is_over |= meter.saw_end();
            let rest = if is_over { meter.finish() } else { Bytes::new() };
            *body = join(now, rest);
            if end_of_stream && ctx.ends_by_close && !meter.saw_end() {
                return Err(Error::create(ErrorType::ConnectionClosed, ErrorSource::Upstream, None, None));
            }
        }
        Meter::Error(held) => {
            if let Some(chunk) = body.take() {
                let room = ERROR_CAP - held.len();
                held.extend_from_slice(&chunk[..chunk.len().min(room)]);
            }
            if end_of_stream {
                *body = Some(Bytes::from(scrub(held).into_owned()));
            }
        }
    }
    if is_over {
        // Before the last bytes go to the client: what it got whole is on the books, and its next request finds free what this one
        // gave back.
        let status = ctx.attempt.as_ref().map_or(0, |current| current.status);
        ctx.close(Some(&session.req_header().headers), Outcome::of_answer(status));
    }
    Ok(())
}

/// Nothing is `None`: an empty chunk would end a chunked body.
fn join(now: Bytes, rest: Bytes) -> Option<Bytes> {
    match (now.is_empty(), rest.is_empty()) {
        (true, true) => None,
        (false, true) => Some(now),
        (true, false) => Some(rest),
        (false, false) => Some([now, rest].concat().into()),
    }
}
