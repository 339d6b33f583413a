//! Usage: what one request consumed, and the row that says so.

use std::{borrow::Cow, net::IpAddr};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    id::{KeyId, UserId},
    limit::{Amount, hold::Holder},
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
    /// The part of the input that was put into that cache.
    pub cache_write_tokens: u64,
    /// The part of the output that was reasoning.
    pub reasoning_tokens: u64,
    /// Audio tokens, of input and output together.
    pub audio_tokens: u64,
    /// Those of them that were output.
    pub output_audio_tokens: u64,
    /// Image tokens, of input and output together.
    pub image_tokens: u64,
    /// Those of them that were output.
    pub output_image_tokens: u64,
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

/// What one address used in a month, as far as it is booked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BookedAddress {
    /// The address, or the first one of its network: see [`network_of`](crate::limit::network_of).
    pub network: IpAddr,
    /// How much.
    pub amount: Amount,
}

/// Tries as they stand in the books: a JSON array. `last` is one more that is not over yet.
#[must_use]
pub fn attempts_json(attempts: &[Attempt], last: Option<&Attempt>) -> String {
    let mut json = Vec::with_capacity(128 * (attempts.len() + 1));
    json.push(b'[');
    for attempt in attempts.iter().chain(last) {
        if json.len() > 1 {
            json.push(b',');
        }
        if serde_json::to_writer(&mut json, attempt).is_err() {
            return "[]".to_owned();
        }
    }
    json.push(b']');
    String::from_utf8(json).unwrap_or_else(|_| "[]".to_owned())
}

/// A row of `request_log`: the audit log and the usage record of one request. Its texts are borrowed where they can be: from
/// the request that ends, or from the file that it was written to.
#[derive(Clone, Debug, PartialEq)]
pub struct UsageRecord<'t> {
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
    pub route: Cow<'t, str>,
    /// Model that was asked for; empty: none was read.
    pub model: Cow<'t, str>,
    /// Model that was asked of the upstream.
    pub upstream_model: Option<Cow<'t, str>>,
    /// Model that answered, by its own words.
    pub served_model: Option<Cow<'t, str>>,
    /// Name of the upstream that answered.
    pub upstream: Option<Cow<'t, str>>,
    /// Every try, in order: see [`attempts_json`].
    pub attempts: Cow<'t, str>,
    /// Status the client got; 0: the client was gone before any.
    pub status: u16,
    /// Was it a streamed answer?
    pub stream: bool,
    /// Error code of the contract, if the request failed.
    pub code: Option<Cow<'t, str>>,
    /// How the provider worked on it, by its own words: see [`Tier`](crate::price::Tier).
    pub service_tier: Option<Cow<'t, str>>,
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
    pub finish_reason: Option<Cow<'t, str>>,
    /// The client's `user-agent`.
    pub user_agent: Option<Cow<'t, str>>,
    /// The client's own `x-request-id`, if it sent one.
    pub client_request_id: Option<Cow<'t, str>>,
    /// The provider's id of the request.
    pub provider_request_id: Option<Cow<'t, str>>,
}

impl UsageRecord<'_> {
    /// What it consumed.
    #[must_use]
    pub fn amount(&self) -> Amount {
        Amount { tokens: self.usage.total_tokens(), nano_usd: self.cost_nano_usd }
    }

    /// Whose it is.
    #[must_use]
    pub fn holder(&self) -> Holder<'_> {
        Holder { ip: self.ip, user: self.user_id, key: self.key_id, model: &self.model }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_are_one_array_however_they_come() {
        let attempt = |n: u16| Attempt { upstream: "a\"b".into(), status: n, duration_ms: 3, error: None };
        let all = [attempt(1), attempt(2), attempt(3)];
        let json = serde_json::to_string(&all).unwrap();
        assert_eq!(attempts_json(&all, None), json);
        assert_eq!(attempts_json(&all[..2], Some(&all[2])), json);
        assert_eq!(attempts_json(&[], None), "[]");
    }
}
