//! What this replica has to ask and to tell Redis, in the order in which it came about.
//!
//! The order is what makes corrections exact: an ask brings along what this replica held at that moment, and a correction
//! counts before or after it, in Redis as here. Only who joins an earlier ask overtakes what came about in between: never what
//! adds to anything, and if it was refused for want of what was given back, it asks again. Corrections of the same subject
//! with no ask between them become one, so that a thousand rows that are booked at once cost one of each subject.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use foldhash::quality::RandomState;
use tollgate_core::limit::{Month, Subject, state::Demand};

use super::{
    redis_ask::{Ask, Asker},
    redis_wire::{Change, Known},
};

/// Corrections that may wait; beyond them Redis is told the sums anew instead.
const MAX_CHANGES: usize = 65_536;
/// Requests that may wait; those beyond are decided without Redis.
const MAX_ASKERS: usize = 65_536;
/// Asks in one batch: a script holds everybody else up for as long as it runs.
const ASKS_AT_ONCE: usize = 64;
/// Requests that are asked for together: if they are refused, each of them asks again.
const TOGETHER: usize = 256;
/// Corrections in one batch.
const CHANGES_AT_ONCE: usize = 512;

/// One thing to ask or to tell.
#[derive(Debug)]
pub(super) enum Step {
    /// Requests.
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
    askers: usize,
    /// Asks that others may join, by their place in `steps`.
    open: HashMap<Arc<[Demand]>, usize, RandomState>,
    /// The corrections since the last ask, by their place in `steps`.
    recent: HashMap<Subject, usize, RandomState>,
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

    /// A new session: Redis is told sums instead of corrections. Who waits asks again.
    pub fn renew(&mut self) {
        let new = Self { session: self.session.wrapping_add(1), ..Self::default() };
        let old = std::mem::replace(self, new);
        let asks = old.steps.into_iter().filter_map(|step| if let Step::Ask(ask) = step { Some(ask) } else { None });
        asks.for_each(Ask::forget);
    }

    /// Adds a request, unless too many wait. `known` reads what this replica knows of each subject.
    ///
    /// If it `may_join` others that are bound by the same, it is asked for with them, in their place: what came about since
    /// then counts after it.
    pub fn ask(
        &mut self,
        demands: &Arc<[Demand]>,
        month: Month,
        asker: Asker,
        may_join: bool,
        known: impl FnOnce() -> Vec<Known>,
    ) {
        if self.askers >= MAX_ASKERS {
            return;
        }
        self.askers += 1;
        let open = self.open.get(demands).filter(|_| may_join).copied();
        if let Some(Step::Ask(ask)) = open.and_then(|place| self.steps.get_mut(place))
            && ask.month == month
            && ask.askers.len() < TOGETHER
        {
            ask.askers.push(asker);
            ask.is_joined = true;
            return;
        }
        if may_join {
            self.open.insert(Arc::clone(demands), self.steps.len());
        }
        self.asks += 1;
        let (demands, askers) = (Arc::clone(demands), vec![asker]);
        self.steps.push_back(Step::Ask(Ask { demands, known: known(), month, askers, is_joined: false }));
        self.recent.clear();
    }

    /// Adds a correction.
    pub fn tell(&mut self, change: Change) {
        if change.adds() {
            self.open.clear();
        }
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
        let count = self.at_once();
        self.take(count)
    }

    /// Takes out the next requests, with what came about before them: what came about after the last waits for others to
    /// take it along. Empty if nobody asks.
    pub fn next_asks(&mut self) -> Vec<Step> {
        if self.asks == 0 {
            return Vec::new();
        }
        let most = self.at_once();
        let last = self.steps.range(..most).rposition(|step| matches!(step, Step::Ask(_)));
        self.take(last.map_or(most, |last| last + 1))
    }

    /// Is all that waits sent next?
    pub fn is_short(&self) -> bool {
        self.asks <= ASKS_AT_ONCE && self.steps.len() - self.asks <= CHANGES_AT_ONCE
    }

    /// How many steps one batch takes.
    fn at_once(&self) -> usize {
        let (mut asks, mut changes) = (0, 0);
        let fits = |step: &&Step| {
            match step {
                Step::Ask(_) => asks += 1,
                Step::Change(_) => changes += 1,
            }
            asks <= ASKS_AT_ONCE && changes <= CHANGES_AT_ONCE
        };
        self.steps.iter().take_while(fits).count()
    }

