//! The end of a request: metrics, one line in the access log, and its record, unless that was written with its last bytes.

use pingora_core::{Error, ErrorSource};
use pingora_proxy::Session;
use tollgate_core::{breaker::Outcome, denial::Denial, usage::Usage};
use uuid::Uuid;

use super::{
    ctx::{Ending, RequestCtx, millis},
    downstream,
    reply::answered,
};
use crate::{shared::Shared, telemetry::Access};

/// Settles everything that the request opened.
pub fn finish(shared: &Shared, session: &mut Session, ctx: &mut RequestCtx, error: Option<&Error>) {
    downstream::restore(session, &mut ctx.downstream);
    if ctx.ending.is_none() {
        let ending = ending(session, ctx, error);
        if ctx.attempt.is_some() {
            let failure = ending.interrupted.then_some(&*ending.code);
            ctx.conclude(shared, Outcome::Neutral, "client_closed", failure);
        }
        if ctx.denial == Some(Denial::JournalFull) {
            // There is no room for a record; nothing was asked of anybody.
            ctx.ending = Some(ending);
        } else {
            ctx.close(ending);
        }
    }
    let Some(ending) = &ctx.ending else { return };
    let duration = ctx.arrived.elapsed();
    let route = ctx.route.map_or("none", |route| route.name);
    let asked = ctx.ask.as_ref().map_or("", |ask| &*ask.target.model);
    let label = shared.metrics.model_label(asked, (200..300).contains(&ending.status) && !asked.is_empty());
    shared.metrics.request(route, &label, &ending.code, duration);
    if ending.consumed && ctx.ask.as_ref().is_some_and(|ask| ask.target.price.is_none()) {
        shared.metrics.unpriced_requests_total.with_label_values(&[&label]).inc();
    }
    if let Some(overhead) = ctx.overhead() {
        shared.metrics.overhead_seconds.observe(overhead.as_secs_f64());
    }
    let produced = ctx.produced.as_ref();
    if let (Some(true), Some(first)) = (produced.map(|produced| produced.streamed), ctx.first_byte) {
        shared.metrics.time_to_first_token_seconds.observe(first.duration_since(ctx.arrived).as_secs_f64());
    }
    let usage = produced.and_then(|produced| produced.usage);
    if let (Some(ask), Some(usage)) = (&ctx.ask, &usage) {
        shared.limiter.lengths().learn(&ask.target.model, usage.completion_tokens / ask.head.choices);
    }
    log(ctx, ending, usage.as_ref(), route, duration);
}

fn ending(session: &Session, ctx: &RequestCtx, error: Option<&Error>) -> Ending {
    let status = answered(session).unwrap_or(0);
    let client_gone = error.is_some_and(|error| *error.esource() == ErrorSource::Downstream) && ctx.denial.is_none();
    let code = match (&ctx.denial, client_gone, status) {
        (Some(denial), _, _) => denial.code().into(),
        (None, true, _) => "client_closed".into(),
        (None, false, 0) => "internal_error".into(),
        (None, false, status) => Ending::of_answer(status).code,
    };
    let interrupted = error.is_some() && (ctx.attempt.is_some() || ctx.broke_off);
    // Nothing may have been shown of what the upstream answered.
    let status_there = ctx.attempt.as_ref().map_or(status, |current| current.status);
    let consumed = (200..300).contains(&status)
        || (interrupted && status == 0 && matches!(status_there, 0 | 200..300) && ctx.denial.is_none());
    Ending { code, status, interrupted, consumed }
}

fn log(ctx: &RequestCtx, ending: &Ending, usage: Option<&Usage>, route: &str, duration: std::time::Duration) {
    let mut id = Uuid::encode_buffer();
    let line = Access {
        request_id: ctx.request_id.hyphenated().encode_lower(&mut id),
        route,
        key: ctx.key.as_ref().map(|key| key.prefix.as_str()),
        model: ctx.ask.as_ref().map(|ask| &*ask.target.model),
        upstream: ctx.attempts.last().map(|attempt| attempt.upstream.as_str()),
        attempts: ctx.attempts.len(),
        status: ending.status,
        code: &ending.code,
        prompt_tokens: usage.map(|usage| usage.prompt_tokens),
        completion_tokens: usage.map(|usage| usage.completion_tokens),
        duration_ms: millis(duration),
    };
    line.log();
}
