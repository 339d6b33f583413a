//! The record of a request: made in one place, whatever ended it, and handed to the journal.
//!
//! An answer that came to its end is written down before its last bytes go to the client; everything else when the request is
//! over. Texts are borrowed from the request: the journal copies them once, into the file.

use std::borrow::Cow;

use http::{HeaderName, header};
use tollgate_core::{
    journal::entry::{End, INTERRUPTED},
    route::Action,
    usage::{Usage, UsageRecord, attempts_json},
};

use super::ctx::{Ask, Ending, Meter, Produced, RequestCtx, millis};
use crate::journal::{Output, Uncounted};

static CLIENT_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

impl RequestCtx {
    /// Settles what the request reserved, and writes down how it ended, unless that is done.
    pub fn close(&mut self, ending: Ending) {
        if self.ending.is_some() {
            return;
        }
        if self.produced.is_none() {
            self.settle(ending.consumed);
        }
        let mut produced = self.produced.take().unwrap_or_else(|| Meter::None.into());
        let output = std::mem::replace(&mut produced.output, Output::None);
        self.record(&ending, &produced, output);
        if let Some(content) = self.content.take() {
            content.finish();
        }
        (self.produced, self.ending) = (Some(produced), Some(ending));
    }

    /// Only requests that were made with a valid key and meant for an upstream are on the books.
    fn record(&mut self, ending: &Ending, produced: &Produced, output: Output) {
        let open = self.open.take();
        let Some(route) = self.route.filter(|route| matches!(route.action, Action::Forward(_))) else { return };
        let Some(key) = &self.key else { return };
        let ask = self.ask.as_ref();
        let estimated = produced.usage.is_none() && ending.consumed;
        let usage = if estimated { rough(ask, &output) } else { produced.usage.unwrap_or_default() };
        let served = &produced.served;
        let tier = ask.map(|ask| ask.tier(served)).unwrap_or_default();
        let failure = ending.interrupted.then_some(&*ending.code);
        let attempt = self.attempt_so_far(failure);
        let last = attempt.as_ref().or_else(|| self.attempts.last());
        let text = |name: &HeaderName| self.asked.get(name).and_then(|value| value.to_str().ok()).map(Cow::Borrowed);
        let record = UsageRecord {
            request_id: self.request_id,
            started_at: self.arrived_at,
            user_id: key.user.id,
            key_id: key.id,
            ip: self.ip,
            route: route.name.into(),
            model: ask.map_or("", |ask| &ask.target.model).into(),
            upstream_model: self.upstream_model.as_deref().map(Cow::Borrowed),
            served_model: served.model.as_deref().map(Cow::Borrowed),
            upstream: last.map(|attempt| Cow::Borrowed(&*attempt.upstream)),
            attempts: attempts_json(&self.attempts, attempt.as_ref()).into(),
            status: ending.status,
            stream: ask.is_some_and(|ask| ask.head.stream),
            code: (ending.code != "ok").then_some(Cow::Borrowed(&*ending.code)),
            service_tier: served.service_tier.as_deref().map(Cow::Borrowed),
            usage,
            estimated,
            interrupted: ending.interrupted,
            cost_nano_usd: ask.map_or(0, |ask| ask.target.cost_nano_usd(&usage, tier)),
            ttft_ms: self.first_byte.map(|first| millis(first.duration_since(self.arrived))),
            duration_ms: millis(self.arrived.elapsed()),
            overhead_us: self.overhead().map_or(0, |took| u32::try_from(took.as_micros()).unwrap_or(u32::MAX)),
            finish_reason: produced.finish_reason.as_deref().map(Cow::Borrowed),
            user_agent: text(&header::USER_AGENT),
            client_request_id: text(&CLIENT_REQUEST_ID),
            provider_request_id: self.provider_request_id.as_deref().map(Cow::Borrowed),
        };
        let uncounted = ask.filter(|_| estimated).map(|ask| Uncounted {
            request_id: self.request_id,
            model: ask.target.model.clone(),
            price: ask.target.price.clone(),
            tier,
            dialect: ask.dialect,
            prompt: ask.body.clone(),
            output,
        });
        self.journal.end(open, End { record, is_uncounted: false, hold: self.hold }, uncounted);
    }
}

/// What an answer consumed, by the size of the texts.
fn rough(ask: Option<&Ask>, output: &Output) -> Usage {
    ask.map(|ask| ask.rough_usage(output)).unwrap_or_default()
}

/// A request whose task was dropped before its end, as the last ones are when the server stops, is still on the books.
impl Drop for RequestCtx {
    fn drop(&mut self) {
        if self.open.is_none() && self.forwarded.is_none() {
            return;
        }
        let status = self.attempt.as_ref().map_or(0, |current| current.status);
        let was_asked = self.forwarded.is_some() && self.denial.is_none();
        let consumed = (200..300).contains(&status) || (status == 0 && was_asked);
        self.close(Ending { code: INTERRUPTED.into(), status, interrupted: true, consumed });
    }
}
