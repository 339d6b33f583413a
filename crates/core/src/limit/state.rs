//! What is known of one subject, and the decision over all subjects of a request.
//!
//! The decision has two halves: [`State::refusal`] looks, [`State::reserve`] takes. Whoever decides holds the states of all
//! subjects meanwhile, so that nothing comes between the two, and a refused request has taken nothing.
//!
//! **Quota** is what is booked in the database this month, and what is *held*: the reservations of requests in flight,
//! and what finished requests used but the database does not have yet. Both are handed in, or are kept here in sums.
//!
//! **A replica that lost sight of the others** holds itself to its [`Share`]. Of the windows it then knows a copy that is
//! a moment old ([`State::set_mirror`]): what the copy leaves free is divided among the replicas, and as the copy's cells
//! pass, so is what they set free. All replicas together thus stay within the limit.

use super::{
    Amount, Caps, Subject,
    standing::{Left, Standing},
    window::Window,
};

/// What a request wants of every subject, besides being one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Need {
    /// What is reserved: as much as the request may consume, as far as that can be told.
    pub amount: Amount,
    /// What must be left of a quota. Less than `amount` where the client set no limit to its output: then the amount is
    /// a guess, and a guess must not keep anybody from the rest of a quota.
    pub least: Amount,
    /// Which of its tokens are those of the prompt.
    pub prompt_tokens: u64,
}

impl From<Amount> for Need {
    fn from(amount: Amount) -> Self {
        Self { amount, least: amount, prompt_tokens: amount.tokens }
    }
}

/// A subject and what binds it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Demand {
    /// Whom.
    pub subject: Subject,
    /// By what.
    pub caps: Caps,
}

/// Which limit refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Requests per minute.
    Rpm,
    /// Tokens per minute.
    Tpm,
    /// Requests in flight at once.
    Concurrency,
    /// Tokens per month.
    MonthlyTokens,
    /// Dollars per month.
    MonthlyUsd,
}

impl Kind {
    /// The words for it in messages.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Rpm => "requests per minute (RPM)",
            Self::Tpm => "tokens per minute (TPM)",
            Self::Concurrency => "requests at once",
            Self::MonthlyTokens => "tokens per month",
            Self::MonthlyUsd => "dollars per month",
        }
    }
}

/// When a refused request would be admitted. Ordered: what takes longer is greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wait {
    /// After this many milliseconds, if nothing else is admitted meanwhile.
    Ms(u64),
    /// When the month is over.
    NextMonth,
    /// Never: it wants more than the limit is.
    Never,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Index of the demand that refused.
    pub demand: usize,
    /// Which of its limits.
    pub kind: Kind,
    /// How much that limit is.
    pub limit: u64,
    /// When it is worth trying again.
    pub wait: Wait,
}

/// Which part of every limit this replica may give out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Number of this replica among them, from 0.
    pub rank: u32,
    /// Replicas.
    pub of: u32,
    /// Per cent of the windows that are given out at all; the rest covers what the others did since the copy was made.
    pub percent: u32,
}

impl Share {
    /// All of it: there is no other replica.
    pub const WHOLE: Self = Self { rank: 0, of: 1, percent: 100 };

    /// This replica's part of a window's free room. The parts of all replicas add up to no more than it.
    fn of_window(self, free: u64) -> u64 {
        self.of_sum(u64::try_from(u128::from(free) * u128::from(self.percent.min(100)) / 100).unwrap_or(free))
    }

    /// This replica's part of something that is not a window.
    fn of_sum(self, free: u64) -> u64 {
        let of = u64::from(self.of.max(1));
        free / of + u64::from(u64::from(self.rank) < free % of)
    }
}

/// What is known of one subject.
#[derive(Debug, Default)]
pub struct State {
    // Boxed, because most subjects have only some of the limits.
    requests: Option<Box<Window>>,
    tokens: Option<Box<Window>>,
    mirror: Option<Box<Mirror>>,
    in_flight: u64,
    /// Those of them that were admitted while a limit counted holders.
    told: u64,
    held: Amount,
}

