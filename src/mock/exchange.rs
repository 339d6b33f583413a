//! From a request to its response: key, faults, target, and the wait that a fault may ask for.

use std::{sync::Arc, time::Instant};

use axum::{
    body::{Body, Bytes, to_bytes},
    extract::Request,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header, request::Parts},
    response::Response,
};
use serde_json::{Map, Value};

use super::{
    call::{Call, failure},
    chat, completions,
    delivery::{Answer, deliver, respond},
    embeddings,
    error::ApiError,
    faults::Faults,
    headers::{Provider, provider_headers, set_content_type},
    models,
    options::Failing,
    responses,
};

/// Largest body that is taken.
const MAX_BODY: usize = 128 << 20;
/// Bodies from this size on are worked on by a thread of their own: counting their tokens takes a while.
const LARGE_BODY: usize = 64 << 10;

/// What all requests share.
pub(super) struct Mock {
    pub(super) faults: Faults,
    pub(super) failing: Failing,
}

/// An endpoint that takes a JSON body.
#[derive(Clone, Copy, Debug)]
pub(super) enum Endpoint {
    Chat,
    Completions,
    Embeddings,
    Responses,
}

impl Endpoint {
    fn answer(self, call: &Call<'_>) -> Result<Answer, ApiError> {
        match self {
            Self::Chat => chat::answer(call),
            Self::Completions => completions::answer(call),
            Self::Embeddings => embeddings::answer(call),
            Self::Responses => responses::answer(call),
        }
    }
}

/// How a route names its model and its version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    /// `/v1`
    OpenAi,
    /// `/openai/v1`: Azure's headers and errors, otherwise like OpenAI.
    AzureV1,
    /// `/openai`: `api-version` is required.
    AzureDated,
}

impl Style {
    fn provider(self) -> Provider {
        if self == Self::OpenAi { Provider::OpenAi } else { Provider::Azure }
    }
}

/// What a route answers with.
#[derive(Clone, Debug)]
pub(super) enum Target {
    /// The endpoint, for the body, and for the model that the path names if it does.
    Json(Endpoint, Option<String>),
    /// The list of models, or one of it.
    Models(Option<String>),
}

/// What comes of a request.
struct Outcome {
    faults: Faults,
    result: Result<Answer, ApiError>,
}

impl Mock {
    /// Answers one request.
    pub(super) async fn exchange(self: Arc<Self>, style: Style, target: Target, request: Request) -> Response {
        let arrived = Instant::now();
        let provider = style.provider();
        let Outcome { faults, result } = self.outcome(style, target, request).await;
        tokio::time::sleep(faults.slow).await;
        if faults.stall {
            return std::future::pending().await;
        }
        let headers = provider_headers(provider, arrived);
        match result {
            Ok(answer) => deliver(answer, &faults, headers),
            Err(error) => error_response(&error, provider, &faults, headers),
        }
    }

    async fn outcome(self: Arc<Self>, style: Style, target: Target, request: Request) -> Outcome {
        let (parts, body) = request.into_parts();
        let mut faults = self.faults.clone();
        // The body is read before anything is refused: closing on a client that still writes is another fault.
        let body = to_bytes(body, MAX_BODY).await.map_err(|_| ApiError::too_large());
        let body = match body.and_then(|body| admit(style, &parts, &mut faults).map(|()| body)) {
            Ok(body) => body,
            Err(error) => return Outcome { faults, result: Err(error) },
        };
        let is_large = body.len() >= LARGE_BODY;
        let answer = move || target.answer(style.provider(), &body, faults, &self.failing);
        if !is_large {
            return answer();
        }
        tokio::task::spawn_blocking(answer).await.unwrap_or_else(|error| Outcome {
            faults: Faults::default(),
            result: Err(ApiError::invalid(format!("the mock failed: {error}"))),
        })
    }
}

impl Target {
    fn answer(&self, provider: Provider, body: &[u8], faults: Faults, failing: &Failing) -> Outcome {
        match self {
            Self::Models(name) => {
                let status = faults.status.or_else(|| failing.next());
                let found = name.as_deref().map_or_else(|| Ok(models::list()), models::show);
                let result = match status {
                    Some(status) => Err(failure(status, name.as_deref().unwrap_or("models"), &faults)),
                    None => found.map(|found| Answer::Whole(Bytes::from(found.to_string()))),
                };
                Outcome { faults, result }
            }
            Self::Json(endpoint, deployment) => {
                let Ok(body) = serde_json::from_slice::<Map<String, Value>>(body) else {
                    return Outcome { faults, result: Err(ApiError::not_json()) };
                };
                let call = match Call::parse(&body, provider, deployment.as_deref(), faults.clone()) {
                    Ok(call) => call,
                    Err(error) => return Outcome { faults, result: Err(error) },
                };
                let result = match call.faults.status.or_else(|| failing.next()) {
                    Some(status) => Err(failure(status, call.model, &call.faults)),
                    None => endpoint.answer(&call),
                };
                Outcome { faults: call.faults, result }
            }
        }
    }
}

/// Checks what stands outside the body: key, `api-version`, directives of the header.
fn admit(style: Style, parts: &Parts, faults: &mut Faults) -> Result<(), ApiError> {
    let key = presented_key(&parts.headers, style).ok_or_else(ApiError::no_key)?;
    if key == "invalid" {
        return Err(ApiError::of_status(StatusCode::UNAUTHORIZED, ""));
    }
    let has_version = parts.uri.query().is_some_and(|query| query.split('&').any(|q| q.starts_with("api-version=")));
    if style == Style::AzureDated && !has_version {
        return Err(ApiError::no_such_path(parts.method.as_str(), parts.uri.path()));
    }
    for directives in parts.headers.get_all("x-mock") {
        let directives = directives.to_str().map_err(|_| ApiError::invalid("the header x-mock is not ASCII"))?;
        faults.apply(directives).map_err(ApiError::invalid)?;
    }
    Ok(())
}

fn presented_key(headers: &HeaderMap, style: Style) -> Option<&str> {
    let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let bearer = text("authorization").and_then(|value| value.strip_prefix("Bearer "));
    let key = if style == Style::OpenAi { bearer } else { text("api-key").or(bearer) };
    key.map(str::trim).filter(|key| !key.is_empty())
}

fn error_response(error: &ApiError, provider: Provider, faults: &Faults, mut headers: HeaderMap) -> Response {
    set_content_type(&mut headers, "application/json");
    if let Some(seconds) = faults.retry_after {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    if let Some(milliseconds) = faults.retry_after_ms {
        headers.insert(HeaderName::from_static("retry-after-ms"), HeaderValue::from(milliseconds));
    }
    let mut response = respond(headers, Body::from(error.body(provider).to_string()));
    *response.status_mut() = error.status;
    response
}

/// Answers a request that no route is for.
pub(super) fn refuse(request: &Request, error: fn(&str, &str) -> ApiError) -> Response {
    let path = request.uri().path();
    let provider = if path.starts_with("/openai/") { Provider::Azure } else { Provider::OpenAi };
    let headers = provider_headers(provider, Instant::now());
    error_response(&error(request.method().as_str(), path), provider, &Faults::default(), headers)
}
