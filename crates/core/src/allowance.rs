//! The allowance: what is left of an upstream's own limits, so that it is not asked for what it must refuse.
//!
//! Two sources. What the provider says in its answers ([`Report`]), and, if limits of the upstream are written down, what
//! this process itself began in the last minute. If either foresees a refusal, others are asked first. It is foresight and
//! no more: an upstream that seems spent still takes what nobody else can, and only a 429 makes it cool.
//!
//! **Between two answers** a burst must not spend the same remainder again and again. Every attempt is counted as it
//! begins; `remaining` was counted by the provider when the attempt that it answers came in. So what was begun after that
//! attempt is not yet in its number, and what was begun before is. The allowance is therefore kept as a mark on the count of
//! attempts ("spent when 1,300 are begun"), which every answer moves, and which needs no list of what is in flight. An answer
//! that was overtaken by that of a later attempt is older news and ignored.
//!
//! What a provider says holds until its reset. Where it names none (Azure), it holds for [`UNSAID_RESET_MS`], the longest
//! stretch over which Azure counts requests: the next attempt after it brings news. That limits refill little by little is
//! not taken into account, for how they do is nowhere promised.

mod headers;

pub use headers::{Report, Said, cooling_ms};

use crate::limit::window::Window;

/// How long a remainder holds for which no reset was said.
pub const UNSAID_RESET_MS: u64 = 10_000;

/// How much was begun, in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    requests: u64,
    tokens: u64,
}

/// What is left of an upstream's own limits.
#[derive(Clone, Debug, Default)]
pub struct Allowance {
    begun: Mark,
    /// The latest attempt whose answer was seen.
    answered: Mark,
    requests: Horizon,
    tokens: Horizon,
    own_requests: Own,
    own_tokens: Own,
}

/// A remainder that the provider named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Horizon {
    /// It is spent when so much was begun.
    at: u64,
    /// Until when that holds.
    until_ms: u64,
}

/// A limit that is written down, and what this process took of it in the last minute.
#[derive(Clone, Debug, Default)]
struct Own {
    /// 0: none.
    limit: u64,
    window: Option<Box<Window>>,
}

/// What is certainly left, as two numbers that can be kept where no lock is needed to read them. True until the next
/// attempt begins or the next answer is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outlook {
    /// A request that needs so many tokens is not foreseen to be refused; 0: any may be.
    pub tokens: u64,
    /// From then on none is, in milliseconds of the caller's clock.
    pub until_ms: u64,
}

impl Outlook {
    /// Is it certain, without asking [`Allowance::is_spent`], that `tokens` are left?
    #[must_use]
    pub fn is_certain(self, tokens: u64, now_ms: u64) -> bool {
        now_ms >= self.until_ms || tokens.max(1) <= self.tokens
    }
}

impl Default for Outlook {
    fn default() -> Self {
        Self { tokens: u64::MAX, until_ms: 0 }
    }
}

impl Allowance {
    /// Sets the limits that are written down for the upstream: requests and tokens per minute, 0: none.
    pub fn set_limits(&mut self, rpm: u64, tpm: u64) {
        self.own_requests.set_limit(rpm);
        self.own_tokens.set_limit(tpm);
    }

    /// Counts an attempt that begins and may consume `tokens`. The mark is for [`Self::see`].
    pub fn spend(&mut self, tokens: u64, now_ms: u64) -> Mark {
        self.begun.requests = self.begun.requests.saturating_add(1);
        self.begun.tokens = self.begun.tokens.saturating_add(tokens);
        self.own_requests.spend(1, now_ms);
        self.own_tokens.spend(tokens, now_ms);
        self.begun
    }

    /// Takes note of what the answer says to the attempt that was given `mark`.
    pub fn see(&mut self, report: &Report, mark: Mark, now_ms: u64) {
        if report.is_empty() || mark.requests < self.answered.requests {
            return;
        }
        self.answered = mark;
        self.requests.see(report.requests, mark.requests, now_ms);
        self.tokens.see(report.tokens, mark.tokens, now_ms);
    }