/// A copy of windows that are kept elsewhere.
#[derive(Clone, Debug, Default)]
pub struct Mirror {
    /// Requests.
    pub requests: Window,
    /// Tokens.
    pub tokens: Window,
}

/// What a decision takes into account besides the states.
#[derive(Clone, Copy, Debug)]
pub struct Circumstances {
    /// Milliseconds of a clock that never goes back.
    pub now_ms: u64,
    /// What this replica may give out.
    pub share: Share,
    /// Are only the windows to be looked at, because the rest is decided elsewhere?
    pub windows_only: bool,
}

impl Circumstances {
    /// Everything is decided here.
    #[must_use]
    pub fn alone(now_ms: u64, share: Share) -> Self {
        Self { now_ms, share, windows_only: false }
    }
}

impl State {
    /// Why this subject refuses the request, if it does: the limit that takes longest to give way. Changes nothing but the
    /// age of the windows. `demand` is the index of the subject, `booked` what the database has of this month.
    pub fn refusal(
        &mut self,
        demand: usize,
        caps: &Caps,
        need: Need,
        booked: Amount,
        at: Circumstances,
    ) -> Option<Refusal> {
        let share = at.share;
        let (seen_requests, seen_tokens) = self.mirror.as_deref_mut().map(|m| (&mut m.requests, &mut m.tokens)).unzip();
        let rpm = window_wait(self.requests.as_deref_mut(), seen_requests, 1, caps.rpm, at);
        let tpm = window_wait(self.tokens.as_deref_mut(), seen_tokens, need.amount.tokens, caps.tpm, at);
        let elsewhere = at.windows_only;
        let busy = !elsewhere && caps.concurrency > 0 && self.in_flight >= share.of_sum(caps.concurrency);
        let over = |cap: u64, booked: u64, held: u64, need: u64| {
            let left = share.of_sum(cap.saturating_sub(booked));
            !elsewhere && cap > 0 && (booked > cap || held.saturating_add(need) > left)
        };
        let tokens = over(caps.monthly_tokens, booked.tokens, self.held.tokens, need.least.tokens);
        let money = over(caps.monthly_nano_usd, booked.nano_usd, self.held.nano_usd, need.least.nano_usd);
        if rpm.is_none() && tpm.is_none() && !(busy || tokens || money) {
            return None; // nearly always
        }
        [
            rpm.map(|wait| (Kind::Rpm, caps.rpm, wait)),
            tpm.map(|wait| (Kind::Tpm, caps.tpm, wait)),
            busy.then_some((Kind::Concurrency, caps.concurrency, Wait::Ms(SLOT_WAIT_MS))),
            tokens.then_some((Kind::MonthlyTokens, caps.monthly_tokens, Wait::NextMonth)),
            money.then_some((Kind::MonthlyUsd, caps.monthly_nano_usd, Wait::NextMonth)),
        ]
        .into_iter()
        .flatten()
        .max_by_key(|(.., wait)| *wait)
        .map(|(kind, limit, wait)| Refusal { demand, kind, limit, wait })
    }

    /// Takes so many requests, and `need` for each. Only windows that `caps` limit are kept.
    pub fn reserve(&mut self, caps: &Caps, times: u64, need: Amount, now_ms: u64) {
        let all = need.times(times);
        if caps.rpm > 0 {
            self.requests.get_or_insert_default().add(now_ms, times);
        }
        if caps.tpm > 0 {
            self.tokens.get_or_insert_default().add(now_ms, all.tokens);
        }
        self.in_flight += times;
        if caps.counts_holders() {
            self.told += times;
        }
        if caps.has_quota() {
            self.held = self.held.plus(all);
        }
    }

