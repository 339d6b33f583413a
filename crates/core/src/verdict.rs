//! What an upstream's answer means: to its breaker, to the next attempt, and to the client.
//!
//! | answer | the upstream | the request |
//! |---|---|---|
//! | 2xx with a body of the kind that was asked for | is well | is answered |
//! | 400, 404, 413, 422 and other 4xx | says nothing of itself | is at fault: the client gets the answer |
//! | 429 | cools, for as long as it says | goes elsewhere |
//! | 401, 403; no quota left | is quarantined | goes elsewhere; the client never sees it |
//! | 403 for a model that the account has not; 429 for a request that is too large for its limit | says nothing of itself | goes elsewhere |
//! | 408, 5xx; a 200 that holds an error; a redirect; HTML | failed | goes elsewhere |
//! | 409 | says nothing of itself | goes elsewhere, as the SDKs retry it too |
//!
//! When nobody is left, the client gets the most useful of what was answered: a 429 says when to come back, a 5xx at least
//! what happened, and a connection that broke says nothing.

use serde::Deserialize;

use crate::breaker::Outcome;

/// What a status says at once, before the body has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// 2xx.
    Good,
    /// The request is at fault.
    ClientFault,
    /// The upstream is in trouble, or has some with us; its body may say which.
    Trouble,
    /// No provider answers like this.
    Unexpected,
}

/// The class of a final status.
#[must_use]
pub fn class(status: u16) -> Class {
    match status {
        200..=299 => Class::Good,
        401 | 403 | 408 | 409 | 429 | 500..=599 => Class::Trouble,
        400..=499 => Class::ClientFault,
        _ => Class::Unexpected,
    }
}

/// What trouble means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// To the breaker.
    pub outcome: Outcome,
    /// In the metrics.
    pub label: &'static str,
    /// Of how much use the answer is to the client, if no upstream has a better one; 0: it must not see it, because it is
    /// about our credential or account.
    pub usefulness: u8,
}

/// Codes of a 403 that is about what was asked for. Were it taken for one about the credential, any client could quarantine all
/// upstreams by asking for a model that none of them may use.
const NOT_GIVEN: [&str; 4] = ["model_not_found", "insufficient_permissions", "missing_scope", "permission_denied"];
/// How a 429 begins that will never pass: the request is more than the account may use in a minute.
const TOO_LARGE: &str = "Request too large";
/// Codes by which providers say that an account is used up, whatever the status.
const EXHAUSTED: [&str; 3] = ["insufficient_quota", "billing_hard_limit_reached", "billing_not_active"];

/// What an answer of [`Class::Trouble`] means, by its status and what its body says. `cooling_ms`: how long a 429 asks to be
/// left alone.
#[must_use]
pub fn trouble(status: u16, body: &ErrorBody, cooling_ms: Option<u64>) -> Trouble {
    let code = body.code.as_deref().unwrap_or_default();
    let (outcome, label, usefulness) = match status {
        403 | 429 if EXHAUSTED.contains(&code) => (Outcome::Exhausted, "exhausted", 0),
        403 if NOT_GIVEN.contains(&code) => (Outcome::Neutral, "not_given", 0),
        429 if body.message.starts_with(TOO_LARGE) => (Outcome::Neutral, "too_large", 4),
        401 | 403 => (Outcome::Refused, "refused", 0),
        429 => (Outcome::Limited { for_ms: cooling_ms }, "rate_limited", 4),
        409 => (Outcome::Neutral, "conflict", 2),
        408 => (Outcome::Failure, "timeout", 1),
        503 | 529 => (Outcome::Failure, "server_error", 3),
        _ => (Outcome::Failure, "server_error", 2),
    };
    Trouble { outcome, label, usefulness }
}

/// What an error's body says, as far as it is one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ErrorBody {
    /// Its code, or its type if it has no code.
    pub code: Option<String>,
    /// Its message.
    pub message: String,
}

