//! The breaker: the health state machine of one upstream.
//!
//! ```text
//!              failures                 backoff over
//!   closed ----------------->  open  ----------------->  half-open --- a probe succeeds ---> closed
//!                               ^                            |
//!                               +------- a probe fails ------+
//!
//!   401, 403, insufficient_quota:  any state ---> quarantined --- freed ---> half-open
//!   429:                           cooling lies over any of them until its time is over
//! ```
//!
//! **Why two signals.** Failures in a row see an upstream that is gone: five requests are enough, however few come. They are
//! blind to one that fails every second request, because each success begins the count anew. The share of failures over a
//! window sees that, but needs a number of attempts before a share means anything. Either opens. A moving average was
//! rejected: it is one number for both, and nobody can say from a log line why it opened.
//!
//! **Why one probe.** A crowd let loose on an upstream that comes back takes it down again. The request of a client is the
//! probe, for only it asks what clients ask: a provider whose list of models answers may well fail every completion. A probe
//! that succeeds is believed at once. Letting traffic grow step by step was rejected: limits and the next five failures do
//! the same without a further state.
//!
//! **Why 429 is not a failure.** It is a healthy answer that names a time. The upstream cools for exactly that long, and
//! then gets its work back without a probe. **Why 401 and 403 are for good:** time does not mend a credential, and a
//! provider may lock an account that keeps knocking. Somebody who knows, or a slow probe, frees it.
//!
//! **What is late does not count.** A permit carries the epoch, the stretch of one state, in which it was given. A failure
//! from before the breaker opened must not extend the backoff, and a success from then must not close it. What an answer
//! says of the account (429, 401, 403, no quota) holds whenever it comes.
//!
//! Guarantees, each a property test: no two probes share their time, a probe that says nothing holds its place for
//! [`Rules::probe_patience_ms`] at most; an open breaker lets one in after its backoff, which is bounded; a quarantined one
//! lets nobody in until it is freed; cooling lasts for exactly what was said; neutral outcomes change nothing.
//!
//! That an open breaker becomes half-open, and that a cooling ends, is the passing of time and no event: [`Breaker::state`]
//! shows it, but nobody is told. Times are of one clock of the caller's; if it stands still or goes back, waits become
//! longer by as much, and nothing else happens.

#[cfg(test)]
mod properties;
mod rules;
mod samples;
mod turns;
mod words;

pub use rules::{Rules, Span};
pub use words::{Notice, Outcome, Permit, Ready, Reason, State, Transition};

use rules::Backoff;
use samples::Samples;
use turns::changed;

/// The health of one upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Breaker {
    rules: Rules,
    circuit: Circuit,
    epoch: u32,
    last_probe: u32,
    failures_in_row: u32,
    samples: Samples,
    backoff: Backoff,
    quarantine: Backoff,
    cooling: Backoff,
    cooling_until_ms: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Circuit {
    /// `by`: the number of the probe that closed it, whose further words still count.
    Closed {
        since_ms: u64,
        by: u32,
    },
    Open {
        until_ms: u64,
    },
    HalfOpen {
        probe: Option<Probe>,
    },
    Quarantined {
        slow_probe_at_ms: u64,
    },
}

/// A request that is finding out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Probe {
    number: u32,
    /// When the next one may take its place.
    yields_at_ms: u64,
}

impl Default for Breaker {
    fn default() -> Self {
        Self::new(Rules::default())
    }
}

