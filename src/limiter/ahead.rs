//! Admissions made ahead: a caller that sends many requests a second does not wait for Redis with each of them.
//!
//! Redis is asked for as many admissions as the caller is about to use, together, in one decision; its requests take them
//! from here. How many, and whether the limits leave ample room for that, is in [`ahead`](tollgate_core::limit::ahead).
//!
//! **It is the same law.** What is admitted ahead is counted in the second of Redis's clock in which Redis was asked, and may
//! only be used while that second lasts. Redis's clock was read after it was asked; so counted from the moment of asking, what was
//! left of its second then is over too early rather than too late. The same holds for the cell of this process. A request that
//! takes such an admission is counted in the second in which it is sent, as if it had asked itself.
//!
//! Requests that find nothing in stock while their limits leave ample room are asked for together, also with what is to be in
//! stock: otherwise the few milliseconds at the beginning of each second, when there is none, would cost Redis more than all
//! the rest of it.
//!
//! Admissions that are not used are what is left of a [`Lot`] that is dropped: that undoes them, here and in Redis. None
//! outlives the link to Redis or the session it was made in.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use foldhash::quality::RandomState;
use tokio::time::sleep;
use tollgate_core::limit::{
    Amount, Month,
    ahead::{InUse, PERIOD_MS, Pace, is_usable, room, usable_until_ms},
    standing::Standing,
    state::{Demand, Need},
    window::CELL_MS,
};

use super::{
    Admission, Limiter, Plan, Reservation,
    redis::{Asked, Redis, Reserved},
    reservation::Lot,
};

/// Callers whose pace is known; who comes when there are so many asks for each request.
const MAX_CALLERS: usize = 1_024;
/// More are asked for when less than this part of the stock is left.
const REFILL: u32 = 4;
/// How often what was not used is given back.
const SWEEP: Duration = Duration::from_millis(250);

/// What is in stock for each caller: for all requests that are bound by the same limits.
#[derive(Debug, Default)]
pub(super) struct Ahead(Mutex<HashMap<Arc<[Demand]>, Stock, RandomState>>);

#[derive(Debug, Default)]
struct Stock {
    pace: Pace,
    lots: VecDeque<Ready>,
    /// What was left of the windows, by the last verdict.
    standing: Option<Standing>,
    /// Is more on its way?
    is_fetching: bool,
    /// When it may be asked for more, on this process's clock.
    rests_until_ms: u64,
}

/// There is nothing in stock for a request: it asks Redis.
pub(super) struct NoneReady {
    /// Is there ample room, so that it may join others?
    pub is_ample: bool,
}

/// Admissions that wait for their requests.
#[derive(Debug)]
struct Ready {
    lot: Lot,
    month: Month,
    until_ms: u64,
}

impl Ready {
    /// May they be used now?
    fn are_good(&self, month: Month, session: u32, now_ms: u64) -> bool {
        let are_of_session = self.lot.reserved.session == Some(session);
        self.lot.count > 0 && are_of_session && self.month == month && is_usable(now_ms, self.until_ms)
    }
}

impl Ahead {
    fn stocks(&self) -> MutexGuard<'_, HashMap<Arc<[Demand]>, Stock, RandomState>> {
        // Poisoned only by a panic between two numbers; they are still numbers.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets `act` change the stock of a caller, if it has one.
    fn with<T>(&self, demands: &[Demand], act: impl FnOnce(&mut Stock) -> T) -> Option<T> {
        self.stocks().get_mut(demands).map(act)
    }

    /// Takes note of what Redis said is left.
    pub(super) fn see(&self, demands: &[Demand], standing: Standing) {
        self.with(demands, |stock| stock.standing = Some(standing));
    }

    /// There was no ample room: until it is worth another try, all of this caller's requests ask for themselves.
    pub(super) fn rest(&self, demands: &[Demand], now_ms: u64) {
        self.with(demands, |stock| stock.rests_until_ms = now_ms + PERIOD_MS);
    }

    /// Takes out what can no longer be used, and callers that are gone.
    fn sweep(&self, now_ms: u64) -> Vec<Ready> {
        let mut old = Vec::new();
        self.stocks().retain(|_, stock| {
            let overdue = stock.lots.iter().take_while(|ready| !is_usable(now_ms, ready.until_ms)).count();
            old.extend(stock.lots.drain(..overdue));
            stock.is_fetching || !stock.lots.is_empty() || !stock.pace.is_idle(now_ms)
        });
        old
    }
}

impl Stock {
    /// Takes what fits a request, and says how many more are wanted. What can no longer be used goes to `old`.
    fn take(&mut self, plan: &Plan, session: u32, old: &mut Vec<Ready>) -> (Option<Reservation>, u32) {
        self.pace.note(plan.need.amount, plan.now_ms);
        while let Some(first) = self.lots.front() {
            if first.are_good(plan.month, session, plan.now_ms) {
                break;
            }
            old.extend(self.lots.pop_front());
        }
        let first = self.lots.front_mut().filter(|first| plan.need.amount.fits_in(first.lot.taken.need));
        let taken = first.and_then(|first| first.lot.take());
        let left_ms = self.lots.back().map_or(CELL_MS, |last| last.until_ms.saturating_sub(plan.now_ms));
        let (wanted, has) = (self.pace.stock(left_ms), self.lots.iter().map(|ready| ready.lot.count).sum::<u32>());
        let may_ask = !self.is_fetching && self.is_ample(plan.need.amount, plan.now_ms);
        let more = if may_ask && has < wanted.div_ceil(REFILL) { wanted - has } else { 0 };
        self.is_fetching |= more > 0;
        (taken, more)
    }

