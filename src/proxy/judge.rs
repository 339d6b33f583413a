//! What an answer means once it is known: to the attempt that brought it, and to the client when nobody is left to be asked.

use pingora_core::{Error, Result};
use tollgate_core::{
    breaker::Outcome,
    denial::Denial,
    openai::error::scrub,
    verdict::{ErrorBody, trouble},
};

use super::{
    attempt::Failed,
    ctx::{Ending, Meter, RequestCtx},
    reply::{self, Answer},
};
use crate::shared::Shared;

/// The answer is over. Its reservation is settled before its last bytes go to the client: the client's next request must
/// find free what this one gave back.
pub fn end(shared: &Shared, ctx: &mut RequestCtx) {
    if ctx.ending.is_some() {
        return; // a stream goes on after its end mark
    }
    let status = ctx.attempt.as_ref().map_or(0, |current| current.status);
    let is_good = (200..300).contains(&status);
    ctx.settle(is_good);
    let is_error = ctx.produced.as_ref().is_some_and(|produced| produced.is_error);
    let (outcome, label) = match (is_good, is_error) {
        (true, false) => (Outcome::Success, "ok"),
        (true, true) => (Outcome::Failure, "error_in_answer"),
        (false, _) => (Outcome::Neutral, "client_error"),
    };
    ctx.conclude(shared, outcome, label, is_error.then_some(label));
    ctx.close(Ending::of_answer(status));
}

/// No provider answers like this: `label` says why.
pub fn reject(shared: &Shared, ctx: &mut RequestCtx, label: &'static str) -> Box<Error> {
    if let Some(current) = &ctx.attempt {
        let (upstream, status) = (&current.upstream.name, current.status);
        tracing::error!(upstream, status, reason = label, "the upstream answers what no provider does");
    }
    ctx.conclude(shared, Outcome::Failure, label, Some(label));
    ctx.not_passed(shared)
}

/// The first event of a stream is an error, or there is none: as good as a 500 without a word.
pub fn reject_stream(shared: &Shared, ctx: &mut RequestCtx) -> Box<Error> {
    ctx.conclude(shared, Outcome::Failure, "error_event", Some("error_event"));
    ctx.not_passed(shared)
}

/// An error of the upstream is whole: what it means, and what becomes of it.
pub fn give_up(shared: &Shared, ctx: &mut RequestCtx) -> Box<Error> {
    let held = match std::mem::take(&mut ctx.meter) {
        Meter::Trouble(held) => held,
        _ => Vec::new(),
    };
    let (status, cooling_ms) = ctx.attempt.as_ref().map_or((0, None), |current| (current.status, current.cooling_ms));
    let error = ErrorBody::parse(&held);
    let trouble = trouble(status, &error, cooling_ms);
    if trouble.usefulness == 0
        && let Some(current) = &ctx.attempt
    {
        tracing::error!(upstream = current.upstream.name, status, "the upstream refuses the gateway itself");
    }
    // Clients read errors by OpenAI's envelope; a proxy's page in front of the upstream is none.
    let body = match error == ErrorBody::default() {
        true => Denial::UpstreamError.body(),
        false => scrub(&held).into_owned(),
    };
    ctx.keep(Failed { status, body: body.into(), usefulness: trouble.usefulness });
    ctx.conclude(shared, trouble.outcome, trouble.label, Some(trouble.label));
    ctx.not_passed(shared)
}

/// Nobody is left to be asked: the client gets the last answer in the place of this one.
///
/// # Errors
/// If a header cannot be built: a defect.
pub fn replace(shared: &Shared, ctx: &mut RequestCtx) -> Result<()> {
    let denial = ctx.no_upstream(shared);
    let answer = last_answer(shared, ctx, || denial)?;
    ctx.replace_content(&answer.body);
    let ending = Ending::of_answer(answer.header.status.as_u16());
    let code = ctx.denial.as_ref().map_or(ending.code, |denial| denial.code().into());
    ctx.close(Ending { code, ..ending });
    if let Some(handle) = &ctx.downstream {
        handle.replace(answer);
    }
    Ok(())
}

/// What the client is told when nobody is left to be asked: the most useful answer there was, or why there is none.
///
/// # Errors
/// If a header cannot be built: a defect.
pub fn last_answer(shared: &Shared, ctx: &mut RequestCtx, denial: impl FnOnce() -> Denial) -> Result<Answer> {
    if let Some(failed) = ctx.failed.take() {
        let wait_ms = matches!(failed.status, 429 | 503).then(|| ctx.soonest_ms(shared));
        ctx.denial = None;
        return reply::upstream_error(ctx.request_id, &ctx.standing, &failed, wait_ms);
    }
    let denial = ctx.denial.take().unwrap_or_else(denial);
    shared.metrics.denial(&denial);
    let answer = reply::denial(ctx.request_id, &ctx.standing, &denial);
    ctx.denial = Some(denial);
    answer
}