    /// Would a request that needs `tokens` be refused, as far as can be foreseen?
    pub fn is_spent(&mut self, tokens: u64, now_ms: u64) -> bool {
        self.requests.left(self.begun.requests, now_ms) < 1
            || self.tokens.left(self.begun.tokens, now_ms) < tokens
            || self.own_requests.left(now_ms) < 1
            || self.own_tokens.left(now_ms) < tokens
    }

    /// What is certainly left from `now_ms` on, unless another attempt begins.
    pub fn outlook(&mut self, now_ms: u64) -> Outlook {
        let requests = self.requests.left(self.begun.requests, now_ms).min(self.own_requests.left(now_ms));
        let tokens = self.tokens.left(self.begun.tokens, now_ms).min(self.own_tokens.left(now_ms));
        // What is written down has no end: more than the limit is too much for an empty minute, too.
        let has_own = self.own_requests.limit > 0 || self.own_tokens.limit > 0;
        let until_ms = if has_own { u64::MAX } else { self.requests.until_ms.max(self.tokens.until_ms) };
        Outlook { tokens: if requests == 0 { 0 } else { tokens }, until_ms }
    }
}

impl Horizon {
    fn see(&mut self, said: Said, begun: u64, now_ms: u64) {
        if let Some(remaining) = said.remaining {
            let holds_ms = said.reset_ms.unwrap_or(UNSAID_RESET_MS);
            *self = Self { at: begun.saturating_add(remaining), until_ms: now_ms.saturating_add(holds_ms) };
        }
    }

    fn left(self, begun: u64, now_ms: u64) -> u64 {
        if now_ms < self.until_ms { self.at.saturating_sub(begun) } else { u64::MAX }
    }
}

impl Own {
    fn set_limit(&mut self, limit: u64) {
        self.limit = limit;
        if limit == 0 {
            self.window = None;
        }
    }

    fn spend(&mut self, n: u64, now_ms: u64) {
        if self.limit > 0 {
            self.window.get_or_insert_default().add(now_ms, n);
        }
    }

