//! Every reason for which the gateway itself turns a request down or reports a failure.
//!
//! One enum is the whole contract: status, `type`, `code`, `param` and message of the OpenAI envelope are functions of
//! it, and `code` is also the label in `denials_total`. Clients choose their exception class by the status alone, so a
//! status is never changed lightly; they retry by `retry-after`, so it must be true.

use crate::{
    limit::{
        Class,
        standing::show_duration,
        state::{Kind, Refusal, Wait},
    },
    openai::error::envelope,
};

/// Why a request gets the gateway's own error instead of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Denial {
    /// No key was presented.
    MissingApiKey,
    /// The key is unknown or malformed.
    InvalidApiKey,
    /// The key was revoked, or its user disabled.
    KeyRevoked,
    /// The key's time is over.
    KeyExpired,
    /// The key may not be used from this address.
    IpNotAllowed,
    /// No such model, or not for this key. The same answer for both: who may not use a model need not learn of it.
    ModelNotFound {
        /// As the client wrote it.
        model: String,
    },
    /// The body cannot be acted upon.
    InvalidBody {
        /// What is wrong, for the client.
        message: String,
        /// The field it is about.
        param: Option<String>,
    },
    /// The body exceeds `[server] max_body`.
    RequestTooLarge {
        /// The limit, in bytes.
        limit_bytes: u64,
    },
    /// The body did not arrive in time.
    RequestTimeout,
    /// No such path.
    UnknownUrl {
        /// Method of the request.
        method: String,
        /// Its path.
        path: String,
    },
    /// The path exists, with another method.
    MethodNotAllowed {
        /// Method of the request.
        method: String,
        /// The method that is allowed.
        allow: &'static str,
    },
    /// A limit per minute, or of requests at once, is reached.
    RateLimited {
        /// Whose limit.
        class: Class,
        /// Which one.
        kind: Kind,
        /// How much it is.
        limit: u64,
        /// Who waits that long is admitted, if nothing else is meanwhile.
        retry_after_ms: u64,
    },
    /// The request alone is more than a limit per minute.
    TooLargeForLimit {
        /// Whose limit.
        class: Class,
        /// How much it is.
        limit: u64,
    },
    /// The quota of the month is used up, or what is left is less than the request may consume.
    QuotaExceeded {
        /// Whose quota.
        class: Class,
        /// Which one.
        kind: Kind,
    },
    /// Too many requests, or too many wrong keys, from one address.
    TooManyFromAddress {
        /// Who waits that long is let in.
        retry_after_ms: u64,
    },
    /// Limits cannot be checked now, and the configuration says not to go on without.
    LimiterUnavailable,
    /// There is no room to write down what the request consumes, and the configuration says not to go on without.
    JournalFull,
    /// No upstream can serve this now.
    UpstreamUnavailable {
        /// When the first of them will take a request again.
        retry_after_ms: u64,
    },
    /// The upstream did not answer in time.
    UpstreamTimeout,
    /// The upstream broke, or refused the gateway itself.
    UpstreamError,
    /// A defect of the gateway.
    Internal,
}

impl Denial {
    /// HTTP status.
    #[must_use]
    pub fn status(&self) -> u16 {
        match self {
            Self::InvalidBody { .. } => 400,
            Self::MissingApiKey | Self::InvalidApiKey | Self::KeyRevoked | Self::KeyExpired => 401,
            Self::IpNotAllowed => 403,
            Self::ModelNotFound { .. } | Self::UnknownUrl { .. } => 404,
            Self::MethodNotAllowed { .. } => 405,
            Self::RequestTimeout => 408,
            Self::RequestTooLarge { .. } => 413,
            Self::RateLimited { .. }
            | Self::TooLargeForLimit { .. }
            | Self::QuotaExceeded { .. }
            | Self::TooManyFromAddress { .. } => 429,
            Self::Internal => 500,
            Self::UpstreamError => 502,
            Self::UpstreamUnavailable { .. } | Self::LimiterUnavailable | Self::JournalFull => 503,
            Self::UpstreamTimeout => 504,
        }
    }