    /// Was there ample room for such a need when Redis was last asked?
    fn is_ample(&self, need: Amount, now_ms: u64) -> bool {
        let has_room = |standing: Standing| room(&[], &standing, need, 1) > 0;
        now_ms >= self.rests_until_ms && self.standing.is_some_and(has_room)
    }
}

impl Limiter {
    /// An admission that was made ahead and fits, if there is one. Sees to it that there will be more.
    pub(super) fn take_ahead(&self, redis: &Redis, plan: &Plan) -> Result<Admission, NoneReady> {
        let nothing = Err(NoneReady { is_ample: false });
        if !redis.is_linked() || !redis.has_clock() || self.is_learning(plan.now_ms) {
            return nothing;
        }
        let (session, mut old) = (redis.session(), Vec::new());
        let (taken, more, is_ample, standing) = {
            let mut stocks = self.0.ahead.stocks();
            if !stocks.contains_key(&plan.demands) {
                if stocks.len() >= MAX_CALLERS {
                    return nothing;
                }
                stocks.insert(Arc::clone(&plan.demands), Stock::default());
            }
            let Some(stock) = stocks.get_mut(&plan.demands) else { return nothing };
            let (taken, more) = stock.take(plan, session, &mut old);
            (taken, more, stock.is_ample(plan.need.amount, plan.now_ms), stock.standing.unwrap_or_default())
        };
        drop(old); // each of them tells Redis
        if more > 0 {
            let (limiter, demands, month) = (self.clone(), Arc::clone(&plan.demands), plan.month);
            tokio::spawn(async move { limiter.fetch_ahead(demands, month, more).await });
        }
        let reservation = taken.ok_or(NoneReady { is_ample })?;
        Ok(Admission { reservation, standing, need: plan.need })
    }

    /// Gives back what was not used, for ever.
    pub(super) async fn keep_ahead(&self) {
        loop {
            sleep(SWEEP).await;
            drop(self.0.ahead.sweep(self.now_ms()));
        }
    }

    async fn fetch_ahead(&self, demands: Arc<[Demand]>, month: Month, wanted: u32) {
        let fetched = self.admit_ahead(&demands, month, wanted).await;
        if fetched.is_none() {
            self.0.ahead.rest(&demands, self.now_ms());
        }
        // A caller that is gone meanwhile leaves them to be dropped.
        let _ = self.0.ahead.with(&demands, |stock| {
            stock.is_fetching = false;
            fetched.into_iter().for_each(|(ready, standing)| {
                stock.lots.push_back(ready);
                stock.standing = Some(standing);
            });
        });
    }

    /// Asks Redis for up to so many, if the limits leave ample room for them.
    async fn admit_ahead(&self, demands: &Arc<[Demand]>, month: Month, wanted: u32) -> Option<(Ready, Standing)> {
        let redis = self.0.redis.as_ref()?;
        let (need, standing) = self.0.ahead.with(demands, |stock| Some((stock.pace.need(), stock.standing?)))??;
        let in_use = |demand: &Demand| {
            let (in_flight, held) = self.0.memory.holdings(&demand.subject);
            InUse { caps: demand.caps, in_flight, held, booked: self.0.books.of(month, &demand.subject) }
        };
        let in_use: Vec<InUse> = demands.iter().map(in_use).collect();
        let room = room(&in_use, &standing, need, redis.share().of.into());
        let times = wanted.min(u32::try_from(room).unwrap_or(u32::MAX));
        if times == 0 {
            return None;
        }
        let plan = Plan { demands: Arc::clone(demands), need: Need::from(need), month, now_ms: self.now_ms() };
        let known = || demands.iter().map(|demand| self.known(demand, &plan)).collect();
        let asked = Asked { demands, times, need: plan.need, month, may_join: true };
        let verdict = redis.admit(asked, plan.now_ms, known).await.ok()?;
        if verdict.joined_in_vain {
            self.0.ahead.rest(demands, self.now_ms());
        }
        let counted = verdict.decision.ok()?;
        let reserved = Reserved { session: Some(counted.session), cells: Some(counted.cells) };
        let now_ms = self.now_ms();
        let until_ms = usable_until_ms(plan.now_ms, verdict.cell_left_ms, now_ms);
        let taken = self.0.memory.record_all(demands, times.into(), need, now_ms);
        let lot = Lot { limiter: self.clone(), demands: Arc::clone(demands), taken, reserved, count: times };
        let ready = Ready { lot, month, until_ms };
        // What a Redis that lost its memory admits is not for use; the next request that asks finds out.
        let is_sound = !verdict.has_forgotten && !redis.has_jumped(verdict.now_ms, plan.now_ms);
        is_sound.then_some((ready, verdict.standing))
    }
}
