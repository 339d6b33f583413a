//! The end of a request: books, metrics, one line in the access log.

use std::sync::Arc;

use http::{HeaderMap, header};
use pingora_core::{Error, ErrorSource};
use pingora_proxy::Session;
use tollgate_core::{
    breaker,
    route::Action,
    usage::{Usage, UsageRecord},
};

use super::{
    ctx::{Ask, Meter, Produced, RequestCtx, millis},
    downstream,
    reply::answered,
};
use crate::{
    journal::{Finished, Uncounted},
    shared::Shared,
};

/// How the answer ended.
struct Outcome {
    code: String,
    status: u16,
    interrupted: bool,
    /// Did the model work for it, as far as can be told?
    consumed: bool,
}

/// Settles everything that the request opened.
pub async fn finish(shared: &Shared, session: &mut Session, ctx: &mut RequestCtx, error: Option<&Error>) {
    downstream::restore(session, &mut ctx.downstream);
    ctx.settled = true;
    let outcome = outcome(session, ctx, error);
    let produced = take_produced(ctx, &outcome);
    let duration = ctx.arrived.elapsed();
    if ctx.attempt.is_some() {
        let failure = outcome.interrupted.then(|| outcome.code.clone());
        ctx.conclude(shared, breaker::Outcome::Neutral, "client_closed", failure.as_deref());
    }
    let route = ctx.route.map_or("none", |route| route.name);
    let asked = ctx.ask.as_ref().map_or("", |ask| &*ask.target.model);
    let label = shared.metrics.model_label(asked, (200..300).contains(&outcome.status) && !asked.is_empty());
    shared.metrics.request(route, &label, &outcome.code, duration);
    if let Some(overhead) = overhead(ctx) {
        shared.metrics.overhead_seconds.observe(overhead.as_secs_f64());
    }
    if let (true, Some(first)) = (produced.streamed, ctx.first_byte) {
        shared.metrics.time_to_first_token_seconds.observe(first.duration_since(ctx.arrived).as_secs_f64());
    }
    if let (Some(ask), Some(usage)) = (&ctx.ask, &produced.usage) {
        shared.limiter.lengths().learn(&ask.target.model, usage.completion_tokens / ask.head.choices);
    }
    log(ctx, &outcome, produced.usage.as_ref(), route, duration);
    let headers = Some(&session.req_header().headers);
    let Some(finished) = finished(headers, ctx, outcome, produced, duration) else { return };
    if let Err(lost) = shared.journal.record(finished).await {
        shared.metrics.journal_lost_records_total.inc();
        tracing::error!(request_id = %lost.record.request_id, "a usage record is lost: the writer did not take it");
    }
}

/// A request whose task was dropped before its end, as the last ones are when the server stops, is still on the books.
impl Drop for RequestCtx {
    fn drop(&mut self) {
        if self.settled || self.forwarded.is_none() {
            return;
        }
        let status = self.attempt.as_ref().map_or(0, |current| current.status);
        let answered = (200..300).contains(&status);
        let consumed = answered || (status == 0 && self.denial.is_none());
        let outcome = Outcome { code: "interrupted".to_owned(), status, interrupted: true, consumed };
        let produced = take_produced(self, &outcome);
        self.end_attempt(Some("interrupted"));
        let duration = self.arrived.elapsed();
        if let Some(finished) = finished(None, self, outcome, produced, duration)
            && let Err(lost) = self.journal.push(finished)
        {
            tracing::error!(request_id = %lost.record.request_id, "a usage record is lost: the journal is full");
        }
    }
}

/// What the answer brought; settles the reservation unless that is done.
fn take_produced(ctx: &mut RequestCtx, outcome: &Outcome) -> Produced {
    if ctx.produced.is_none() {
        ctx.settle(outcome.consumed);
    }
    ctx.produced.take().unwrap_or_else(|| Meter::None.into())
}

