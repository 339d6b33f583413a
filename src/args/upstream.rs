//! `tollgate upstream` as it is typed.
//!
//! The credential is no argument: it is read from standard input, or from [`CREDENTIAL_VARIABLE`](super::CREDENTIAL_VARIABLE).
//! What begins with `-` is taken for a value where a number or a duration stands, so that a negative one is told as such.

use std::time::Duration;

use clap::{Args as ClapArgs, Subcommand};
use tollgate_core::upstream::{BaseUrl, ModelEntry, UpstreamKind};

use super::value::{self, Setting};

/// `tollgate upstream`
#[derive(Debug, Subcommand)]
pub enum UpstreamVerb {
    /// Add an upstream; its credential is read from standard input, or from TOLLGATE_UPSTREAM_CREDENTIAL
    Add {
        /// Unique name, the label in metrics
        #[arg(long)]
        name: String,
        /// What is set.
        #[command(flatten)]
        settings: Box<UpstreamSettings>,
    },
    /// List all upstreams, those of the config file too, and how the running gateway sees them
    List,
    /// Show one upstream (never its credential)
    Show(UpstreamRef),
    /// Change an upstream
    Update {
        /// Which upstream.
        #[command(flatten)]
        upstream: UpstreamRef,
        /// New name
        #[arg(long)]
        name: Option<String>,
        /// Read a new credential, as `upstream add` does
        #[arg(long)]
        new_credential: bool,
        /// What is set.
        #[command(flatten)]
        settings: Box<UpstreamSettings>,
    },
    /// Give an upstream work again, also one that was quarantined
    Enable(UpstreamRef),
    /// Give an upstream no new work
    Disable(UpstreamRef),
    /// Disable an upstream and wait until nothing is in flight there any more
    Drain(DrainArgs),
    /// Remove an upstream and forget its credential
    Remove(UpstreamRef),
    /// Ask an upstream for its models, with its credential: is it there, how fast, does it accept us?
    Test(UpstreamRef),
}

/// Which upstream.
#[derive(Clone, Debug, ClapArgs)]
pub struct UpstreamRef {
    /// Id or name
    #[arg(value_name = "UPSTREAM")]
    pub upstream: String,
}

/// How to drain.
#[derive(Clone, Debug, ClapArgs)]
pub struct DrainArgs {
    /// Which upstream.
    #[command(flatten)]
    pub upstream: UpstreamRef,
    /// How long to wait, 1s to 1d; it stays disabled afterwards
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = value::patience, allow_hyphen_values = true)]
    pub timeout: Duration,
}

/// What can be set of an upstream.
#[derive(Clone, Debug, Default, PartialEq, ClapArgs)]
pub struct UpstreamSettings {
    /// How it wants to be spoken to: openai or azure [default: openai]
    #[arg(long)]
    pub kind: Option<UpstreamKind>,
    /// Where it is [default: OpenAI itself]
    #[arg(long, value_name = "URL", value_parser = BaseUrl::parse)]
    pub base_url: Option<BaseUrl>,
    /// What it serves: names, name=upstream-name pairs, or patterns with '*' [default: *]
    #[arg(long, value_name = "MODEL,...", value_delimiter = ',', value_parser = ModelEntry::parse)]
    pub models: Option<Vec<ModelEntry>>,
    /// Share of the work among upstreams of the same priority, 0 to 1000 [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=1000), allow_negative_numbers = true)]
    pub weight: Option<u32>,
    /// Lower numbers are used first, 0 to 1000 [default: 0]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=1000), allow_negative_numbers = true)]
    pub priority: Option<u32>,
    /// Azure's api-version, such as 2024-10-21
    #[arg(long, value_name = "VERSION", value_parser = value::api_version)]
    pub api_version: Option<String>,
    /// How it is handled.
    #[command(flatten)]
    pub handling: HandlingSettings,
}

/// How an upstream is handled, where not as `[upstream_defaults]` of the config says.
#[derive(Clone, Debug, Default, PartialEq, ClapArgs)]
#[command(next_help_heading = "Handling (a value, or `default` for what [upstream_defaults] says)")]
pub struct HandlingSettings {
    /// To accept a connection, TLS included, such as 5s or 500ms
    #[arg(long, value_name = "DURATION", value_parser = value::connect_timeout, allow_hyphen_values = true)]
    pub connect_timeout: Option<Setting<Duration>>,
    /// From the request to the first byte of the answer
    #[arg(long, value_name = "DURATION", value_parser = value::wait, allow_hyphen_values = true)]
    pub first_byte_timeout: Option<Setting<Duration>>,
    /// From one piece of an answer to the next
    #[arg(long, value_name = "DURATION", value_parser = value::wait, allow_hyphen_values = true)]
    pub chunk_timeout: Option<Setting<Duration>>,
    /// For one attempt in all; 0s: as long as it takes
    #[arg(long, value_name = "DURATION", value_parser = value::total_timeout, allow_hyphen_values = true)]
    pub total_timeout: Option<Setting<Duration>>,
    /// Requests per minute that it is known to allow; 0: not known
    #[arg(long, value_name = "N", value_parser = value::per_minute, allow_hyphen_values = true)]
    pub rpm: Option<Setting<u64>>,
    /// Tokens per minute that it is known to allow; 0: not known
    #[arg(long, value_name = "N", value_parser = value::per_minute, allow_hyphen_values = true)]
    pub tpm: Option<Setting<u64>>,
    /// How often its list of models is asked for, to find out that it is well again; 0s: never
    #[arg(long, value_name = "DURATION", value_parser = value::probe_interval, allow_hyphen_values = true)]
    pub probe_interval: Option<Setting<Duration>>,
}
