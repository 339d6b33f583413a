//! The law of limits, on a simulated clock: one suite for the limiter in this process and for the one in Redis.
//!
//! What is asked of a limiter is [`Place`](place::Place); each test says once what must be true of every place. Each Redis
//! here is a real server; only its clock is given.

mod place;
mod replicas;
mod short_way;

use chrono::DateTime;
use proptest::prelude::*;
use tollgate_core::{
    id::{KeyId, UserId},
    limit::{
        Amount, Caps, MAX_LIMIT, Subject,
        standing::Standing,
        state::{Demand, Kind, Need, Refusal, Wait},
    },
};

use self::place::{
    Held, LEASE_MS, NOW, Place, Process, Replica, amount, any_caps, at_once, everywhere, everywhere_for,
    for_each_input, month, quota, rpm, someone,
};
use crate::support::redis::Redis as Server;

/// Waits this long, wants so many tokens, uses so many of them, and takes so long.
type Call = (u64, u64, u64, u64);

fn calls() -> impl Strategy<Value = Vec<Call>> {
    prop::collection::vec((0_u64..2500, 0_u64..400, 0_u64..400, 0_u64..90_000), 1..150)
}

#[test]
fn no_true_minute_holds_more_than_the_limit() {
    everywhere_for(24, &(1_u64..40, 400_u64..3000, calls()), |place, (rpm, tpm, calls)| {
        let someone = someone(Caps { rpm: *rpm, tpm: *tpm, ..Caps::default() });
        place.set(NOW);
        let mut admitted: Vec<(u64, u64)> = Vec::new();
        let mut open: Vec<(u64, usize, u64, Held)> = Vec::new();
        for &(wait, want, used, lasts) in calls {
            place.pass(wait);
            for (_, index, used, held) in open.extract_if(.., |(ends, ..)| *ends <= place.now()) {
                place.settle(held, amount(used));
                admitted[index].1 = used;
            }
            if let Ok(held) = place.one(&someone, want) {
                // Of what was estimated, at most that is used: what exceeds it is the error of the estimate.
                open.push((place.now() + lasts, admitted.len(), used.min(want), held));
                admitted.push((place.now(), want));
            }
        }
        for (index, &(begin, _)) in admitted.iter().enumerate() {
            let minute: Vec<_> = admitted[index..].iter().take_while(|(at, _)| *at < begin + 60_000).collect();
            prop_assert!(minute.len() as u64 <= *rpm, "{} requests in the minute from {begin}", minute.len());
            let sum: u64 = minute.iter().map(|(_, tokens)| tokens).sum();
            prop_assert!(sum <= *tpm, "{sum} tokens in the minute from {begin}");
        }
        Ok(())
    });
}

#[test]
fn steady_load_gets_nearly_all_of_the_limit() {
    everywhere_for(3, &(1_u64..40, 0_u64..1000), |place, &(limit, phase)| {
        let someone = someone(rpm(limit));
        let minutes = 61;
        place.set(NOW + phase);
        let mut count = 0;
        // Somebody always waits: as many as fit are admitted each half second.
        for _ in 0..minutes * 120 {
            while place.one(&someone, 0).is_ok() {
                count += 1;
            }
            place.pass(500);
        }
        prop_assert!(count * 100 >= limit * minutes * 98, "{count} of {}", limit * minutes);
        Ok(())
    });
}

#[test]
fn tokens_at_steady_load_get_nearly_all_of_the_limit() {
    everywhere(|place| {
        let someone = someone(Caps { tpm: 60_000, ..Caps::default() });
        let mut used = 0;
        for _ in 0..61 * 60 {
            while place.one(&someone, 100).is_ok_and(|held| {
                place.settle(held, amount(90));
                true
            }) {
                used += 90;
            }
            place.pass(1000);
        }
        assert!(used * 100 >= 61 * 60_000 * 98_u64, "{used}");
    });
}

#[test]
fn who_waits_as_told_is_admitted_and_not_a_millisecond_earlier() {
    let inputs = (1_u64..20, prop::collection::vec(0_u64..9000, 1..60), 0_u64..100);
    everywhere_for(24, &inputs, |place, (rpm, waits, want)| {
        let someone = someone(Caps { rpm: *rpm, tpm: 300, ..Caps::default() });
        place.set(NOW);
        for wait in waits {
            place.pass(*wait);
            let Err(refusal) = place.one(&someone, *want) else { continue };
            let Wait::Ms(ms) = refusal.wait else { panic!("{refusal:?}") };
            place.pass(ms - 1);
            prop_assert!(place.one(&someone, *want).is_err(), "{refusal:?}, and earlier");
            place.pass(1);
            prop_assert!(place.one(&someone, *want).is_ok(), "{refusal:?}, and waited");
        }
        Ok(())
    });
}

