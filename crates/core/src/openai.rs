//! The wire format of the OpenAI API, as far as the gateway acts on it, and nothing more.
//!
//! The gateway does not model the API. It reads the few members it must know (which model, is it a stream, what did it
//! cost), splices the few it must change, and passes every other byte on as it came: unknown members, big integers and
//! odd white space included. So a new member of the API needs no release of the gateway.
//!
//! - [`request`] reads the head of a request body, [`rewrite`] splices into it;
//! - [`response`] reads usage out of JSON answers, [`sse`] out of streams, where it can also hide it; [`served`] who answered;
//! - [`text`] finds prompt and output texts, to be counted where a provider reports no usage;
//! - [`assemble`] makes of a stream the answer that it adds up to;
//! - [`error`] writes the error envelope, and scrubs the provider's.

pub mod assemble;
pub mod error;
pub mod request;
pub mod response;
pub mod rewrite;
pub mod served;
pub mod sse;
pub mod text;

mod chunk;
mod json;
mod passed;
mod prompt;
pub(crate) mod scan;

pub(crate) use prompt::{pieces, prompt, text_of};

/// The version prefix that every path of the route table begins with.
pub(crate) const VERSION_PREFIX: &str = "/v1";

/// Path at a provider that speaks like OpenAI.
///
/// `base_path` is the path of the configured `base_url`, which is what an SDK would be given: it already holds the
/// version (`/v1`, or whatever a compatible provider uses). So the version of `endpoint_path` (`/v1/chat/completions`)
/// gives way to it. A `base_url` without any path is taken to mean OpenAI's own layout and keeps `/v1`.
#[must_use]
pub fn path(base_path: &str, endpoint_path: &str) -> String {
    let base_path = base_path.trim_end_matches('/');
    if base_path.is_empty() {
        return endpoint_path.to_owned();
    }
    format!("{base_path}{}", unversioned(endpoint_path))
}

/// `/v1/chat/completions` without its `/v1`.
pub(crate) fn unversioned(endpoint_path: &str) -> &str {
    match endpoint_path.strip_prefix(VERSION_PREFIX) {
        Some(rest) if rest.starts_with('/') => rest,
        _ => endpoint_path,
    }
}

#[cfg(test)]
mod tests {
    use super::path;

    #[test]
    fn the_version_of_the_base_url_wins() {
        let cases = [
            ("/v1", "/v1/chat/completions", "/v1/chat/completions"),
            ("/v1/", "/v1/embeddings", "/v1/embeddings"),
            ("", "/v1/responses", "/v1/responses"),
            ("/", "/v1/responses", "/v1/responses"),
            ("/api/paas/v4", "/v1/chat/completions", "/api/paas/v4/chat/completions"),
            ("/proxy/v1", "/v1/models/v1", "/proxy/v1/models/v1"),
            ("/base", "/v10/x", "/base/v10/x"),
        ];
        for (base, endpoint, expected) in cases {
            assert_eq!(path(base, endpoint), expected, "{base} {endpoint}");
        }
    }
}
