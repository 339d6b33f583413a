//! The limiter within one process: every subject's state, and the decision over several of them.
//!
//! States live in shards, each behind one lock. A user, its keys and their models are in one shard, an address in another:
//! a decision takes two locks at the most, always in the order of the shards, looks at all states, and only then changes
//! them. So it is atomic, a refusal leaves no trace, and no two requests can wait for each other. (A lock per state was
//! measured: ten atomic operations more per request, twice the time.)
//!
//! There is room for [`MAX_SUBJECTS`]. What comes when its shard is full shares one state with all others of its kind
//! there: limits get tighter, never looser, and memory stays bounded whatever number of addresses calls. A sweep takes
//! out what is idle.

use std::{
    hash::BuildHasher,
    sync::{Mutex, MutexGuard, PoisonError},
};

use foldhash::quality::RandomState;
use indexmap::IndexMap;
use tollgate_core::limit::{
    Amount, Subject,
    standing::Standing,
    state::{Circumstances, Demand, Mirror, Need, Refusal, State},
    window::CELL_MS,
};

/// Subjects that have a state of their own. At most 1.2 KB each, 80 MB in all.
const MAX_SUBJECTS: usize = 65_536;
/// Enough that threads seldom meet.
const SHARDS: usize = 64;

/// Every subject that was heard of lately.
#[derive(Debug)]
pub struct Memory {
    shards: Vec<Mutex<Shard>>,
    hasher: RandomState,
}

type Shard = IndexMap<Subject, State, RandomState>;

/// What a request took: to be settled or undone, once.
#[derive(Clone, Copy, Debug, Default)]
pub struct Taken {
    /// The cell of the windows it went into.
    pub cell: u64,
    /// How much of each.
    pub need: Amount,
    /// Bit `n` is set if the demand at `n` found no room of its own.
    shared: u32,
}

impl Taken {
    /// Had the demand at `index` no room of its own?
    #[must_use]
    pub fn is_shared(&self, index: usize) -> bool {
        self.shared & (1 << index) != 0
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect(), hasher: RandomState::default() }
    }
}

impl Memory {
    /// Decides on a request and takes what it needs, in one step; says what is left of the windows then. `booked`: what the
    /// database has of this month; asked while the states are locked, so that what is let go because it is booked counts one
    /// way or the other. If a limit refuses, nothing was taken.
    pub fn admit(
        &self,
        demands: &[Demand],
        booked: impl Fn(&Demand) -> Amount,
        need: Need,
        at: Circumstances,
    ) -> (Result<Taken, Refusal>, Standing) {
        let mut locked = self.locked(demands);
        let refusals = demands
            .iter()
            .enumerate()
            .filter_map(|(index, demand)| locked.state(index).refusal(index, &demand.caps, need, booked(demand), at));
        let decision = match refusals.max_by_key(|refusal| refusal.wait) {
            Some(refusal) => Err(refusal),
            None => Ok(locked.take(demands, 1, need.amount, at.now_ms)),
        };
        let mut standing = Standing::default();
        for (index, demand) in demands.iter().enumerate() {
            locked.state(index).show(&demand.caps, at.now_ms, &mut standing);
        }
        (decision, standing)
    }

    /// Takes what a request needs without asking: it was admitted elsewhere.
    pub fn record(&self, demands: &[Demand], need: Amount, now_ms: u64) -> Taken {
        self.record_all(demands, 1, need, now_ms)
    }

    /// Takes what so many requests need without asking, `need` each; returns what each of them took.
    pub fn record_all(&self, demands: &[Demand], times: u64, need: Amount, now_ms: u64) -> Taken {
        self.locked(demands).take(demands, times, need, now_ms)
    }

    /// Corrects what was taken at each subject to the truth, which remains held where there is a quota.
    pub fn settle(&self, demands: &[Demand], taken: Taken, actual: Amount, now_ms: u64) {
        for (index, demand) in demands.iter().enumerate() {
            self.change(demand, taken, index, |state| {
                state.settle(&demand.caps, taken.cell, taken.need, actual, now_ms);
            });
        }
    }

    /// Undoes what was taken as if it had never been.
    pub fn undo(&self, demands: &[Demand], taken: Taken) {
        self.undo_all(demands, 1, taken);
    }

    /// Undoes what so many took, each of them the same.
    pub fn undo_all(&self, demands: &[Demand], times: u64, taken: Taken) {
        for (index, demand) in demands.iter().enumerate() {
            self.change(demand, taken, index, |state| state.undo(&demand.caps, taken.cell, times, taken.need));
        }
    }

