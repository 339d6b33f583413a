//! The end of a request: metrics, one line in the access log, and its record, unless that was written with its last bytes.

use pingora_core::{Error, ErrorSource};
use pingora_proxy::Session;
use tollgate_core::{denial::Denial, usage::Usage};

use super::{
    ctx::{Outcome, RequestCtx, millis},
    reply::answered,
};
use crate::shared::Shared;

/// Settles everything that the request opened.
pub fn finish(shared: &Shared, session: &Session, ctx: &mut RequestCtx, error: Option<&Error>) {
    if ctx.outcome.is_none() {
        let outcome = outcome(session, ctx, error);
        if ctx.denial == Some(Denial::JournalFull) {
            // There is no room for a record; nothing was asked of anybody.
            ctx.outcome = Some(outcome);
        } else {
            ctx.close(Some(&session.req_header().headers), outcome);
        }
    }
    let Some(outcome) = ctx.outcome.clone() else { return };
    if ctx.attempt.is_some() {
        let failure = outcome.interrupted.then_some(&*outcome.code);
        ctx.end_attempt(failure);
    }
    let duration = ctx.arrived.elapsed();
    let route = ctx.route.map_or("none", |route| route.name);
    let asked = ctx.ask.as_ref().map_or("", |ask| &*ask.target.model);
    let label = shared.metrics.model_label(asked, (200..300).contains(&outcome.status) && !asked.is_empty());
    shared.metrics.request(route, &label, &outcome.code, duration);
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
    log(ctx, &outcome, usage.as_ref(), route, duration);
}

fn outcome(session: &Session, ctx: &RequestCtx, error: Option<&Error>) -> Outcome {
    let status = answered(session).unwrap_or(0);
    let client_gone = error.is_some_and(|error| *error.esource() == ErrorSource::Downstream) && ctx.denial.is_none();
    let code = match (&ctx.denial, client_gone, status) {
        (Some(denial), _, _) => denial.code().into(),
        (None, true, _) => "client_closed".into(),
        (None, false, 0) => "internal_error".into(),
        (None, false, status) => Outcome::of_answer(status).code,
    };
    let interrupted = error.is_some() && ctx.attempt.is_some();
    let consumed = (200..300).contains(&status) || (interrupted && status == 0 && ctx.denial.is_none());
    Outcome { code, status, interrupted, consumed }
}

fn log(ctx: &RequestCtx, outcome: &Outcome, usage: Option<&Usage>, route: &str, duration: std::time::Duration) {
    tracing::info!(
        target: "access",
        request_id = %ctx.request_id,
        route,
        key = ctx.key.as_ref().map(|key| key.prefix.as_str()),
        model = ctx.ask.as_ref().map(|ask| &*ask.target.model),
        upstream = ctx.attempts.last().map(|attempt| attempt.upstream.as_str()),
        attempts = ctx.attempts.len(),
        status = outcome.status,
        code = &*outcome.code,
        prompt_tokens = usage.map(|usage| usage.prompt_tokens),
        completion_tokens = usage.map(|usage| usage.completion_tokens),
        duration_ms = millis(duration),
    );
}
