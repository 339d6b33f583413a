//! Health: what all requests share about one upstream, cheap to ask.
//!
//! A pick asks every member of a pool, an attempt enters one. So asking takes no lock: what the breaker and the allowance
//! amount to is kept in three numbers beside them, and the passing of time is only a comparison with `now_ms`. Entering and
//! recording take one lock, for some additions, never across an await. One lock for both, because entering needs both.
//!
//! The numbers are written while the lock is held, so that none is overwritten by an older one. Whoever reads them without it may
//! be a moment behind. That is no harm: the breaker itself decides in [`Health::enter`], and the allowance is foresight.
//! **Hence a pick may choose an upstream that then does not let it in** (another request was the probe, or it has just
//! opened). Whoever picks treats it as tried and picks again.
//!
//! An [`Attempt`] is a guard: it counts as in flight until it is dropped, and a probe that is dropped without a word frees its
//! place. No way out of a request, a panic included, leaves an upstream waiting for it.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
};

use crate::{
    allowance::{Allowance, Mark, Outlook, Report},
    breaker::{Breaker, Notice, Outcome, Permit, Ready, Rules, State, Transition},
    pool::Fitness,
};

/// The health of one upstream. Times are of one clock of the caller's, in milliseconds.
#[derive(Debug)]
pub struct Health {
    ready_at_ms: AtomicU64,
    certain_tokens: AtomicU64,
    certain_until_ms: AtomicU64,
    in_flight: AtomicU32,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    breaker: Breaker,
    allowance: Allowance,
}

impl Default for Health {
    fn default() -> Self {
        let outlook = Outlook::default();
        Self {
            ready_at_ms: AtomicU64::new(0),
            certain_tokens: AtomicU64::new(outlook.tokens),
            certain_until_ms: AtomicU64::new(outlook.until_ms),
            in_flight: AtomicU32::new(0),
            inner: Mutex::default(),
        }
    }
}

impl Health {
    /// Sets the breaker's rules, and the limits that are written down for the upstream: requests and tokens per minute,
    /// 0: none. What is known of it stays known.
    pub fn configure(&self, rules: Rules, rpm: u64, tpm: u64, now_ms: u64) {
        let mut inner = self.lock();
        inner.breaker.set_rules(rules);
        inner.allowance.set_limits(rpm, tpm);
        self.publish_outlook(&mut inner, now_ms);
    }

    /// May it get a request that needs `tokens`? Without a lock, unless it is about to be spent.
    #[must_use]
    pub fn fitness(&self, now_ms: u64, tokens: u64) -> Fitness {
        if self.ready(now_ms) != Ready::Now {
            return Fitness::No;
        }
        let outlook =
            Outlook { tokens: self.certain_tokens.load(Relaxed), until_ms: self.certain_until_ms.load(Relaxed) };
        if outlook.is_certain(tokens, now_ms) || !self.is_spent(tokens, now_ms) {
            Fitness::Preferred
        } else {
            Fitness::LastResort
        }
    }

    /// May a request go there, or when? Without a lock.
    #[must_use]
    pub fn ready(&self, now_ms: u64) -> Ready {
        Ready::of(self.ready_at_ms.load(Relaxed), now_ms)
    }

    /// Is a request finding out just now whether it is well again?
    #[must_use]
    pub fn is_probing(&self) -> bool {
        self.lock().breaker.is_probing()
    }

    /// Begins an attempt that may consume `tokens`, if the breaker lets it in.
    #[must_use]
    pub fn enter(self: &Arc<Self>, now_ms: u64, tokens: u64) -> Option<Attempt> {
        let mut inner = self.lock();
        let permit = inner.breaker.try_enter(now_ms)?;
        let mark = inner.allowance.spend(tokens, now_ms);
        self.publish_ready(&inner);
        self.publish_outlook(&mut inner, now_ms);
        drop(inner);
        self.in_flight.fetch_add(1, Relaxed);
        Some(Attempt { health: Arc::clone(self), permit, mark })
    }

    /// Attempts under way.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// Where it stands.
    #[must_use]
    pub fn state(&self, now_ms: u64) -> State {
        self.lock().breaker.state(now_ms)
    }

    /// When the slow probe is due, if it is quarantined.
    #[must_use]
    pub fn slow_probe_at_ms(&self) -> Option<u64> {
        self.lock().breaker.slow_probe_at_ms()
    }

    /// Ends whatever keeps traffic away; see [`Breaker::free`].
    pub fn free(&self, now_ms: u64) -> Option<Transition> {
        self.change(|breaker| breaker.free(now_ms))
    }

