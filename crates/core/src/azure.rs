//! How Azure OpenAI differs from OpenAI.
//!
//! There are two of it:
//!
//! - **Dated**: `{resource}/openai/deployments/{deployment}/chat/completions?api-version=2024-10-21`. The deployment stands
//!   in the path for the endpoints of a model, and `api-version` must be given.
//! - **v1**: the configured base path ends in `/openai/v1`. Paths are OpenAI's, the model in the body is the deployment, and
//!   `api-version` may be left out.
//!
//! The model in the body is rewritten to the deployment's name for both. The dated API ignores it where the deployment
//! stands in the path, and needs it where it does not (`/openai/responses`), so one rule is right everywhere.

use std::fmt::Write as _;

use http::{HeaderName, header};

use crate::{openai::unversioned, upstream::UpstreamKind};

/// The `api-version` of a dated address that names none: the latest stable one.
pub const DEFAULT_API_VERSION: &str = "2024-10-21";

/// From this month on, the dated API knows `stream_options.include_usage`.
const USAGE_IN_STREAMS_SINCE: &str = "2024-09";

/// Endpoints that belong to a deployment; all others stand directly below `/openai`.
const DEPLOYMENT_ENDPOINTS: [&str; 5] = ["/chat/completions", "/completions", "/embeddings", "/audio/", "/images/"];

/// Path and query at an Azure upstream.
///
/// `base_path` is the path of the configured `base_url` (empty, `/openai` and `/openai/v1` are usual), `endpoint_path` that
/// of the route table (`/v1/chat/completions`).
#[must_use]
pub fn path(base_path: &str, endpoint_path: &str, deployment: &str, api_version: Option<&str>) -> String {
    let base_path = base_path.trim_end_matches('/');
    let endpoint = unversioned(endpoint_path);
    let mut path = String::with_capacity(128);
    if is_v1(base_path) {
        path.push_str(base_path);
        path.push_str(endpoint);
    } else {
        path.push_str(base_path.strip_suffix("/openai").unwrap_or(base_path));
        path.push_str("/openai");
        if DEPLOYMENT_ENDPOINTS.iter().any(|known| is_at_or_below(endpoint, known)) {
            path.push_str("/deployments/");
            push_encoded(&mut path, deployment);
        }
        path.push_str(endpoint);
    }
    let default = (!is_v1(base_path)).then_some(DEFAULT_API_VERSION);
    if let Some(api_version) = api_version.or(default) {
        path.push_str("?api-version=");
        push_encoded(&mut path, api_version);
    }
    path
}

/// Does this upstream understand `stream_options.include_usage`? If not, asking for it would be refused.
#[must_use]
pub fn reports_usage_in_streams(base_path: &str, api_version: Option<&str>) -> bool {
    let version = api_version.unwrap_or(DEFAULT_API_VERSION).as_bytes();
    let is_dated = version.len() >= 7 && version[..4].iter().all(u8::is_ascii_digit) && version[4] == b'-';
    is_v1(base_path.trim_end_matches('/')) || (is_dated && version >= USAGE_IN_STREAMS_SINCE.as_bytes())
}

/// The header that carries the credential, and what stands before the credential in it.
#[must_use]
pub fn auth_header(kind: UpstreamKind) -> (HeaderName, &'static str) {
    match kind {
        UpstreamKind::OpenAi => (header::AUTHORIZATION, "Bearer "),
        UpstreamKind::Azure => (HeaderName::from_static("api-key"), ""),
    }
}

fn is_v1(base_path: &str) -> bool {
    base_path.ends_with("/openai/v1")
}

fn is_at_or_below(endpoint: &str, known: &str) -> bool {
    if known.ends_with('/') { endpoint.starts_with(known) } else { endpoint == known }
}

/// Appends `text` as one segment of a path, or one value of a query: all but the unreserved characters are encoded.
fn push_encoded(path: &mut String, text: &str) {
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            path.push(char::from(byte));
        } else {
            // Writing to a string cannot fail.
            let _ = write!(path, "%{byte:02X}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dated_paths_name_the_deployment_and_a_version() {
        let chat = |base| path(base, "/v1/chat/completions", "prod 4o/ü", None);
        let expected = "/openai/deployments/prod%204o%2F%C3%BC/chat/completions?api-version=2024-10-21";
        assert_eq!(chat(""), expected);
        assert_eq!(chat("/openai"), expected);
        assert_eq!(chat("/openai/"), expected);
        assert_eq!(chat("/team"), format!("/team{expected}"));
        assert_eq!(
            path("", "/v1/images/edits", "img", Some("2025-01-01-preview")),
            "/openai/deployments/img/images/edits?api-version=2025-01-01-preview"
        );
        assert_eq!(path("", "/v1/embeddings", "e", Some("a&b")), "/openai/deployments/e/embeddings?api-version=a%26b");
    }

    #[test]
    fn responses_have_no_deployment_in_the_path() {
        assert_eq!(path("", "/v1/responses", "d", Some("2025-04-01")), "/openai/responses?api-version=2025-04-01");
        assert_eq!(path("", "/v1/files", "d", None), "/openai/files?api-version=2024-10-21");
    }

    #[test]
    fn v1_paths_are_openais() {
        assert_eq!(path("/openai/v1", "/v1/chat/completions", "d", None), "/openai/v1/chat/completions");
        assert_eq!(path("/x/openai/v1/", "/v1/responses", "d", None), "/x/openai/v1/responses");
        let preview = path("/openai/v1", "/v1/embeddings", "d", Some("preview"));
        assert_eq!(preview, "/openai/v1/embeddings?api-version=preview");
    }

    #[test]
    fn usage_is_asked_of_those_who_know_it() {
        let cases = [
            ("", None, true),
            ("", Some("2024-09-01-preview"), true),
            ("", Some("2024-10-21"), true),
            ("", Some("2025-01-01-preview"), true),
            ("", Some("2024-08-01-preview"), false),
            ("", Some("2023-05-15"), false),
            ("", Some("preview"), false),
            ("", Some(""), false),
            ("/openai/v1", Some("preview"), true),
            ("/openai/v1/", None, true),
        ];
        for (base, version, expected) in cases {
            assert_eq!(reports_usage_in_streams(base, version), expected, "{base} {version:?}");
        }
    }

    #[test]
    fn each_kind_has_its_header() {
        assert_eq!(auth_header(UpstreamKind::OpenAi), (header::AUTHORIZATION, "Bearer "));
        assert_eq!(auth_header(UpstreamKind::Azure).0.as_str(), "api-key");
    }
}
