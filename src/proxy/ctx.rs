//! What one request carries from phase to phase.

use std::{borrow::Cow, net::IpAddr, sync::Arc, time::Instant};

use bytes::Bytes;
use chrono::{DateTime, Utc};
use http::HeaderMap;
use pingora_core::upstreams::peer::HttpPeer;
use tollgate_core::{
    denial::Denial,
    key::KeyEntry,
    limit::{Amount, estimate::prompt_tokens, hold::Hold, standing::Standing},
    openai::{
        request::RequestHead,
        response::{AnswerFacts, JsonMeter},
        served::Served,
        sse::StreamMeter,
    },
    price::Tier,
    route::{Dialect, Route},
    snapshot::Target,
    usage::{Attempt, Usage},
};
use uuid::Uuid;

use super::{
    attempt::{Current, Failed},
    downstream::Handle,
};
use crate::{
    content::Capture,
    journal::{Journal, Open, Output},
    limiter::Reservation,
    shared::{Held, View},
};

/// State of one request. Filled by the phases, in order.
#[derive(Debug)]
pub struct RequestCtx {
    /// Keeps the process from ending before the request does.
    pub held: Held,
    /// Where it goes when it is over.
    pub journal: Journal,
    /// Set once it was written down that it was admitted.
    pub open: Option<Open>,
    /// How it ended; set once it has gone to the journal.
    pub ending: Option<Ending>,
    /// The gateway's own id: the key of the books, so never the client's choice.
    pub request_id: Uuid,
    /// When the request arrived.
    pub arrived: Instant,
    /// The same, by the calendar.
    pub arrived_at: DateTime<Utc>,
    /// Who is speaking, behind trusted proxies.
    pub ip: Option<IpAddr>,
    /// The line of the route table.
    pub route: Option<&'static Route>,
    /// The client's headers, but for its key.
    pub asked: HeaderMap,
    /// Whose key it is.
    pub key: Option<Arc<KeyEntry>>,
    /// The one view that this request works with.
    pub view: Option<Arc<View>>,
    /// What is asked for; set once the request may be forwarded.
    pub ask: Option<Ask>,
    /// Its content, if that is to be kept.
    pub content: Option<Box<Capture>>,
    /// Finished attempts.
    pub attempts: Vec<Attempt>,
    /// Attempts that failed because a kept connection was closed; they do not count.
    pub stale_retries: usize,
    /// Indexes of the members that were tried.
    pub tried: Vec<usize>,
    /// The attempt under way.
    pub attempt: Option<Current>,
    /// How to connect for it, until that is done.
    pub picked: Option<Box<HttpPeer>>,
    /// Did the upstream break off in the middle of its answer?
    pub broke_off: bool,
    /// The most useful answer of those that failed.
    pub failed: Option<Failed>,
    /// The wrapper of the client's session, if it needed one.
    pub downstream: Option<Handle>,
    /// Name of the model at the upstream of the last attempt.
    pub upstream_model: Option<String>,
    /// What it reserved; let go when its answer is over.
    pub reservation: Option<Reservation>,
    /// What it holds of quotas until it is booked.
    pub hold: Option<Hold>,
    /// What is left of the limits that bind it.
    pub standing: Standing,
    /// How the answer is read.
    pub meter: Meter,
    /// What the answer brought, once it is over.
    pub produced: Option<Produced>,
    /// Has the answer no length of its own, so that it ends when its connection does?
    pub ends_by_close: bool,
    /// When the first byte of the answer's body came.
    pub first_byte: Option<Instant>,
    /// Time spent waiting for the client's body.
    pub waited_for_client: std::time::Duration,
    /// When the first attempt began.
    pub forwarded: Option<Instant>,
    /// Why the gateway itself answered.
    pub denial: Option<Denial>,
    /// The provider's id of the request.
    pub provider_request_id: Option<String>,
}

/// What a client asks for: body, head, and the model it resolved to.
#[derive(Debug)]
pub struct Ask {
    /// How to read body and answer.
    pub dialect: Dialect,
    /// The whole body, as it came.
    pub body: Bytes,
    /// What stands in it.
    pub head: RequestHead,
    /// Who may serve it.
    pub target: Target,
    /// Tokens that it may consume, as far as that can be told.
    pub tokens: u64,
}

/// How a request ended.
#[derive(Clone, Debug)]
pub struct Ending {
    /// `ok`, or the error code.
    pub code: Cow<'static, str>,
    /// Status that the client got; 0: none.
    pub status: u16,
    /// Did the answer end early?
    pub interrupted: bool,
    /// Did the model work for it, as far as can be told?
    pub consumed: bool,
}

impl Ending {
    /// An upstream's answer came to its end.
    #[must_use]
    pub fn of_answer(status: u16) -> Self {
        let is_good = (200..300).contains(&status);
        let code = if is_good { "ok".into() } else { format!("http_{status}").into() };
        Self { code, status, interrupted: false, consumed: is_good }
    }
}

impl Ask {
    /// What an answer consumed of which nobody told, by the size of the texts, until they are counted.
    #[must_use]
    pub fn rough_usage(&self, output: &Output) -> Usage {
        Usage {
            prompt_tokens: prompt_tokens(&self.body),
            completion_tokens: if self.dialect.has_output() { output.rough_tokens() } else { 0 },
            ..Usage::default()
        }
    }

    /// In which tier the provider works: as the answer says, else as the request wants it.
    #[must_use]
    pub fn tier(&self, served: &Served) -> Tier {
        served.service_tier.as_deref().map_or(self.head.tier, Tier::of)
    }
}