    fn take(&mut self, count: usize) -> Vec<Step> {
        let taken: Vec<Step> = self.steps.drain(..count).collect();
        for ask in taken.iter().filter_map(|step| if let Step::Ask(ask) = step { Some(ask) } else { None }) {
            self.asks -= 1;
            self.askers -= ask.askers.len();
        }
        let moves_up = |place: &mut usize| place.checked_sub(count).inspect(|left| *place = *left).is_some();
        self.open.retain(|_, place| moves_up(place));
        self.recent.retain(|_, place| moves_up(place));
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::{super::redis_ask::Answer, *};
    use tokio::sync::oneshot;
    use tollgate_core::{
        id::UserId,
        limit::{Amount, Caps, state::Need},
    };

    fn user(id: i64) -> Subject {
        Subject::User(UserId(id))
    }

    fn booked(id: i64, tokens: u64) -> Change {
        let amount = Amount { tokens, nano_usd: 2 * tokens };
        Change { release: amount, booked: Some((Month(1), amount)), ..Change::of(user(id)) }
    }

    fn demands(id: i64) -> Arc<[Demand]> {
        [Demand { subject: user(id), caps: Caps::default() }].into()
    }

    /// Nobody waits for the answer.
    fn asker() -> Asker {
        Asker { times: 1, need: Need::default(), answer: oneshot::channel().0 }
    }

    fn ask(queue: &mut Queue, id: i64, may_join: bool) {
        queue.ask(&demands(id), Month(1), asker(), may_join, Vec::new);
    }

    /// Corrections as 0, asks as how many wait for their answer.
    fn shape(steps: &[Step]) -> Vec<usize> {
        let of = |step: &Step| if let Step::Ask(ask) = step { ask.askers.len() } else { 0 };
        steps.iter().map(of).collect()
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
        ask(&mut queue, 1, false);
        queue.tell(booked(1, 2));
        queue.tell(booked(1, 3));
        assert_eq!(shape(&queue.next()), [0, 1, 0]);
    }

    #[test]
    fn those_who_may_join_an_earlier_ask_of_the_same() {
        let mut queue = Queue::default();
        ask(&mut queue, 1, true);
        queue.tell(booked(1, 1));
        ask(&mut queue, 1, true);
        ask(&mut queue, 2, true);
        ask(&mut queue, 1, true);
        ask(&mut queue, 1, false);
        ask(&mut queue, 2, true);
        queue.ask(&demands(2), Month(2), asker(), true, Vec::new);
        assert_eq!(shape(&queue.next()), [3, 0, 2, 1, 1]);
        ask(&mut queue, 1, true);
        queue.tell(Change { more: 1, ..Change::of(user(3)) });
        ask(&mut queue, 1, true);
        assert_eq!(shape(&queue.next()), [1, 0, 1], "what adds is not overtaken");
        ask(&mut queue, 1, true);
        assert_eq!(shape(&queue.next()), [1], "what was sent is not joined any more");
        (0..=TOGETHER).for_each(|_| ask(&mut queue, 1, true));
        assert_eq!(shape(&queue.next()), [TOGETHER, 1]);
    }

    #[test]
    fn what_came_after_the_last_request_waits_for_others_to_take_it_along() {
        let mut queue = Queue::default();
        queue.tell(booked(1, 1));
        assert!(queue.next_asks().is_empty(), "nobody asks");
        ask(&mut queue, 1, true);
        queue.tell(booked(1, 2));
        queue.tell(booked(2, 2));
        assert_eq!(shape(&queue.next_asks()), [0, 1]);
        queue.tell(booked(1, 3));
        ask(&mut queue, 1, true);
        ask(&mut queue, 1, true);
        assert_eq!(shape(&queue.next_asks()), [0, 0, 2], "corrections of the same are still one");
        assert!(queue.is_empty());
    }

    #[test]
    fn a_batch_is_bounded_and_keeps_the_order() {
        let mut queue = Queue::default();
        (0..ASKS_AT_ONCE + 1).for_each(|_| ask(&mut queue, 1, false));
        assert_eq!(queue.next_asks().len(), ASKS_AT_ONCE);
        assert_eq!(queue.next().len(), 1);
        assert!(queue.is_empty());
        for n in 0..CHANGES_AT_ONCE + 1 {
            queue.tell(booked(n as i64, 1));
        }
        ask(&mut queue, 1, false);
        assert_eq!(queue.next_asks().len(), CHANGES_AT_ONCE);
        assert_eq!(shape(&queue.next_asks()), [0, 1]);
    }

    #[test]
    fn who_waits_when_a_session_ends_asks_again() {
        let mut queue = Queue::default();
        let (answer, mut waiting) = oneshot::channel();
        queue.ask(&demands(1), Month(1), Asker { answer, ..asker() }, true, Vec::new);
        queue.renew();
        assert!(matches!(waiting.try_recv(), Ok(Answer::Forgotten)) && queue.is_empty());
    }

    #[test]
    fn so_many_may_wait() {
        let mut queue = Queue::default();
        (0..=MAX_ASKERS).for_each(|n| ask(&mut queue, n as i64 % 100, true));
        let mut waiting = 0;
        while !queue.is_empty() {
            waiting += shape(&queue.next_asks()).iter().sum::<usize>();
        }
        assert_eq!(waiting, MAX_ASKERS);
    }

    #[test]
    fn too_many_corrections_begin_a_new_session() {
        let mut queue = Queue::default();
        (0..=MAX_CHANGES).for_each(|n| queue.tell(booked(n as i64, 1)));
        assert_eq!(queue.session(), 1);
        assert!(queue.is_empty());
    }
}