#[test]
fn a_refusal_leaves_no_trace() {
    everywhere(|place| {
        let demands = [
            Demand { subject: Subject::of_ip([192, 0, 2, 1].into()), caps: rpm(10) },
            Demand { subject: Subject::User(UserId(1)), caps: Caps { tpm: 1000, concurrency: 9, ..quota(1000) } },
            someone(rpm(1)),
        ];
        assert!(place.admit(&demands, amount(100).into()).0.is_ok());
        for _ in 0..20 {
            let refusal = place.admit(&demands, amount(100).into()).0.err().expect("the key may once");
            assert_eq!((refusal.demand, refusal.kind), (2, Kind::Rpm));
        }
        let (held, standing) = place.admit(&demands[..2], amount(900).into());
        assert!(held.is_ok(), "tokens, places and the quota are as they were");
        assert_eq!(standing.requests.unwrap().remaining, 8);
        assert_eq!(standing.tokens.unwrap().remaining, 0);
    });
}

#[test]
fn what_is_undone_was_never_there() {
    let caps = Caps { rpm: 100, tpm: 10_000, concurrency: 50, monthly_tokens: 20_000, ..Caps::default() };
    everywhere_for(12, &prop::collection::vec((0_u64..3000, 1_u64..300, any::<bool>()), 1..60), |place, steps| {
        let (disturbed, calm) = (someone(caps), someone(caps));
        place.set(NOW);
        for &(wait, want, stays) in steps {
            place.pass(wait);
            if let Ok(held) = place.one(&disturbed, want) {
                place.undo(held);
            }
            let ask = |demand: &Demand| place.admit(std::slice::from_ref(demand), amount(want).into());
            if stays {
                let ((one, at_one), (other, at_other)) = (ask(&disturbed), ask(&calm));
                prop_assert_eq!((one.err(), at_one), (other.err(), at_other));
            }
        }
        Ok(())
    });
}

#[test]
fn a_clock_that_jumps_back_frees_nothing() {
    for jump in [1, 999, 30_000, 61_000, 3_600_000] {
        everywhere(|place| {
            let someone = someone(rpm(7));
            place.set(NOW - 30_000);
            assert_eq!(place.count(&someone, 4), 4);
            place.set(NOW);
            assert_eq!(place.count(&someone, 9), 3);
            place.set(NOW - jump);
            assert_eq!(place.count(&someone, 9), 0, "{jump}");
            place.set(NOW - jump + 29_000);
            assert_eq!(place.count(&someone, 9), 0, "{jump}: nothing is older than it was");
            place.set(NOW - jump + 32_000);
            assert_eq!(place.count(&someone, 9), 4, "{jump}: the older part keeps its age");
        });
    }
}

#[test]
fn a_quota_is_what_is_booked_and_what_is_held() {
    everywhere(|place| {
        let someone = someone(quota(1000));
        let first = place.one(&someone, 600).unwrap();
        assert_eq!(place.one(&someone, 401).err().unwrap().wait, Wait::NextMonth);
        let second = place.one(&someone, 400).unwrap();
        let first = place.settle(first, amount(100));
        let third = place.one(&someone, 500).expect("what was too much is free at once");
        assert!(place.one(&someone, 1).is_err());
        place.book(first);
        assert!(place.one(&someone, 1).is_err(), "booking moves it, and frees nothing");
        place.undo(third);
        let second = place.settle(second, amount(900));
        place.book(second);
        assert_eq!(place.one(&someone, 1).err().unwrap().kind, Kind::MonthlyTokens, "it took more than was held");
    });
}

#[test]
fn a_quota_that_is_overdrawn_refuses_what_costs_nothing_too() {
    everywhere(|place| {
        let someone = someone(quota(14));
        let used = place.settle(place.one(&someone, 0).unwrap(), amount(14));
        place.book(used);
        let free = place.one(&someone, 0).expect("nothing fits into what is used up");
        let used = place.settle(free, amount(1));
        place.book(used);
        assert!(place.one(&someone, 0).is_err());
    });
}

