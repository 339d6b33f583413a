//! The promises of the breaker, tried on a simulated clock with whatever may happen to it.

use proptest::prelude::*;

use super::*;

const NOW: u64 = 1_000_000;

#[derive(Clone, Debug)]
enum Step {
    Wait(u64),
    Back(u64),
    Enter,
    /// Of the permits that were given, the one so many before the last.
    Record(usize, Outcome),
    Release(usize),
    Probed(bool),
    Free,
    Share(Notice),
}

fn outcomes() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        1 => Just(Outcome::Begun),
        3 => Just(Outcome::Success),
        9 => Just(Outcome::Failure),
        1 => Just(Outcome::Neutral),
        1 => prop::option::of(0_u64..20_000).prop_map(|for_ms| Outcome::Limited { for_ms }),
        1 => prop_oneof![Just(Outcome::Refused), Just(Outcome::Exhausted)],
    ]
}

fn notices() -> impl Strategy<Value = Notice> {
    prop_oneof![
        (0_u64..90_000).prop_map(|ms| Notice::Cooling { until_ms: NOW + ms }),
        (0_u64..90_000).prop_map(|ms| Notice::Quarantined { slow_probe_at_ms: NOW + ms }),
        Just(Notice::Cleared),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (0_u64..3_000).prop_map(Step::Wait),
        1 => (0_u64..90_000).prop_map(Step::Wait),
        1 => (0_u64..3_000).prop_map(Step::Back),
        8 => Just(Step::Enter),
        12 => (0_usize..4, outcomes()).prop_map(|(at, outcome)| Step::Record(at, outcome)),
        2 => (0_usize..4).prop_map(Step::Release),
        1 => any::<bool>().prop_map(Step::Probed),
        1 => Just(Step::Free),
        1 => notices().prop_map(Step::Share),
    ];
    prop::collection::vec(step, 1..200)
}

fn rules() -> impl Strategy<Value = Rules> {
    (0_u32..4, 0_u32..8, 0_u32..101, 0_u64..70_000).prop_map(
        |(failures, least_requests, failure_percent, probe_patience_ms)| Rules {
            failures,
            least_requests,
            failure_percent,
            probe_patience_ms,
            ..Rules::default()
        },
    )
}

/// A breaker on a simulated clock, beside what must be true of it.
#[derive(Default)]
struct World {
    breaker: Breaker,
    now: u64,
    /// With the epoch in which each was given.
    permits: Vec<(Permit, u32)>,
    /// The probe that closed it last, and the epoch that this began.
    closed_by: Option<(Permit, u32)>,
    /// The probe that is under way, and when it was sent.
    probe: Option<(Permit, u64)>,
    cooling_until: u64,
    is_quarantined: bool,
}

impl World {
    fn take(&mut self, step: &Step, jitter: f64) {
        let epoch = self.breaker.epoch;
        match step {
            Step::Wait(ms) => self.now += ms,
            Step::Back(ms) => self.now = self.now.saturating_sub(*ms),
            Step::Enter => self.enter(),
            Step::Record(at, outcome) => {
                if let Some((permit, given)) = self.permits.iter().rev().nth(*at).copied() {
                    let now = self.breaker.epoch;
                    let is_late = given != now && self.closed_by != Some((permit, now));
                    self.record(permit, *outcome, is_late, jitter);
                }
            }
            Step::Release(at) => {
                if let Some((permit, _)) = self.permits.iter().rev().nth(*at).copied() {
                    self.breaker.release(permit);
                    self.ended(permit);
                }
            }
            Step::Probed(is_ok) => {
                self.breaker.probed(*is_ok, self.now, jitter);
                self.is_quarantined &= !is_ok;
            }
            Step::Free => {
                self.breaker.free(self.now);
                (self.is_quarantined, self.cooling_until) = (false, 0);
            }
            Step::Share(notice) => self.share(*notice),
        }
        // What is quarantined meanwhile, and freed again, is asked anew.
        if epoch != self.breaker.epoch && !matches!(step, Step::Enter) {
            self.probe = None;
        }
        assert_eq!(self.breaker.state(self.now) == State::Quarantined, self.is_quarantined);
        assert_eq!(self.breaker.cooling_until_ms, self.cooling_until, "cooling is not what was said");
    }

    fn enter(&mut self) {
        let ready = self.breaker.ready(self.now);
        let Some(permit) = self.breaker.try_enter(self.now) else {
            return assert_ne!(ready, Ready::Now, "it said that it would");
        };
        assert_eq!(ready, Ready::Now);
        assert!(!self.is_quarantined, "traffic while quarantined");
        assert!(self.now >= self.cooling_until, "traffic while cooling");
        if permit.is_probe() {
            if let Some((_, sent)) = self.probe {
                assert!(self.now >= sent + self.breaker.rules.probe_patience_ms, "two probes at once");
            }
            self.probe = Some((permit, self.now));
        }
        self.permits.push((permit, self.breaker.epoch));
    }

