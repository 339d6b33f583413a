//! What this replica has to ask and to tell Redis, in the order in which it came about.
//!
//! The order is what makes corrections exact: an ask brings along what this replica held at that moment, and a correction
//! counts before or after it, in Redis as here. Corrections of the same subject with no ask between them become one, so
//! that a thousand rows that are booked at once cost one of each subject.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use tokio::sync::oneshot;
use tollgate_core::limit::{
    Month, Subject,
    state::{Demand, Need},
};

use super::{
    redis::Verdict,
    redis_wire::{Change, Known},
};

/// Corrections that may wait; beyond them Redis is told the sums anew instead.
const MAX_CHANGES: usize = 65_536;
/// Requests that may wait; those beyond are decided without Redis.
const MAX_ASKS: usize = 65_536;
/// Requests in one batch: a script holds everybody else up for as long as it runs.
const ASKS_AT_ONCE: usize = 64;
/// Corrections in one batch.
const CHANGES_AT_ONCE: usize = 512;

/// A request, or several alike, that wait for their verdict.
#[derive(Debug)]
pub(super) struct Ask {
    /// What binds it.
    pub demands: Arc<[Demand]>,
    /// What this replica knew of each subject when it asked.
    pub known: Vec<Known>,
    /// How many requests: all of them are admitted, or none.
    pub times: u32,
    /// What is to be reserved for each.
    pub need: Need,
    /// Whose quota it counts against.
    pub month: Month,
    /// Where the verdict is waited for.
    pub answer: oneshot::Sender<Verdict>,
}

/// One thing to ask or to tell.
#[derive(Debug)]
pub(super) enum Step {
    /// A request.
    Ask(Ask),
    /// A correction.
    Change(Change),
}

/// What waits, and the number under which Redis knows this replica's sums.
#[derive(Debug, Default)]
pub(super) struct Queue {
    session: u32,
    steps: VecDeque<Step>,
    asks: usize,
    /// The corrections since the last ask, by their place in `steps`.
    recent: HashMap<Subject, usize>,
}

impl Queue {
    /// The number under which Redis knows this replica's sums.
    pub fn session(&self) -> u32 {
        self.session
    }

    /// Does anything wait?
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// A new session: Redis is told sums instead of corrections. Who waits will not be answered.
    pub fn renew(&mut self) {
        *self = Self { session: self.session.wrapping_add(1), ..Self::default() };
    }

    /// Adds a request, unless too many wait.
    pub fn ask(&mut self, ask: Ask) {
        if self.asks < MAX_ASKS {
            self.asks += 1;
            self.steps.push_back(Step::Ask(ask));
            self.recent.clear();
        }
    }

    /// Adds a correction.
    pub fn tell(&mut self, change: Change) {
        let place = self.recent.get(&change.subject).copied();
        if let Some(Step::Change(earlier)) = place.and_then(|place| self.steps.get_mut(place))
            && earlier.take_in(&change)
        {
            return;
        }
        if self.steps.len() - self.asks >= MAX_CHANGES {
            self.renew();
            return;
        }
        self.recent.insert(change.subject.clone(), self.steps.len());
        self.steps.push_back(Step::Change(change));
    }

    /// Takes out what is to be sent next.
    pub fn next(&mut self) -> Vec<Step> {
        let (mut asks, mut changes) = (0, 0);
        let fits = |step: &&Step| {
            match step {
                Step::Ask(_) => asks += 1,
                Step::Change(_) => changes += 1,
            }
            asks <= ASKS_AT_ONCE && changes <= CHANGES_AT_ONCE
        };
        let count = self.steps.iter().take_while(fits).count();
        self.take(count)
    }

    /// Is all that waits sent next?
    pub fn is_short(&self) -> bool {
        self.asks <= ASKS_AT_ONCE && self.steps.len() - self.asks <= CHANGES_AT_ONCE
    }

    fn take(&mut self, count: usize) -> Vec<Step> {
        self.recent.clear();
        let taken: Vec<Step> = self.steps.drain(..count).collect();
        self.asks -= taken.iter().filter(|step| matches!(step, Step::Ask(_))).count();
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tollgate_core::{id::UserId, limit::Amount};

    fn user(id: i64) -> Subject {
        Subject::User(UserId(id))
    }

    fn booked(id: i64, tokens: u64) -> Change {
        let amount = Amount { tokens, nano_usd: 2 * tokens };
        Change { release: amount, booked: Some((Month(1), amount)), ..Change::of(user(id)) }
    }

    fn ask() -> Ask {
        let (answer, _) = oneshot::channel();
        Ask { demands: Arc::from([]), known: Vec::new(), times: 1, need: Need::default(), month: Month(1), answer }
    }

    #[test]
    fn what_is_booked_at_once_becomes_one_correction_of_each_subject() {
        let mut queue = Queue::default();
        (0..1000).for_each(|n| queue.tell(booked(n % 2, 3)));
        let steps = queue.next();
        let sums: Vec<_> = steps
            .iter()
            .map(|step| match step {
                Step::Change(change) => (change.release.tokens, change.booked),
                Step::Ask(_) => panic!("nobody asked"),
            })
            .collect();
        let sum = Amount { tokens: 1500, nano_usd: 3000 };
        assert_eq!(sums, [(1500, Some((Month(1), sum))), (1500, Some((Month(1), sum)))]);
    }

    #[test]
    fn corrections_keep_their_side_of_an_ask() {
        let mut queue = Queue::default();
        queue.tell(booked(1, 1));
        queue.ask(ask());
        queue.tell(booked(1, 2));
        queue.tell(booked(1, 3));
        let kinds: Vec<_> = queue.next().iter().map(|step| matches!(step, Step::Ask(_))).collect();
        assert_eq!(kinds, [false, true, false]);
    }

    #[test]
    fn a_batch_is_bounded_and_keeps_the_order() {
        let mut queue = Queue::default();
        (0..ASKS_AT_ONCE + 1).for_each(|_| queue.ask(ask()));
        assert_eq!(queue.next().len(), ASKS_AT_ONCE);
        assert_eq!(queue.next().len(), 1);
        assert!(queue.is_empty());
        for n in 0..CHANGES_AT_ONCE + 1 {
            queue.tell(booked(n as i64, 1));
        }
        assert_eq!(queue.next().len(), CHANGES_AT_ONCE);
    }

    #[test]
    fn too_many_corrections_begin_a_new_session() {
        let mut queue = Queue::default();
        (0..=MAX_CHANGES).for_each(|n| queue.tell(booked(n as i64, 1)));
        assert_eq!(queue.session(), 1);
        assert!(queue.is_empty());
    }
}
