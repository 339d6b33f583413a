//! Every reason for which the gateway itself turns a request down or reports a failure.
//!
//! One enum is the whole contract: status, `type`, `code`, `param` and message of the OpenAI envelope are functions of
//! it, and `code` is also the label in `denials_total`. Clients choose their exception class by the status alone, so a
//! status is never changed lightly; they retry by `retry-after`, so it must be true.

use crate::openai::error::envelope;

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
    /// No upstream can serve this now.
    UpstreamUnavailable {
        /// When it may be worth trying again.
        retry_after_s: u32,
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
            Self::Internal => 500,
            Self::UpstreamError => 502,
            Self::UpstreamUnavailable { .. } => 503,
            Self::UpstreamTimeout => 504,
        }
    }

    /// `error.type`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        if self.status() < 500 { "invalid_request_error" } else { "server_error" }
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
            Self::UpstreamUnavailable { .. } => {
                "No upstream can serve this request right now. Please try again later.".to_owned()
            }
            Self::UpstreamTimeout => "The upstream did not answer in time.".to_owned(),
            Self::UpstreamError => "The upstream failed to answer this request.".to_owned(),
            Self::Internal => "The gateway failed to process this request.".to_owned(),
        }
    }

    /// Seconds for `retry-after`.
    #[must_use]
    pub fn retry_after_s(&self) -> Option<u32> {
        match self {
            Self::UpstreamUnavailable { retry_after_s } => Some(*retry_after_s),
            _ => None,
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
            (Denial::UpstreamUnavailable { retry_after_s: 1 }, 503, "upstream_unavailable"),
            (Denial::UpstreamTimeout, 504, "upstream_timeout"),
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
}
