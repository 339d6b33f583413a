//! One try of one upstream: what it carries, how it ends, and whether another one may follow.
//!
//! Whatever ends an attempt ends it here: on the record of the request, in the metrics, and for the breaker of its upstream.
//! Another may follow only while the client has seen nothing, an upstream that was not tried would take it, and
//! count, deadline and the budget of the whole process allow it. Where asking twice would be work done twice, it may only
//! follow if nothing was sent.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use pingora_core::{Error, ErrorSource, ErrorType};
use tollgate_core::{
    breaker::{Outcome, Ready},
    denial::Denial,
    health,
    upstream::Upstream,
};

use super::ctx::RequestCtx;
use crate::{peers::Peer, shared::Shared};

/// Error type of an answer that the client must not see: another upstream gets its turn, or the client another answer. Its
/// attempt is concluded already.
pub const NOT_PASSED: ErrorType = ErrorType::new("NotPassed");
/// How soon an upstream may be free that is just being probed.
pub const PROBE_STEP: Duration = Duration::from_millis(50);
/// What a client is told to wait when nobody knows how long it will take, in milliseconds.
const UNKNOWN_WAIT_MS: u64 = 1_000;

/// The attempt under way.
#[derive(Debug)]
pub struct Current {
    /// The member.
    pub upstream: Arc<Upstream>,
    /// How to speak to it.
    pub peer: Arc<Peer>,
    /// The model's name at this upstream.
    pub model: String,
    /// The body as this upstream wants it.
    pub body: Bytes,
    /// Did the gateway ask for usage in the client's place?
    pub asked_usage: bool,
    /// When it began.
    pub began: Instant,
    /// Its place at the upstream: counted as in flight, and known to the breaker.
    pub health: health::Attempt,
    /// Status it answered; 0: none yet.
    pub status: u16,
    /// How long that took.
    pub answered_after: Option<Duration>,
    /// How long a 429 asks to be left alone, in milliseconds.
    pub cooling_ms: Option<u64>,
    /// Does the breaker know that an answer has begun?
    pub has_begun: bool,
}

/// What an attempt answered that the client gets if no other does better.
#[derive(Debug)]
pub struct Failed {
    /// Its status.
    pub status: u16,
    /// Its body, cleaned of what names the account.
    pub body: Bytes,
    /// Of how much use it is; see [`Trouble`](tollgate_core::verdict::Trouble).
    pub usefulness: u8,
}

impl RequestCtx {
    /// Tells the breaker what is known of the attempt under way; more may follow.
    pub fn tell(&self, shared: &Shared, outcome: Outcome) {
        let Some(current) = &self.attempt else { return };
        let transition = current.health.record(outcome, shared.now_ms(), jitter(outcome));
        if let Some(transition) = transition {
            shared.changed(&current.upstream, &transition);
        }
    }

    /// Ends the attempt under way. `label`: what the metrics call it; `error`: what the record calls it, if it failed.
    pub fn conclude(&mut self, shared: &Shared, outcome: Outcome, label: &'static str, error: Option<&str>) {
        self.tell(shared, outcome);
        if let Some(current) = &self.attempt {
            shared.metrics.upstream_requests_total.with_label_values(&[&current.upstream.name, label]).inc();
        }
        self.end_attempt(error);
    }

    /// Ends the attempt under way and puts it on the record.
    pub fn end_attempt(&mut self, error: Option<&str>) {
        if let Some(handle) = &self.downstream {
            handle.relax();
        }
        self.attempts.extend(self.attempt_so_far(error));
        self.attempt = None;
    }

    /// Keeps an answer for the client, unless there is a more useful one already.
    pub fn keep(&mut self, failed: Failed) {
        if failed.usefulness > self.failed.as_ref().map_or(0, |known| known.usefulness) {
            self.failed = Some(failed);
        }
    }

    /// May another attempt follow the one that has just ended? Takes it from the budget. `was_sent`: did the upstream get, or
    /// perhaps get, the request?
    pub fn may_retry(&self, shared: &Shared, was_sent: bool) -> bool {
        let Some(ask) = &self.ask else { return false };
        if (was_sent && ask.head.background) || self.counted_attempts() >= shared.settings.max_attempts {
            return false;
        }
        if self.time_left(shared).is_some_and(|left| left.is_zero()) || !self.has_untried(shared) {
            return false;
        }
        let is_paid_for = shared.retry_budget.withdraw();
        if !is_paid_for {
            shared.metrics.retries_refused_total.inc();
        }
        is_paid_for
    }

