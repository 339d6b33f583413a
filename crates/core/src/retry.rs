//! The retry budget of the process: how many retries its traffic pays for.
//!
//! A retry helps against the failure of one upstream, and multiplies the load when all of them fail, which is when they can
//! least bear it: three attempts per request are three times the traffic. An attempt count per request does not prevent
//! that, a budget for all of them does. Each request deposits a share of a retry, each retry withdraws a whole one, so that in
//! an outage the upstreams get a fifth more than without retries, whatever the attempt count.
//!
//! A share of little traffic is nothing, and a gateway with one request per second should retry its only request. So a
//! deposit is worth at least one retry per second since the last deposit, and at most one. The balance is capped: what a
//! calm day saved up must not be spent in the first second of an outage.
//!
//! **Guarantee**: over any run, retries <= initial + share * requests + seconds + 1. A property test holds it to that.
//!
//! Every request passes here, so there is no lock, and no write while the balance is at its cap, which is where it is as long
//! as all is well. Counting is in thousandths, without floating point.

use std::sync::atomic::{AtomicU64, Ordering};

/// One retry, in the unit of the balance.
const RETRY: u64 = 1_000;

/// What the budget goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Retries that 100 requests pay for.
    pub percent: u32,
    /// Retries that are there at the start.
    pub initial: u32,
    /// Retries that can be saved up.
    pub most: u32,
}

impl Default for Rules {
    fn default() -> Self {
        Self { percent: 20, initial: 10, most: 100 }
    }
}

/// The retry budget.
#[derive(Debug)]
pub struct Budget {
    share: u64,
    cap: u64,
    balance: AtomicU64,
    last_deposit_ms: AtomicU64,
}

impl Default for Budget {
    fn default() -> Self {
        Self::new(Rules::default())
    }
}

impl Budget {
    /// A budget with its initial balance.
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        let cap = u64::from(rules.most) * RETRY;
        Self {
            share: u64::from(rules.percent) * RETRY / 100,
            cap,
            balance: AtomicU64::new((u64::from(rules.initial) * RETRY).min(cap)),
            last_deposit_ms: AtomicU64::new(0),
        }
    }

    /// A request came in.
    pub fn deposit(&self, now_ms: u64) {
        if self.balance.load(Ordering::Relaxed) >= self.cap {
            return;
        }
        // Whoever moves the time on is paid for the time: no second is paid for twice.
        let last_ms = self.last_deposit_ms.fetch_max(now_ms, Ordering::Relaxed);
        let worth = now_ms.saturating_sub(last_ms).min(RETRY).max(self.share);
        self.change(|balance| Some(balance.saturating_add(worth).min(self.cap)));
    }

    /// Is there a retry left? Takes it.
    #[must_use]
    pub fn withdraw(&self) -> bool {
        self.change(|balance| balance.checked_sub(RETRY))
    }

    /// Retries that are left.
    #[must_use]
    pub fn balance(&self) -> u64 {
        self.balance.load(Ordering::Relaxed) / RETRY
    }

    fn change(&self, change: impl FnMut(u64) -> Option<u64>) -> bool {
        self.balance.fetch_update(Ordering::Relaxed, Ordering::Relaxed, change).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: u64 = 1_000_000;

    #[test]
    fn an_outage_is_not_multiplied() {
        let budget = Budget::default();
        // 100 requests a second, each of which would retry twice.
        let (mut retries, requests) = (0, 10_000);
        for at in 0..requests {
            budget.deposit(NOW + at * 10);
            retries += (0..2).filter(|_| budget.withdraw()).count();
        }
        assert_eq!(retries, 10 + 2_000, "the initial balance, and a fifth");
    }

    #[test]
    fn little_traffic_may_retry() {
        let budget = Budget::new(Rules { initial: 0, ..Rules::default() });
        assert!(!budget.withdraw());
        for at in 0..100 {
            budget.deposit(NOW + at * 1_000);
            assert!(budget.withdraw() && !budget.withdraw(), "one a second, {at}");
        }
    }

    #[test]
    fn what_is_saved_up_is_capped() {
        let budget = Budget::new(Rules { percent: 100, initial: 500, most: 3 });
        (0..100).for_each(|at| budget.deposit(NOW + at));
        assert_eq!(budget.balance(), 3);
        assert_eq!((0..9).filter(|_| budget.withdraw()).count(), 3);
        let none = Budget::new(Rules { percent: 0, initial: 0, most: 0 });
        none.deposit(NOW);
        assert!(!none.withdraw(), "a cap of nothing turns retries off");
    }

    #[test]
    fn no_retry_is_given_twice() {
        let budget = Budget::new(Rules { percent: 20, initial: 10, most: 1_000_000 });
        let retries: usize = std::thread::scope(|scope| {
            let run = || {
                (0..5_000_u64)
                    .filter(|at| {
                        budget.deposit(NOW + at / 10);
                        budget.withdraw()
                    })
                    .count()
            };
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(run)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert!((4_000..=10 + 4_000 + 2).contains(&retries), "{retries}");
    }

    proptest! {
        #[test]
        fn traffic_pays_for_every_retry(
            percent in 0_u32..120,
            initial in 0_u32..30,
            most in 0_u32..200,
            steps in prop::collection::vec((0_u64..3_000, -500_i64..500, 0_usize..5), 1..300),
        ) {
            let budget = Budget::new(Rules { percent, initial, most });
            let (mut now, mut retries, mut requests, mut passed) = (NOW, 0_u64, 0_u64, 0);
            for (wait, skew, wanted) in steps {
                (now, passed) = (now + wait, passed + wait);
                // Clocks of threads are read in one order and arrive in another.
                budget.deposit(now.saturating_add_signed(skew));
                requests += 1;
                retries += (0..wanted).filter(|_| budget.withdraw()).count() as u64;
                let paid = u64::from(initial) * 1_000 + requests * u64::from(percent) * 10 + passed + 500 + 1_000;
                prop_assert!(retries * 1_000 <= paid, "{retries} retries, {paid} thousandths paid");
            }
        }

        #[test]
        fn any_clock_is_borne(times in prop::collection::vec(any::<u64>(), 1..50), percent: u32, most: u32) {
            let budget = Budget::new(Rules { percent, initial: most, most });
            for now in times {
                budget.deposit(now);
                let _ = budget.withdraw();
                prop_assert!(budget.balance() <= most.into());
            }
        }
    }
}
