//! One request, read far enough that an endpoint can answer it: body, model, faults.

use std::time::{SystemTime, UNIX_EPOCH};

use axum::http::StatusCode;
use serde_json::{Map, Value};
use uuid::Uuid;

use super::{error::ApiError, faults::Faults, fields::Fields, headers::Provider, models, text::Vocabulary};

/// What precedes directives in the field `user`.
const USER_MARK: &str = "mock:";

/// A request to an endpoint that takes a JSON body.
#[derive(Debug)]
pub(super) struct Call<'a> {
    pub(super) fields: Fields<'a>,
    /// Name of the model (or of Azure's deployment), without directives.
    pub(super) model: &'a str,
    pub(super) provider: Provider,
    pub(super) faults: Faults,
}

impl<'a> Call<'a> {
    /// Reads what every endpoint needs. `deployment` is the model if the path names one; `faults` are those of the
    /// flags and of the header, to which those of the body are added.
    pub(super) fn parse(
        body: &'a Map<String, Value>,
        provider: Provider,
        deployment: Option<&'a str>,
        mut faults: Faults,
    ) -> Result<Self, ApiError> {
        let fields = Fields(body);
        if let Some(directives) = fields.text("user")?.and_then(|user| user.strip_prefix(USER_MARK)) {
            faults.apply(directives).map_err(ApiError::invalid)?;
        }
        let named = match deployment {
            Some(deployment) => deployment,
            None => fields.text("model")?.ok_or_else(|| ApiError::invalid("you must provide a model parameter"))?,
        };
        let (model, directives) = named.split_once('@').unwrap_or((named, ""));
        faults.apply(directives).map_err(ApiError::invalid)?;
        if !models::exists(model) {
            return Err(ApiError::model_not_found(model));
        }
        Ok(Self { fields, model, provider, faults })
    }

    /// The tokenizer of the model.
    pub(super) fn vocabulary(&self) -> Vocabulary {
        Vocabulary::of(self.model)
    }

    /// How the answer names the model: OpenAI resolves an alias to a dated snapshot.
    pub(super) fn answering_model(&self) -> &'a str {
        models::snapshot(self.model)
    }

    /// Is a stream asked for? `stream_options` without one is an error.
    pub(super) fn is_stream(&self) -> Result<bool, ApiError> {
        let is_stream = self.fields.flag("stream")?;
        if !is_stream && self.fields.get("stream_options").is_some() {
            return Err(ApiError::invalid("The 'stream_options' parameter is only allowed when 'stream' is enabled.")
                .param("stream_options"));
        }
        Ok(is_stream)
    }

    /// Does a stream carry its usage, in an extra chunk?
    pub(super) fn includes_usage(&self) -> Result<bool, ApiError> {
        let options = self.fields.object("stream_options")?;
        let asked = options.map_or(Ok(false), |options| options.flag("include_usage"))?;
        Ok(asked && !self.faults.no_usage)
    }

    /// How many tokens are written under `limit`, and whether that is the whole answer.
    pub(super) fn length(&self, limit: Option<u32>) -> (u32, bool) {
        let wanted = self.faults.tokens.unwrap_or_else(|| self.vocabulary().natural_tokens());
        let written = limit.map_or(wanted, |limit| limit.min(wanted));
        (written, written == wanted)
    }
}

/// The failure with `status` of a request for `model`.
pub(super) fn failure(status: StatusCode, model: &str, faults: &Faults) -> ApiError {
    let error = ApiError::of_status(status, model);
    match &faults.code {
        Some(code) => error.recoded(code),
        None => error,
    }
}

/// A fresh id that begins with `prefix`.
pub(super) fn fresh_id(prefix: &str) -> String {
    format!("{prefix}{}", Uuid::now_v7().simple())
}

/// Now, in seconds since 1970, as `created` says it.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(body: &Value, deployment: Option<&str>) -> Result<(String, Faults), ApiError> {
        let body = body.as_object().unwrap();
        Call::parse(body, Provider::OpenAi, deployment, Faults::default()).map(|c| (c.model.to_owned(), c.faults))
    }

    #[test]
    fn directives_come_from_user_and_model_and_the_model_wins() {
        let body = json!({"model": "gpt-4o-mini@status=500", "user": "mock:status=429;retry-after=3"});
        let (model, faults) = parse(&body, None).unwrap();
        assert_eq!(model, "gpt-4o-mini");
        assert_eq!((faults.status.unwrap().as_u16(), faults.retry_after), (500, Some(3)));
    }

    #[test]
    fn a_plain_user_is_no_directive() {
        let (_, faults) = parse(&json!({"model": "gpt-4o", "user": "status=500"}), None).unwrap();
        assert_eq!(faults, Faults::default());
    }

    #[test]
    fn the_deployment_of_the_path_is_the_model() {
        let (model, faults) = parse(&json!({"model": "ignored"}), Some("gpt-4o@stall")).unwrap();
        assert_eq!(model, "gpt-4o");
        assert!(faults.stall);
    }

    #[test]
    fn missing_unknown_and_misspelt_are_refused() {
        for (body, status) in [
            (json!({}), 400),
            (json!({"model": 7}), 400),
            (json!({"model": "unknown-model"}), 404),
            (json!({"model": "gpt-4o@statsu=1"}), 400),
        ] {
            assert_eq!(parse(&body, None).unwrap_err().status.as_u16(), status, "{body}");
        }
    }
}
