//! How many admissions are made ahead of the requests that will use them.
//!
//! Where the decision is made elsewhere, each request waits for it. A caller that sends many a second need not: so many as it
//! is about to send are admitted ahead, together. What is admitted ahead is taken from others until it is used or given
//! back. So it is only done where that cannot hurt: at most the [`AMPLE`]th part of what any limit leaves, and only as much
//! as is used within 25 milliseconds, judged by the last tenth of a second or by what came of this one so far, if that is much.

use super::{Amount, Caps, standing::Standing, window::CELL_MS};

/// Over how long requests are counted, in milliseconds.
pub const PERIOD_MS: u64 = 100;
/// For how long the stock lasts: a quarter of a period.
const LASTS_MS: u64 = PERIOD_MS / 4;
/// So many within a period are many before it is over.
const MANY: u32 = 64;
/// Fewer are not worth it, and more are never wanted.
const STOCK: (u64, u64) = (4, 256);
/// Of what is left of a limit, so many times as much stays for others.
pub const AMPLE: u64 = 64;

/// How many requests come, and the most that any of them needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pace {
    period: u64,
    requests: u32,
    largest: Amount,
    before: (u32, Amount),
}

impl Pace {
    /// Takes note of a request with this need.
    pub fn note(&mut self, need: Amount, now_ms: u64) {
        let period = now_ms / PERIOD_MS;
        if period != self.period {
            let before = if period == self.period + 1 { (self.requests, self.largest) } else { Default::default() };
            *self = Self { period, before, ..Self::default() };
        }
        self.requests = self.requests.saturating_add(1);
        self.largest = self.largest.max(need);
    }

    /// How many admissions should be in stock, if those that are made now can be used for `left_ms`; 0: none, there are too
    /// few requests.
    #[must_use]
    pub fn stock(&self, left_ms: u64) -> u32 {
        let (least, most) = STOCK;
        let requests = if self.requests < MANY { self.before.0 } else { self.before.0.max(self.requests) };
        let stock = (u64::from(requests) * left_ms.min(LASTS_MS) / PERIOD_MS).min(most);
        u32::try_from(stock).ok().filter(|_| stock >= least).unwrap_or(0)
    }

    /// What each of them should hold.
    #[must_use]
    pub fn need(&self) -> Amount {
        self.largest.max(self.before.1)
    }

    /// Has nobody asked since the last period?
    #[must_use]
    pub fn is_idle(&self, now_ms: u64) -> bool {
        now_ms / PERIOD_MS > self.period + 1
    }
}

/// Until when an admission may be used that was asked for at `asked_ms` and counted here at `counted_ms`, both on the clock of
/// this process; `cell_left_ms` is what was left of the cell on the other clock, which was read in between.
#[must_use]
pub fn usable_until_ms(asked_ms: u64, cell_left_ms: u64, counted_ms: u64) -> u64 {
    let here = (counted_ms / CELL_MS + 1) * CELL_MS;
    here.min(asked_ms.saturating_add(cell_left_ms))
}

/// May it be used now? Both clocks leave out what is less than a millisecond, so that much is taken to have passed twice.
#[must_use]
pub fn is_usable(now_ms: u64, until_ms: u64) -> bool {
    now_ms.saturating_add(2) <= until_ms
}

/// What is in use of one subject, as far as this process knows.
#[derive(Clone, Copy, Debug, Default)]
pub struct InUse {
    /// What binds it.
    pub caps: Caps,
    /// Requests under way.
    pub in_flight: u64,
    /// What they hold of quotas.
    pub held: Amount,
    /// What is booked of them.
    pub booked: Amount,
}