    /// Corrects a reservation that `caps` bound to the truth. What was too much goes back into its own cell; what was too
    /// little counts from the moment it is known. `actual` remains held, if there is a quota, until the database has it.
    pub fn settle(&mut self, caps: &Caps, cell: u64, need: Amount, actual: Amount, now_ms: u64) {
        self.end(caps, 1, need);
        if caps.has_quota() {
            self.held = self.held.plus(actual);
        }
        if let Some(tokens) = &mut self.tokens {
            tokens.take_back(cell, need.tokens.saturating_sub(actual.tokens));
            let more = actual.tokens.saturating_sub(need.tokens);
            if more > 0 {
                tokens.add(now_ms, more);
            }
        }
    }

    /// Undoes so many reservations of `need` each, that `caps` bound, as if they had never been made.
    pub fn undo(&mut self, caps: &Caps, cell: u64, times: u64, need: Amount) {
        self.end(caps, times, need);
        if let Some(requests) = &mut self.requests {
            requests.take_back(cell, times);
        }
        if let Some(tokens) = &mut self.tokens {
            tokens.take_back(cell, need.times(times).tokens);
        }
    }

    fn end(&mut self, caps: &Caps, times: u64, need: Amount) {
        self.in_flight = self.in_flight.saturating_sub(times);
        if caps.counts_holders() {
            self.told = self.told.saturating_sub(times);
        }
        if caps.has_quota() {
            self.held = self.held.minus(need.times(times));
        }
    }

    /// Lets go of what the database now has.
    pub fn release(&mut self, held: Amount) {
        self.held = self.held.minus(held);
    }

    /// What others are told is held here: requests in flight, and amounts. Of requests from before a limit counted them
    /// nobody is told, also when they end.
    #[must_use]
    pub fn told(&self) -> (u64, Amount) {
        (self.told, self.held)
    }

    /// Requests in flight.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.in_flight
    }

    /// What is reserved, or used and not booked.
    #[must_use]
    pub fn held(&self) -> Amount {
        self.held
    }

    /// Was anything admitted in the last minute, here or, as far as the copy shows, elsewhere?
    pub fn is_recent(&mut self, now_ms: u64) -> bool {
        let any = |window: &mut Option<Box<Window>>| window.as_mut().is_some_and(|w| w.used(now_ms) > 0);
        let mirror = self.mirror.as_mut();
        let seen = mirror.is_some_and(|m| m.requests.used(now_ms) > 0 || m.tokens.used(now_ms) > 0);
        seen || any(&mut self.requests) || any(&mut self.tokens)
    }

    /// Replaces the copy of the windows that all replicas share, which was asked for at `asked_ms`; from then on what
    /// this replica admits counts beside it.
    pub fn set_mirror(&mut self, mirror: Mirror, asked_ms: u64) {
        for window in [&mut self.requests, &mut self.tokens].into_iter().flatten() {
            window.forget_before(asked_ms);
        }
        self.mirror = Some(Box::new(mirror));
    }

    /// Is nothing known that a new state would not know?
    pub fn is_idle(&mut self, now_ms: u64) -> bool {
        self.in_flight == 0 && self.held.is_zero() && !self.is_recent(now_ms)
    }

    /// Adds what is left of this subject's windows to `standing`.
    pub fn show(&mut self, caps: &Caps, now_ms: u64, standing: &mut Standing) {
        let left = |own: Option<&mut Window>, copy: Option<&mut Window>, limit: u64| {
            let (mut used, mut reset_ms) = (0_u64, 0);
            for window in [own, copy].into_iter().flatten() {
                used = used.saturating_add(window.used(now_ms));
                reset_ms = window.reset_ms(now_ms).max(reset_ms);
            }
            Left { limit, remaining: limit.saturating_sub(used), reset_ms }
        };
        let (requests, tokens) = self.mirror.as_deref_mut().map(|m| (&mut m.requests, &mut m.tokens)).unzip();
        if caps.rpm > 0 {
            standing.see_requests(left(self.requests.as_deref_mut(), requests, caps.rpm));
        }
        if caps.tpm > 0 {
            standing.see_tokens(left(self.tokens.as_deref_mut(), tokens, caps.tpm));
        }
    }
}

