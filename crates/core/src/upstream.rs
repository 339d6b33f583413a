//! Upstreams: one member of the pool, as it is written down, checked.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{glob, id::UpstreamId, secret::Secret};

/// How the provider wants to be spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UpstreamKind {
    /// api.openai.com and everything that speaks like it.
    #[serde(rename = "openai")]
    OpenAi,
    /// Azure OpenAI: deployments, `api-version`, `api-key`.
    Azure,
}

impl UpstreamKind {
    /// The word for it in config, database and command line.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::OpenAi => "openai",
            Self::Azure => "azure",
        }
    }
}

impl std::str::FromStr for UpstreamKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "openai" => Ok(Self::OpenAi),
            "azure" => Ok(Self::Azure),
            _ => Err(format!("{text:?} is not a kind of upstream: use \"openai\" or \"azure\"")),
        }
    }
}

/// One entry of an upstream's model list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelEntry {
    /// Name that clients use; may be a pattern with `*`.
    pub name: String,
    /// Name that the provider wants; `None`: the client's.
    pub upstream_name: Option<String>,
}

impl ModelEntry {
    /// Parses `name`, `pattern*` or `name=upstream-name`.
    ///
    /// # Errors
    /// A sentence that says what is wrong with `text`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (name, upstream_name) = text.split_once('=').map_or((text, None), |(a, b)| (a, Some(b)));
        let (name, upstream_name) = (name.trim(), upstream_name.map(str::trim));
        if name.is_empty() || upstream_name.is_some_and(str::is_empty) {
            return Err(format!("{text:?} is not a model: write a name, name=upstream-name, or a pattern with *"));
        }
        if upstream_name.is_some_and(glob::is_pattern) {
            return Err(format!("{text:?}: the upstream's name of a model cannot be a pattern"));
        }
        if text.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err(format!("the model {text:?} contains white space"));
        }
        Ok(Self { name: name.to_owned(), upstream_name: upstream_name.map(str::to_owned) })
    }
}

impl std::fmt::Display for ModelEntry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.upstream_name {
            Some(upstream_name) => write!(f, "{}={upstream_name}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

/// A provider's address, taken apart once so that no request parses it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseUrl {
    /// Is it `https`?
    pub tls: bool,
    /// Host name or address, without brackets.
    pub host: String,
    /// Port, also when the URL left it out.
    pub port: u16,
    /// Value of the `host` header.
    pub authority: String,
    /// Path without a slash at its end: `/v1`, or empty.
    pub path: String,
}

impl BaseUrl {
    /// Parses `https://api.openai.com/v1`.
    ///
    /// # Errors
    /// A sentence that says what is wrong with `text`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let uri: http::Uri = text.parse().map_err(|e| format!("{text:?} is not a URL: {e}"))?;
        let tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(format!("{text:?} must begin with https:// or http://")),
        };
        let authority = uri.authority().ok_or_else(|| format!("{text:?} names no host"))?;
        if authority.as_str().contains('@') {
            return Err("a base_url must not contain a user or password; use the credential setting".to_owned());
        }
        if uri.query().is_some() || text.contains('#') {
            return Err(format!("{text:?} must end with the path: no ? and no #"));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() {
            return Err(format!("{text:?} names no host"));
        }
        Ok(Self {
            tls,
            host: host.to_owned(),
            port: authority.port_u16().unwrap_or(if tls { 443 } else { 80 }),
            authority: authority.to_string(),
            path: uri.path().trim_end_matches('/').to_owned(),
        })
    }
}

impl std::fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}://{}{}", if self.tls { "https" } else { "http" }, self.authority, self.path)
    }
}

/// How long an upstream may take, step by step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// To accept a connection, TLS included.
    pub connect: Duration,
    /// From one byte of the answer to the next, the first one included. Reasoning models think for minutes before it.
    pub read: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { connect: Duration::from_secs(5), read: Duration::from_secs(600) }
    }
}

/// One member of the pool.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// Row of `upstreams`; `None`: it comes from the config file.
    pub id: Option<UpstreamId>,
    /// Unique name, the label in metrics.
    pub name: String,
    /// How it wants to be spoken to.
    pub kind: UpstreamKind,
    /// Where it is.
    pub base_url: BaseUrl,
    /// The provider's secret.
    pub credential: Secret,
    /// What it serves; empty stands for `*`.
    pub models: Vec<ModelEntry>,
    /// Share of the work among upstreams of the same priority. 0: gets none.
    pub weight: u32,
    /// Lower numbers are used first.
    pub priority: u32,
    /// Azure's `api-version`.
    pub api_version: Option<String>,
    /// How long it may take.
    pub timeouts: Timeouts,
    /// PEM of certificate authorities to trust for it, instead of the system's.
    pub ca_pem: Option<String>,
    /// A disabled upstream gets no new work.
    pub disabled: bool,
}

impl Upstream {
    /// The upstream's own name for `model`, if it serves it.
    ///
    /// An exact entry wins over a pattern, whatever their order.
    #[must_use]
    pub fn resolve_model<'a>(&'a self, model: &'a str) -> Option<&'a str> {
        if self.models.is_empty() {
            return Some(model);
        }
        let exact = self.models.iter().find(|entry| entry.name == model);
        let entry = exact.or_else(|| self.models.iter().find(|entry| glob::matches(&entry.name, model)))?;
        Some(entry.upstream_name.as_deref().unwrap_or(model))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_urls_are_taken_apart() {
        let url = BaseUrl::parse("https://api.openai.com/v1/").unwrap();
        assert_eq!((url.tls, url.host.as_str(), url.port), (true, "api.openai.com", 443));
        assert_eq!((url.authority.as_str(), url.path.as_str()), ("api.openai.com", "/v1"));
        assert_eq!(url.to_string(), "https://api.openai.com/v1");
        let url = BaseUrl::parse("http://[::1]:8081").unwrap();
        assert_eq!((url.tls, url.host.as_str(), url.port, url.path.as_str()), (false, "::1", 8081, ""));
    }

    #[test]
    fn base_urls_that_cannot_be_meant_are_refused() {
        for bad in ["", "api.openai.com", "ftp://a", "https://", "https://u:p@a/v1", "https://a/v1?x=1", "https://a/#x"]
        {
            assert!(BaseUrl::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn model_entries_are_names_pairs_or_patterns() {
        assert_eq!(ModelEntry::parse("gpt-4o").unwrap().to_string(), "gpt-4o");
        assert_eq!(
            ModelEntry::parse("gpt-4o = prod").err(),
            Some("the model \"gpt-4o = prod\" contains white space".into())
        );
        let pair = ModelEntry::parse("gpt-4o=prod").unwrap();
        assert_eq!(pair.upstream_name.as_deref(), Some("prod"));
        for bad in ["", "=", "a=", "=b", "a=b*", "a b"] {
            assert!(ModelEntry::parse(bad).is_err(), "{bad}");
        }
    }
}
