//! The pool: which upstream takes the next request.
//!
//! Lowest priority number first; within one priority, smooth weighted round robin (the algorithm of nginx, commit
//! 52327e0): each pick adds every eligible member's weight to its running value, takes the largest, and subtracts the sum.
//! Over any window the shares are exact and evenly interleaved: weights 5, 1, 1 give a a b a c a a, never a burst of five.
//!
//! The running values are the only state. They sit behind a mutex that is held for a few additions and never across an
//! await; a tier with one eligible member does not even take it.

use std::sync::{Mutex, PoisonError};

/// Upstreams that serve one set of models, in order of preference. Members are indexes into the snapshot's upstreams.
#[derive(Debug)]
pub struct Pool {
    tiers: Vec<Tier>,
}

#[derive(Debug)]
struct Tier {
    members: Vec<Member>,
    running: Mutex<Vec<i64>>,
}

#[derive(Clone, Copy, Debug)]
struct Member {
    index: usize,
    weight: i64,
}

impl Pool {
    /// Makes a pool of `(index, priority, weight)`. Members of weight 0 are left out: they get no work.
    #[must_use]
    pub fn new(members: impl IntoIterator<Item = (usize, u32, u32)>) -> Self {
        let mut sorted: Vec<_> = members.into_iter().filter(|(_, _, weight)| *weight > 0).collect();
        sorted.sort_by_key(|(_, priority, _)| *priority);
        let tiers = sorted
            .chunk_by(|a, b| a.1 == b.1)
            .map(|chunk| {
                Tier::new(chunk.iter().map(|&(index, _, weight)| Member { index, weight: weight.into() }).collect())
            })
            .collect();
        Self { tiers }
    }

    /// Picks a member for which `eligible(index)` holds.
    #[must_use]
    pub fn pick(&self, eligible: impl Fn(usize) -> bool) -> Option<usize> {
        self.tiers.iter().find_map(|tier| tier.pick(&eligible))
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
    fn new(members: Vec<Member>) -> Self {
        let running = Mutex::new(vec![0; members.len()]);
        Self { members, running }
    }

    fn pick(&self, eligible: impl Fn(usize) -> bool) -> Option<usize> {
        let mut candidates = self.members.iter().filter(|member| eligible(member.index));
        let first = candidates.next()?;
        if candidates.next().is_none() {
            return Some(first.index);
        }
        // Poisoned only if a panic hit between two additions; the values are still usable.
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let mut total = 0;
        let mut best: Option<usize> = None;
        for (at, member) in self.members.iter().enumerate().filter(|(_, member)| eligible(member.index)) {
            running[at] += member.weight;
            total += member.weight;
            if best.is_none_or(|b| running[at] > running[b]) {
                best = Some(at);
            }
        }
        let best = best?;
        running[best] -= total;
        Some(self.members[best].index)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Pool;

    #[test]
    fn picks_are_interleaved_by_weight() {
        let pool = Pool::new([(0, 0, 5), (1, 0, 1), (2, 0, 1)]);
        let picks: Vec<_> = (0..7).filter_map(|_| pool.pick(|_| true)).collect();
        assert_eq!(picks, [0, 0, 1, 0, 2, 0, 0]);
    }

    #[test]
    fn the_next_priority_is_used_only_when_the_first_has_nobody() {
        let pool = Pool::new([(0, 1, 9), (1, 0, 1), (2, 0, 0)]);
        assert_eq!(pool.pick(|_| true), Some(1));
        assert_eq!(pool.pick(|index| index != 1), Some(0));
        assert_eq!(pool.pick(|index| index == 2), None, "weight 0 gets nothing");
        assert!(!pool.any(|index| index == 2));
    }

    proptest! {
        #[test]
        fn shares_follow_the_weights(weights in prop::collection::vec(0_u32..50, 1..6)) {
            let total: u32 = weights.iter().sum();
            let pool = Pool::new(weights.iter().enumerate().map(|(index, weight)| (index, 0, *weight)));
            let mut counts = vec![0_u32; weights.len()];
            for _ in 0..total * 3 {
                counts[pool.pick(|_| true).unwrap()] += 1;
            }
            let expected: Vec<_> = weights.iter().map(|weight| weight * 3).collect();
            prop_assert_eq!(counts, expected);
        }

        #[test]
        fn what_was_tried_is_not_picked_again(weights in prop::collection::vec(1_u32..9, 1..6), rounds in 1_usize..20) {
            let pool = Pool::new(weights.iter().enumerate().map(|(index, weight)| (index, 0, *weight)));
            for _ in 0..rounds {
                let mut tried = Vec::new();
                while let Some(index) = pool.pick(|index| !tried.contains(&index)) {
                    tried.push(index);
                }
                tried.sort_unstable();
                prop_assert_eq!(&tried, &(0..weights.len()).collect::<Vec<_>>());
            }
        }
    }
}