    /// The word of a probe that is no request of a client; see [`Breaker::probed`]. `jitter`: a random number from 0 to 1.
    pub fn probed(&self, is_ok: bool, now_ms: u64, jitter: f64) -> Option<Transition> {
        self.change(|breaker| breaker.probed(is_ok, now_ms, jitter))
    }

    /// Another replica's word; see [`Breaker::share`].
    pub fn share(&self, notice: Notice, now_ms: u64) -> Option<Transition> {
        self.change(|breaker| breaker.share(notice, now_ms))
    }

    fn is_spent(&self, tokens: u64, now_ms: u64) -> bool {
        let mut inner = self.lock();
        // Time may have brought back what was spent when the numbers were written.
        self.publish_outlook(&mut inner, now_ms);
        inner.allowance.is_spent(tokens, now_ms)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Breaker) -> T) -> T {
        let mut inner = self.lock();
        let result = change(&mut inner.breaker);
        self.publish_ready(&inner);
        result
    }

    fn publish_ready(&self, inner: &Inner) {
        self.ready_at_ms.store(inner.breaker.ready_at_ms(), Relaxed);
    }

    fn publish_outlook(&self, inner: &mut Inner, now_ms: u64) {
        let outlook = inner.allowance.outlook(now_ms);
        self.certain_tokens.store(outlook.tokens, Relaxed);
        self.certain_until_ms.store(outlook.until_ms, Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Poisoned only if a panic hit between two assignments; whatever state that left ends by time or by the next word.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One attempt under way at an upstream.
#[derive(Debug)]
#[must_use = "an attempt that is dropped is over"]
pub struct Attempt {
    health: Arc<Health>,
    permit: Permit,
    mark: Mark,
}

impl Attempt {
    /// Takes note of what became of it; may be told more than once, as more becomes known. See [`Breaker::record`].
    /// `jitter`: a random number from 0 to 1.
    pub fn record(&self, outcome: Outcome, now_ms: u64, jitter: f64) -> Option<Transition> {
        self.health.change(|breaker| breaker.record(self.permit, outcome, now_ms, jitter))
    }

    /// Takes note of what its answer says of the upstream's limits.
    pub fn see_allowance(&self, report: &Report, now_ms: u64) {
        if !report.is_empty() {
            let mut inner = self.health.lock();
            inner.allowance.see(report, self.mark, now_ms);
            self.health.publish_outlook(&mut inner, now_ms);
        }
    }

    /// Is it the request that finds out whether the upstream is well again?
    #[must_use]
    pub fn is_probe(&self) -> bool {
        self.permit.is_probe()
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        self.health.in_flight.fetch_sub(1, Relaxed);
        if self.is_probe() {
            self.health.change(|breaker| breaker.release(self.permit));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::allowance::Said;

    const NOW: u64 = 1_000_000;

    fn opened() -> Arc<Health> {
        let health = Arc::new(Health::default());
        for _ in 0..5 {
            health.enter(NOW, 1).unwrap().record(Outcome::Failure, NOW, 0.0);
        }
        assert_eq!(health.state(NOW), State::Open);
        health
    }

    fn remaining(requests: u64, tokens: u64) -> Report {
        let said = |n| Said { limit: None, remaining: Some(n), reset_ms: Some(5_000) };
        Report { requests: said(requests), tokens: said(tokens) }
    }

    #[test]
    fn fitness_says_what_the_breaker_says() {
        let health = opened();
        assert_eq!(health.fitness(NOW + 999, 1), Fitness::No);
        assert_eq!(health.ready(NOW), Ready::At(NOW + 1_000));
        assert_eq!(health.fitness(NOW + 1_000, 1), Fitness::Preferred);
        let probe = health.enter(NOW + 1_000, 1).unwrap();
        assert!(probe.is_probe());
        assert_eq!(health.fitness(NOW + 1_000, 1), Fitness::No, "somebody is finding out");
        assert!(health.enter(NOW + 1_000, 1).is_none());
        probe.record(Outcome::Refused, NOW + 1_000, 0.0);
        assert_eq!(health.ready(NOW + 1_000), Ready::Never);
        assert_eq!(health.slow_probe_at_ms(), Some(NOW + 301_000));
        health.share(Notice::Cleared, NOW + 1_000);
        assert_eq!(health.fitness(NOW + 1_000, 1), Fitness::Preferred);
        health.probed(true, NOW + 1_000, 0.0);
        assert_eq!(health.state(NOW + 1_000), State::Closed);
    }

    #[test]
    fn what_is_spent_is_a_last_resort_until_its_reset() {
        let health = Arc::new(Health::default());
        let attempt = health.enter(NOW, 10).unwrap();
        attempt.see_allowance(&remaining(2, 100), NOW);
        assert_eq!(health.fitness(NOW, 100), Fitness::Preferred);
        assert_eq!(health.fitness(NOW, 101), Fitness::LastResort);
        let burst = [health.enter(NOW, 10), health.enter(NOW, 10)];
        assert_eq!(health.fitness(NOW, 0), Fitness::LastResort);
        assert!(health.enter(NOW, 10).is_some(), "it may be asked all the same");
        assert_eq!(health.fitness(NOW + 5_000, 101), Fitness::Preferred);
        drop(burst);
    }

    #[test]
    fn limits_that_are_written_down_are_looked_ahead_to() {
        let health = Arc::new(Health::default());
        health.configure(Rules::default(), 2, 0, NOW);
        let _attempts = [health.enter(NOW, 9), health.enter(NOW, 9)];
        assert_eq!(health.fitness(NOW + 60_000, 9), Fitness::LastResort);
        assert_eq!(health.fitness(NOW + 61_000, 9), Fitness::Preferred);
        assert_eq!(health.certain_tokens.load(Relaxed), u64::MAX, "the next one asks without a lock");
    }

    #[test]
    fn attempts_in_flight_are_counted_by_guards() {
        let health = Arc::new(Health::default());
        let attempt = health.enter(NOW, 1);
        assert_eq!(health.in_flight(), 1);
        drop(attempt);
        assert_eq!(health.in_flight(), 0);
    }

    #[test]
    fn a_probe_that_is_dropped_or_panics_frees_its_place() {
        let health = opened();
        drop(health.enter(NOW + 1_000, 1).unwrap());
        let panicked = std::thread::spawn({
            let health = Arc::clone(&health);
            move || {
                let _probe = health.enter(NOW + 1_000, 1).unwrap();
                std::panic::resume_unwind(Box::new("the request ends badly"));
            }
        });
        assert!(panicked.join().is_err());
        assert_eq!(health.in_flight(), 0);
        assert!(health.enter(NOW + 1_000, 1).is_some_and(|attempt| attempt.is_probe()));
    }

    #[test]
    fn of_a_crowd_one_is_the_probe() {
        for _ in 0..200 {
            let health = opened();
            let probe_is_out = AtomicBool::new(false);
            let run = || {
                for _ in 0..20 {
                    if let Some(_probe) = health.enter(NOW + 1_000, 1) {
                        assert!(!probe_is_out.swap(true, Relaxed), "two probes at once");
                        std::thread::yield_now();
                        probe_is_out.store(false, Relaxed);
                    }
                }
            };
            std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(run))));
            assert_eq!((health.in_flight(), health.fitness(NOW + 1_000, 1)), (0, Fitness::Preferred));
        }
    }

    #[test]
    fn the_numbers_agree_with_what_is_locked() {
        let health = Arc::new(Health::default());
        let outcomes = [
            Outcome::Success,
            Outcome::Failure,
            Outcome::Failure,
            Outcome::Limited { for_ms: Some(3) },
            Outcome::Neutral,
            Outcome::Refused,
        ];
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let health = Arc::clone(&health);
                scope.spawn(move || {
                    for (step, outcome) in (0..3_000_u64).zip(outcomes.iter().cycle()) {
                        let now = NOW + step;
                        if let Some(attempt) = health.enter(now, step % 50) {
                            attempt.see_allowance(&remaining(step % 7, step % 90), now);
                            attempt.record(*outcome, now, 0.5);
                        } else if step % 5 == thread {
                            health.free(now);
                        }
                    }
                });
            }
        });
        assert_eq!(health.in_flight(), 0);
        let mut inner = health.lock();
        assert_eq!(health.ready_at_ms.load(Relaxed), inner.breaker.ready_at_ms());
        for (tokens, later) in (0..120).flat_map(|tokens| [0, 2_999, 8_001].map(|later| (tokens, later))) {
            let now = NOW + later;
            let is_spent = inner.allowance.is_spent(tokens, now);
            let outlook = Outlook {
                tokens: health.certain_tokens.load(Relaxed),
                until_ms: health.certain_until_ms.load(Relaxed),
            };
            assert!(!(is_spent && outlook.is_certain(tokens, now)), "{tokens} tokens at {later}");
        }
    }
}
