//! Reads the body of an answer on its way through.
//!
//! JSON and streams pass as they are, but for the usage that only the gateway asked for. A stream is held back until its
//! first event shows that it is no error. An upstream's error is held back until it is whole, because a name that must not be
//! seen could be cut in two, and because only its body tells what it means; it is short by nature, and what exceeds
//! [`ERROR_CAP`] is cut off.

use std::time::{Duration, Instant};

use bytes::Bytes;
use pingora_core::{Error, ErrorSource, ErrorType, Result};
use pingora_proxy::Session;
use tollgate_core::{breaker::Outcome, openai::error::scrub};

use super::{
    ctx::{Meter, RequestCtx},
    downstream,
    judge::{end, give_up, reject_stream, replace},
};
use crate::shared::Shared;

/// Longest error body that is passed on.
const ERROR_CAP: usize = 64 * 1024;
/// How long a body may go on after the end mark of its stream.
const AFTER_END_MARK: Duration = Duration::from_secs(1);

/// Meters one piece of the body, and changes it where the client must see something else.
///
/// # Errors
/// [`NOT_PASSED`](super::attempt::NOT_PASSED) if another upstream gets its turn, or the client another answer. An upstream's error if a stream ends by a
/// closed connection before its end mark: passed on as a clean end, it would pass for whole.
pub fn filter(
    shared: &Shared,
    session: &mut Session,
    body: &mut Option<Bytes>,
    is_end: bool,
    ctx: &mut RequestCtx,
) -> Result<()> {
    note_piece(shared, session, body.as_ref(), is_end, ctx);
    // Who reads a stream is done with it at its end mark, and need not wait for the end of the body.
    let mut is_over = is_end;
    match &mut ctx.meter {
        Meter::None => {}
        Meter::Json(meter) => {
            if let Some(chunk) = body {
                meter.feed(chunk);
            }
        }
        Meter::Stream(meter) => {
            let had_error = meter.saw_error();
            let now = body.take().map(|chunk| meter.feed(chunk)).unwrap_or_default();
            is_over |= meter.saw_end();
            let rest = if is_over { meter.finish() } else { Bytes::new() };
            *body = join(now, rest);
            if meter.saw_error() && !had_error {
                *body = body.take().map(|piece| scrub(&piece).into_owned().into());
            }
            stream(shared, is_end, ctx)?;
        }
        Meter::Fault(held) => {
            hold(held, body.take());
            if is_end {
                *body = Some(Bytes::from(scrub(held).into_owned()));
            }
        }
        Meter::Trouble(held) => {
            hold(held, body.take());
            if is_end || held.len() == ERROR_CAP {
                let error = give_up(shared, ctx);
                return if is_end && !error.retry() { replace(shared, ctx) } else { Err(error) };
            }
        }
    }
    if let (Some(_), Some(piece)) = (&ctx.content, &body) {
        ctx.keep_content(piece);
    }
    if is_over {
        end(shared, ctx);
        if let (false, Some(handle)) = (is_end, &ctx.downstream) {
            handle.expect_end(AFTER_END_MARK);
        }
    }
    Ok(())
}

/// Notes when the answer began, and sees to it that it is not waited for without end.
fn note_piece(shared: &Shared, session: &mut Session, body: Option<&Bytes>, is_end: bool, ctx: &mut RequestCtx) {
    if let Some(handle) = &ctx.downstream {
        handle.touch();
    }
    if ctx.first_byte.is_some() || body.is_none_or(Bytes::is_empty) {
        return;
    }
    ctx.first_byte = Some(Instant::now());
    let Some(current) = &ctx.attempt else { return };
    if !is_end {
        let timeouts = current.upstream.handling.timeouts;
        let rest = timeouts.total.map(|total| total.saturating_sub(current.began.elapsed()));
        let until_deadline = ctx.time_left(shared).filter(|_| matches!(ctx.meter, Meter::Trouble(_)));
        let rest = rest.into_iter().chain(until_deadline).min();
        downstream::watch(session, &mut ctx.downstream, timeouts.chunk, rest);
    }
}

/// Decides on what is held back of a stream, and on its end.
fn stream(shared: &Shared, is_end: bool, ctx: &mut RequestCtx) -> Result<()> {
    let Meter::Stream(meter) = &ctx.meter else { return Ok(()) };
    let (has_events, saw_comment, saw_end) = (meter.events() > 0, meter.saw_comment(), meter.saw_end());
    if is_holding(ctx) {
        if meter.first_event_is_error() || (is_end && !has_events) {
            return Err(reject_stream(shared, ctx));
        }
        if let (true, Some(handle)) = (has_events || saw_comment, &ctx.downstream) {
            handle.release();
        }
    }
    if has_events {
        note_begin(shared, ctx);
    }
    if is_end && ctx.ends_by_close && !saw_end {
        return Err(Error::create(ErrorType::ConnectionClosed, ErrorSource::Upstream, None, None));
    }
    Ok(())
}

fn is_holding(ctx: &RequestCtx) -> bool {
    ctx.downstream.as_ref().is_some_and(downstream::Handle::is_holding)
}

/// The first event came: the upstream works.
fn note_begin(shared: &Shared, ctx: &mut RequestCtx) {
    let Some(current) = ctx.attempt.as_mut().filter(|current| !current.has_begun) else { return };
    current.has_begun = true;
    let series = &shared.metrics.upstream_first_token_seconds;
    series.with_label_values(&[&current.upstream.name]).observe(current.began.elapsed().as_secs_f64());
    ctx.tell(shared, Outcome::Begun);
}

fn hold(held: &mut Vec<u8>, piece: Option<Bytes>) {
    if let Some(piece) = piece {
        let room = ERROR_CAP - held.len();
        held.extend_from_slice(&piece[..piece.len().min(room)]);
    }
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