    /// The error with which an answer that was concluded is not passed on, to be retried if another upstream may do better.
    pub fn not_passed(&self, shared: &Shared) -> Box<Error> {
        let mut error = Error::create(NOT_PASSED, ErrorSource::Upstream, None, None);
        error.set_retry(self.may_retry(shared, true));
        error
    }

    /// Was it the request's own deadline that cut this attempt off? Not if the attempt had most of the time to itself: then
    /// its upstream is to blame.
    pub fn is_cut_by_deadline(&self, shared: &Shared) -> bool {
        let (Some(deadline), Some(current)) = (shared.settings.deadline, &self.attempt) else { return false };
        self.arrived.elapsed() >= deadline && current.began.elapsed() * 2 < deadline
    }

    /// What is left until the deadline of the request; `None`: it has none.
    pub fn time_left(&self, shared: &Shared) -> Option<Duration> {
        shared.settings.deadline.map(|deadline| deadline.saturating_sub(self.arrived.elapsed()))
    }

    /// Finished attempts that count against the limit.
    fn counted_attempts(&self) -> usize {
        self.attempts.len() - self.stale_retries
    }

    /// Is there an upstream that was not tried and would take this request, now or in a moment?
    fn has_untried(&self, shared: &Shared) -> bool {
        self.untried_wait(shared).is_some_and(|wait| wait <= shared.settings.wait)
    }

    /// How long until an upstream that was not tried takes this request; one that is just being probed may at any moment.
    pub fn untried_wait(&self, shared: &Shared) -> Option<Duration> {
        let (Some(ask), Some(view)) = (&self.ask, &self.view) else { return None };
        let now_ms = shared.now_ms();
        let untried = ask.target.pool.members().filter(|index| !self.tried.contains(index));
        let wait = |index| {
            let health = &view.snapshot.member(index).state.health;
            match health.ready(now_ms) {
                Ready::Now => Some(Duration::ZERO),
                Ready::At(_) if health.is_probing() => Some(PROBE_STEP),
                Ready::At(at_ms) => Some(Duration::from_millis(at_ms.saturating_sub(now_ms))),
                Ready::Never => None,
            }
        };
        untried.filter_map(wait).min()
    }

    /// When the first upstream that serves this request will take one again, in milliseconds from now.
    pub fn soonest_ms(&self, shared: &Shared) -> u64 {
        let (Some(ask), Some(view)) = (&self.ask, &self.view) else { return UNKNOWN_WAIT_MS };
        let now_ms = shared.now_ms();
        let waits =
            ask.target.pool.members().map(|index| match view.snapshot.member(index).state.health.ready(now_ms) {
                Ready::Now => UNKNOWN_WAIT_MS,
                Ready::At(at_ms) => at_ms.saturating_sub(now_ms).max(1),
                Ready::Never => u64::MAX,
            });
        match waits.min() {
            Some(u64::MAX) | None => 60 * UNKNOWN_WAIT_MS,
            Some(wait_ms) => wait_ms,
        }
    }

    /// Why there is no answer, if no upstream gave one that can be shown.
    pub fn no_upstream(&self, shared: &Shared) -> Denial {
        match self.attempts.last().map(|attempt| attempt.error.as_deref()) {
            Some(Some("timeout" | "deadline")) => Denial::UpstreamTimeout,
            Some(_) => Denial::UpstreamError,
            None => Denial::UpstreamUnavailable { retry_after_ms: self.soonest_ms(shared) },
        }
    }
}

/// A random number for outcomes that make the breaker wait.
fn jitter(outcome: Outcome) -> f64 {
    match outcome {
        Outcome::Begun | Outcome::Success | Outcome::Neutral => 0.0,
        // Without randomness replicas come back at the same time, which is bad, but no reason to fail.
        _ => getrandom::u32().map_or(0.0, |random| f64::from(random) / f64::from(u32::MAX)),
    }
}
