//! What the comparison can be told on its command line, and the fixed shape of each load.

use clap::Parser;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Connections of the closed loop that asks for JSON answers.
pub(crate) const JSON_CONNECTIONS: usize = 64;
/// Connections of the closed loop that asks for streams.
pub(crate) const STREAM_CONNECTIONS: usize = 16;
/// Time before each measured window that is not counted: pools fill, caches warm.
pub(crate) const WARM_UP: Duration = Duration::from_millis(500);
/// How long a fresh process is left alone before its idle memory is read.
pub(crate) const IDLE: Duration = Duration::from_secs(2);

/// Compares the gateway with a bare Pingora pass-through and with nginx, in front of one mock upstream.
#[derive(Debug, Parser)]
#[command(name = "side_by_side")]
pub(crate) struct Options {
    /// Interleaved rounds of each load; the tables show their medians.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of each measured window.
    #[arg(long, default_value_t = 4.0)]
    seconds: f64,
    /// Three rounds of 1.5 seconds: a glance, not a verdict.
    #[arg(long)]
    quick: bool,
    /// Leaves a system out.
    #[arg(long, value_name = "SYSTEM")]
    pub(crate) without: Vec<Optional>,
    /// Writes every figure of every round to this file.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Exits with 1 if a target is missed.
    #[arg(long)]
    pub(crate) strict: bool,
    /// Given by `cargo bench`, and not by `cargo test`, which must not spend minutes here.
    #[arg(long, hide = true)]
    pub(crate) bench: bool,
    /// Serve the mock upstream on this address instead: how the comparison starts its own child.
    #[arg(long, hide = true)]
    pub(crate) mock: Option<SocketAddr>,
}

/// The systems that the comparison can do without (bare Pingora is what the others are measured by).
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Optional {
    /// The gateway, with Redis too.
    Gateway,
    /// The gateway with its limits in Redis.
    Redis,
    /// nginx.
    Nginx,
}

impl Options {
    /// Interleaved rounds of each load, at least one.
    pub(crate) fn rounds(&self) -> usize {
        if self.quick { 3 } else { self.rounds.max(1) }
    }

    /// Length of one measured window, at least half a second (the CPU clock ticks in hundredths) and at most a minute.
    pub(crate) fn window(&self) -> Duration {
        Duration::from_secs_f64(if self.quick { 1.5 } else { self.seconds.clamp(0.5, 60.0) })
    }
}