fn outcome(session: &Session, ctx: &RequestCtx, error: Option<&Error>) -> Outcome {
    let status = answered(session).unwrap_or(0);
    let client_gone = error.is_some_and(|error| *error.esource() == ErrorSource::Downstream) && ctx.denial.is_none();
    let code = match (&ctx.denial, client_gone, status) {
        (Some(denial), _, _) => denial.code().to_owned(),
        (None, true, _) => "client_closed".to_owned(),
        (None, false, 0) => "internal_error".to_owned(),
        (None, false, 200..=299) => "ok".to_owned(),
        (None, false, status) => format!("http_{status}"),
    };
    let interrupted = error.is_some() && (ctx.attempt.is_some() || ctx.broke_off);
    // Nothing may have been shown of what the upstream answered.
    let status_there = ctx.attempt.as_ref().map_or(status, |current| current.status);
    let consumed = (200..300).contains(&status)
        || (interrupted && status == 0 && matches!(status_there, 0 | 200..300) && ctx.denial.is_none());
    Outcome { code, status, interrupted, consumed }
}

/// What the gateway took before it asked the upstream, without waiting for the client.
fn overhead(ctx: &RequestCtx) -> Option<std::time::Duration> {
    Some(ctx.forwarded?.duration_since(ctx.arrived).saturating_sub(ctx.waited_for_client))
}

/// The row of a request that was made with a valid key and meant for an upstream.
fn finished(
    headers: Option<&HeaderMap>,
    ctx: &mut RequestCtx,
    outcome: Outcome,
    produced: Produced,
    duration: std::time::Duration,
) -> Option<Finished> {
    let key = ctx.key.clone()?;
    let route = ctx.route.filter(|route| matches!(route.action, Action::Forward(_)))?;
    let ask = ctx.ask.take();
    let text = |name: header::HeaderName| headers?.get(name).and_then(|v| v.to_str().ok()).map(|v| clip(v, 256));
    let estimated = produced.usage.is_none() && outcome.consumed;
    let last = ctx.attempts.last();
    let record = UsageRecord {
        request_id: ctx.request_id,
        started_at: ctx.arrived_at,
        user_id: key.user.id,
        key_id: key.id,
        ip: ctx.ip,
        route: route.name,
        model: ask.as_ref().map(|ask| ask.target.model.to_string()).unwrap_or_default(),
        upstream_model: ctx.upstream_model.take(),
        upstream: last.map(|attempt| attempt.upstream.clone()),
        attempts: std::mem::take(&mut ctx.attempts),
        status: outcome.status,
        stream: ask.as_ref().is_some_and(|ask| ask.head.stream),
        code: (outcome.code != "ok").then_some(outcome.code),
        usage: produced.usage.unwrap_or_default(),
        estimated,
        interrupted: outcome.interrupted,
        cost_nano_usd: 0,
        ttft_ms: ctx.first_byte.map(|first| millis(first.duration_since(ctx.arrived))),
        duration_ms: millis(duration),
        overhead_us: overhead(ctx).map_or(0, |overhead| u32::try_from(overhead.as_micros()).unwrap_or(u32::MAX)),
        finish_reason: produced.finish_reason.map(|reason| clip(&reason, 64)),
        user_agent: text(header::USER_AGENT),
        client_request_id: text(header::HeaderName::from_static("x-request-id")),
        provider_request_id: ctx.provider_request_id.take(),
    };
    let price = ask.as_ref().map(|ask| ask.target.price).unwrap_or_default();
    let uncounted = ask
        .filter(|_| estimated)
        .map(|ask: Ask| Arc::new(Uncounted { dialect: ask.dialect, prompt: ask.body, output: produced.output }));
    Some(Finished { record, price, uncounted, unbooked: ctx.unbooked.take() })
}

fn clip(text: &str, most: usize) -> String {
    text.chars().take(most).collect()
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
        code = outcome.code,
        prompt_tokens = usage.map(|usage| usage.prompt_tokens),
        completion_tokens = usage.map(|usage| usage.completion_tokens),
        duration_ms = millis(duration),
    );
}