    /// `error.type`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::RateLimited { .. } | Self::TooLargeForLimit { .. } | Self::TooManyFromAddress { .. } => {
                "rate_limit_error"
            }
            Self::QuotaExceeded { .. } => "insufficient_quota",
            _ if self.status() < 500 => "invalid_request_error",
            _ => "server_error",
        }
    }

    /// `error.code`, and the label in the metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::MissingApiKey | Self::InvalidApiKey => "invalid_api_key",
            Self::KeyRevoked => "key_revoked",
            Self::KeyExpired => "key_expired",
            Self::IpNotAllowed => "ip_not_allowed",
            Self::ModelNotFound { .. } => "model_not_found",
            Self::InvalidBody { .. } => "invalid_body",
            Self::RequestTooLarge { .. } => "request_too_large",
            Self::RequestTimeout => "request_timeout",
            Self::UnknownUrl { .. } => "unknown_url",
            Self::MethodNotAllowed { .. } => "method_not_allowed",
            Self::RateLimited { .. } | Self::TooLargeForLimit { .. } | Self::TooManyFromAddress { .. } => {
                "rate_limit_exceeded"
            }
            Self::QuotaExceeded { .. } => "insufficient_quota",
            Self::LimiterUnavailable => "limiter_unavailable",
            Self::JournalFull => "journal_full",
            Self::UpstreamUnavailable { .. } => "upstream_unavailable",
            Self::UpstreamTimeout => "upstream_timeout",
            Self::UpstreamError => "upstream_error",
            Self::Internal => "internal_error",
        }
    }

    /// `error.param`.
    #[must_use]
    pub fn param(&self) -> Option<&str> {
        match self {
            Self::ModelNotFound { .. } => Some("model"),
            Self::InvalidBody { param, .. } => param.as_deref(),
            _ => None,
        }
    }

    /// `error.message`, for the client.
    #[must_use]
    pub fn message(&self) -> String {
        match self {
            Self::MissingApiKey => {
                "You didn't provide an API key. Send it as 'Authorization: Bearer tg-...' or, from an \
                 Azure client, as 'api-key: tg-...'."
                    .to_owned()
            }
            Self::InvalidApiKey => {
                "Incorrect API key provided. Keys of this gateway begin with 'tg-'; ask its operator \
                 for one."
                    .to_owned()
            }
            Self::KeyRevoked => "This API key has been revoked.".to_owned(),
            Self::KeyExpired => "This API key has expired.".to_owned(),
            Self::IpNotAllowed => "This API key may not be used from your address.".to_owned(),
            Self::ModelNotFound { model } => {
                format!("The model `{model}` does not exist or you do not have access to it.")
            }
            Self::InvalidBody { message, .. } => message.clone(),
            Self::RequestTooLarge { limit_bytes } => {
                format!("The request body is larger than the {limit_bytes} bytes that this gateway accepts.")
            }
            Self::RequestTimeout => "The request body did not arrive in time.".to_owned(),
            Self::UnknownUrl { method, path } => format!("Invalid URL ({method} {path})"),
            Self::MethodNotAllowed { method, allow } => {
                format!("Not allowed to {method} on this URL. Use {allow}.")
            }
            Self::RateLimited { class, kind, limit, retry_after_ms } => {
                let wait = show_duration(*retry_after_ms);
                format!(
                    "Rate limit reached for your {} on {}: Limit {limit}. Please try again in {wait}.",
                    class.word(),
                    kind.words()
                )
            }
            Self::TooLargeForLimit { class, limit } => format!(
                "Request too large for your {} on {}: Limit {limit}. Its prompt and the output that it asks for exceed the \
                 limit by themselves; lower max_tokens or shorten the prompt.",
                class.word(),
                Kind::Tpm.words()
            ),
            Self::QuotaExceeded { class, kind } => format!(
                "You exceeded the quota of your {} on {}, or this request may exceed it. Quotas begin anew each month (UTC); \
                 ask the operator of this gateway for more.",
                class.word(),
                kind.words()
            ),
            Self::TooManyFromAddress { retry_after_ms } => {
                format!("Too many requests from your address. Please try again in {}.", show_duration(*retry_after_ms))
            }
            Self::LimiterUnavailable => "Rate limits cannot be checked right now. Please try again later.".to_owned(),
            Self::JournalFull => "Usage cannot be recorded right now. Please try again later.".to_owned(),
            Self::UpstreamUnavailable { .. } => {
                "No upstream can serve this request right now. Please try again later.".to_owned()
            }
            Self::UpstreamTimeout => "The upstream did not answer in time.".to_owned(),
            Self::UpstreamError => "The upstream failed to answer this request.".to_owned(),
            Self::Internal => "The gateway failed to process this request.".to_owned(),
        }
    }

    /// How long to wait before trying again, in milliseconds, for `retry-after` and `retry-after-ms`.
    #[must_use]
    pub fn retry_after_ms(&self) -> Option<u64> {
        match self {
            Self::RateLimited { retry_after_ms, .. }
            | Self::TooManyFromAddress { retry_after_ms }
            | Self::UpstreamUnavailable { retry_after_ms } => Some(*retry_after_ms),
            Self::LimiterUnavailable | Self::JournalFull => Some(1000),
            _ => None,
        }
    }

    /// Is it certain that the same request would be refused again? Clients retry every 429 that does not say so.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self, Self::QuotaExceeded { .. } | Self::TooLargeForLimit { .. })
    }

    /// The denial of a request that a limit refused.
    #[must_use]
    pub fn of_refusal(refusal: &Refusal, class: Class) -> Self {
        let Refusal { kind, limit, wait, .. } = *refusal;
        match wait {
            Wait::Ms(retry_after_ms) => Self::RateLimited { class, kind, limit, retry_after_ms },
            Wait::NextMonth => Self::QuotaExceeded { class, kind },
            Wait::Never => Self::TooLargeForLimit { class, limit },
        }
    }

    /// The body: OpenAI's error envelope.
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        envelope(&self.message(), self.kind(), self.param(), Some(self.code()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_contract_of_the_errors() {
        let cases = [
            (Denial::MissingApiKey, 401, "invalid_api_key"),
            (Denial::InvalidApiKey, 401, "invalid_api_key"),
            (Denial::KeyRevoked, 401, "key_revoked"),
            (Denial::KeyExpired, 401, "key_expired"),
            (Denial::IpNotAllowed, 403, "ip_not_allowed"),
            (Denial::ModelNotFound { model: "x".into() }, 404, "model_not_found"),
            (Denial::InvalidBody { message: "m".into(), param: None }, 400, "invalid_body"),
            (Denial::RequestTooLarge { limit_bytes: 1 }, 413, "request_too_large"),
            (Denial::UpstreamUnavailable { retry_after_ms: 1 }, 503, "upstream_unavailable"),
            (Denial::UpstreamTimeout, 504, "upstream_timeout"),
            (Denial::LimiterUnavailable, 503, "limiter_unavailable"),
            (Denial::JournalFull, 503, "journal_full"),
            (Denial::UpstreamError, 502, "upstream_error"),
        ];
        for (denial, status, code) in cases {
            assert_eq!((denial.status(), denial.code()), (status, code));
            assert_eq!(denial.kind(), if status < 500 { "invalid_request_error" } else { "server_error" });
            let body: serde_json::Value = serde_json::from_slice(&denial.body()).unwrap();
            assert_eq!(body["error"]["code"], code);
            assert_eq!(body["error"]["message"], denial.message());
        }
    }

    #[test]
    fn limits_say_whose_they_are_and_when_to_come_back() {
        let of = |kind, wait| Denial::of_refusal(&Refusal { demand: 0, kind, limit: 3, wait }, Class::Key);
        let limited = of(Kind::Rpm, Wait::Ms(20_500));
        assert_eq!(
            (limited.status(), limited.kind(), limited.code()),
            (429, "rate_limit_error", "rate_limit_exceeded")
        );
        assert_eq!((limited.retry_after_ms(), limited.is_final()), (Some(20_500), false));
        assert_eq!(
            limited.message(),
            "Rate limit reached for your key on requests per minute (RPM): Limit 3. Please try again in 20.5s."
        );
        let quota = of(Kind::MonthlyUsd, Wait::NextMonth);
        assert_eq!((quota.status(), quota.kind(), quota.code()), (429, "insufficient_quota", "insufficient_quota"));
        assert_eq!((quota.retry_after_ms(), quota.is_final()), (None, true));
        let large = of(Kind::Tpm, Wait::Never);
        assert_eq!((large.code(), large.retry_after_ms(), large.is_final()), ("rate_limit_exceeded", None, true));
    }
}
