//! The headers that the providers put on their answers, down to Cloudflare's cookie.
//!
//! None of them may reach a client of the gateway; they are here so that a test can see that none does.

use std::time::Instant;

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use uuid::Uuid;

/// The organization that the mock says the key belongs to.
pub(super) const ORGANIZATION: &str = "org-mock0000000000000000000";

/// Whose manners the mock shows: decided by the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Provider {
    /// `/v1/...`
    OpenAi,
    /// `/openai/...`
    Azure,
}

const OPENAI: &[(&str, &str)] = &[
    ("access-control-expose-headers", "X-Request-ID"),
    ("openai-organization", ORGANIZATION),
    ("openai-project", "proj_mock"),
    ("openai-version", "2020-10-01"),
    ("x-ratelimit-limit-requests", "10000"),
    ("x-ratelimit-limit-tokens", "200000"),
    ("x-ratelimit-remaining-requests", "9999"),
    ("x-ratelimit-remaining-tokens", "199000"),
    ("x-ratelimit-reset-requests", "6ms"),
    ("x-ratelimit-reset-tokens", "1m0s"),
    ("strict-transport-security", "max-age=31536000; includeSubDomains; preload"),
    ("cf-cache-status", "DYNAMIC"),
    ("set-cookie", "__cf_bm=mock-cookie; path=/; domain=.api.openai.com; HttpOnly; Secure; SameSite=None"),
    ("set-cookie", "_cfuvid=mock-visitor; path=/; domain=.api.openai.com; HttpOnly; Secure; SameSite=None"),
    ("x-content-type-options", "nosniff"),
    ("server", "cloudflare"),
    ("cf-ray", "8f0000000000mock-FRA"),
    ("alt-svc", "h3=\":443\"; ma=86400"),
];

const AZURE: &[(&str, &str)] = &[
    ("x-ms-region", "West Europe"),
    ("x-ratelimit-remaining-requests", "99"),
    ("x-ratelimit-remaining-tokens", "-1"),
    ("azureml-model-session", "mock-session"),
    ("strict-transport-security", "max-age=31536000; includeSubDomains; preload"),
    ("x-content-type-options", "nosniff"),
    ("x-ms-rai-invoked", "true"),
];

/// The provider's headers for an answer to a request that came in at `arrived`.
pub(super) fn provider_headers(provider: Provider, arrived: Instant) -> HeaderMap {
    let (fixed, id_name) = match provider {
        Provider::OpenAi => (OPENAI, "x-request-id"),
        Provider::Azure => (AZURE, "apim-request-id"),
    };
    let mut headers = HeaderMap::with_capacity(fixed.len() + 4);
    for &(name, value) in fixed {
        headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    let id = match provider {
        Provider::OpenAi => format!("req_{}", Uuid::now_v7().simple()),
        Provider::Azure => Uuid::now_v7().to_string(),
    };
    if let Ok(id) = HeaderValue::from_str(&id) {
        headers.insert(HeaderName::from_static(id_name), id);
    }
    if provider == Provider::OpenAi {
        let elapsed = u64::try_from(arrived.elapsed().as_millis()).unwrap_or(u64::MAX);
        headers.insert(HeaderName::from_static("openai-processing-ms"), HeaderValue::from(elapsed));
    }
    headers
}

/// Names the media type of an answer.
pub(super) fn set_content_type(headers: &mut HeaderMap, value: &'static str) {
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(value));
}
