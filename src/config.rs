//! The configuration: complete and validated before a socket is bound.
//!
//! [`load`] turns a TOML file into a [`Config`] in which everything is parsed, resolved and read: addresses, durations,
//! certificates, prices. Nothing that runs later can fail because of what the file says. If anything is wrong, every problem
//! is reported at once, each with file, line, setting and mend, and no part of the configuration is used.
//!
//! `load` reads files and nothing else of the world: the environment is an argument, there is no hidden state, and calling
//! it again is all that a reload needs. Relative paths are relative to the working directory. The defaults are in the code,
//! once; `conf/tollgate.toml` repeats them for people, and a test holds the two together.

mod audit;
mod check;
mod expand;
mod files;
mod limits;
mod pool;
pub mod prices;
mod problem;
mod raw;
mod redis_url;
mod server;
mod suggest;
mod table;
mod upstreams;
mod validate;

use std::{
    collections::HashMap,
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::sign::CertifiedKey;
use tollgate_core::{
    breaker,
    content::ContentMode,
    key::IpNet,
    limit::policy::Policy,
    pool::Strategy,
    retry,
    secret::Secret,
    snapshot::ModelInfo,
    units,
    upstream::{BaseUrl, Handling, ModelEntry, UpstreamKind},
};
use zeroize::Zeroizing;

pub use self::{
    check::check,
    expand::Env,
    problem::{ConfigErrors, Problem},
};
use crate::{
    journal::{Fsync, OnFull},
    telemetry::LogFormat,
};

/// The file that is read if none is named and it is there.
pub const DEFAULT_FILE: &str = "conf/tollgate.toml";
/// Environment variable with the Fernet keys, comma-separated; the first encrypts.
pub const FERNET_KEYS_VARIABLE: &str = "TOLLGATE_FERNET_KEYS";

/// A configuration that can be run.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Where it was read from; `None`: the embedded defaults.
    pub file: Option<PathBuf>,
    /// `[server]`
    pub server: Server,
    /// `[tls]`; always there if there is a TLS listener.
    pub tls: Option<Tls>,
    /// `[store]`
    pub store: Store,
    /// `[limiter]`
    pub limiter: LimiterConfig,
    /// `[limits]`
    pub limits: LimitsConfig,
    /// `[usage]`
    pub usage: Usage,
    /// `[audit]`
    pub audit: Audit,
    /// `[secrets]`
    pub secrets: Secrets,
    /// `[log]`
    pub log: Log,
    /// `[retry]`
    pub retry: Retry,
    /// `[pool]`
    pub pool: Pool,
    /// `[breaker]`
    pub breaker: breaker::Rules,
    /// `[upstream_defaults]`: for upstreams that are not in the file, and for what one in the file leaves out.
    pub upstream_defaults: Handling,
    /// Every `[[upstream]]`, in the order of the file.
    pub upstreams: Vec<UpstreamSpec>,
    /// Every `[models.*]`, by name.
    pub models: HashMap<String, ModelInfo>,
    /// What can be run, but may not be meant.
    pub warnings: Vec<Problem>,
}

/// Listeners and what holds for every request.
#[derive(Clone, Debug, PartialEq)]
pub struct Server {
    /// Plain HTTP listeners of the data plane.
    pub listen: Vec<SocketAddr>,
    /// HTTPS listeners of the data plane.
    pub tls_listen: Vec<SocketAddr>,
    /// Listener of the admin plane; `None`: there is none.
    pub admin_listen: Option<SocketAddr>,
    /// Proxies in front of the gateway whose `x-forwarded-for` is believed.
    pub trusted_proxies: Vec<IpNet>,
    /// Largest body that is accepted, in bytes.
    pub max_body_bytes: usize,
    /// Worker threads; at least 1.
    pub threads: usize,
    /// May an idle thread take over work of a busy one?
    pub work_stealing: bool,
    /// How long a client may take from one piece of its request to the next.
    pub client_timeout: Duration,
    /// How long requests in flight may take to finish when the gateway stops.
    pub grace_period: Duration,
    /// Idle connections to upstreams that are kept for reuse.
    pub keepalive_pool: usize,
}

/// The certificate of the TLS listeners, read and checked: the key fits it and it has not expired.
#[derive(Clone)]
pub struct Tls {
    /// File with the certificate chain, in PEM.
    pub cert: PathBuf,
    /// File with the private key, in PEM.
    pub key: PathBuf,
    /// Both, as rustls takes them.
    pub certified: Arc<CertifiedKey>,
    /// When the certificate expires.
    pub expires_at: SystemTime,
}

impl PartialEq for Tls {
    fn eq(&self, other: &Self) -> bool {
        // The key was checked to fit the certificate, so equal certificates have equal keys.
        self.cert == other.cert && self.key == other.key && self.certified.cert == other.certified.cert
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Tls");
        shown.field("cert", &self.cert).field("key", &self.key).field("expires_at", &self.expires_at);
        shown.finish_non_exhaustive()
    }
}

/// Which database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreKind {
    /// A file of this machine.
    Sqlite,
    /// A server.
    Postgres,
}

/// The database.
#[derive(Clone, Debug, PartialEq)]
pub struct Store {
    /// Which database.
    pub kind: StoreKind,
    /// Where it is. A secret, because it may hold a password.
    pub url: Secret,
}

/// Where limits are counted.
#[derive(Clone, Debug, PartialEq)]
pub struct LimiterConfig {
    /// The URL of Redis, or those of some nodes of a cluster with commas between them; `None`: this process counts alone.
    /// A secret, because it may hold a password.
    pub redis: Option<Secret>,
    /// What happens while Redis cannot be reached.
    pub on_redis_down: OnRedisDown,
    /// How long a request waits for Redis.
    pub redis_timeout: Duration,
}

