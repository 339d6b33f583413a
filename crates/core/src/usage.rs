//! Usage: what one request consumed, and the row that says so.

use std::net::IpAddr;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    id::{KeyId, UserId},
    limit::Amount,
};

/// Token counts of one answer, as the provider reports them. A missing number is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the input, cached ones included.
    pub prompt_tokens: u64,
    /// Tokens of the output, reasoning included.
    pub completion_tokens: u64,
    /// The part of the input that came from the provider's prompt cache.
    pub cached_tokens: u64,
    /// The part of the output that was reasoning.
    pub reasoning_tokens: u64,
    /// Audio tokens, of input and output together.
    pub audio_tokens: u64,
}

impl Usage {
    /// Input and output together.
    #[must_use]
    pub fn total_tokens(&self) -> u64 {
        self.prompt_tokens.saturating_add(self.completion_tokens)
    }
}

/// One try of one upstream, as it is written into `request_log.attempts`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// Name of the upstream.
    pub upstream: String,
    /// Status it answered; 0: no answer came.
    pub status: u16,
    /// How long it took, in milliseconds, up to its response header or its failure.
    pub duration_ms: u32,
    /// Why it failed, in one word; `None`: it did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What one key used of one model in a month, as far as it is booked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Booked {
    /// Whose key.
    pub user: UserId,
    /// Which key.
    pub key: KeyId,
    /// Which model.
    pub model: String,
    /// How much.
    pub amount: Amount,
}

impl From<UsageRecord> for Booked {
    fn from(record: UsageRecord) -> Self {
        let amount = Amount { tokens: record.usage.total_tokens(), nano_usd: record.cost_nano_usd };
        Self { user: record.user_id, key: record.key_id, model: record.model, amount }
    }
}

/// What one address used in a month, as far as it is booked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BookedAddress {
    /// The address, or the first one of its network: see [`network_of`](crate::limit::network_of).
    pub network: IpAddr,
    /// How much.
    pub amount: Amount,
}

/// A row of `request_log`: the audit log and the usage record of one request.
#[derive(Clone, Debug, PartialEq)]
pub struct UsageRecord {
    /// The gateway's own id of the request; the key of the books.
    pub request_id: Uuid,
    /// When the request arrived.
    pub started_at: DateTime<Utc>,
    /// Who asked.
    pub user_id: UserId,
    /// With which key.
    pub key_id: KeyId,
    /// From where.
    pub ip: Option<IpAddr>,
    /// Route, as in the metrics: `chat_completions`, `embeddings`, ...
    pub route: &'static str,
    /// Model that was asked for; empty: none was read.
    pub model: String,
    /// Model that was asked of the upstream.
    pub upstream_model: Option<String>,
    /// Name of the upstream that answered.
    pub upstream: Option<String>,
    /// Every try, in order.
    pub attempts: Vec<Attempt>,
    /// Status the client got; 0: the client was gone before any.
    pub status: u16,
    /// Was it a streamed answer?
    pub stream: bool,
    /// Error code of the contract, if the request failed.
    pub code: Option<String>,
    /// What it consumed.
    pub usage: Usage,
    /// Are the counts estimated, because the provider reported none?
    pub estimated: bool,
    /// Did the answer end early: client gone, or upstream broken?
    pub interrupted: bool,
    /// What it cost, in 10^-9 dollars.
    pub cost_nano_usd: u64,
    /// From the arrival to the first byte of the answer's body, in milliseconds.
    pub ttft_ms: Option<u32>,
    /// From the arrival to the end, in milliseconds.
    pub duration_ms: u32,
    /// The part of it that was the gateway's own, in microseconds.
    pub overhead_us: u32,
    /// Why the model stopped.
    pub finish_reason: Option<String>,
    /// The client's `user-agent`.
    pub user_agent: Option<String>,
    /// The client's own `x-request-id`, if it sent one.
    pub client_request_id: Option<String>,
    /// The provider's id of the request.
    pub provider_request_id: Option<String>,
}