/// How many requests with this need the limits of all subjects leave ample room for. `standing`: what is left of their
/// windows. What this process has under way, each of the `replicas` may have.
#[must_use]
pub fn room(subjects: &[InUse], standing: &Standing, need: Amount, replicas: u64) -> u64 {
    let times = |left: u64, each: u64| left / each.max(1) / AMPLE;
    let requests = standing.requests.map(|left| times(left.remaining, 1));
    let tokens = standing.tokens.map(|left| times(left.remaining, need.tokens));
    let of_each = |of: &InUse| {
        let InUse { caps, in_flight, held, booked } = *of;
        let left =
            |cap: u64, booked: u64, held: u64| cap.saturating_sub(booked.saturating_add(held.saturating_mul(replicas)));
        let limited = |cap: u64, room: u64| (cap > 0).then_some(room);
        [
            limited(caps.concurrency, times(left(caps.concurrency, 0, in_flight), 1)),
            limited(caps.monthly_tokens, times(left(caps.monthly_tokens, booked.tokens, held.tokens), need.tokens)),
            limited(
                caps.monthly_nano_usd,
                times(left(caps.monthly_nano_usd, booked.nano_usd, held.nano_usd), need.nano_usd),
            ),
        ]
    };
    let rooms = subjects.iter().flat_map(of_each).chain([requests, tokens]).flatten();
    rooms.min().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::standing::Left, *};

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_is_usable_is_used_in_the_cell_where_it_was_counted(
            ahead_us in 0_u64..5_000_000,
            asked_us in 0_u64..5_000_000,
            [on_its_way, on_its_way_back, waits] in [0_u64..1_500_000, 0..100_000, 0..1_500_000],
        ) {
            let (decided_us, counted_us) = (asked_us + on_its_way, asked_us + on_its_way + on_its_way_back);
            let used_us = counted_us + waits;
            let cell_left_ms = CELL_MS - (decided_us + ahead_us) / 1_000 % CELL_MS;
            let until_ms = usable_until_ms(asked_us / 1_000, cell_left_ms, counted_us / 1_000);
            if is_usable(used_us / 1_000, until_ms) {
                let there = |us: u64| (us + ahead_us) / 1_000 / CELL_MS;
                prop_assert_eq!(there(used_us), there(decided_us));
                prop_assert_eq!(used_us / 1_000 / CELL_MS, counted_us / 1_000 / CELL_MS);
            }
        }

        #[test]
        fn most_of_a_cell_can_be_used(asked_ms in 0_u64..5_000, age_ms in 0_u64..990) {
            let asked_ms = asked_ms / CELL_MS * CELL_MS;
            let until_ms = usable_until_ms(asked_ms, CELL_MS, asked_ms + 5);
            prop_assert!(is_usable(asked_ms + age_ms, until_ms));
        }
    }

    fn amount(tokens: u64) -> Amount {
        Amount { tokens, nano_usd: 2 * tokens }
    }

    #[test]
    fn the_stock_follows_the_last_period() {
        let mut pace = Pace::default();
        (1..u64::from(MANY)).for_each(|n| pace.note(amount(n % 7), 1_000));
        assert_eq!((pace.stock(900), pace.need()), (0, amount(6)), "nothing is known yet");
        (u64::from(MANY)..=400).for_each(|n| pace.note(amount(n % 7), 1_050));
        assert_eq!(pace.stock(900), 100, "there are as many in half a period");
        pace.note(amount(2), 1_100);
        assert_eq!((pace.stock(900), pace.need()), (100, amount(6)));
        assert_eq!([pace.stock(20), pace.stock(1), pace.stock(0)], [80, 4, 0], "no more than come in what is left");
        pace.note(amount(2), 1_299);
        assert_eq!((pace.stock(900), pace.need()), (0, amount(2)), "one request is too few");
        (0..1_000_000).for_each(|_| pace.note(amount(1), 1_300));
        assert_eq!(u64::from(pace.stock(900)), STOCK.1);
        assert!(!pace.is_idle(1_499) && pace.is_idle(1_500));
        pace.note(amount(1), 9_000);
        assert_eq!(pace.stock(900), 0, "it has been quiet");
    }

    #[test]
    fn every_limit_keeps_ample_room() {
        let caps = Caps {
            rpm: 1_000,
            tpm: 1_000_000,
            concurrency: 640,
            monthly_tokens: 6_400_000,
            monthly_nano_usd: 12_800_000,
        };
        let standing = |requests, tokens| {
            let left = |remaining| Some(Left { limit: remaining, remaining, reset_ms: 0 });
            Standing { requests: left(requests), tokens: left(tokens) }
        };
        let ample = standing(AMPLE * 100, AMPLE * 100_000);
        let with = |in_flight, held, booked, replicas| {
            let of = InUse { caps, in_flight, held: amount(held), booked: amount(booked) };
            room(&[of], &ample, amount(1_000), replicas)
        };
        assert_eq!(with(0, 0, 0, 1), 10, "concurrency");
        assert_eq!(with(320, 0, 0, 1), 5);
        assert_eq!(with(320, 0, 0, 2), 0, "the other replica may have as many");
        assert_eq!(with(0, 100_000, 6_000_000, 1), 4, "what is left of the month");
        assert_eq!(with(0, 0, 7_000_000, 1), 0);
        let free = InUse::default();
        assert_eq!(room(&[free], &standing(AMPLE * 3, AMPLE * 100_000), amount(1_000), 1), 3);
        assert_eq!(room(&[free], &standing(AMPLE * 300, AMPLE * 5_999), amount(1_000), 1), 5);
        assert_eq!(room(&[free], &Standing::default(), amount(1), 1), u64::MAX, "nothing is limited");
    }
}