impl Breaker {
    /// A closed breaker that knows nothing yet.
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            circuit: Circuit::Closed { since_ms: 0, by: 0 },
            epoch: 0,
            last_probe: 0,
            failures_in_row: 0,
            samples: Samples::default(),
            backoff: Backoff::default(),
            quarantine: Backoff::default(),
            cooling: Backoff::default(),
            cooling_until_ms: 0,
        }
    }

    /// Goes by other rules from now on. Waits that have begun stay as they are.
    pub fn set_rules(&mut self, rules: Rules) {
        if self.rules.window_s != rules.window_s {
            self.samples = Samples::default();
        }
        self.rules = rules;
    }

    /// Leave to make an attempt at `now_ms`, or `None`. Whoever got one says what became of it: [`Self::record`], or
    /// [`Self::release`] if there is nothing to say.
    pub fn try_enter(&mut self, now_ms: u64) -> Option<Permit> {
        if self.ready_at_ms() == u64::MAX || self.ready_at_ms() > now_ms {
            return None;
        }
        match self.circuit {
            Circuit::Closed { .. } => Some(Permit { epoch: self.epoch, probe: 0 }),
            Circuit::Quarantined { .. } => None,
            Circuit::Open { .. } => {
                self.turn(Circuit::HalfOpen { probe: None });
                Some(self.send_probe(now_ms))
            }
            Circuit::HalfOpen { .. } => Some(self.send_probe(now_ms)),
        }
    }

    /// Takes note of what became of an attempt. `jitter`: a random number from 0 to 1.
    ///
    /// One permit may be recorded more than once, as more becomes known: [`Outcome::Begun`] with the first bytes, then
    /// how it ended. A failure after a success counts as a failure.
    pub fn record(&mut self, permit: Permit, outcome: Outcome, now_ms: u64, jitter: f64) -> Option<Transition> {
        match outcome {
            Outcome::Begun => self.begin(permit, now_ms),
            Outcome::Success => self.succeed(permit, now_ms),
            Outcome::Failure => self.fail(permit, now_ms, jitter),
            Outcome::Neutral => {
                self.release(permit);
                None
            }
            Outcome::Limited { for_ms } => {
                self.release(permit);
                self.limit(for_ms, now_ms, jitter)
            }
            Outcome::Refused => self.refuse(Reason::Refused, now_ms, jitter),
            Outcome::Exhausted => self.refuse(Reason::Exhausted, now_ms, jitter),
        }
    }

    /// The attempt ended without a word about the upstream. Frees the place of a probe.
    pub fn release(&mut self, permit: Permit) {
        if let Circuit::HalfOpen { probe } = &mut self.circuit {
            *probe = probe.filter(|probe| probe.number != permit.probe);
        }
    }

    /// The word of a probe that is no request of a client.
    ///
    /// That it succeeded closes an open or half-open breaker unless a request is finding out already, and makes a
    /// quarantined one half-open. That it failed is a failure like others of a closed breaker, puts off the next slow
    /// probe of a quarantined one, and is nothing new to the others: their backoff must not depend on a probe that may
    /// itself be what is broken.
    pub fn probed(&mut self, is_ok: bool, now_ms: u64, jitter: f64) -> Option<Transition> {
        let from = self.state(now_ms);
        match (self.circuit, is_ok) {
            (Circuit::Closed { .. }, false) => self.count_failure(now_ms, jitter),
            (Circuit::Quarantined { .. }, false) => {
                let wait_ms = self.quarantine.next(self.rules.quarantine_ms, jitter);
                self.circuit = Circuit::Quarantined { slow_probe_at_ms: now_ms.saturating_add(wait_ms) };
                None
            }
            (Circuit::Quarantined { .. }, true) => {
                self.turn(Circuit::HalfOpen { probe: None });
                changed(from, State::HalfOpen, Reason::ActiveProbe, None)
            }
            (Circuit::Open { .. } | Circuit::HalfOpen { probe: None }, true) => {
                self.turn(Circuit::Closed { since_ms: now_ms, by: 0 });
                changed(from, State::Closed, Reason::ActiveProbe, None)
            }
            _ => None,
        }
    }

    /// Ends whatever keeps traffic away: an operator knows better. What was quarantined or open is half-open afterwards,
    /// so that one request goes first.
    pub fn free(&mut self, now_ms: u64) -> Option<Transition> {
        self.clear(now_ms, Reason::Freed)
    }

    /// Another replica's word. Saying it twice changes nothing, and nothing that is known is shortened, except by
    /// [`Notice::Cleared`].
    pub fn share(&mut self, notice: Notice, now_ms: u64) -> Option<Transition> {
        match (notice, &mut self.circuit) {
            (Notice::Cleared, _) => self.clear(now_ms, Reason::Told),
            (Notice::Cooling { until_ms }, _) => self.cool(until_ms, now_ms, Reason::Told),
            (Notice::Quarantined { slow_probe_at_ms: told }, Circuit::Quarantined { slow_probe_at_ms }) => {
                *slow_probe_at_ms = told.max(*slow_probe_at_ms);
                None
            }
            (Notice::Quarantined { slow_probe_at_ms }, _) => {
                let from = self.state(now_ms);
                self.turn(Circuit::Quarantined { slow_probe_at_ms });
                changed(from, State::Quarantined, Reason::Told, Some(slow_probe_at_ms))
            }
        }
    }

    /// When the next request is let in, in milliseconds of the caller's clock; 0: at once, `u64::MAX`: not by the passing
    /// of time. One number, so that it can be kept where no lock is needed to read it; [`Ready::of`] says what it means.
    #[must_use]
    pub fn ready_at_ms(&self) -> u64 {
        let ready_at_ms = match self.circuit {
            Circuit::Closed { .. } | Circuit::HalfOpen { probe: None } => 0,
            Circuit::Open { until_ms } => until_ms,
            Circuit::HalfOpen { probe: Some(probe) } => probe.yields_at_ms,
            Circuit::Quarantined { .. } => u64::MAX,
        };
        ready_at_ms.max(self.cooling_until_ms)
    }

    /// May a request go there at `now_ms`, or when?
    #[must_use]
    pub fn ready(&self, now_ms: u64) -> Ready {
        Ready::of(self.ready_at_ms(), now_ms)
    }

    /// Where it stands at `now_ms`. Quarantine hides cooling, and cooling hides the rest.
    #[must_use]
    pub fn state(&self, now_ms: u64) -> State {
        match self.circuit {
            Circuit::Quarantined { .. } => State::Quarantined,
            _ if self.cooling_until_ms > now_ms => State::Cooling,
            Circuit::Closed { .. } => State::Closed,
            Circuit::Open { until_ms } if until_ms > now_ms => State::Open,
            Circuit::Open { .. } | Circuit::HalfOpen { .. } => State::HalfOpen,
        }
    }

    /// Is a request finding out just now whether it is well again?
    #[must_use]
    pub fn is_probing(&self) -> bool {
        matches!(self.circuit, Circuit::HalfOpen { probe: Some(_) })
    }

    /// When the slow probe of a quarantined upstream is due, in milliseconds of the caller's clock.
    #[must_use]
    pub fn slow_probe_at_ms(&self) -> Option<u64> {
        match self.circuit {
            Circuit::Quarantined { slow_probe_at_ms } => Some(slow_probe_at_ms),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_000_000;

    /// Makes an attempt that comes to `outcome` at once.
    fn attempt(breaker: &mut Breaker, outcome: Outcome, now_ms: u64) -> Option<Transition> {
        let permit = breaker.try_enter(now_ms).expect("it lets requests in");
        breaker.record(permit, outcome, now_ms, 0.0)
    }

    fn opened(now_ms: u64) -> Breaker {
        let mut breaker = Breaker::default();
        assert!((0..5).any(|_| attempt(&mut breaker, Outcome::Failure, now_ms).is_some()));
        assert_eq!(breaker.state(now_ms), State::Open);
        breaker
    }

    fn quarantined(now_ms: u64) -> Breaker {
        let mut breaker = Breaker::default();
        assert!(attempt(&mut breaker, Outcome::Refused, now_ms).is_some());
        breaker
    }

    #[test]
    fn failures_in_a_row_open_it() {
        let mut breaker = Breaker::default();
        (0..4).for_each(|_| assert_eq!(attempt(&mut breaker, Outcome::Failure, NOW), None));
        assert_eq!(attempt(&mut breaker, Outcome::Success, NOW), None);
        (0..4).for_each(|_| assert_eq!(attempt(&mut breaker, Outcome::Failure, NOW), None));
        let change = Transition {
            from: State::Closed,
            to: State::Open,
            reason: Reason::ConsecutiveFailures,
            until_ms: Some(NOW + 1_000),
        };
        assert_eq!(attempt(&mut breaker, Outcome::Failure, NOW), Some(change));
        assert_eq!(change.notice(), None, "others find out for themselves");
        assert_eq!(breaker.ready(NOW + 999), Ready::At(NOW + 1_000));
        assert_eq!(breaker.ready(NOW + 1_000), Ready::Now);
        assert_eq!(breaker.state(NOW + 1_000), State::HalfOpen);
    }

    #[test]
    fn a_great_share_of_failures_opens_it() {
        let mut breaker = Breaker::default();
        let mut count = 0;
        let change = (0..).find_map(|at| {
            count += 1;
            let outcome = if at % 2 == 0 { Outcome::Success } else { Outcome::Failure };
            attempt(&mut breaker, outcome, NOW + at * 100)
        });
        assert_eq!((change.map(|c| c.reason), count), (Some(Reason::FailureShare), 20));
        let mut breaker = Breaker::default();
        for at in 0..300 {
            let outcome = if at % 2 == 0 { Outcome::Success } else { Outcome::Failure };
            assert_eq!(attempt(&mut breaker, outcome, NOW + at * 2_000), None, "too few in a window");
        }
    }

    #[test]
    fn streams_that_break_off_open_it() {
        for first in [Outcome::Begun, Outcome::Success] {
            let mut breaker = Breaker::default();
            let change = (0..30).find_map(|at| {
                let permit = breaker.try_enter(NOW + at).unwrap();
                assert_eq!(breaker.record(permit, first, NOW + at, 0.0), None);
                breaker.record(permit, Outcome::Failure, NOW + at, 0.0)
            });
            assert_eq!(change.map(|c| c.to), Some(State::Open), "{first:?}");
        }
    }

    #[test]
    fn one_probe_finds_out() {
        let mut breaker = opened(NOW);
        let at = NOW + 1_000;
        let probe = breaker.try_enter(at).unwrap();
        assert!(probe.is_probe());
        assert_eq!(breaker.try_enter(at), None);
        breaker.release(probe);
        let probe = breaker.try_enter(at).unwrap();
        let change = breaker.record(probe, Outcome::Failure, at, 0.0).unwrap();
        assert_eq!(
            (change.from, change.reason, change.until_ms),
            (State::HalfOpen, Reason::ProbeFailed, Some(at + 2_000))
        );
        let probe = breaker.try_enter(at + 2_000).unwrap();
        let change = breaker.record(probe, Outcome::Begun, at + 2_000, 0.0).unwrap();
        assert_eq!((change.to, change.reason), (State::Closed, Reason::ProbeSucceeded));
        (0..4).for_each(|_| assert_eq!(attempt(&mut breaker, Outcome::Failure, at + 2_000), None));
        let change = breaker.record(probe, Outcome::Failure, at + 2_000, 0.0).unwrap();
        assert_eq!(
            change.until_ms,
            Some(at + 6_000),
            "its own end counts; it was not well for long, so it waits longer"
        );
    }

    #[test]
    fn what_is_late_neither_opens_nor_closes() {
        let mut breaker = Breaker::default();
        let late: Vec<_> = (0..9).filter_map(|_| breaker.try_enter(NOW)).collect();
        assert!((0..5).any(|_| attempt(&mut breaker, Outcome::Failure, NOW).is_some()));
        assert_eq!(breaker.record(late[0], Outcome::Failure, NOW + 500, 0.0), None);
        assert_eq!(breaker.ready(NOW + 500), Ready::At(NOW + 1_000), "no longer than before");
        assert_eq!(breaker.record(late[1], Outcome::Success, NOW + 500, 0.0), None);
        assert_eq!(breaker.state(NOW + 500), State::Open);
        attempt(&mut breaker, Outcome::Success, NOW + 1_000).unwrap();
        assert!(late.iter().all(|&permit| breaker.record(permit, Outcome::Failure, NOW + 1_001, 0.0).is_none()));
        assert!(breaker.record(late[2], Outcome::Refused, NOW + 1_001, 0.0).is_some(), "a fact about the account");
    }

    #[test]
    fn waits_begin_anew_after_it_has_been_well_for_a_while() {
        let mut breaker = opened(NOW);
        let mut now = NOW + 1_000;
        attempt(&mut breaker, Outcome::Success, now).unwrap();
        now += 30_000;
        attempt(&mut breaker, Outcome::Success, now);
        let change = (0..5).find_map(|_| attempt(&mut breaker, Outcome::Failure, now));
        assert_eq!(change.and_then(|c| c.until_ms), Some(now + 1_000));
    }

    #[test]
    fn a_probe_that_says_nothing_loses_its_place_and_keeps_its_word() {
        let mut breaker = opened(NOW);
        let at = NOW + 1_000;
        let slow = breaker.try_enter(at).unwrap();
        assert_eq!(breaker.ready(at + 59_999), Ready::At(at + 60_000));
        let next = breaker.try_enter(at + 60_000).unwrap();
        assert_eq!(breaker.record(slow, Outcome::Failure, at + 60_000, 0.0), None, "it was given up");
        breaker.release(slow);
        assert_eq!(breaker.try_enter(at + 60_000), None, "the place is not its own any more");
        assert!(breaker.record(slow, Outcome::Success, at + 60_000, 0.0).is_some());
        assert_eq!(breaker.record(next, Outcome::Failure, at + 60_000, 0.0), None, "late");
        assert_eq!(breaker.state(at + 60_000), State::Closed);
    }

    #[test]
    fn cooling_lasts_as_long_as_was_said_and_needs_no_probe() {
        let mut breaker = Breaker::default();
        let change = attempt(&mut breaker, Outcome::Limited { for_ms: Some(86_400_000) }, NOW).unwrap();
        assert_eq!(change.notice(), Some(Notice::Cooling { until_ms: NOW + 86_400_000 }));
        assert_eq!(breaker.try_enter(NOW + 86_399_999), None);
        assert!(!breaker.try_enter(NOW + 86_400_000).unwrap().is_probe());
        assert_eq!(breaker.state(NOW + 86_400_000), State::Closed);
    }

    #[test]
    fn cooling_without_a_time_doubles_while_it_comes_back() {
        let (mut breaker, mut now, mut waits) = (Breaker::default(), NOW, Vec::new());
        for _ in 0..5 {
            let crowd = [breaker.try_enter(now).unwrap(), breaker.try_enter(now).unwrap()];
            let until =
                breaker.record(crowd[0], Outcome::Limited { for_ms: None }, now, 0.0).unwrap().until_ms.unwrap();
            assert_eq!(breaker.record(crowd[1], Outcome::Limited { for_ms: None }, now + 1, 0.0), None);
            waits.push(until - now);
            now = until;
        }
        assert_eq!(waits, [5_000, 10_000, 20_000, 40_000, 60_000]);
        attempt(&mut breaker, Outcome::Success, now);
        let change = attempt(&mut breaker, Outcome::Limited { for_ms: None }, now).unwrap();
        assert_eq!(change.until_ms, Some(now + 5_000));
    }

    #[test]
    fn a_limited_probe_leaves_the_question_open() {
        let mut breaker = opened(NOW);
        attempt(&mut breaker, Outcome::Limited { for_ms: Some(3_000) }, NOW + 1_000).unwrap();
        assert_eq!(breaker.state(NOW + 3_999), State::Cooling);
        assert_eq!(breaker.state(NOW + 4_000), State::HalfOpen);
        assert!(breaker.try_enter(NOW + 4_000).unwrap().is_probe());
    }

    #[test]
    fn a_bad_credential_is_quarantined_until_it_is_freed() {
        for outcome in [Outcome::Refused, Outcome::Exhausted] {
            let mut breaker = Breaker::default();
            let late = breaker.try_enter(NOW).unwrap();
            let change = attempt(&mut breaker, outcome, NOW).unwrap();
            assert_eq!((change.to, change.until_ms), (State::Quarantined, Some(NOW + 300_000)));
            assert_eq!(breaker.record(late, outcome, NOW + 9, 0.0), None, "nothing new");
            assert_eq!(breaker.ready(u64::MAX - 1), Ready::Never);
            assert_eq!(breaker.free(NOW + 10).map(|c| c.notice()), Some(Some(Notice::Cleared)));
            let change = attempt(&mut breaker, outcome, NOW + 20).unwrap();
            assert_eq!(change.until_ms, Some(NOW + 20 + 600_000), "the slow probe waits longer");
        }
    }

    #[test]
    fn slow_probes_free_it_or_wait_longer() {
        let mut breaker = quarantined(NOW);
        assert_eq!(breaker.slow_probe_at_ms(), Some(NOW + 300_000));
        assert_eq!(breaker.probed(false, NOW + 300_000, 0.0), None);
        assert_eq!(breaker.slow_probe_at_ms(), Some(NOW + 900_000));
        let change = breaker.probed(true, NOW + 900_000, 0.0).unwrap();
        assert_eq!(
            (change.from, change.to, change.notice()),
            (State::Quarantined, State::HalfOpen, Some(Notice::Cleared))
        );
        assert_eq!(breaker.slow_probe_at_ms(), None);
        assert!(breaker.try_enter(NOW + 900_000).unwrap().is_probe());
    }

    #[test]
    fn active_probes_close_what_nobody_is_asking() {
        let mut breaker = opened(NOW);
        assert_eq!(breaker.probed(false, NOW, 0.0), None);
        assert_eq!(breaker.ready(NOW), Ready::At(NOW + 1_000), "no longer than before");
        assert_eq!(breaker.probed(true, NOW, 0.0).map(|c| c.to), Some(State::Closed));
        let mut breaker = opened(NOW);
        let probe = breaker.try_enter(NOW + 1_000).unwrap();
        assert_eq!(breaker.probed(true, NOW + 1_000, 0.0), None, "a request is finding out");
        breaker.release(probe);
        assert!(breaker.probed(true, NOW + 1_000, 0.0).is_some());
        assert_eq!((0..5).filter_map(|_| breaker.probed(false, NOW + 1_000, 0.0)).count(), 1);
    }

    #[test]
    fn what_others_say_shortens_nothing() {
        let mut breaker = Breaker::default();
        let change = breaker.share(Notice::Cooling { until_ms: NOW + 9_000 }, NOW).unwrap();
        assert_eq!((change.reason, change.notice()), (Reason::Told, None), "what was told is not told on");
        assert_eq!(breaker.share(Notice::Cooling { until_ms: NOW + 9_000 }, NOW), None);
        assert_eq!(breaker.share(Notice::Cooling { until_ms: NOW + 5_000 }, NOW), None);
        assert_eq!(breaker.ready(NOW), Ready::At(NOW + 9_000));
        assert!(breaker.share(Notice::Quarantined { slow_probe_at_ms: NOW + 70 }, NOW).is_some());
        assert_eq!(breaker.share(Notice::Quarantined { slow_probe_at_ms: NOW + 60 }, NOW), None);
        assert_eq!(breaker.slow_probe_at_ms(), Some(NOW + 70));
        assert_eq!(breaker.share(Notice::Cleared, NOW).map(|c| (c.to, c.notice())), Some((State::HalfOpen, None)));
        assert_eq!(breaker.share(Notice::Cleared, NOW), None);
    }

    #[test]
    fn an_operator_ends_a_cooling() {
        let mut breaker = Breaker::default();
        attempt(&mut breaker, Outcome::Limited { for_ms: Some(86_400_000) }, NOW);
        assert_eq!(breaker.free(NOW).map(|c| c.to), Some(State::Closed));
        assert_eq!(breaker.ready(NOW), Ready::Now);
        assert_eq!(breaker.free(NOW), None);
    }
}