/// What a client is told to wait for a slot: nobody knows when a request in flight will end.
pub const SLOT_WAIT_MS: u64 = 1000;

/// How long a window refuses `n` more; `None`: it does not.
fn window_wait(
    own: Option<&mut Window>,
    mirror: Option<&mut Window>,
    n: u64,
    limit: u64,
    at: Circumstances,
) -> Option<Wait> {
    if limit == 0 {
        return None;
    }
    if n > limit {
        return Some(Wait::Never);
    }
    let (now, share) = (at.now_ms, at.share);
    let (mut own, mut mirror) = (own, mirror);
    let used = |window: &mut Option<&mut Window>| window.as_mut().map_or(0, |window| window.used(now));
    let wanted = used(&mut own).saturating_add(n);
    if wanted <= share.of_window(limit.saturating_sub(used(&mut mirror))) {
        return None;
    }
    // While the share is not the whole, the wait is the safe side of both windows.
    let wait = |window: Option<&mut Window>, n: u64, limit: u64| {
        window.map_or(0, |window| window.wait_ms(now, n, limit).unwrap_or_else(|| window.reset_ms(now)))
    };
    let own_wait = wait(own, n, share.of_window(limit));
    let of_all = wanted.saturating_mul(u64::from(share.of)).saturating_mul(100) / u64::from(share.percent.max(1));
    let others_wait = wait(mirror, of_all, limit);
    Some(Wait::Ms(own_wait.max(others_wait).max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        id::{KeyId, UserId},
        limit::Class,
    };
    use proptest::prelude::*;

    const NOW: u64 = 1_000_000;

    fn admit(
        state: &mut State,
        caps: Caps,
        need: Amount,
        booked: Amount,
        now_ms: u64,
        share: Share,
    ) -> Result<u64, Refusal> {
        let at = Circumstances::alone(now_ms, share);
        state.refusal(0, &caps, need.into(), booked, at).map_or(Ok(()), Err)?;
        state.reserve(&caps, 1, need, now_ms);
        Ok(now_ms / crate::limit::window::CELL_MS)
    }

    fn tokens(tokens: u64) -> Amount {
        Amount { tokens, nano_usd: 0 }
    }

    #[test]
    fn the_limit_that_takes_longest_is_named() {
        let caps = Caps { rpm: 1, tpm: 10, concurrency: 1, monthly_tokens: 15, monthly_nano_usd: 0 };
        let mut state = State::default();
        let mut try_it = |n, booked| {
            admit(&mut state, caps, tokens(n), booked, NOW, Share::WHOLE)
                .map_err(|refusal| (refusal.kind, refusal.wait))
        };
        assert_eq!(try_it(11, Amount::default()), Err((Kind::Tpm, Wait::Never)));
        assert_eq!(try_it(10, tokens(6)), Err((Kind::MonthlyTokens, Wait::NextMonth)));
        assert!(try_it(10, tokens(5)).is_ok());
        assert_eq!(try_it(1, Amount::default()), Err((Kind::Tpm, Wait::Ms(61_000))));
        assert_eq!(try_it(6, Amount::default()), Err((Kind::MonthlyTokens, Wait::NextMonth)), "10 are held");
    }

    #[test]
    fn a_reservation_is_corrected_to_the_truth() {
        let caps = Caps { tpm: 100, concurrency: 1, monthly_tokens: 1000, ..Caps::default() };
        let mut state = State::default();
        let cell = admit(&mut state, caps, tokens(80), Amount::default(), NOW, Share::WHOLE).unwrap();
        assert!(admit(&mut state, caps, tokens(1), Amount::default(), NOW, Share::WHOLE).is_err(), "one at once");
        state.settle(&caps, cell, tokens(80), tokens(30), NOW + 500);
        assert_eq!((state.in_flight(), state.held()), (0, tokens(30)));
        let cell = admit(&mut state, caps, tokens(70), Amount::default(), NOW + 500, Share::WHOLE).unwrap();
        state.settle(&caps, cell, tokens(70), tokens(90), NOW + 2000);
        assert_eq!(state.held(), tokens(120));
        let mut standing = Standing::default();
        state.show(&caps, NOW + 2000, &mut standing);
        assert_eq!(standing.tokens, Some(Left { limit: 100, remaining: 0, reset_ms: 61_000 }), "20 more since 2000");
        state.release(tokens(120));
        assert!(state.is_idle(NOW + 70_000));
    }

    #[test]
    fn what_is_undone_leaves_no_trace() {
        let caps = Caps { rpm: 1, tpm: 10, concurrency: 1, monthly_tokens: 10, ..Caps::default() };
        let mut state = State::default();
        let cell = admit(&mut state, caps, tokens(10), Amount::default(), NOW, Share::WHOLE).unwrap();
        state.undo(&caps, cell, 1, tokens(10));
        assert!(state.is_idle(NOW));
    }

    #[test]
    fn many_are_as_many_as_they_are() {
        let caps = Caps { rpm: 100, tpm: 1_000, concurrency: 100, monthly_tokens: 1_000, ..Caps::default() };
        let (mut one_by_one, mut together) = (State::default(), State::default());
        let cell = NOW / crate::limit::window::CELL_MS;
        (0..7).for_each(|_| one_by_one.reserve(&caps, 1, tokens(10), NOW));
        together.reserve(&caps, 7, tokens(10), NOW);
        let seen = |state: &mut State| {
            let mut standing = Standing::default();
            state.show(&caps, NOW, &mut standing);
            (standing, state.in_flight(), state.held())
        };
        assert_eq!(seen(&mut one_by_one), seen(&mut together));
        assert_eq!((together.in_flight(), together.held()), (7, tokens(70)));
        (0..4).for_each(|_| one_by_one.undo(&caps, cell, 1, tokens(10)));
        together.undo(&caps, cell, 4, tokens(10));
        assert_eq!(seen(&mut one_by_one), seen(&mut together));
        together.undo(&caps, cell, 3, tokens(10));
        assert!(together.is_idle(NOW));
    }

    #[test]
    fn shares_add_up_to_no_more_than_the_limit() {
        let sum = |free| (0..3).map(|rank| Share { rank, of: 3, percent: 100 }.of_sum(free)).sum::<u64>();
        for free in [0, 1, 2, 3, 10, 11, 600] {
            assert_eq!(sum(free), free);
        }
        assert_eq!(Share { rank: 0, of: 3, percent: 90 }.of_window(600), 180);
    }

    #[test]
    fn what_others_used_is_theirs_until_it_passes() {
        let caps = Caps { rpm: 90, ..Caps::default() };
        let mut state = State::default();
        let mut mirror = Mirror::default();
        mirror.requests.put_aged(NOW, 30, 60);
        state.set_mirror(mirror, NOW);
        let share = Share { rank: 0, of: 3, percent: 100 };
        let mut admitted = |now| {
            (0..100).filter(|_| admit(&mut state, caps, tokens(0), Amount::default(), now, share).is_ok()).count()
        };
        assert_eq!(admitted(NOW), 10, "a third of the 30 that were free");
        assert_eq!(admitted(NOW + 31_000), 20, "and a third of the 60 when they have passed");
    }

    #[test]
    fn classes_are_locked_in_one_order() {
        let subjects = [
            Subject::of_ip("10.0.0.1".parse().unwrap()),
            Subject::User(UserId(9)),
            Subject::Key(UserId(1), KeyId(1)),
            Subject::KeyModel(UserId(1), KeyId(1), "m".into()),
        ];
        assert!(subjects.is_sorted());
        assert!(subjects.iter().map(Subject::class).is_sorted());
        assert_eq!(Subject::Others(Class::Ip).class(), Class::Ip);
    }

    /// A caller: waits this long, wants so many tokens, uses so many of them, for so long.
    fn calls() -> impl Strategy<Value = Vec<(u64, u64, u64, u64)>> {
        prop::collection::vec((0_u64..2500, 0_u64..400, 0_u64..400, 0_u64..90_000), 1..400)
    }

    proptest! {
        #[test]
        fn no_true_minute_holds_more_than_the_limit(rpm in 1_u64..40, tpm in 400_u64..3000, calls in calls()) {
            let caps = Caps { rpm, tpm, ..Caps::default() };
            let (mut state, mut now) = (State::default(), NOW + rpm);
            let mut admitted: Vec<(u64, u64)> = Vec::new();
            let mut open: Vec<(u64, u64, u64, usize, u64)> = Vec::new();
            for (wait, want, used, lasts) in calls {
                now += wait;
                open.retain(|&(ends, cell, need, index, used)| {
                    if ends <= now {
                        state.settle(&caps, cell, tokens(need), tokens(used), now);
                        admitted[index].1 = used;
                    }
                    ends > now
                });
                if let Ok(cell) = admit(&mut state, caps, tokens(want), Amount::default(), now, Share::WHOLE) {
                    admitted.push((now, want));
                    // Of what was estimated, at most that is used: what exceeds it is the error of the estimate.
                    open.push((now + lasts, cell, want, admitted.len() - 1, used.min(want)));
                }
            }
            for (index, &(begin, _)) in admitted.iter().enumerate() {
                let minute: Vec<_> = admitted[index..].iter().take_while(|(at, _)| *at < begin + 60_000).collect();
                prop_assert!(minute.len() as u64 <= rpm, "{} requests in the minute from {begin}", minute.len());
                let sum: u64 = minute.iter().map(|(_, tokens)| tokens).sum();
                prop_assert!(sum <= tpm, "{sum} tokens in the minute from {begin}");
            }
        }

        #[test]
        fn steady_load_gets_nearly_all_of_the_limit(rpm in 1_u64..100, phase in 0_u64..1000) {
            let caps = Caps { rpm, ..Caps::default() };
            let (mut state, mut count, minutes) = (State::default(), 0_u64, 61);
            // Somebody always waits: as many as fit are admitted each 250 ms.
            for tick in 0..minutes * 240 {
                let now = NOW + phase + tick * 250;
                while admit(&mut state, caps, tokens(0), Amount::default(), now, Share::WHOLE).is_ok() {
                    count += 1;
                }
            }
            prop_assert!(count * 100 >= rpm * minutes * 98, "{count} of {}", rpm * minutes);
        }

        #[test]
        fn who_waits_as_told_is_admitted(rpm in 1_u64..20, waits in prop::collection::vec(0_u64..9000, 1..60), want in 0_u64..100) {
            let caps = Caps { rpm, tpm: 300, ..Caps::default() };
            let (mut state, mut now) = (State::default(), NOW);
            for wait in waits {
                now += wait;
                if let Err(refusal) = admit(&mut state, caps, tokens(want), Amount::default(), now, Share::WHOLE) {
                    let Wait::Ms(ms) = refusal.wait else { panic!("{refusal:?}") };
                    let early = Circumstances::alone(now + ms - 1, Share::WHOLE);
                    let late = Circumstances::alone(now + ms, Share::WHOLE);
                    let mut again = |at| state.refusal(0, &caps, tokens(want).into(), Amount::default(), at);
                    prop_assert!(again(early).is_some());
                    prop_assert!(again(late).is_none());
                    now += ms;
                }
            }
        }
    }
}