/// What happens while Redis cannot be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnRedisDown {
    /// Each process counts for itself.
    Local,
    /// What has limits is denied.
    Deny,
}

/// Which limits hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitsConfig {
    /// Limits where a user or a key says nothing of its own.
    pub policy: Policy,
    /// How long an answer is taken to be until the model's own habit is learned, in tokens.
    pub assumed_output_tokens: u64,
    /// What holds before anything else.
    pub gate: GateConfig,
}

/// What one address may do before anything is known about its requests. 0: no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GateConfig {
    /// Requests per second.
    pub requests_per_second: u32,
    /// Requests per minute whose key is none.
    pub failed_keys_per_minute: u32,
}

/// How usage gets to the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Directory in which it waits.
    pub journal: PathBuf,
    /// Disk that it may take there, in bytes.
    pub journal_max_bytes: u64,
    /// What happens when it takes that.
    pub on_journal_full: OnFull,
    /// When it is synced to the disk.
    pub fsync: Fsync,
    /// Longest time that a record waits for others.
    pub flush_interval: Duration,
    /// Most records of one transaction.
    pub batch: usize,
}

/// What is kept of single requests, and for how long. Sums are kept for ever.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Audit {
    /// Days that a row of the request log is kept at least; 0: for ever.
    pub retention_days: u32,
    /// What is kept of their content where neither key nor user says otherwise.
    pub content: ContentMode,
    /// For how many days content is kept; 0: for ever.
    pub content_retention_days: u32,
    /// How much is kept of a request, and of its answer, in bytes.
    pub max_content_bytes: usize,
    /// How much content may be in memory at once, in bytes.
    pub buffer_bytes: usize,
    /// Regular expressions whose matches are taken out of redacted content, checked.
    pub redact: Vec<String>,
}

/// Keys that encrypt upstreams' credentials, and content.
#[derive(Clone, Debug, PartialEq)]
pub struct Secrets {
    /// Fernet keys, checked; the first encrypts. Empty: the file is not there yet and must be made.
    pub fernet_keys: Vec<Secret>,
    /// Where they are kept, unless the environment holds them.
    pub fernet_keys_file: PathBuf,
}

/// The log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// How lines look.
    pub format: LogFormat,
    /// Which lines there are, in `tracing`'s filter syntax.
    pub level: String,
}

/// How requests are shared out among upstreams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Within one priority, where a model does not say.
    pub strategy: Strategy,
    /// How long a request waits for an upstream that will be ready again, if none is.
    pub wait: Duration,
}

/// How failed attempts are repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Upstreams tried for one request at the most; at least 1.
    pub attempts: usize,
    /// How long after its arrival a request may still be given to another upstream; `None`: any time.
    pub deadline: Option<Duration>,
    /// How many retries the traffic pays for.
    pub budget: retry::Rules,
}

/// An upstream's secret as the file holds it.
#[derive(Clone, PartialEq)]
pub enum CredentialSource {
    /// The secret itself.
    Plain(Secret),
    /// A Fernet token, without the `fernet:` before it. One of [`Secrets::fernet_keys`] decrypts it.
    Fernet(String),
    /// A file that holds it, and may come to hold another one.
    File {
        /// Where it is.
        path: PathBuf,
        /// What it held when it was read.
        secret: Secret,
    },
}

impl fmt::Debug for CredentialSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(_) => f.write_str("Plain([secret])"),
            Self::Fernet(_) => f.write_str("Fernet([token])"),
            Self::File { path, .. } => write!(f, "File({path:?})"),
        }
    }
}

/// One `[[upstream]]`.
#[derive(Clone, Debug, PartialEq)]
pub struct UpstreamSpec {
    /// Unique name, the label in metrics.
    pub name: String,
    /// How it wants to be spoken to.
    pub kind: UpstreamKind,
    /// Where it is.
    pub base_url: BaseUrl,
    /// The provider's secret.
    pub credential: CredentialSource,
    /// What it serves; empty stands for `*`.
    pub models: Vec<ModelEntry>,
    /// Share of the work among upstreams of the same priority, 0 to 1000.
    pub weight: u32,
    /// Lower numbers are used first.
    pub priority: u32,
    /// Azure's `api-version`.
    pub api_version: Option<String>,
    /// A disabled upstream gets no work.
    pub disabled: bool,
    /// Certificate authorities to trust for it, in PEM, checked; `None`: the system's.
    pub ca_pem: Option<String>,
    /// How it is handled.
    pub handling: Handling,
}

/// Reads `path`; without one, [`DEFAULT_FILE`] if it is there, else the embedded defaults.
///
/// # Errors
/// Every problem of the configuration.
pub fn load(path: Option<&Path>, env: Env<'_>) -> Result<Config, ConfigErrors> {
    let default = Path::new(DEFAULT_FILE);
    let file = path.or_else(|| default.exists().then_some(default));
    let Some(file) = file else { return parse(None, "", env) };
    // It may hold secrets in clear text.
    match files::read_text(file).map(Zeroizing::new) {
        Ok(text) => parse(Some(file), &text, env),
        Err(message) => {
            let problem = Problem { file: file.display().to_string(), line: None, setting: String::new(), message };
            Err(ConfigErrors { problems: vec![problem], warnings: Vec::new() })
        }
    }
}

/// Reads a configuration from `text`, which `file` names in messages.
///
/// # Errors
/// Every problem of the configuration.
pub fn parse(file: Option<&Path>, text: &str, env: Env<'_>) -> Result<Config, ConfigErrors> {
    let (config, findings) = validate::read(file, text, env);
    if findings.problems.is_empty() {
        Ok(Config { warnings: findings.warnings, ..config })
    } else {
        Err(ConfigErrors { problems: findings.problems, warnings: findings.warnings })
    }
}