    /// Lets go of what was held of the quota of `subject` after the settlement. `is_shared`: it had no room of its own.
    pub fn release(&self, subject: &Subject, is_shared: bool, held: Amount) {
        self.change_at(subject, is_shared, |state| state.release(held));
    }

    /// Replaces the copy of a subject's shared windows, if the subject is known.
    pub fn set_mirror(&self, subject: &Subject, mirror: Mirror, asked_ms: u64) {
        if let Some(state) = self.shard(subject).get_mut(subject) {
            state.set_mirror(mirror, asked_ms);
        }
    }

    /// Was anything of this subject admitted in the last minute, as far as is known here?
    pub fn is_recent(&self, subject: &Subject, now_ms: u64) -> bool {
        self.shard(subject).get_mut(subject).is_some_and(|state| state.is_recent(now_ms))
    }

    /// What this process holds of a subject: requests in flight, and amounts.
    #[must_use]
    pub fn holdings(&self, subject: &Subject) -> (u64, Amount) {
        let shard = self.shard(subject);
        shard.get(subject).map_or((0, Amount::default()), |state| (state.in_flight(), state.held()))
    }

    /// What other replicas are told that this process holds of a subject; see [`State::told`].
    #[must_use]
    pub fn told(&self, subject: &Subject) -> (u64, Amount) {
        self.shard(subject).get(subject).map_or((0, Amount::default()), State::told)
    }

    /// The subjects for which `is_wanted` holds, at most `most` of them.
    pub fn subjects(&self, most: usize, mut is_wanted: impl FnMut(&Subject, &mut State) -> bool) -> Vec<Subject> {
        let mut wanted = Vec::new();
        for shard in &self.shards {
            let mut shard = lock(shard);
            let found = shard.iter_mut().filter_map(|(subject, state)| is_wanted(subject, state).then_some(subject));
            wanted.extend(found.take(most - wanted.len()).cloned());
        }
        wanted
    }

    /// Takes out what is idle.
    pub fn sweep(&self, now_ms: u64) {
        for shard in &self.shards {
            lock(shard).retain(|_, state| !state.is_idle(now_ms));
        }
    }

    /// How many subjects there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).len()).sum()
    }

    /// Is there none?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn change(&self, demand: &Demand, taken: Taken, index: usize, act: impl FnOnce(&mut State)) {
        self.change_at(&demand.subject, taken.is_shared(index), act);
    }

    fn change_at(&self, subject: &Subject, is_shared: bool, act: impl FnOnce(&mut State)) {
        let mut shard = self.shard(subject);
        // What is held keeps its state from being swept.
        let state = if is_shared { shard.get_mut(&Subject::Others(subject.class())) } else { shard.get_mut(subject) };
        if let Some(state) = state {
            act(state);
        }
    }

    fn shard(&self, subject: &Subject) -> MutexGuard<'_, Shard> {
        lock(&self.shards[self.shard_of(subject)])
    }

    fn shard_of(&self, subject: &Subject) -> usize {
        let hash = match subject {
            Subject::Ip(ip) => self.hasher.hash_one(ip),
            Subject::User(user) | Subject::Key(user, _) | Subject::KeyModel(user, ..) => user.0.cast_unsigned(),
            Subject::Others(class) => *class as u64,
        };
        #[expect(clippy::cast_possible_truncation, reason = "less than the number of shards")]
        let shard = (hash % SHARDS as u64) as usize;
        shard
    }

    /// Locks the shards of all demands, in their order, and finds the state of each demand.
    fn locked(&self, demands: &[Demand]) -> Locked<'_> {
        let of: Vec<usize> = demands.iter().map(|demand| self.shard_of(&demand.subject)).collect();
        let mut order = of.clone();
        order.sort_unstable();
        order.dedup();
        let mut shards: Vec<MutexGuard<'_, Shard>> = order.iter().map(|&shard| lock(&self.shards[shard])).collect();
        let mut shared = 0;
        let places = demands.iter().zip(of).enumerate().map(|(index, (demand, shard))| {
            let guard = order.partition_point(|&other| other < shard);
            let (place, is_shared) = place_of(&mut shards[guard], &demand.subject);
            shared |= u32::from(is_shared) << index;
            (guard, place)
        });
        let places = places.collect();
        Locked { shards, places, shared }
    }
}

fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    // Numbers that are consistent enough: a panic between two of them is not possible in safe arithmetic.
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the state of a subject is, made if it is not there; and whether it is one that is shared.
fn place_of(shard: &mut Shard, subject: &Subject) -> (usize, bool) {
    if let Some(place) = shard.get_index_of(subject) {
        return (place, false);
    }
    if shard.len() < MAX_SUBJECTS / SHARDS {
        return (shard.insert_full(subject.clone(), State::default()).0, false);
    }
    let others = Subject::Others(subject.class());
    let place = shard.get_index_of(&others);
    (place.unwrap_or_else(|| shard.insert_full(others, State::default()).0), true)
}

/// The states of a request, locked.
struct Locked<'m> {
    shards: Vec<MutexGuard<'m, Shard>>,
    /// Shard (by its index in `shards`) and place in it, for each demand.
    places: Vec<(usize, usize)>,
    shared: u32,
}

impl Locked<'_> {
    fn state(&mut self, index: usize) -> &mut State {
        let (shard, place) = self.places[index];
        &mut self.shards[shard][place]
    }

    fn take(&mut self, demands: &[Demand], times: u64, need: Amount, now_ms: u64) -> Taken {
        for (index, demand) in demands.iter().enumerate() {
            self.state(index).reserve(&demand.caps, times, need, now_ms);
        }
        Taken { cell: now_ms / CELL_MS, need, shared: self.shared }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;
    use tollgate_core::{
        id::{KeyId, UserId},
        limit::{Caps, state::Share},
    };

    fn at(now_ms: u64) -> Circumstances {
        Circumstances::alone(now_ms, Share::WHOLE)
    }

    fn demand(subject: Subject, rpm: u64) -> Demand {
        Demand { subject, caps: Caps { rpm, ..Caps::default() } }
    }

    fn key(n: i64) -> Subject {
        Subject::Key(UserId(1), KeyId(n))
    }

    fn admits(memory: &Memory, demands: &[Demand]) -> bool {
        memory.admit(demands, |_| Amount::default(), Need::default(), at(0)).0.is_ok()
    }

    #[test]
    fn a_refusal_leaves_no_trace_at_any_subject() {
        let memory = Memory::default();
        let demands = [demand(Subject::User(UserId(1)), 100), demand(key(1), 1)];
        assert!(admits(&memory, &demands));
        assert!((0..50).all(|_| !admits(&memory, &demands)));
        let (_, standing) = memory.admit(&demands[..1], |_| Amount::default(), Need::default(), at(0));
        assert_eq!(standing.requests.unwrap().remaining, 98);
    }

    #[test]
    fn threads_together_get_what_there_is_and_no_more() {
        let memory = Memory::default();
        let ip = Subject::of_ip("10.0.0.1".parse().unwrap());
        let demands = [demand(ip, 700), demand(Subject::User(UserId(1)), 1000), demand(key(1), 500)];
        let backwards = [demand(Subject::User(UserId(2)), 1000), demands[0].clone()];
        let admitted = |demands: &[Demand]| (0..400).filter(|_| admits(&memory, demands)).count();
        let total: usize = thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| admitted(&demands))).collect();
            let other = scope.spawn(|| admitted(&backwards));
            let total = threads.into_iter().map(|thread| thread.join().unwrap()).sum::<usize>();
            assert!(total <= 500);
            total + other.join().unwrap()
        });
        assert!(total <= 700, "the address is shared");
    }

    #[test]
    fn a_full_table_makes_limits_tighter_not_looser() {
        let memory = Memory::default();
        let admit = |n: u32| {
            let demands = [demand(Subject::of_ip(std::net::Ipv4Addr::from(n).into()), 1)];
            let (decision, _) = memory.admit(&demands, |_| Amount::default(), Need::default(), at(0));
            decision.is_ok_and(|taken| {
                memory.settle(&demands, taken, Amount::default(), 0);
                true
            })
        };
        let admitted = (0..100_000).filter(|n| admit(*n)).count();
        assert_eq!(admitted, MAX_SUBJECTS + SHARDS, "in each shard the rest shares one");
        assert_eq!(memory.len(), MAX_SUBJECTS + SHARDS);
        memory.sweep(30_000);
        assert_eq!(memory.len(), MAX_SUBJECTS + SHARDS, "all are within their minute");
        memory.sweep(61_000);
        assert!(memory.is_empty());
    }

    #[test]
    fn a_sweep_never_doubles_a_limit() {
        let memory = Memory::default();
        let demands = [demand(key(1), 50)];
        let total: usize = thread::scope(|scope| {
            let sweeper = scope.spawn(|| (0..2_000).for_each(|_| memory.sweep(0)));
            let total = (0..5000).filter(|_| admits(&memory, &demands)).count();
            sweeper.join().unwrap();
            total
        });
        assert_eq!(total, 50);
    }
}
