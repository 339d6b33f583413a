//! The pool: which upstream takes the next request.
//!
//! Lowest priority number first. Within one priority a [`Strategy`] decides:
//!
//! * **Weighted**: smooth weighted round robin (the algorithm of nginx, commit 52327e0): each pick adds every eligible
//!   member's weight to its running value, takes the largest, and subtracts the sum. Over any window the shares are exact and
//!   evenly interleaved: weights 5, 1, 1 give a a b a c a a, never a burst of five.
//! * **Least in flight**: the fewest attempts in flight for the weight; equals take turns by the rule above. It gives slow
//!   members less than their weight says, and those that fail at once more, until their breaker opens.
//! * **Sticky**: the same key to the same member as long as that is eligible, so that the provider's prompt cache is of use.
//!   See [`sticky_hash`]. Without a key, as weighted.
//!
//! **Eligibility has two grades.** A member that foresight takes for spent is asked only when nobody of *any* priority is
//! better off, since a request that is refused costs an attempt. It is asked then, in the same order, because foresight may be
//! wrong and a refusal by the gateway would be certain.
//!
//! The running values are the only state. They sit behind a mutex that is held for a few additions and never across an
//! await; a tier with one eligible member does not even take it. A pick allocates nothing: it asks for a member's fitness
//! again rather than write it down. The answer may change in between, so that a pick fails or finds one that has just become
//! unfit. Whoever picks finds out when it enters, and picks again.

mod sticky;
mod strategy;

pub use sticky::sticky_hash;
pub use strategy::{Fitness, Strategy};

use std::{
    cmp::Ordering,
    sync::{Mutex, PoisonError},
};

/// What a pool must know of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its place among the snapshot's upstreams.
    pub index: usize,
    /// Lower numbers are used first.
    pub priority: u32,
    /// Share of the work among members of the same priority. 0: gets none.
    pub weight: u32,
    /// [`sticky_hash`] of its name: what stays the same over snapshots and replicas.
    pub identity: u64,
}

/// Upstreams that serve one set of models, in order of preference. Members are indexes into the snapshot's upstreams.
#[derive(Debug)]
pub struct Pool {
    tiers: Vec<Tier>,
}

#[derive(Debug)]
struct Tier {
    members: Vec<Place>,
    running: Mutex<Vec<i64>>,
}

impl Pool {
    /// Makes a pool. Members of weight 0 are left out: they get no work.
    #[must_use]
    pub fn new(members: impl IntoIterator<Item = Place>) -> Self {
        let mut sorted: Vec<_> = members.into_iter().filter(|member| member.weight > 0).collect();
        sorted.sort_by_key(|member| member.priority);
        let tiers = sorted.chunk_by(|a, b| a.priority == b.priority).map(|chunk| Tier::new(chunk.to_vec())).collect();
        Self { tiers }
    }

    /// Picks a member that is preferred, else one that is a last resort.
    ///
    /// `sticky` is the [`sticky_hash`] of the request's key, if it has one; `fit` and `in_flight` say of an index whether it
    /// may get the request, and how many attempts it has under way.
    #[must_use]
    pub fn pick(
        &self,
        strategy: Strategy,
        sticky: Option<u64>,
        fit: impl Fn(usize) -> Fitness,
        in_flight: impl Fn(usize) -> u32,
    ) -> Option<usize> {
        let among = |least: Fitness| {
            let eligible = |member: &Place| fit(member.index) >= least;
            self.tiers.iter().find_map(|tier| match (strategy, sticky) {
                (Strategy::LeastInFlight, _) => tier.least_in_flight(eligible, &in_flight),
                (Strategy::Sticky, Some(key)) => tier.sticky(eligible, key),
                (Strategy::Weighted, _) | (Strategy::Sticky, None) => tier.weighted(eligible),
            })
        };
        among(Fitness::Preferred).or_else(|| among(Fitness::LastResort))
    }

    /// Is there a member for which `eligible(index)` holds?
    #[must_use]
    pub fn any(&self, eligible: impl Fn(usize) -> bool) -> bool {
        self.members().any(eligible)
    }

