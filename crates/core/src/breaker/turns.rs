//! What the words do to a breaker: every way from one state to another.
//!
//! Each way is a function that returns the change, if it is worth a line in the log. All of them go through `turn`, so
//! that none can forget to begin a new epoch.

use super::{
    Breaker, Circuit, Probe,
    rules::Rules,
    samples::Samples,
    words::{Permit, Reason, State, Transition},
};

/// A later end of a cooling is worth a line in the log if it is later by this much.
const NOTABLE_MS: u64 = 1_000;

impl Breaker {
    /// Begins another stretch of one state: what is on its way from before is late from now on.
    pub(super) fn turn(&mut self, circuit: Circuit) {
        self.circuit = circuit;
        self.epoch = self.epoch.wrapping_add(1);
        self.failures_in_row = 0;
        self.samples = Samples::default();
    }

    pub(super) fn send_probe(&mut self, now_ms: u64) -> Permit {
        self.last_probe = self.last_probe.wrapping_add(1).max(1);
        let yields_at_ms = now_ms.saturating_add(self.rules.probe_patience_ms);
        self.circuit = Circuit::HalfOpen { probe: Some(Probe { number: self.last_probe, yields_at_ms }) };
        Permit { epoch: self.epoch, probe: self.last_probe }
    }

    /// Does what became of it still count? The probe that closed the breaker may go on to fail like any other attempt.
    fn is_of_now(&self, permit: Permit) -> bool {
        let closed_it = |by: u32| permit.is_probe() && permit.probe == by;
        permit.epoch == self.epoch || matches!(self.circuit, Circuit::Closed { by, .. } if closed_it(by))
    }

    pub(super) fn begin(&mut self, permit: Permit, now_ms: u64) -> Option<Transition> {
        let is_half_open = matches!(self.circuit, Circuit::HalfOpen { .. });
        if is_half_open && self.is_of_now(permit) { self.succeed(permit, now_ms) } else { None }
    }

    pub(super) fn succeed(&mut self, permit: Permit, now_ms: u64) -> Option<Transition> {
        if !self.is_of_now(permit) {
            return None;
        }
        let from = self.state(now_ms);
        if now_ms >= self.cooling_until_ms {
            self.cooling.reset();
        }
        match self.circuit {
            Circuit::Closed { since_ms, .. } => {
                self.failures_in_row = 0;
                self.samples.add(now_ms, self.rules.window_s, false);
                self.forgive(now_ms.saturating_sub(since_ms));
                None
            }
            // A probe that another has taken the place of is believed, too: an upstream may be slow to answer and well.
            Circuit::HalfOpen { .. } => {
                self.turn(Circuit::Closed { since_ms: now_ms, by: permit.probe });
                changed(from, State::Closed, Reason::ProbeSucceeded, None)
            }
            Circuit::Open { .. } | Circuit::Quarantined { .. } => None,
        }
    }

    /// Once it has been closed for as long as it was last open, and for a window at least, waits begin anew.
    fn forgive(&mut self, closed_ms: u64) {
        if closed_ms >= self.backoff.last_ms().max(u64::from(self.rules.window_s) * 1000) {
            self.backoff.reset();
            self.quarantine.reset();
        }
    }

    pub(super) fn fail(&mut self, permit: Permit, now_ms: u64, jitter: f64) -> Option<Transition> {
        match self.circuit {
            Circuit::Closed { .. } if self.is_of_now(permit) => self.count_failure(now_ms, jitter),
            // One that was given up does not reopen: what it waited for may be long over.
            Circuit::HalfOpen { probe: Some(probe) } if probe.number == permit.probe => {
                self.open(Reason::ProbeFailed, now_ms, jitter)
            }
            _ => None,
        }
    }

    pub(super) fn count_failure(&mut self, now_ms: u64, jitter: f64) -> Option<Transition> {
        self.failures_in_row = self.failures_in_row.saturating_add(1);
        self.samples.add(now_ms, self.rules.window_s, true);
        let (all, failures) = self.samples.sums(now_ms, self.rules.window_s);
        let Rules { failures: most, least_requests, failure_percent: percent, .. } = self.rules;
        if most > 0 && self.failures_in_row >= most {
            return self.open(Reason::ConsecutiveFailures, now_ms, jitter);
        }
        let is_share_great = percent > 0 && failures * 100 >= all * u64::from(percent);
        if is_share_great && all >= u64::from(least_requests) {
            return self.open(Reason::FailureShare, now_ms, jitter);
        }
        None
    }

    fn open(&mut self, reason: Reason, now_ms: u64, jitter: f64) -> Option<Transition> {
        let from = self.state(now_ms);
        let until_ms = now_ms.saturating_add(self.backoff.next(self.rules.backoff_ms, jitter));
        self.turn(Circuit::Open { until_ms });
        changed(from, State::Open, reason, Some(until_ms))
    }

    pub(super) fn refuse(&mut self, reason: Reason, now_ms: u64, jitter: f64) -> Option<Transition> {
        let from = self.state(now_ms);
        // Those that were on their way with the same credential say nothing new.
        if from == State::Quarantined {
            return None;
        }
        let slow_probe_at_ms = now_ms.saturating_add(self.quarantine.next(self.rules.quarantine_ms, jitter));
        self.turn(Circuit::Quarantined { slow_probe_at_ms });
        changed(from, State::Quarantined, reason, Some(slow_probe_at_ms))
    }

    pub(super) fn limit(&mut self, for_ms: Option<u64>, now_ms: u64, jitter: f64) -> Option<Transition> {
        let for_ms = match for_ms {
            Some(for_ms) => for_ms,
            // Those that were on their way when it began to cool say nothing new.
            None if self.cooling_until_ms > now_ms => return None,
            None => self.cooling.next(self.rules.cooling_ms, jitter),
        };
        self.cool(now_ms.saturating_add(for_ms), now_ms, Reason::Limited)
    }

    pub(super) fn cool(&mut self, until_ms: u64, now_ms: u64, reason: Reason) -> Option<Transition> {
        if until_ms <= self.cooling_until_ms.max(now_ms) {
            return None;
        }
        let from = self.state(now_ms);
        let longer_ms = until_ms - self.cooling_until_ms;
        self.cooling_until_ms = until_ms;
        match from {
            State::Quarantined => None,
            State::Cooling if longer_ms < NOTABLE_MS => None,
            _ => changed(from, State::Cooling, reason, Some(until_ms)),
        }
    }

    pub(super) fn clear(&mut self, now_ms: u64, reason: Reason) -> Option<Transition> {
        let from = self.state(now_ms);
        self.cooling_until_ms = 0;
        self.cooling.reset();
        if matches!(self.circuit, Circuit::Quarantined { .. } | Circuit::Open { .. }) {
            self.turn(Circuit::HalfOpen { probe: None });
        }
        let to = self.state(now_ms);
        if from == to { None } else { changed(from, to, reason, None) }
    }
}

pub(super) fn changed(from: State, to: State, reason: Reason, until_ms: Option<u64>) -> Option<Transition> {
    Some(Transition { from, to, reason, until_ms })
}
