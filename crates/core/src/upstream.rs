//! Upstreams: one member of the pool, as it is written down, checked.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{glob, id::UpstreamId, secret::Secret};

pub mod written;

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
    /// From the request to the first byte of the answer's body. Reasoning models think for minutes before it.
    pub first_byte: Duration,
    /// From one piece of the body to the next.
    pub chunk: Duration,
    /// For one attempt in all; `None`: as long as it takes.
    pub total: Option<Duration>,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            first_byte: Duration::from_secs(600),
            chunk: Duration::from_secs(300),
            total: None,
        }
    }
}

/// How an upstream is handled, beyond what it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Handling {
    /// How long it may take.
    pub timeouts: Timeouts,
    /// Requests per minute that it is known to allow; 0: not known.
    pub rpm: u64,
    /// Tokens per minute that it is known to allow; 0: not known.
    pub tpm: u64,
    /// How often it is probed without a client's request; `None`: only by its requests.
    pub probe_interval: Option<Duration>,
}

/// What is said of one upstream's handling, where it differs from the defaults. `None`: as the default. Durations are in
/// milliseconds, 0: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Overrides {
    /// See [`Timeouts::connect`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connect_timeout_ms: Option<u64>,
    /// See [`Timeouts::first_byte`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_byte_timeout_ms: Option<u64>,
    /// See [`Timeouts::chunk`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chunk_timeout_ms: Option<u64>,
    /// See [`Timeouts::total`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_timeout_ms: Option<u64>,
    /// See [`Handling::rpm`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rpm: Option<u64>,
    /// See [`Handling::tpm`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tpm: Option<u64>,
    /// See [`Handling::probe_interval`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probe_interval_ms: Option<u64>,
}

impl Overrides {
    /// What must be said of `handling` where `default` holds.
    #[must_use]
    pub fn between(handling: Handling, default: Handling) -> Self {
        let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let or_none = |duration: Option<Duration>| duration.map_or(0, ms);
        let differs = |said: u64, default: u64| Some(said).filter(|said| *said != default);
        let (said, from) = (handling.timeouts, default.timeouts);
        Self {
            connect_timeout_ms: differs(ms(said.connect), ms(from.connect)),
            first_byte_timeout_ms: differs(ms(said.first_byte), ms(from.first_byte)),
            chunk_timeout_ms: differs(ms(said.chunk), ms(from.chunk)),
            total_timeout_ms: differs(or_none(said.total), or_none(from.total)),
            rpm: differs(handling.rpm, default.rpm),
            tpm: differs(handling.tpm, default.tpm),
            probe_interval_ms: differs(or_none(handling.probe_interval), or_none(default.probe_interval)),
        }
    }

    /// What they make of `default`.
    #[must_use]
    pub fn over(&self, default: Handling) -> Handling {
        let some = |ms: u64| Some(Duration::from_millis(ms)).filter(|duration| !duration.is_zero());
        let or = |ms: Option<u64>, default: Duration| ms.map_or(default, Duration::from_millis);
        Handling {
            timeouts: Timeouts {
                connect: or(self.connect_timeout_ms, default.timeouts.connect),
                first_byte: or(self.first_byte_timeout_ms, default.timeouts.first_byte),
                chunk: or(self.chunk_timeout_ms, default.timeouts.chunk),
                total: self.total_timeout_ms.map_or(default.timeouts.total, some),
            },
            rpm: self.rpm.unwrap_or(default.rpm),
            tpm: self.tpm.unwrap_or(default.tpm),
            probe_interval: self.probe_interval_ms.map_or(default.probe_interval, some),
        }
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
    /// How it is handled.
    pub handling: Handling,
    /// PEM of certificate authorities to trust for it, instead of the system's.
    pub ca_pem: Option<String>,
    /// A disabled upstream gets no new work.
    pub disabled: bool,
}

/// Which account an upstream is at: address and credential, as a number that tells nothing of either. What is known of an
/// upstream's health belongs to its account.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Account(u64);

impl std::fmt::Display for Account {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl std::str::FromStr for Account {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        u64::from_str_radix(text, 16).map(Self)
    }
}

impl Upstream {
    /// Its account.
    #[must_use]
    pub fn account(&self) -> Account {
        let mut hash = Sha256::new();
        hash.update(self.base_url.to_string());
        hash.update([0]);
        hash.update(self.credential.expose());
        // 64 bits: enough to tell accounts apart, too few to find a credential by.
        let hash: [u8; 32] = hash.finalize().into();
        Account(hash.iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

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
    fn overrides_say_only_what_differs() {
        let default = Handling { rpm: 7, probe_interval: Some(Duration::from_secs(9)), ..Handling::default() };
        assert_eq!(Overrides::default().over(default), default);
        let all = r#"{"connect_timeout_ms":1,"first_byte_timeout_ms":2,"chunk_timeout_ms":3,"total_timeout_ms":4,"rpm":0,"tpm":5,"probe_interval_ms":0}"#;
        let overrides: Overrides = serde_json::from_str(all).unwrap();
        let ms = Duration::from_millis;
        let timeouts = Timeouts { connect: ms(1), first_byte: ms(2), chunk: ms(3), total: Some(ms(4)) };
        assert_eq!(overrides.over(default), Handling { timeouts, rpm: 0, tpm: 5, probe_interval: None });
        assert_eq!(serde_json::to_string(&overrides).unwrap(), all);
        assert_eq!(serde_json::to_string(&Overrides::default()).unwrap(), "{}");
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