    /// Indexes of all members, in order of preference.
    pub fn members(&self) -> impl Iterator<Item = usize> {
        self.tiers.iter().flat_map(|tier| tier.members.iter().map(|member| member.index))
    }
}

impl Tier {
    fn new(members: Vec<Place>) -> Self {
        let running = Mutex::new(vec![0; members.len()]);
        Self { members, running }
    }

    fn weighted(&self, eligible: impl Fn(&Place) -> bool) -> Option<usize> {
        let mut candidates = self.members.iter().filter(|member| eligible(member));
        let first = candidates.next()?;
        if candidates.next().is_none() {
            return Some(first.index);
        }
        // Poisoned only if a panic hit between two additions; the values are still usable.
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let mut total = 0;
        let mut best: Option<usize> = None;
        for (at, member) in self.members.iter().enumerate().filter(|(_, member)| eligible(member)) {
            running[at] += i64::from(member.weight);
            total += i64::from(member.weight);
            if best.is_none_or(|b| running[at] > running[b]) {
                best = Some(at);
            }
        }
        let best = best?;
        running[best] -= total;
        Some(self.members[best].index)
    }

    fn least_in_flight(&self, eligible: impl Fn(&Place) -> bool, in_flight: impl Fn(usize) -> u32) -> Option<usize> {
        let load = |member: &Place| (in_flight(member.index), member.weight);
        let candidates = self.members.iter().filter(|member| eligible(member));
        let (least, index) =
            candidates.map(|member| (load(member), member.index)).min_by(|a, b| compare_loads(a.0, b.0))?;
        let turn = self.weighted(|member| eligible(member) && compare_loads(load(member), least).is_le());
        turn.or(Some(index))
    }

    fn sticky(&self, eligible: impl Fn(&Place) -> bool, key: u64) -> Option<usize> {
        let score = |member: &Place| sticky::score(member.identity, key, member.weight);
        let candidates = self.members.iter().filter(|member| eligible(member));
        let best = candidates.map(|member| (score(member), member)).max_by(|(a, x), (b, y)| {
            // Equal scores are next to impossible; if they come, all replicas still agree.
            a.total_cmp(b).then(x.identity.cmp(&y.identity))
        });
        best.map(|(_, member)| member.index)
    }
}

