//! Errors as the providers word them.
//!
//! One type, two envelopes: OpenAI answers `{"error":{"message","type","param","code"}}`, Azure only `code` and
//! `message`, with codes of its own. Some texts name the organization, as the real ones do: a gateway must not pass
//! them on unread.

use axum::http::StatusCode;
use serde_json::{Value, json};

use super::headers::{ORGANIZATION, Provider};

/// An error answer: status and the fields of OpenAI's envelope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ApiError {
    pub(super) status: StatusCode,
    message: String,
    kind: &'static str,
    param: Option<String>,
    code: Option<String>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), kind, param: None, code: None }
    }

    /// A 400 of type `invalid_request_error`.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// The same error, about the field `param`.
    pub(super) fn param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// The same error, with `code`.
    pub(super) fn code(mut self, code: impl Into<String>) -> Self {
        self.code = Some(code.into());
        self
    }

    /// A required field is not there.
    pub(super) fn missing(param: &str) -> Self {
        Self::invalid(format!("Missing required parameter: '{param}'.")).param(param).code("missing_required_parameter")
    }

    /// A field is of the wrong JSON type.
    pub(super) fn wrong_type(param: &str, expected: &str, got: &Value) -> Self {
        let got = match got {
            Value::Null => "null",
            Value::Bool(_) => "a boolean",
            Value::Number(n) if n.is_f64() => "a decimal",
            Value::Number(_) => "an integer",
            Value::String(_) => "a string",
            Value::Array(_) => "an array",
            Value::Object(_) => "an object",
        };
        Self::invalid(format!("Invalid type for '{param}': expected {expected}, but got {got} instead."))
            .param(param)
            .code("invalid_type")
    }

    /// The body is not a JSON object.
    pub(super) fn not_json() -> Self {
        Self::invalid(
            "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP \
             library correctly. The OpenAI API expects a JSON payload, but what was sent was not valid JSON.)",
        )
    }

    /// The body is larger than the mock takes.
    pub(super) fn too_large() -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", "The request body is too large.")
    }

    /// No key was presented.
    pub(super) fn no_key() -> Self {
        Self::new(
            StatusCode::UNAUTHORIZED,
            "invalid_request_error",
            "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer \
             auth (i.e. Authorization: Bearer YOUR_KEY).",
        )
    }

    /// The model does not exist.
    pub(super) fn model_not_found(model: &str) -> Self {
        let message = format!("The model `{model}` does not exist or you do not have access to it.");
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message).param("model").code("model_not_found")
    }

    /// No such path; Azure says so too when `api-version` is missing.
    pub(super) fn no_such_path(method: &str, path: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", format!("Invalid URL ({method} {path})"))
    }

    /// The path exists, but not with this method.
    pub(super) fn wrong_method(method: &str, path: &str) -> Self {
        let message = format!("Not allowed to {method} on {path}.");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message).code("method_not_allowed")
    }

    /// What the provider says with `status` when it fails by itself, about a request for `model`.
    pub(super) fn of_status(status: StatusCode, model: &str) -> Self {
        const SORRY: &str = "The server had an error while processing your request. Sorry about that!";
        let error = |kind, message: &str| Self::new(status, kind, message);
        match status.as_u16() {
            401 => error("invalid_request_error", "Incorrect API key provided: sk-mo**ck. You can find your API key at https://platform.openai.com/account/api-keys.")
                .code("invalid_api_key"),
            403 => error("invalid_request_error", "Country, region, or territory not supported")
                .code("unsupported_country_region_territory"),
            404 => Self::model_not_found(model),
            409 => error("invalid_request_error", "The resource is being changed by another request."),
            422 => error("invalid_request_error", "The request was well formed but could not be processed."),
            429 => Self::new(status, "requests", format!(
                "Rate limit reached for {model} in organization {ORGANIZATION} on requests per min (RPM): Limit 3, Used 3, Requested 1. Please try again in 20s."
            ))
            .code("rate_limit_exceeded"),
            503 => error("server_error", "The engine is currently overloaded, please try again later."),
            500.. => error("server_error", SORRY),
            _ => error("invalid_request_error", "The request was refused."),
        }
    }

    /// The same error with another code, and with the type that OpenAI gives to that code.
    pub(super) fn recoded(self, code: &str) -> Self {
        if code != "insufficient_quota" {
            return self.code(code);
        }
        let message = "You exceeded your current quota, please check your plan and billing details.";
        Self::new(self.status, "insufficient_quota", message).code(code)
    }

    /// The body of the answer, in the provider's envelope.
    pub(super) fn body(&self, provider: Provider) -> Value {
        match provider {
            Provider::OpenAi => json!({"error": {
                "message": self.message, "type": self.kind, "param": self.param, "code": self.code,
            }}),
            Provider::Azure => {
                let (code, message) = self.in_azure_words();
                json!({"error": {"code": code, "message": message}})
            }
        }
    }

    fn in_azure_words(&self) -> (String, &str) {
        match (self.status.as_u16(), self.code.as_deref()) {
            (401, _) => (
                "401".into(),
                "Access denied due to invalid subscription key or wrong API endpoint. Make sure to provide a valid key \
                 for an active subscription and use a correct regional API endpoint for your resource.",
            ),
            (404, Some("model_not_found")) => (
                "DeploymentNotFound".into(),
                "The API deployment for this resource does not exist. If you created the deployment within the last 5 \
                 minutes, please wait a moment and try again.",
            ),
            (404, _) => ("404".into(), "Resource not found"),
            (429, Some("rate_limit_exceeded")) => (
                "429".into(),
                "Requests to the ChatCompletions_Create Operation under Azure OpenAI API have exceeded call rate limit \
                 of your current pricing tier. Please retry later.",
            ),
            (status, None) => (status.to_string(), self.message.as_str()),
            (_, Some(code)) => (code.into(), self.message.as_str()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openai_and_azure_word_the_same_error_differently() {
        let error = ApiError::model_not_found("unknown-1");
        let openai = error.body(Provider::OpenAi);
        assert_eq!(openai["error"]["type"], "invalid_request_error");
        assert_eq!(openai["error"]["param"], "model");
        assert_eq!(openai["error"]["code"], "model_not_found");
        let azure = error.body(Provider::Azure);
        assert_eq!(azure["error"]["code"], "DeploymentNotFound");
        assert_eq!(azure["error"].as_object().unwrap().len(), 2);
    }

    #[test]
    fn a_quota_error_has_its_own_type() {
        let error = ApiError::of_status(StatusCode::TOO_MANY_REQUESTS, "gpt-4o").recoded("insufficient_quota");
        let body = error.body(Provider::OpenAi);
        assert_eq!(body["error"]["type"], "insufficient_quota");
        assert_eq!(body["error"]["code"], "insufficient_quota");
    }
}
