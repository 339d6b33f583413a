//! What Redis is asked, and what it answers.
//!
//! Requests that are bound by the same limits may be asked for together: they are admitted together or not at all, for
//! what one of them costs in Redis. If they are not, each asks again alone. So that is for those whose limits leave ample
//! room ([`ahead`](super::ahead)).

use std::sync::Arc;

use tokio::sync::oneshot;
use tollgate_core::limit::{
    Amount, Month,
    policy::MAX_DEMANDS,
    standing::Standing,
    state::{Demand, Need, Refusal},
};

use super::redis_wire::Known;

/// Requests that are decided on together.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// What binds each of them.
    pub demands: &'a Arc<[Demand]>,
    /// How many they are.
    pub times: u32,
    /// What each needs.
    pub need: Need,
    /// Whose quota they count against.
    pub month: Month,
    /// May others that are bound by the same be decided on with them? It costs Redis no more than one alone, but if the
    /// limits have no room for all of them, they have waited in vain and ask again.
    pub may_join: bool,
}

impl<'a> Asked<'a> {
    /// One request, on its own.
    #[must_use]
    pub fn alone(demands: &'a Arc<[Demand]>, need: Need, month: Month) -> Self {
        Self { demands, times: 1, need, month, may_join: false }
    }
}

/// Redis cannot be asked now.
#[derive(Debug)]
pub struct Gone;

/// What Redis decided.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// Is the request admitted?
    pub decision: Result<Counted, Refusal>,
    /// What is left of the windows.
    pub standing: Standing,
    /// Had Redis no state of a subject that was in use a moment ago?
    pub has_forgotten: bool,
    /// Redis's time, in milliseconds.
    pub now_ms: u64,
    /// For how long it is still in the cell where this was counted, in milliseconds; in a cluster the least of any node.
    pub cell_left_ms: u64,
    /// Had it joined others before, for all of whom there was no room?
    pub joined_in_vain: bool,
}

/// Where an admitted request was counted.
#[derive(Clone, Copy, Debug)]
pub struct Counted {
    /// The session.
    pub session: u32,
    /// The cell at each subject, in the time of its node.
    pub cells: [u64; MAX_DEMANDS],
}

/// Requests that wait to be decided on together.
#[derive(Debug)]
pub(super) struct Ask {
    /// What binds each of them.
    pub demands: Arc<[Demand]>,
    /// What this replica knew of each subject when the first of them asked.
    pub known: Vec<Known>,
    /// Whose quota they count against.
    pub month: Month,
    /// Who they are, those first who came first.
    pub askers: Vec<Asker>,
    /// Did some join the first, and so overtake what came about in between?
    pub is_joined: bool,
}

/// A request, or several alike, and where their verdict is waited for.
#[derive(Debug)]
pub(super) struct Asker {
    /// How many requests.
    pub times: u32,
    /// What is to be reserved for each.
    pub need: Need,
    /// Where the answer is waited for.
    pub answer: oneshot::Sender<Answer>,
}

/// What somebody who asked hears.
#[derive(Debug)]
pub(super) enum Answer {
    /// What Redis decided.
    Verdict(Verdict),
    /// Together with others it was too much; Redis has counted none of them.
    TooManyTogether,
    /// A new session began: if Redis counted anything, it holds nothing of it any more.
    Forgotten,
}

impl Asker {
    /// What all of its requests reserve.
    pub fn amount(&self) -> Amount {
        self.need.amount.times(self.times.into())
    }
}

impl Ask {
    /// How many requests they are.
    pub fn times(&self) -> u64 {
        self.askers.iter().map(|asker| u64::from(asker.times)).sum()
    }

    /// What all of them reserve.
    pub fn amount(&self) -> Amount {
        self.askers.iter().fold(Amount::default(), |sum, asker| sum.plus(asker.amount()))
    }

    /// What must be left of a quota for all of them: as much as if they came one after the other, of which each reserves its
    /// amount and finds the least that it needs.
    pub fn least(&self) -> Amount {
        let of_each = self.askers.iter().scan(Amount::default(), |before, asker| {
            let least =
                before.plus(asker.need.amount.times(u64::from(asker.times).saturating_sub(1))).plus(asker.need.least);
            *before = before.plus(asker.amount());
            Some(least)
        });
        of_each.fold(Amount::default(), Amount::max)
    }

    /// Tells all of them to ask again.
    pub fn forget(self) {
        for asker in self.askers {
            // Whoever does not wait any longer decided otherwise.
            let _ = asker.answer.send(Answer::Forgotten);
        }
    }

    /// Does anybody still wait for the verdict? Whoever does not is decided otherwise, and leaves.
    pub fn is_awaited(&mut self) -> bool {
        self.askers.retain(|asker| !asker.answer.is_closed());
        !self.askers.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn amount(tokens: u64) -> Amount {
        Amount { tokens, nano_usd: 2 * tokens }
    }

    #[test]
    fn together_they_want_what_they_would_want_one_after_the_other() {
        let asker = |times, tokens, least| {
            let need = Need { amount: amount(tokens), least: amount(least), prompt_tokens: 1 };
            let (answer, waiting) = oneshot::channel();
            (Asker { times, need, answer }, waiting)
        };
        // A guess of 100 that 10 suffice for, one of 5, and two of 20.
        let (askers, mut waiting): (Vec<_>, Vec<_>) =
            [asker(1, 100, 10), asker(1, 5, 5), asker(2, 20, 1)].into_iter().unzip();
        let mut ask = Ask { demands: Arc::from([]), known: Vec::new(), month: Month(1), askers, is_joined: true };
        assert_eq!((ask.times(), ask.amount(), ask.least()), (4, amount(145), amount(126)));
        waiting.pop();
        assert!(ask.is_awaited());
        assert_eq!((ask.times(), ask.amount(), ask.least()), (2, amount(105), amount(105)));
        waiting.remove(0);
        assert!(ask.is_awaited());
        assert_eq!((ask.times(), ask.amount(), ask.least()), (1, amount(5), amount(5)));
        waiting.clear();
        assert!(!ask.is_awaited());
    }
}
