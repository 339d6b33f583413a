//! What a breaker goes by: thresholds, and how long it waits.
//!
//! Every waiting time that is ours to choose doubles while its cause comes back, up to a bound, and up to a quarter is
//! added by chance, so that replicas which lost an upstream in the same moment do not come back to it in the same moment.
//! The chance is added, never subtracted: what is written down as the least wait is one.

/// Bounds of a waiting time that doubles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The first wait, in milliseconds.
    pub min_ms: u64,
    /// The longest wait, in milliseconds, before up to a quarter is added by chance.
    pub max_ms: u64,
}

/// The thresholds and waits of one breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Failures in a row that open it. 0: they do not.
    pub failures: u32,
    /// Length of the window of the failure share, in seconds.
    pub window_s: u32,
    /// Attempts that the window must hold before their share counts.
    pub least_requests: u32,
    /// Failures among them, in per cent, that open it. 0: they do not.
    pub failure_percent: u32,
    /// How long it is open.
    pub backoff_ms: Span,
    /// How long a quarantined upstream is left alone by the slow probe.
    pub quarantine_ms: Span,
    /// How long it cools if the provider does not say for how long.
    pub cooling_ms: Span,
    /// How long a probe that says nothing keeps others from probing, in milliseconds.
    pub probe_patience_ms: u64,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            failures: 5,
            window_s: 30,
            least_requests: 20,
            failure_percent: 50,
            backoff_ms: Span { min_ms: 1_000, max_ms: 60_000 },
            quarantine_ms: Span { min_ms: 300_000, max_ms: 3_600_000 },
            cooling_ms: Span { min_ms: 5_000, max_ms: 60_000 },
            probe_patience_ms: 60_000,
        }
    }
}

/// A waiting time that doubles while its cause comes back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Backoff {
    last_ms: u64,
}

impl Backoff {
    /// The next wait, in milliseconds: the first one, or twice the last, with a part that `jitter` (0 to 1) decides.
    pub fn next(&mut self, span: Span, jitter: f64) -> u64 {
        let min_ms = span.min_ms.max(1);
        self.last_ms = self.last_ms.saturating_mul(2).clamp(min_ms, span.max_ms.max(min_ms));
        self.last_ms.saturating_add(part(self.last_ms / 4, jitter))
    }

    /// The last wait without its chance, in milliseconds; 0: there was none.
    pub fn last_ms(self) -> u64 {
        self.last_ms
    }

    /// Begins anew.
    pub fn reset(&mut self) {
        self.last_ms = 0;
    }
}

fn part(of_ms: u64, jitter: f64) -> u64 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to `of_ms`; not a number is 0")]
    let part = (of_ms as f64 * jitter.clamp(0.0, 1.0)) as u64;
    part.min(of_ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_their_bound() {
        let span = Span { min_ms: 1_000, max_ms: 5_000 };
        let mut backoff = Backoff::default();
        let waits: Vec<_> = (0..5).map(|_| backoff.next(span, 0.0)).collect();
        assert_eq!(waits, [1_000, 2_000, 4_000, 5_000, 5_000]);
        backoff.reset();
        assert_eq!(backoff.next(span, 1.0), 1_250);
    }

    #[test]
    fn no_jitter_and_no_bounds_make_it_overflow() {
        for jitter in [-1.0, 0.0, 0.5, 1.0, 2.0, f64::NAN, f64::INFINITY] {
            for (min_ms, max_ms) in [(0, 0), (9, 3), (1, u64::MAX), (u64::MAX, u64::MAX)] {
                let mut backoff = Backoff::default();
                for _ in 0..70 {
                    let wait = backoff.next(Span { min_ms, max_ms }, jitter);
                    assert!(wait >= min_ms.max(1) && wait >= backoff.last_ms(), "{jitter} {min_ms} {max_ms}");
                    assert!(wait - backoff.last_ms() <= backoff.last_ms() / 4);
                }
            }
        }
    }
}
