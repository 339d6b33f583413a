//! `[pool]`, `[retry]` and `[breaker]`: how requests are shared out among upstreams, and what happens when one fails.

use std::time::Duration;

use tollgate_core::{
    breaker::{self, Span},
    pool::Strategy,
    retry,
    upstream::{Handling, Timeouts, written},
};

use super::{
    Pool, Retry,
    table::Table,
    validate::{HOUR, MILLISECOND, duration},
};

const DAY: Duration = Duration::from_secs(86_400);
const SECOND: Duration = Duration::from_secs(1);

/// Reads `[pool]`.
pub(super) fn pool(table: &mut Table<'_>) -> Pool {
    let wait = duration(table, "wait", SECOND, Duration::ZERO..=HOUR);
    Pool { strategy: strategy(table).unwrap_or_default(), wait }
}

/// A `strategy`, if there is one.
pub(super) fn strategy(table: &mut Table<'_>) -> Option<Strategy> {
    table.text("strategy", str::parse)
}

/// Reads `[retry]`.
pub(super) fn retry(table: &mut Table<'_>) -> Retry {
    let default = retry::Rules::default();
    Retry {
        attempts: table.whole("attempts", 1..=10).unwrap_or(3),
        deadline: positive(duration(table, "deadline", Duration::ZERO, Duration::ZERO..=DAY)),
        budget: retry::Rules { percent: table.whole("budget_percent", 0..=100).unwrap_or(default.percent), ..default },
    }
}

/// Reads `[breaker]`.
pub(super) fn breaker(table: &mut Table<'_>) -> breaker::Rules {
    let default = breaker::Rules::default();
    breaker::Rules {
        failures: table.whole("failures", 0..=1000).unwrap_or(default.failures),
        window_s: table.whole("window_s", 1..=3600).unwrap_or(default.window_s),
        least_requests: table.whole("least_requests", 1..=10_000).unwrap_or(default.least_requests),
        failure_percent: table.whole("failure_percent", 0..=100).unwrap_or(default.failure_percent),
        backoff_ms: span(table, ["backoff", "backoff_max"], default.backoff_ms),
        quarantine_ms: span(table, ["quarantine_probe", "quarantine_probe_max"], default.quarantine_ms),
        ..default
    }
}

/// A waiting time that doubles: its first value, and its greatest.
fn span(table: &mut Table<'_>, [first, most]: [&'static str; 2], default: Span) -> Span {
    let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let min_ms = ms(duration(table, first, Duration::from_millis(default.min_ms), MILLISECOND..=HOUR));
    let max_ms = ms(duration(table, most, Duration::from_millis(default.max_ms.max(min_ms)), MILLISECOND..=DAY));
    if max_ms < min_ms {
        table.problem(most, format!("is less than {first}, which it is the greatest value of"));
    }
    Span { min_ms, max_ms }
}

/// How the upstream of `table` is handled; what it leaves out is taken from `default`.
pub(super) fn handling(table: &mut Table<'_>, default: Handling) -> Handling {
    let from = default.timeouts;
    let most = written::MOST_PER_MINUTE;
    Handling {
        timeouts: Timeouts {
            connect: table.text("connect_timeout", written::parse_connect_timeout).unwrap_or(from.connect),
            first_byte: table.text("first_byte_timeout", written::parse_wait).unwrap_or(from.first_byte),
            chunk: table.text("chunk_timeout", written::parse_wait).unwrap_or(from.chunk),
            total: table.text("total_timeout", written::parse_total_timeout).map_or(from.total, positive),
        },
        rpm: table.whole("rpm", 0..=most).unwrap_or(default.rpm),
        tpm: table.whole("tpm", 0..=most).unwrap_or(default.tpm),
        probe_interval: table
            .text("probe_interval", written::parse_probe_interval)
            .map_or(default.probe_interval, positive),
    }
}

/// 0 stands for "none".
fn positive(duration: Duration) -> Option<Duration> {
    (!duration.is_zero()).then_some(duration)
}