impl ErrorBody {
    /// Reads OpenAI's and Azure's envelope.
    #[must_use]
    pub fn parse(body: &[u8]) -> Self {
        #[derive(Deserialize)]
        struct Body {
            error: Error,
        }
        #[derive(Deserialize)]
        struct Error {
            code: Option<serde_json::Value>,
            r#type: Option<serde_json::Value>,
            message: Option<serde_json::Value>,
        }
        let Ok(Body { error }) = serde_json::from_slice::<Body>(body) else { return Self::default() };
        let text = |value: Option<serde_json::Value>| value.and_then(|value| value.as_str().map(str::to_owned));
        let (code, kind) = (text(error.code), text(error.r#type));
        // Azure's code of a 429 is "429"; OpenAI's quota error may have its name in the type alone.
        let code = match (code, kind) {
            (_, Some(kind)) if EXHAUSTED.contains(&kind.as_str()) => Some(kind),
            (code, kind) => code.or(kind),
        };
        Self { code, message: text(error.message).unwrap_or_default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_status_has_one_meaning() {
        let label =
            |status| (class(status) == Class::Trouble).then(|| trouble(status, &ErrorBody::default(), None).label);
        assert_eq!(label(429), Some("rate_limited"));
        assert_eq!(label(401), Some("refused"));
        assert_eq!(label(500), Some("server_error"));
        for status in [400, 404, 405, 413, 415, 422] {
            assert_eq!(class(status), Class::ClientFault, "{status}");
        }
        assert_eq!(class(200), Class::Good);
        assert_eq!((class(302), class(600), class(199)), (Class::Unexpected, Class::Unexpected, Class::Unexpected));
    }

    #[test]
    fn a_used_up_account_is_told_from_a_rate_limit() {
        let quota =
            br#"{"error":{"message":"m","type":"insufficient_quota","param":null,"code":"insufficient_quota"}}"#;
        let limit = br#"{"error":{"message":"m","type":"requests","param":null,"code":"rate_limit_exceeded"}}"#;
        let azure = br#"{"error":{"code":"429","message":"m"}}"#;
        let of = |body: &[u8]| trouble(429, &ErrorBody::parse(body), Some(7)).outcome;
        assert_eq!(of(quota), Outcome::Exhausted);
        assert_eq!(of(limit), Outcome::Limited { for_ms: Some(7) });
        assert_eq!(of(azure), Outcome::Limited { for_ms: Some(7) });
        let in_type = br#"{"error":{"message":"m","type":"insufficient_quota","code":null}}"#;
        assert_eq!(of(in_type), Outcome::Exhausted);
        for nonsense in [&b""[..], b"<html>", b"{\"error\":5}", b"{\"error\":{\"code\":429}}"] {
            assert_eq!(of(nonsense), Outcome::Limited { for_ms: Some(7) });
        }
    }

    #[test]
    fn no_client_can_take_an_upstream_away_from_the_others() {
        let forbidden = br#"{"error":{"message":"Project `proj_x` does not have access to model `gpt-9`","type":"invalid_request_error","code":"model_not_found"}}"#;
        assert_eq!(trouble(403, &ErrorBody::parse(forbidden), None).outcome, Outcome::Neutral);
        assert_eq!(trouble(403, &ErrorBody::default(), None).outcome, Outcome::Refused);
        let large = br#"{"error":{"message":"Request too large for gpt-4o in organization org-x on tokens per min (TPM): Limit 30000, Requested 31000.","type":"tokens","code":"rate_limit_exceeded"}}"#;
        assert_eq!(trouble(429, &ErrorBody::parse(large), Some(5)).outcome, Outcome::Neutral);
    }

    #[test]
    fn what_is_about_our_account_is_never_shown() {
        for (status, code) in
            [(401, None), (403, None), (403, Some("model_not_found")), (429, Some("insufficient_quota"))]
        {
            let body = ErrorBody { code: code.map(str::to_owned), message: String::new() };
            assert_eq!(trouble(status, &body, None).usefulness, 0, "{status}");
        }
        let useful = |status| trouble(status, &ErrorBody::default(), None).usefulness;
        assert!(useful(429) > useful(503) && useful(503) > useful(500) && useful(500) > useful(408));
    }
}
