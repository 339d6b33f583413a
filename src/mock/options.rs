//! The flags of `tollgate mock`, and what they amount to.

use std::{
    net::SocketAddr,
    str::FromStr,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use axum::http::StatusCode;
use clap::Args;

use super::faults::{DIRECTIVES, Faults, parse_status};

/// A stand-in OpenAI (and Azure OpenAI): for trying the gateway without an account, and for tests.
#[derive(Args, Clone, Debug)]
#[command(after_help = DIRECTIVES)]
pub struct MockArgs {
    /// Address to listen on; port 0: one that is free.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9100")]
    pub listen: SocketAddr,
    /// Wait before the first byte of every answer, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 0)]
    pub delay_ms: u64,
    /// Wait between the chunks of every stream, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 0)]
    pub chunk_delay_ms: u64,
    /// Fail requests with a status: all of them, or the given share (429:0.1 fails every tenth). May be repeated.
    #[arg(long, value_name = "STATUS[:RATE]")]
    pub fail: Vec<FailRule>,
    /// Leave the usage out of every answer.
    #[arg(long)]
    pub no_usage: bool,
    /// Cut chunks inside characters and inside lines.
    #[arg(long)]
    pub split_utf8: bool,
    /// Cut the connection after so many chunks of a stream, and whole answers in half.
    #[arg(long, value_name = "N")]
    pub break_after: Option<usize>,
}

/// How a mock behaves where the request does not say otherwise. The default does nothing wrong.
#[derive(Clone, Debug, Default)]
pub struct MockOptions {
    /// What goes wrong with every answer.
    pub faults: Faults,
    /// Which requests fail; the first rule that strikes decides.
    pub fail: Vec<FailRule>,
}

impl From<&MockArgs> for MockOptions {
    fn from(args: &MockArgs) -> Self {
        let faults = Faults {
            slow: Duration::from_millis(args.delay_ms),
            chunk_delay: Duration::from_millis(args.chunk_delay_ms),
            no_usage: args.no_usage,
            split_utf8: args.split_utf8,
            break_after: args.break_after,
            ..Faults::default()
        };
        Self { faults, fail: args.fail.clone() }
    }
}

/// A share of the requests, and the status that they get.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FailRule {
    /// The status, 400 to 599.
    pub status: StatusCode,
    /// The share, 0 to 1.
    pub rate: f64,
}

impl FromStr for FailRule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (status, rate) = text.split_once(':').unwrap_or((text, "1"));
        let share = rate.parse::<f64>().ok().filter(|rate| (0.0..=1.0).contains(rate));
        let rate = share.ok_or_else(|| format!("`{rate}` is not a share from 0 to 1; write for example 429:0.1"))?;
        Ok(Self { status: parse_status(status)?, rate })
    }
}

/// The rules with their counters.
///
/// A rule does not draw lots: of every `1 / rate` requests that reach it, the last one fails. A share is met exactly,
/// and a test that counts failures is no gamble.
#[derive(Debug)]
pub(super) struct Failing(Vec<(FailRule, AtomicU64)>);

impl Failing {
    pub(super) fn new(rules: &[FailRule]) -> Self {
        Self(rules.iter().map(|rule| (*rule, AtomicU64::new(0))).collect())
    }

    /// The status that the next request fails with, if it does.
    pub(super) fn next(&self) -> Option<StatusCode> {
        self.0.iter().find_map(|(rule, seen)| {
            let before = seen.fetch_add(1, Ordering::Relaxed) as f64;
            let strikes = ((before + 1.0) * rule.rate).floor() > (before * rule.rate).floor();
            strikes.then_some(rule.status)
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: MockArgs,
    }

    #[test]
    fn a_rule_fails_its_share_exactly() {
        let failing = Failing::new(&["429:0.1".parse().unwrap(), "500:0.5".parse().unwrap()]);
        let answers: Vec<_> = (0..100).map(|_| failing.next().map(|status| status.as_u16())).collect();
        assert_eq!(answers.iter().filter(|a| **a == Some(429)).count(), 10);
        assert_eq!(answers.iter().filter(|a| **a == Some(500)).count(), 45);
        assert_eq!(answers.iter().position(|a| *a == Some(429)), Some(9));
    }

    #[test]
    fn flags_become_options() {
        let line =
            "mock --delay-ms 5 --chunk-delay-ms 2 --fail 429:0.5 --fail 500 --no-usage --split-utf8 --break-after 3";
        let args = Cli::try_parse_from(line.split(' ')).unwrap().args;
        assert_eq!(args.listen.to_string(), "127.0.0.1:9100");
        let options = MockOptions::from(&args);
        assert_eq!(options.fail.len(), 2);
        assert_eq!(options.fail[1], FailRule { status: StatusCode::INTERNAL_SERVER_ERROR, rate: 1.0 });
        assert_eq!((options.faults.slow.as_millis(), options.faults.chunk_delay.as_millis()), (5, 2));
        assert_eq!((options.faults.break_after, options.faults.no_usage), (Some(3), true));
        assert!(options.faults.split_utf8);
    }

    #[test]
    fn wrong_flags_are_refused() {
        for bad in ["--fail=200", "--fail=429:2", "--fail=429:x", "--listen=here"] {
            assert!(Cli::try_parse_from(["mock", bad]).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_help_lists_the_directives() {
        assert!(Cli::command().render_help().to_string().contains("retry-after-ms=N"));
    }
}