#[test]
fn a_guess_keeps_nobody_from_the_rest_of_a_quota() {
    everywhere(|place| {
        let someone = [someone(quota(100))];
        let guess = Need { amount: amount(80), least: amount(10), prompt_tokens: 0 };
        assert!(place.admit(&someone, guess).0.is_ok());
        assert!(place.admit(&someone, guess).0.is_ok(), "20 are left, and 10 suffice");
        assert!(place.admit(&someone, guess).0.is_err());
    });
}

#[test]
fn a_quota_begins_anew_at_midnight_utc_and_what_is_held_goes_along() {
    for text in ["2026-12-01T00:00:00Z", "2027-01-01T00:00:00Z", "2028-03-01T00:00:00Z", "2028-02-29T00:00:00Z"] {
        let midnight = u64::try_from(DateTime::parse_from_rfc3339(text).unwrap().timestamp_millis()).unwrap();
        let turns = month(midnight) != month(midnight - 1);
        everywhere(|place| {
            let someone = someone(quota(100));
            place.set(midnight - 1);
            let used = place.one(&someone, 60).unwrap();
            let used = place.settle(used, amount(60));
            place.book(used);
            let _in_flight = place.one(&someone, 40).unwrap();
            assert!(place.one(&someone, 1).is_err());
            place.set(midnight);
            assert_eq!(place.one(&someone, 60).is_ok(), turns, "{text}");
            assert!(place.one(&someone, 1).is_err(), "{text}: 40 and 60");
        });
    }
}

#[test]
fn requests_at_once_are_those_that_have_not_ended() {
    everywhere_for(12, &(1_usize..6, prop::collection::vec((any::<bool>(), 0_u64..4000), 1..80)), |place, input| {
        let (most, steps) = input;
        let someone = someone(at_once(*most as u64));
        place.set(NOW);
        let mut open = Vec::new();
        for (ends, wait) in steps {
            if *ends && let Some(held) = open.pop() {
                place.settle(held, Amount::default());
            }
            let result = place.one(&someone, 0);
            prop_assert_eq!(result.is_ok(), open.len() < *most);
            match result {
                Ok(held) => open.push(held),
                Err(refusal) => prop_assert_eq!((refusal.kind, refusal.wait), (Kind::Concurrency, Wait::Ms(1000))),
            }
            // A replica that does nothing for too long would lose them.
            place.pass((*wait).min(LEASE_MS / 80));
        }
        Ok(())
    });
}

#[test]
fn absurd_numbers_are_refused_and_overflow_nothing() {
    everywhere(|place| {
        let caps = Caps { tpm: 1000, monthly_tokens: 1000, monthly_nano_usd: 1000, ..Caps::default() };
        let absurd = Amount { tokens: 2 * MAX_LIMIT, nano_usd: 2 * MAX_LIMIT };
        let everything = someone(caps);
        let ask = |demand: &Demand, need| place.admit(std::slice::from_ref(demand), need).0;
        assert_eq!(ask(&everything, absurd.into()).err().unwrap().wait, Wait::Never);
        let unlimited = someone(rpm(5));
        let held = ask(&unlimited, absurd.into()).expect("tokens are not limited");
        place.settle(held, absurd);
        let most = someone(Caps { monthly_tokens: MAX_LIMIT, ..Caps::default() });
        for _ in 0..3 {
            let held = ask(&most, amount(MAX_LIMIT / 4).into()).unwrap();
            let used = place.settle(held, amount(MAX_LIMIT / 4));
            place.book(used);
        }
        let _held = ask(&most, amount(MAX_LIMIT / 4).into()).unwrap();
        assert!(ask(&most, amount(1).into()).is_err(), "exact up to the last token");
    });
}

/// What may happen to a subject.
#[derive(Clone, Debug)]
enum Step {
    Admit { want: u64, least: u64 },
    Settle { which: usize, used: u64 },
    Undo { which: usize },
    Book { which: usize },
    Pass { ms: u64 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0_u64..300, 0_u64..300).prop_map(|(want, least)| Step::Admit { want, least: least.min(want) }),
        3 => (0_usize..9, 0_u64..400).prop_map(|(which, used)| Step::Settle { which, used }),
        1 => (0_usize..9).prop_map(|which| Step::Undo { which }),
        2 => (0_usize..9).prop_map(|which| Step::Book { which }),
        4 => prop_oneof![8 => 0_u64..2000, 2 => 2000_u64..20_000, 1 => 60_000_u64..62_000, 1 => 0_u64..200_000]
            .prop_map(|ms| Step::Pass { ms }),
    ];
    prop::collection::vec(step, 1..150)
}

