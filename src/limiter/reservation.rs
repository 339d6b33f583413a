//! What requests hold from their admission to their end.

use std::sync::Arc;

use tollgate_core::limit::{
    Amount,
    hold::{Classes, Hold},
    state::Demand,
};

use super::{Limiter, memory::Taken, redis::Reserved, redis_wire::Change};

/// What an admitted request holds. Dropped unused, it is undone: the request was never sent.
#[derive(Debug)]
pub struct Reservation {
    limiter: Limiter,
    demands: Arc<[Demand]>,
    open: Option<Taken>,
    reserved: Reserved,
}

impl Reservation {
    /// What `taken` was taken for, which Redis knows as `reserved`.
    pub(super) fn new(limiter: Limiter, demands: Arc<[Demand]>, taken: Taken, reserved: Reserved) -> Self {
        Self { limiter, demands, open: Some(taken), reserved }
    }

    /// Corrects what was reserved to what was consumed, as far as it is known now. That is held against the quotas until
    /// [`Limiter::release`] is told; `None`: nothing is, because there is no quota.
    #[must_use]
    pub fn settle(mut self, actual: Amount) -> Option<Hold> {
        let taken = self.open.take()?;
        let (limiter, demands, reserved) = (&self.limiter, &self.demands, self.reserved);
        let act = || limiter.0.memory.settle(demands, taken, actual, limiter.now_ms());
        limiter.change(reserved, act, || {
            let each = demands.iter().enumerate();
            each.filter_map(|(index, demand)| Change::settlement(demand, reserved.cell(index), taken.need, actual))
                .collect()
        });
        let (mut quotas, mut shared) = (Classes::default(), Classes::default());
        for (index, demand) in demands.iter().enumerate().filter(|(_, demand)| demand.caps.has_quota()) {
            quotas.insert(demand.subject.class());
            if taken.is_shared(index) {
                shared.insert(demand.subject.class());
            }
        }
        let (session, is_counted) = (reserved.session, reserved.cells.is_some());
        (!quotas.is_empty()).then_some(Hold { quotas, shared, amount: actual, session, is_counted })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(taken) = self.open.take() {
            undo(&self.limiter, &self.demands, self.reserved, 1, taken);
        }
    }
}

/// Reservations for requests that are yet to come, made together. Those that are left when it is dropped are undone.
#[derive(Debug)]
pub(super) struct Lot {
    /// For whom.
    pub limiter: Limiter,
    /// What binds each of them.
    pub demands: Arc<[Demand]>,
    /// What each of them took.
    pub taken: Taken,
    /// What they are known as in Redis.
    pub reserved: Reserved,
    /// How many are left.
    pub count: u32,
}

impl Lot {
    /// One of them, if there is one left.
    pub fn take(&mut self) -> Option<Reservation> {
        self.count = self.count.checked_sub(1)?;
        Some(Reservation::new(self.limiter.clone(), Arc::clone(&self.demands), self.taken, self.reserved))
    }
}

impl Drop for Lot {
    fn drop(&mut self) {
        if self.count > 0 {
            undo(&self.limiter, &self.demands, self.reserved, self.count.into(), self.taken);
        }
    }
}

fn undo(limiter: &Limiter, demands: &[Demand], reserved: Reserved, times: u64, taken: Taken) {
    let act = || limiter.0.memory.undo_all(demands, times, taken);
    let amount = taken.need.times(times);
    limiter.change(reserved, act, || Change::undo_all(demands, |index| reserved.cell(index), times, amount));
}