    fn record(&mut self, permit: Permit, outcome: Outcome, is_late: bool, jitter: f64) {
        let before = self.breaker.clone();
        let change = self.breaker.record(permit, outcome, self.now, jitter);
        match outcome {
            Outcome::Neutral => {
                let mut freed = before;
                freed.release(permit);
                assert_eq!((change, &self.breaker), (None, &freed), "neutral outcomes change nothing");
            }
            Outcome::Begun | Outcome::Success | Outcome::Failure if is_late => {
                assert_eq!((change, &self.breaker), (None, &before), "what is late changes nothing");
            }
            Outcome::Limited { for_ms: Some(for_ms) } if for_ms > 0 => {
                self.cooling_until = self.cooling_until.max(self.now + for_ms);
            }
            Outcome::Limited { for_ms: None } if self.cooling_until <= self.now => {
                self.cooling_until = self.breaker.cooling_until_ms;
                let waits = self.cooling_until - self.now;
                assert!((5_000..=75_000).contains(&waits), "{waits}");
            }
            Outcome::Refused | Outcome::Exhausted => self.is_quarantined = true,
            _ => {}
        }
        if change.is_some_and(|change| change.reason == Reason::ProbeSucceeded) {
            self.closed_by = Some((permit, self.breaker.epoch));
        }
        if !matches!(outcome, Outcome::Begun) {
            self.ended(permit);
        }
    }

    fn share(&mut self, notice: Notice) {
        self.breaker.share(notice, self.now);
        match notice {
            Notice::Cooling { until_ms } if until_ms > self.now => {
                self.cooling_until = self.cooling_until.max(until_ms);
            }
            Notice::Cooling { .. } => {}
            Notice::Quarantined { .. } => self.is_quarantined = true,
            Notice::Cleared => (self.is_quarantined, self.cooling_until) = (false, 0),
        }
        let once = self.breaker.clone();
        assert_eq!(self.breaker.share(notice, self.now), None, "saying it twice changes nothing");
        assert_eq!(self.breaker, once);
    }

    fn ended(&mut self, permit: Permit) {
        self.probe = self.probe.filter(|(probe, _)| *probe != permit);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn whatever_happens_it_holds_its_promises(rules in rules(), steps in steps(), jitter in 0.0..1.0) {
        let mut world = World { breaker: Breaker::new(rules), now: NOW, ..World::default() };
        for step in &steps {
            world.take(step, jitter);
        }
        // Nobody is kept out for ever, except by quarantine. The clock may have gone back since a wait began.
        let longest = (rules.backoff_ms.max_ms * 5 / 4).max(rules.probe_patience_ms);
        let back: u64 = steps.iter().map(|step| if let Step::Back(ms) = step { *ms } else { 0 }).sum();
        world.now = (world.now + longest + back).max(world.cooling_until);
        prop_assert_eq!(world.breaker.try_enter(world.now).is_some(), !world.is_quarantined);
    }

    #[test]
    fn it_recovers_within_its_backoff(outage_ms in 0_u64..600_000, every_ms in 10_u64..2_000, jitter in 0.0..1.0) {
        let (mut breaker, mut now, well_at) = (Breaker::default(), NOW, NOW + outage_ms);
        while now < well_at || breaker.state(now) != State::Closed {
            // The wait is in proportion to the outage: a short one is not answered by a long absence.
            let longest = (2_000 + outage_ms * 3).min(75_000);
            prop_assert!(now <= well_at + longest + every_ms, "it is well since {} ms", now - well_at);
            if let Some(permit) = breaker.try_enter(now) {
                let outcome = if now < well_at { Outcome::Failure } else { Outcome::Success };
                breaker.record(permit, outcome, now, jitter);
            }
            now += every_ms;
        }
    }

    #[test]
    fn any_clock_is_borne(
        patience: u64,
        events in prop::collection::vec((any::<u64>(), outcomes(), any::<u64>()), 1..60),
    ) {
        let mut breaker = Breaker::new(Rules { probe_patience_ms: patience, ..Rules::default() });
        for (now, outcome, until_ms) in events {
            let permit = breaker.try_enter(now).unwrap_or(Permit { epoch: 0, probe: 0 });
            breaker.record(permit, outcome, now, 1.0);
            breaker.record(permit, Outcome::Limited { for_ms: Some(until_ms) }, now, 1.0);
            breaker.share(Notice::Cooling { until_ms }, now);
            breaker.probed(now % 2 == 0, now, 1.0);
            if now % 3 == 0 {
                breaker.free(now);
            }
        }
    }
}