    fn left(&mut self, now_ms: u64) -> u64 {
        match &mut self.window {
            Some(window) => self.limit.saturating_sub(window.used(now_ms)),
            None if self.limit > 0 => self.limit,
            None => u64::MAX,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: u64 = 1_000_000;

    fn said(remaining: u64, reset_ms: Option<u64>) -> Said {
        Said { limit: None, remaining: Some(remaining), reset_ms }
    }

    fn report(requests: u64, tokens: u64) -> Report {
        Report { requests: said(requests, Some(9_000)), tokens: said(tokens, Some(60_000)) }
    }

    #[test]
    fn it_is_spent_until_the_reset() {
        let mut allowance = Allowance::default();
        assert!(!allowance.is_spent(u64::MAX, NOW), "nothing is known");
        let mark = allowance.spend(100, NOW);
        allowance.see(&report(0, 500), mark, NOW);
        assert!(allowance.is_spent(1, NOW + 8_999));
        assert!(!allowance.is_spent(500, NOW + 9_000));
        assert!(allowance.is_spent(501, NOW + 59_999));
        assert!(!allowance.is_spent(501, NOW + 60_000));
    }

    #[test]
    fn a_burst_between_two_answers_does_not_overshoot() {
        let mut allowance = Allowance::default();
        let mark = allowance.spend(10, NOW);
        allowance.see(&report(3, 1_000), mark, NOW);
        let marks: Vec<_> =
            std::iter::from_fn(|| (!allowance.is_spent(10, NOW)).then(|| allowance.spend(10, NOW))).take(99).collect();
        assert_eq!(marks.len(), 3);
        allowance.see(&report(2, 990), marks[0], NOW);
        assert!(allowance.is_spent(10, NOW), "the two after it are not in that number");
        allowance.see(&report(1, 500), marks[2], NOW);
        assert!(!allowance.is_spent(500, NOW), "one is left");
        assert!(allowance.is_spent(501, NOW), "others take of it, too");
        allowance.see(&report(9, 990), marks[1], NOW);
        assert!(allowance.is_spent(501, NOW), "what was overtaken is ignored");
        allowance.spend(10, NOW);
        assert!(allowance.is_spent(0, NOW));
    }

    #[test]
    fn what_azure_says_holds_for_a_moment() {
        let mut allowance = Allowance::default();
        let mark = allowance.spend(10, NOW);
        allowance.see(&Report { requests: said(0, None), tokens: Said::default() }, mark, NOW);
        assert!(allowance.is_spent(0, NOW + UNSAID_RESET_MS - 1));
        assert!(!allowance.is_spent(0, NOW + UNSAID_RESET_MS));
    }

    #[test]
    fn what_is_written_down_is_held_by_our_own_count() {
        let mut allowance = Allowance::default();
        allowance.set_limits(3, 100);
        allowance.spend(40, NOW);
        assert!(!allowance.is_spent(60, NOW) && allowance.is_spent(61, NOW));
        allowance.spend(0, NOW + 500);
        assert!(!allowance.is_spent(60, NOW + 500));
        allowance.spend(0, NOW + 500);
        assert!(allowance.is_spent(0, NOW + 59_999));
        assert!(!allowance.is_spent(100, NOW + 61_000) && allowance.is_spent(101, NOW + 61_000));
        allowance.set_limits(0, 0);
        assert!(!allowance.is_spent(101, NOW));
    }

    proptest! {
        #[test]
        fn the_outlook_is_never_too_bright(
            rpm in 0_u64..9,
            tpm in 0_u64..900,
            steps in prop::collection::vec((0_u64..30_000, 0_u64..300, prop::option::of((0_u64..9, 0_u64..900))), 1..60),
            need in 0_u64..400,
        ) {
            let (mut allowance, mut now) = (Allowance::default(), NOW);
            allowance.set_limits(rpm, tpm);
            for (wait, tokens, answer) in steps {
                now += wait;
                let mark = allowance.spend(tokens, now);
                if let Some((requests, tokens)) = answer {
                    allowance.see(&report(requests, tokens), mark, now);
                }
                let outlook = allowance.outlook(now);
                for later in [0, 1, 8_999, 9_000, 59_999, 60_000, 61_000, 90_000] {
                    if outlook.is_certain(need, now + later) {
                        prop_assert!(!allowance.clone().is_spent(need, now + later), "{outlook:?} {later}");
                    }
                }
            }
        }

        #[test]
        fn no_more_is_begun_than_the_provider_has_left(
            limit in 1_u64..50,
            steps in prop::collection::vec((0_usize..4, 0_usize..4), 1..100),
        ) {
            // A provider that counts attempts as they come in, and whose answers take their time.
            let (mut allowance, mut taken, mut waiting) = (Allowance::default(), 0, Vec::new());
            let mut begin = |allowance: &mut Allowance, waiting: &mut Vec<_>| {
                let mark = allowance.spend(1, NOW);
                taken += 1;
                waiting.push((mark, limit - taken));
                taken
            };
            begin(&mut allowance, &mut waiting);
            let (mark, left) = waiting.remove(0);
            allowance.see(&report(left, 1_000_000), mark, NOW);
            for (burst, at) in steps {
                for _ in 0..burst {
                    if allowance.is_spent(1, NOW) {
                        break;
                    }
                    prop_assert!(begin(&mut allowance, &mut waiting) <= limit);
                }
                if !waiting.is_empty() {
                    let (mark, left) = waiting.remove(at % waiting.len());
                    allowance.see(&report(left, 1_000_000), mark, NOW);
                }
            }
        }

        #[test]
        fn no_number_is_too_great(n: u64, now: u64, reset: u64) {
            let mut allowance = Allowance::default();
            allowance.set_limits(n, n);
            for _ in 0..2 {
                let mark = allowance.spend(n, now);
                let said = Said { limit: None, remaining: Some(n), reset_ms: Some(reset) };
                allowance.see(&Report { requests: said, tokens: said }, mark, now);
                allowance.is_spent(n, now);
                allowance.outlook(now);
            }
        }
    }
}