/// How an answer is read on its way through.
#[derive(Debug, Default)]
pub enum Meter {
    /// Not at all.
    #[default]
    None,
    /// A JSON body.
    Json(Box<JsonMeter>),
    /// Server-sent events.
    Stream(Box<StreamMeter>),
    /// An error that the request is to blame for: kept until it is whole, then cleaned of what names the account.
    Fault(Vec<u8>),
    /// An error of the upstream: kept until it is whole and can be judged.
    Trouble(Vec<u8>),
}

/// What an answer brought.
#[derive(Debug)]
pub struct Produced {
    /// What it consumed, if the upstream said so.
    pub usage: Option<Usage>,
    /// Why the model stopped.
    pub finish_reason: Option<String>,
    /// Who made it.
    pub served: Served,
    /// The text, to be counted if the upstream did not.
    pub output: Output,
    /// Was it a stream of events?
    pub streamed: bool,
    /// Does it say that something failed?
    pub is_error: bool,
}

impl From<Meter> for Produced {
    fn from(meter: Meter) -> Self {
        match meter {
            Meter::Json(meter) => {
                let (facts, body) = meter.finish();
                let output = body.map_or(Output::None, Output::Json);
                let AnswerFacts { usage, finish_reason, is_error, served } = facts;
                Self { usage, finish_reason, served, output, streamed: false, is_error }
            }
            Meter::Stream(mut meter) => Self {
                usage: meter.usage(),
                finish_reason: meter.finish_reason().map(str::to_owned),
                served: meter.served().clone(),
                output: Output::Stream(meter.take_output()),
                streamed: true,
                is_error: meter.saw_error(),
            },
            Meter::None | Meter::Fault(_) | Meter::Trouble(_) => Self {
                usage: None,
                finish_reason: None,
                served: Served::default(),
                output: Output::None,
                streamed: false,
                is_error: false,
            },
        }
    }
}

impl RequestCtx {
    /// A request that has just arrived.
    #[must_use]
    pub fn new(held: Held, journal: Journal) -> Self {
        Self {
            held,
            journal,
            open: None,
            ending: None,
            request_id: Uuid::now_v7(),
            arrived: Instant::now(),
            arrived_at: Utc::now(),
            ip: None,
            route: None,
            asked: HeaderMap::new(),
            key: None,
            view: None,
            ask: None,
            content: None,
            attempts: Vec::new(),
            stale_retries: 0,
            tried: Vec::new(),
            attempt: None,
            picked: None,
            broke_off: false,
            failed: None,
            downstream: None,
            upstream_model: None,
            reservation: None,
            hold: None,
            standing: Standing::default(),
            meter: Meter::None,
            produced: None,
            ends_by_close: false,
            first_byte: None,
            waited_for_client: std::time::Duration::ZERO,
            forwarded: None,
            denial: None,
            provider_request_id: None,
        }
    }

    /// Forgets what an earlier attempt answered, of which the client has seen nothing.
    pub fn forget_answer(&mut self) {
        self.meter = Meter::None;
        self.first_byte = None;
        self.ends_by_close = false;
        self.provider_request_id = None;
        if let Some(handle) = &self.downstream {
            handle.discard();
        }
        if let Some(content) = &mut self.content {
            content.forget_answer();
        }
    }

    /// Takes note of a piece of the answer that the client gets, if content is to be kept.
    pub fn keep_content(&mut self, piece: &[u8]) {
        let is_stream = matches!(self.meter, Meter::Stream(_));
        if self.content.as_mut().is_some_and(|content| !content.see(piece, is_stream)) {
            self.content = None;
        }
    }

    /// The client gets this answer, and nothing of what was seen of another, if content is to be kept.
    pub fn replace_content(&mut self, body: &[u8]) {
        if let Some(content) = &mut self.content {
            content.forget_answer();
            if !content.see(body, false) {
                self.content = None;
            }
        }
    }

    /// Corrects the reservation to what the answer consumed. Called before the last bytes go to the client: its next
    /// request must find free what this one gave back. `answered`: did the model work for it?
    pub fn settle(&mut self, answered: bool) {
        let produced = Produced::from(std::mem::take(&mut self.meter));
        if let (Some(reservation), Some(ask)) = (self.reservation.take(), &self.ask) {
            let usage = match produced.usage {
                _ if !answered => Usage::default(),
                Some(usage) => usage,
                None => ask.rough_usage(&produced.output),
            };
            let cost = ask.target.cost_nano_usd(&usage, ask.tier(&produced.served));
            self.hold = reservation.settle(Amount { tokens: usage.total_tokens(), nano_usd: cost });
        }
        self.produced = Some(produced);
    }

    /// The attempt under way, as it stands on the record if it ends now.
    #[must_use]
    pub fn attempt_so_far(&self, error: Option<&str>) -> Option<Attempt> {
        self.attempt.as_ref().map(|current| Attempt {
            upstream: current.upstream.name.clone(),
            status: current.status,
            duration_ms: millis(current.answered_after.unwrap_or_else(|| current.began.elapsed())),
            error: error.map(str::to_owned),
        })
    }

    /// What the gateway took before it asked the upstream, without waiting for the client.
    #[must_use]
    pub fn overhead(&self) -> Option<std::time::Duration> {
        Some(self.forwarded?.duration_since(self.arrived).saturating_sub(self.waited_for_client))
    }
}

/// Whole milliseconds, saturating.
#[must_use]
pub fn millis(duration: std::time::Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}