/// Takes the steps, and tells what was answered.
fn history(place: &dyn Place, demands: &[Demand], steps: &[Step], seen: impl Fn()) -> Vec<(Option<Refusal>, Standing)> {
    let (mut open, mut unbooked, mut history) = (Vec::new(), Vec::new(), Vec::new());
    let amount = |tokens: u64| Amount { tokens, nano_usd: 2 * tokens };
    place.set(NOW);
    for step in steps {
        match *step {
            Step::Pass { ms } => place.pass(ms),
            Step::Admit { want, least } => {
                let (held, standing) =
                    place.admit(demands, Need { amount: amount(want), least: amount(least), prompt_tokens: 0 });
                history.push((held.as_ref().err().copied(), standing));
                open.extend(held);
            }
            Step::Settle { which, used } if which < open.len() => {
                unbooked.push(place.settle(open.remove(which), amount(used)));
            }
            Step::Undo { which } if which < open.len() => place.undo(open.remove(which)),
            Step::Book { which } if which < unbooked.len() => place.book(unbooked.remove(which)),
            Step::Settle { .. } | Step::Undo { .. } | Step::Book { .. } => {}
        }
        seen();
    }
    history
}

/// The answers, without the time until a window is whole again.
fn without_resets(history: &[(Option<Refusal>, Standing)]) -> Vec<(Option<Refusal>, Standing)> {
    let without = |&(refusal, mut standing): &(Option<Refusal>, Standing)| {
        let lefts = [&mut standing.requests, &mut standing.tokens];
        lefts.into_iter().flatten().for_each(|left| left.reset_ms = 0);
        (refusal, standing)
    };
    history.iter().map(without).collect()
}

#[test]
fn both_limiters_say_the_same_of_everything() {
    let server = Server::start();
    let (process, replica) = (Process::new(), Replica::new(&server, b'a'));
    for_each_input(64, &(any_caps(), any_caps(), steps()), |(user, key, steps)| {
        let key = someone(*key);
        let Subject::Key(_, KeyId(id)) = key.subject else { unreachable!() };
        let demands = [Demand { subject: Subject::User(UserId(id)), caps: *user }, key];
        let there = history(&replica, &demands, steps, || {
            // What a living replica does anyhow, and what keeps its reservations alive.
            demands.iter().for_each(|demand| replica.sync(&demand.subject));
        });
        let here = history(&process, &demands, steps, || {});
        prop_assert_eq!(without_resets(&here), without_resets(&there));
        // Redis names a moment at which the windows will be whole at the latest.
        for ((_, here), (_, there)) in here.iter().zip(&there) {
            for (here, there) in [(here.requests, there.requests), (here.tokens, there.tokens)] {
                prop_assert!(here.map(|left| left.reset_ms) <= there.map(|left| left.reset_ms));
                prop_assert!(there.is_none_or(|left| left.reset_ms <= 61_000));
            }
        }
        Ok(())
    });
}

#[test]
fn a_jump_back_shortens_the_minute_by_a_second_at_most_and_blocks_nobody() {
    let steps = prop::collection::vec((0_u64..3000, prop_oneof![9 => Just(0), 1 => 1_u64..90_000], 0_u64..200), 1..100);
    everywhere_for(24, &(1_u64..20, 400_u64..2000, steps), |place, (rpm, tpm, steps)| {
        let someone = someone(Caps { rpm: *rpm, tpm: *tpm, ..Caps::default() });
        place.set(NOW);
        let (mut truly_ms, mut jumps, mut admitted) = (0, 0, Vec::new());
        for &(wait, back, want) in steps {
            place.pass(wait);
            truly_ms += wait;
            place.set(place.now() - back);
            jumps += u64::from(back > 0);
            if place.one(&someone, want).is_ok() {
                admitted.push((truly_ms, jumps, want));
            }
        }
        for (index, &(begin, jumps, _)) in admitted.iter().enumerate() {
            let is_within =
                |(at, later, _): &&(u64, u64, u64)| *at < begin + 60_000_u64.saturating_sub(1000 * (later - jumps));
            let minute: Vec<_> = admitted[index..].iter().take_while(is_within).collect();
            prop_assert!(minute.len() as u64 <= *rpm, "{} requests in the minute from {begin}", minute.len());
            let sum: u64 = minute.iter().map(|(.., want)| want).sum();
            prop_assert!(sum <= *tpm, "{sum} tokens in the minute from {begin}");
        }
        place.pass(61_000);
        prop_assert!(place.one(&someone, 1).is_ok(), "a minute later all is forgotten");
        Ok(())
    });
}
