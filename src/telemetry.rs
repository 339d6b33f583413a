//! Logging: one line per request (target `access`), and what operators must know.
//!
//! Logs hold no key, no secret and no content of a request. Pingora and other libraries log through `log`; their lines are
//! taken into the same stream, from `warn` up, because Pingora reports every hung-up client as an error of its own.
//!
//! Lines are written by a thread of their own, in bursts. Where nobody reads standard error, lines are dropped beyond a
//! bounded queue: a full pipe must not stop requests.

use std::io::BufWriter;

use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt, util::SubscriberInitExt};

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For humans.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Keeps the log going; dropping it writes what is left.
#[derive(Debug)]
#[must_use = "lines that wait are lost when the process ends without it"]
pub struct LogGuard(WorkerGuard);

/// Starts logging to standard error. Later calls change nothing: the first one of a process counts.
///
/// `filter` is in `tracing`'s syntax: `info`, or `info,tollgate::proxy=debug`.
///
/// # Errors
/// If `filter` cannot be parsed.
pub fn start(format: LogFormat, filter: &str) -> anyhow::Result<LogGuard> {
    let filter = EnvFilter::builder()
        .parse(filter)
        .map_err(|e| anyhow::anyhow!("[log] level: {filter:?} is not a log filter ({e}); use for example \"info\""))?;
    let quiet = ["pingora_core=warn", "pingora_proxy=off", "sqlx=warn"];
    let filter = quiet.iter().filter_map(|d| d.parse().ok()).fold(filter, EnvFilter::add_directive);
    let registry = tracing_subscriber::registry().with(filter);
    let (stderr, guard) = NonBlockingBuilder::default().lossy(true).finish(BufWriter::new(std::io::stderr()));
    let started = match format {
        LogFormat::Text => registry.with(fmt::layer().with_writer(stderr).with_ansi(false)).try_init(),
        LogFormat::Json => registry.with(fmt::layer().json().flatten_event(true).with_writer(stderr)).try_init(),
    };
    // An error means that this process logs already, as in-process tests do.
    drop(started);
    Ok(LogGuard(guard))
}