/// Compares attempts in flight per weight, without dividing.
fn compare_loads((a, a_weight): (u32, u32), (b, b_weight): (u32, u32)) -> Ordering {
    (u64::from(a) * u64::from(b_weight)).cmp(&(u64::from(b) * u64::from(a_weight)))
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, collections::BTreeSet};

    use proptest::prelude::*;

    use super::{
        Fitness::{self, LastResort, No, Preferred},
        Place, Pool, Strategy, sticky_hash,
    };

    fn place(index: usize, priority: u32, weight: u32) -> Place {
        Place { index, priority, weight, identity: sticky_hash(format!("upstream-{index}").as_bytes()) }
    }

    fn pool(weights: &[u32]) -> Pool {
        Pool::new(weights.iter().enumerate().map(|(index, weight)| place(index, 0, *weight)))
    }

    /// A weighted pick among those for which `eligible` holds.
    fn pick(pool: &Pool, eligible: impl Fn(usize) -> bool) -> Option<usize> {
        pool.pick(Strategy::Weighted, None, |index| if eligible(index) { Preferred } else { No }, |_| 0)
    }

    fn pick_sticky(pool: &Pool, key: u64, eligible: impl Fn(usize) -> bool) -> Option<usize> {
        pool.pick(Strategy::Sticky, Some(key), |index| if eligible(index) { Preferred } else { No }, |_| 0)
    }

    #[test]
    fn picks_are_interleaved_by_weight() {
        let pool = pool(&[5, 1, 1]);
        let picks: Vec<_> = (0..7).filter_map(|_| pick(&pool, |_| true)).collect();
        assert_eq!(picks, [0, 0, 1, 0, 2, 0, 0]);
    }

    #[test]
    fn the_next_priority_is_used_only_when_the_first_has_nobody() {
        let pool = Pool::new([place(0, 1, 9), place(1, 0, 1), place(2, 0, 0)]);
        for (strategy, sticky) in strategies() {
            let pick = |fit: &dyn Fn(usize) -> Fitness| pool.pick(strategy, sticky, fit, |index| [9, 8, 7][index]);
            assert_eq!(pick(&|_| Preferred), Some(1));
            assert_eq!(pick(&|index| if index == 1 { No } else { Preferred }), Some(0));
            assert_eq!(pick(&|index| if index == 2 { Preferred } else { No }), None, "weight 0 gets nothing");
        }
        assert!(!pool.any(|index| index == 2));
        assert_eq!(pool.members().collect::<Vec<_>>(), [1, 0]);
    }

    #[test]
    fn the_last_resort_waits_for_all_priorities() {
        let pool = Pool::new([place(0, 0, 1), place(1, 1, 1), place(2, 2, 1)]);
        for (strategy, sticky) in strategies() {
            let pick = |fits: [Fitness; 3]| pool.pick(strategy, sticky, |index| fits[index], |_| 0);
            assert_eq!(pick([LastResort, No, Preferred]), Some(2));
            assert_eq!(pick([No, LastResort, LastResort]), Some(1));
            assert_eq!(pick([No, No, No]), None);
        }
    }

    #[test]
    fn the_fewest_in_flight_for_the_weight_are_picked() {
        let pool = pool(&[4, 1, 1]);
        let pick = |in_flight: [u32; 3]| {
            pool.pick(Strategy::LeastInFlight, None, |_| Preferred, |index| in_flight[index]).unwrap()
        };
        assert_eq!(pick([3, 1, 2]), 0);
        assert_eq!(pick([9, 2, 3]), 1);
        assert_eq!(pick([u32::MAX, u32::MAX, u32::MAX - 1]), 0);
        let turns: Vec<_> = (0..6).map(|_| pick([8, 2, 2])).collect();
        assert_eq!(turns.iter().filter(|index| **index == 0).count(), 4, "equals take turns by weight: {turns:?}");
        assert_eq!(turns.iter().collect::<BTreeSet<_>>().len(), 3);
    }

    #[test]
    fn without_a_key_sticky_is_weighted() {
        let pool = pool(&[1, 1]);
        let picks: Vec<_> = (0..4).filter_map(|_| pool.pick(Strategy::Sticky, None, |_| Preferred, |_| 0)).collect();
        assert_eq!(picks, [0, 1, 0, 1]);
    }

    fn strategies() -> [(Strategy, Option<u64>); 3] {
        [(Strategy::Weighted, None), (Strategy::LeastInFlight, None), (Strategy::Sticky, Some(7))]
    }

    proptest! {
        #[test]
        fn shares_follow_the_weights(weights in prop::collection::vec(0_u32..50, 1..6)) {
            let total: u32 = weights.iter().sum();
            let pool = pool(&weights);
            let mut counts = vec![0_u32; weights.len()];
            for _ in 0..total * 3 {
                counts[pick(&pool, |_| true).unwrap()] += 1;
            }
            let expected: Vec<_> = weights.iter().map(|weight| weight * 3).collect();
            prop_assert_eq!(counts, expected);
        }

        #[test]
        fn what_was_tried_is_not_picked_again(
            members in prop::collection::vec((0_u32..3, 1_u32..9, any::<bool>()), 1..7),
            strategy in 0_usize..3,
            key: u64,
            rounds in 1_usize..20,
        ) {
            let places = members.iter().enumerate().map(|(index, (priority, weight, _))| place(index, *priority, *weight));
            let pool = Pool::new(places);
            for round in 0..rounds {
                let tried = RefCell::new(Vec::new());
                let fit = |index: usize| match (tried.borrow().contains(&index), members[index].2) {
                    (true, _) => No,
                    (false, true) => LastResort,
                    (false, false) => Preferred,
                };
                let in_flight = |index: usize| u32::try_from((index + round) % 3).unwrap();
                while let Some(index) = pool.pick(Strategy::ALL[strategy], Some(key), fit, in_flight) {
                    tried.borrow_mut().push(index);
                }
                let tried = tried.into_inner();
                let order = |index: &usize| (members[*index].2, members[*index].0);
                prop_assert!(tried.is_sorted_by_key(order), "grade, then priority: {tried:?}");
                prop_assert_eq!(tried.into_iter().collect::<BTreeSet<_>>(), (0..members.len()).collect());
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn shares_are_right_within_a_hundredth(weights in prop::collection::vec(1_u32..1_000, 1..9), skipped in 0_usize..9) {
            let pool = pool(&weights);
            let is_in = |index: usize| index != skipped || weights.len() == 1;
            let total: u32 = (0..weights.len()).filter(|index| is_in(*index)).map(|index| weights[index]).sum();
            let mut counts = vec![0_u32; weights.len()];
            for _ in 0..10_000 {
                counts[pick(&pool, is_in).unwrap()] += 1;
            }
            for index in (0..weights.len()).filter(|index| is_in(*index)) {
                let expected = f64::from(weights[index]) / f64::from(total) * 10_000.0;
                prop_assert!((f64::from(counts[index]) - expected).abs() <= 100.0, "{weights:?}: {counts:?}");
            }
        }

        #[test]
        fn sticky_shares_are_close_to_the_weights(weights in prop::collection::vec(0_u32..20, 1..9), seed: u64) {
            let total: u32 = weights.iter().sum();
            prop_assume!(total > 0);
            let pool = pool(&weights);
            let mut counts = vec![0_u32; weights.len()];
            for n in 0..10_000 {
                let key = sticky_hash(format!("{seed}/session-{n}").as_bytes());
                counts[pick_sticky(&pool, key, |_| true).unwrap()] += 1;
            }
            for (weight, count) in weights.iter().zip(&counts) {
                // Six standard deviations of 10,000 draws.
                let expected = f64::from(*weight) / f64::from(total);
                let tolerance = 6.0 * (expected * (1.0 - expected) / 10_000.0).sqrt();
                prop_assert!((f64::from(*count) / 10_000.0 - expected).abs() <= tolerance, "{weights:?}: {counts:?}");
            }
        }

        #[test]
        fn who_leaves_takes_only_its_own_keys_along(weights in prop::collection::vec(1_u32..20, 2..9), gone in 0_usize..9, seed: u64) {
            let gone = gone % weights.len();
            let all = pool(&weights);
            // The same members in another snapshot: in other places, without the one that is gone.
            let places = (0..weights.len()).rev().filter(|index| *index != gone);
            let fewer = Pool::new(places.map(|index| Place { index: index + 100, ..place(index, 0, weights[index]) }));
            for n in 0_u64..1_000 {
                let key = sticky_hash(&(seed ^ n).to_le_bytes());
                let before = pick_sticky(&all, key, |_| true).unwrap();
                prop_assert_eq!(pick_sticky(&all, key, |_| true), Some(before), "it stays");
                let after = pick_sticky(&all, key, |index| index != gone).unwrap();
                prop_assert!(after != gone && (before == gone || before == after));
                prop_assert_eq!(pick_sticky(&fewer, key, |_| true), Some(after + 100), "snapshots and replicas agree");
            }
        }

        #[test]
        fn a_weight_that_grows_only_attracts_keys(weights in prop::collection::vec(1_u32..20, 2..9), more in 1_u32..20, seed: u64) {
            let mut heavier = weights.clone();
            heavier[0] += more;
            let (before, after) = (pool(&weights), pool(&heavier));
            for n in 0_u64..1_000 {
                let key = sticky_hash(&(seed ^ n).to_le_bytes());
                let (old, new) = (pick_sticky(&before, key, |_| true), pick_sticky(&after, key, |_| true));
                prop_assert!(old == new || new == Some(0));
            }
        }

        #[test]
        fn least_in_flight_keeps_loads_in_proportion(weights in prop::collection::vec(1_u32..9, 1..7)) {
            let pool = pool(&weights);
            let loads = RefCell::new(vec![0_u32; weights.len()]);
            let total: u32 = weights.iter().sum();
            for _ in 0..total * 10 {
                let index = pool.pick(Strategy::LeastInFlight, None, |_| Preferred, |index| loads.borrow()[index]).unwrap();
                loads.borrow_mut()[index] += 1;
            }
            for (weight, load) in weights.iter().zip(loads.borrow().iter()) {
                prop_assert!(load.abs_diff(weight * 10) <= *weight, "{weights:?}: {loads:?}");
            }
        }
    }
}
