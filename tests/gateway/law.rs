//! The law of limits, on a simulated clock: one suite for the limiter in this process and for the one in Redis.
//!
//! What is asked of a limiter is [`Place`]; each test says once what must be true of every place. Each Redis here is a
//! real server; only its clock is given.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use chrono::DateTime;
use prometheus::IntGauge;
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};
use tollgate::limiter::{
    memory::{Memory, Taken},
    redis::{Clock, Options, Redis, Reserved},
    redis_wire::{Change, Known, key_of},
};
use tollgate_core::{
    id::{KeyId, UserId},
    limit::{
        Amount, Caps, MAX_LIMIT, Month, Subject,
        standing::Standing,
        state::{Circumstances, Demand, Kind, Need, Refusal, Share, Wait},
    },
    secret::Secret,
};

use crate::support::redis::Redis as Server;

/// Simulated clocks have no hurry.
fn options(url: impl Into<String>) -> Options {
    let degraded = IntGauge::new("degraded", "degraded").unwrap();
    Options { nodes: Secret::new(url.into()), patience: Duration::from_secs(2), degraded }
}

/// A moment in the middle of a month and of a second.
const NOW: u64 = 1_792_000_000_250;
/// How long what a silent replica holds is kept.
const LEASE_MS: u64 = 30_000;

/// The clock of a test.
type Time = Arc<AtomicU64>;

/// A limiter that is asked by a simulated clock.
trait Place {
    /// Admits at all subjects or at none.
    fn admit(&self, demands: &[Demand], need: Need) -> (Result<Held, Refusal>, Standing);
    /// Corrects to what was used.
    fn settle(&self, held: Held, used: Amount) -> Unbooked;
    /// Takes back what was never sent.
    fn undo(&self, held: Held);
    /// The database has it.
    fn book(&self, unbooked: Unbooked);
    /// Its clock.
    fn time(&self) -> &Time;

    fn now(&self) -> u64 {
        self.time().load(Ordering::Relaxed)
    }

    fn set(&self, now_ms: u64) {
        self.time().store(now_ms, Ordering::Relaxed);
    }

    fn pass(&self, ms: u64) {
        self.time().fetch_add(ms, Ordering::Relaxed);
    }

    fn one(&self, demand: &Demand, tokens: u64) -> Result<Held, Refusal> {
        self.admit(std::slice::from_ref(demand), amount(tokens).into()).0
    }

    /// How many of `tries` are admitted now.
    fn count(&self, demand: &Demand, tries: usize) -> usize {
        (0..tries).filter(|_| self.one(demand, 0).is_ok()).count()
    }
}

/// What an admitted request holds.
struct Held {
    demands: Vec<Demand>,
    taken: Taken,
    reserved: Reserved,
}

/// What a finished request used.
struct Unbooked {
    held: Held,
    used: Amount,
}

/// What the database has booked.
#[derive(Default)]
struct Books(std::sync::Mutex<HashMap<(Month, Subject), Amount>>);

impl Books {
    fn of(&self, month: Month, subject: &Subject) -> Amount {
        self.0.lock().unwrap().get(&(month, subject.clone())).copied().unwrap_or_default()
    }

    fn add(&self, month: Month, subject: &Subject, amount: Amount) {
        let mut sums = self.0.lock().unwrap();
        let sum = sums.entry((month, subject.clone())).or_default();
        *sum = sum.plus(amount);
    }
}

/// The limiter within a process.
struct Process {
    time: Time,
    memory: Memory,
    books: Books,
}

impl Process {
    fn new() -> Self {
        Self { time: Arc::new(AtomicU64::new(NOW)), memory: Memory::default(), books: Books::default() }
    }
}

impl Place for Process {
    fn admit(&self, demands: &[Demand], need: Need) -> (Result<Held, Refusal>, Standing) {
        let booked = |demand: &Demand| self.books.of(month(self.now()), &demand.subject);
        let at = Circumstances::alone(self.now(), Share::WHOLE);
        let (decision, standing) = self.memory.admit(demands, booked, need, at);
        let held = |taken| Held { demands: demands.to_vec(), taken, reserved: Reserved::default() };
        (decision.map(held), standing)
    }

    fn settle(&self, held: Held, used: Amount) -> Unbooked {
        self.memory.settle(&held.demands, held.taken, used.tokens, used, self.now());
        Unbooked { held, used }
    }

    fn undo(&self, held: Held) {
        self.memory.undo(&held.demands, held.taken);
    }

    fn book(&self, unbooked: Unbooked) {
        book(&unbooked, &self.memory, &self.books, month(self.now()));
    }

    fn time(&self) -> &Time {
        &self.time
    }
}

/// A replica that asks Redis, with the copy that it keeps of what it did.
struct Replica {
    time: Time,
    memory: Memory,
    books: Arc<Books>,
    redis: Redis,
    runtime: tokio::runtime::Runtime,
}

impl Replica {
    fn new(server: &Server, name: u8) -> Self {
        Self::beside(server, name, &Arc::new(AtomicU64::new(NOW)), &Arc::default())
    }

    /// One that shares the clock and the database with others.
    fn beside(server: &Server, name: u8, time: &Time, books: &Arc<Books>) -> Self {
        let redis = Redis::new(options(server.url()), [name; 8], Clock::Given(Arc::clone(time)));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(redis.connect(NOW)).unwrap();
        Self { time: Arc::clone(time), memory: Memory::default(), books: Arc::clone(books), redis, runtime }
    }

    fn known(&self, demand: &Demand) -> Known {
        let (in_flight, held) = self.memory.holdings(&demand.subject);
        let held = if demand.caps.has_quota() { held } else { Amount::default() };
        let is_recent = self.memory.is_recent(&demand.subject, self.now());
        Known { booked: self.books.of(month(self.now()), &demand.subject), in_flight, held, is_recent }
    }

    /// Changes what this replica knows, and tells Redis.
    fn change(&self, held: &Held, act: impl FnOnce(), change: impl Fn(&Demand) -> Change) {
        self.redis.change(held.reserved, || {
            act();
            held.demands.iter().map(change).collect()
        });
        self.runtime.block_on(self.redis.flush());
    }

    /// Says to Redis that this replica lives and what it holds.
    fn sync(&self, subject: &Subject) {
        let known = |subject: &Subject| self.memory.holdings(subject);
        self.runtime.block_on(self.redis.sync(std::slice::from_ref(subject), self.now(), known)).unwrap();
    }

    /// Loses the link and finds it again: a new session.
    fn reconnect(&self) {
        self.redis.lose("the test says so");
        self.runtime.block_on(self.redis.connect(self.now())).unwrap();
    }
}

impl Place for Replica {
    fn admit(&self, demands: &[Demand], need: Need) -> (Result<Held, Refusal>, Standing) {
        let known = || demands.iter().map(|demand| self.known(demand)).collect();
        let demands: Arc<[Demand]> = Arc::from(demands);
        let asked = self.redis.admit(&demands, need, month(self.now()), self.now(), known);
        let verdict = self.runtime.block_on(asked).expect("Redis answers");
        let held = verdict.decision.map(|counted| Held {
            demands: demands.to_vec(),
            taken: self.memory.record(&demands, need.amount, self.now()),
            reserved: Reserved { session: Some(counted.session), cells: Some(counted.cells) },
        });
        (held, verdict.standing)
    }

    fn settle(&self, held: Held, used: Amount) -> Unbooked {
        let (need, cell) = (held.taken.need, held.reserved.cell(0));
        let settle = |demand: &Demand| {
            let if_limited = |tokens: u64| if demand.caps.tpm > 0 { tokens } else { 0 };
            let if_quota = |amount: Amount| if demand.caps.has_quota() { amount } else { Amount::default() };
            let tokens = if_limited(need.tokens.saturating_sub(used.tokens));
            let more = if_limited(used.tokens.saturating_sub(need.tokens));
            let (hold, release) = (if_quota(used), if_quota(need));
            Change { ended: 1, cell, tokens, more, hold, release, ..Change::of(demand.subject.clone()) }
        };
        self.change(&held, || self.memory.settle(&held.demands, held.taken, used.tokens, used, self.now()), settle);
        Unbooked { held, used }
    }

    fn undo(&self, held: Held) {
        let (need, cell) = (held.taken.need, held.reserved.cell(0));
        let undo = |demand: &Demand| {
            let release = if demand.caps.has_quota() { need } else { Amount::default() };
            Change { ended: 1, cell, requests: 1, tokens: need.tokens, release, ..Change::of(demand.subject.clone()) }
        };
        self.change(&held, || self.memory.undo(&held.demands, held.taken), undo);
    }

    fn book(&self, unbooked: Unbooked) {
        let (used, month) = (unbooked.used, month(self.now()));
        let booking = |demand: &Demand| match demand.caps.has_quota() {
            true => Change { release: used, booked: Some((month, used)), ..Change::of(demand.subject.clone()) },
            false => Change::of(demand.subject.clone()),
        };
        self.change(&unbooked.held, || book(&unbooked, &self.memory, &self.books, month), booking);
    }

    fn time(&self) -> &Time {
        &self.time
    }
}

/// The books and the memory, as both places keep them.
fn book(unbooked: &Unbooked, memory: &Memory, books: &Books, month: Month) {
    let Unbooked { held: Held { demands, taken, .. }, used } = unbooked;
    for (index, demand) in demands.iter().enumerate().filter(|(_, demand)| demand.caps.has_quota()) {
        books.add(month, &demand.subject, *used);
        memory.release(&demand.subject, taken.is_shared(index), *used);
    }
}

/// Runs what must be true of every place.
fn everywhere(law: impl Fn(&dyn Place)) {
    law(&Process::new());
    let server = Server::start();
    law(&Replica::new(&server, b'a'));
}

/// Runs a property everywhere, a few times: each call of Redis takes its time.
fn everywhere_for<S: Strategy>(
    cases: u32,
    inputs: &S,
    law: impl Fn(&dyn Place, &S::Value) -> Result<(), TestCaseError>,
) {
    everywhere(|place| for_each_input(cases, inputs, |input| law(place, input)));
}

fn for_each_input<S: Strategy>(cases: u32, inputs: &S, property: impl Fn(&S::Value) -> Result<(), TestCaseError>) {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    TestRunner::new(config).run(inputs, |input| property(&input)).unwrap_or_else(|error| panic!("{error}"));
}

fn month(now_ms: u64) -> Month {
    Month::of(DateTime::from_timestamp_millis(now_ms.cast_signed()).unwrap())
}

fn amount(tokens: u64) -> Amount {
    Amount { tokens, nano_usd: 0 }
}

/// A key that nobody has used, with these limits.
fn someone(caps: Caps) -> Demand {
    static KEYS: AtomicI64 = AtomicI64::new(1);
    Demand { subject: Subject::Key(UserId(1), KeyId(KEYS.fetch_add(1, Ordering::Relaxed))), caps }
}

fn rpm(rpm: u64) -> Caps {
    Caps { rpm, ..Caps::default() }
}

fn at_once(concurrency: u64) -> Caps {
    Caps { concurrency, ..Caps::default() }
}

fn quota(monthly_tokens: u64) -> Caps {
    Caps { monthly_tokens, ..Caps::default() }
}

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

fn any_caps() -> impl Strategy<Value = Caps> {
    let limit = |most: u64| prop_oneof![1 => Just(0), 3 => 1..most];
    (limit(30), limit(3000), limit(10), limit(20_000), limit(40_000)).prop_map(
        |(rpm, tpm, concurrency, monthly_tokens, monthly_nano_usd)| Caps {
            rpm,
            tpm,
            concurrency,
            monthly_tokens,
            monthly_nano_usd,
        },
    )
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

/// Two replicas at one Redis, with one clock and one database.
fn two(server: &Server) -> (Replica, Replica) {
    let one = Replica::new(server, b'a');
    let other = Replica::beside(server, b'b', &one.time, &one.books);
    (one, other)
}

#[test]
fn replicas_hold_one_limit_together() {
    let server = Server::start();
    let (one, other) = two(&server);
    let inputs = (any_caps(), prop::collection::vec((any::<bool>(), 0_u64..3000, 0_u64..300), 1..100));
    for_each_input(24, &inputs, |(caps, steps)| {
        let (shared, alone) = (someone(*caps), someone(*caps));
        one.set(NOW);
        for &(at_other, wait, want) in steps {
            one.pass(wait.min(LEASE_MS / 100));
            let replica = if at_other { &other } else { &one };
            let ask = |replica: &Replica, demand| replica.admit(std::slice::from_ref(demand), amount(want).into());
            let (by_two, by_one) = (ask(replica, &shared), ask(&one, &alone));
            prop_assert_eq!((by_two.0.err(), by_two.1), (by_one.0.err(), by_one.1));
        }
        Ok(())
    });
}

#[test]
fn what_a_silent_replica_holds_is_free_after_its_lease() {
    let server = Server::start();
    let (dies, lives) = two(&server);
    let someone = someone(Caps { concurrency: 2, ..quota(100) });
    let _lost = (dies.one(&someone, 40).unwrap(), dies.one(&someone, 40).unwrap());
    assert_eq!(lives.one(&someone, 0).err().unwrap().kind, Kind::Concurrency);
    dies.pass(LEASE_MS - 1000);
    assert!(lives.one(&someone, 0).is_err(), "it may come back");
    dies.pass(1000);
    assert!(lives.one(&someone, 60).is_ok() && lives.one(&someone, 40).is_ok(), "places and quota are free");
}

#[test]
fn what_a_living_replica_holds_is_renewed() {
    let server = Server::start();
    let (streams, other) = two(&server);
    let someone = someone(at_once(1));
    let held = streams.one(&someone, 0).unwrap();
    for _ in 0..20 {
        streams.pass(LEASE_MS / 2);
        streams.sync(&someone.subject);
        assert!(other.one(&someone, 0).is_err());
    }
    streams.settle(held, Amount::default());
    assert!(other.one(&someone, 0).is_ok());
}

#[test]
fn a_new_session_brings_its_sums_along() {
    let server = Server::start();
    let (one, other) = two(&server);
    let someone = someone(Caps { concurrency: 3, ..quota(100) });
    let early = [one.one(&someone, 30).unwrap(), one.one(&someone, 30).unwrap()];
    let () = server.command(&["FLUSHALL"]);
    one.reconnect();
    let late = one.one(&someone, 30).expect("the third");
    assert!(one.one(&someone, 0).is_err() && other.one(&someone, 0).is_err(), "two are known of before");
    for held in early {
        let used = one.settle(held, amount(10));
        one.book(used);
    }
    one.undo(late);
    assert_eq!(other.one(&someone, 81).err().unwrap().kind, Kind::MonthlyTokens, "twice ten are booked");
    let all = [other.one(&someone, 80).unwrap(), other.one(&someone, 0).unwrap(), one.one(&someone, 0).unwrap()];
    assert!(one.one(&someone, 0).is_err(), "three again");
    drop(all);
}

#[test]
fn a_new_session_shows_its_sums_without_a_request() {
    let server = Server::start();
    let (one, other) = two(&server);
    let someone = someone(at_once(2));
    let held = [one.one(&someone, 0).unwrap(), one.one(&someone, 0).unwrap()];
    one.reconnect();
    let [first, _second] = held;
    one.settle(first, Amount::default());
    one.sync(&someone.subject);
    assert!(other.one(&someone, 0).is_ok(), "one has ended");
    assert!(other.one(&someone, 0).is_err(), "the other one has not");
}

#[test]
fn a_redis_that_forgot_is_told_from_a_subject_that_is_new() {
    let server = Server::start();
    let replica = Replica::new(&server, b'a');
    let demands = [Demand { subject: Subject::of_ip([192, 0, 2, 1].into()), caps: rpm(9) }, someone(rpm(9))];
    let forgot = |demands: &[Demand]| {
        let known = || demands.iter().map(|demand| replica.known(demand)).collect();
        let all = Arc::from(demands);
        let asked = replica.redis.admit(&all, Need::default(), month(NOW), NOW, known);
        let verdict = replica.runtime.block_on(asked).unwrap();
        replica.memory.record(demands, Amount::default(), NOW);
        verdict.has_forgotten
    };
    assert!(!forgot(&demands[..1]), "new");
    assert!(!forgot(&demands), "one is known, the other one is new");
    assert!(!forgot(&demands), "both are known");
    let () = server.command(&["FLUSHALL"]);
    assert!(forgot(&demands));
    assert!(!forgot(&demands));
}

#[test]
fn a_redis_that_forgot_is_told_what_is_booked() {
    let server = Server::start();
    let (one, other) = two(&server);
    let someone = someone(quota(100));
    let used = one.settle(one.one(&someone, 60).unwrap(), amount(60));
    one.book(used);
    let () = server.command(&["FLUSHALL"]);
    assert!(other.one(&someone, 41).is_err(), "the database knows of 60");
    assert!(other.one(&someone, 40).is_ok());
}

#[test]
fn a_replica_whose_clock_is_ahead_gives_no_quota_anew() {
    let server = Server::start();
    let one = Replica::new(&server, b'a');
    let midnight = u64::try_from(month(NOW).next().start().timestamp_millis()).unwrap();
    one.set(midnight - 60_000);
    let someone = someone(quota(100));
    let used = one.settle(one.one(&someone, 100).unwrap(), amount(100));
    one.book(used);
    let alone = Arc::from([someone.clone()]);
    let ask = |month: Month| {
        let known = || vec![Known { booked: one.books.of(month, &someone.subject), ..Known::default() }];
        let asked = one.redis.admit(&alone, amount(1).into(), month, one.now(), known);
        one.runtime.block_on(asked).unwrap().decision
    };
    assert!(ask(month(midnight)).is_err(), "Redis is still in the old month");
    one.set(midnight + 60_000);
    assert!(ask(month(midnight - 1)).is_err(), "the replica is still in the old month");
    assert!(ask(month(midnight)).is_ok());
}

#[test]
fn a_redis_whose_clock_is_behind_holds_the_quota_of_the_new_month() {
    let server = Server::start();
    let one = Replica::new(&server, b'a');
    let next = month(NOW).next();
    let alone = Arc::from([someone(quota(100))]);
    let ask = |booked: u64| {
        let known = || vec![Known { booked: amount(booked), ..Known::default() }];
        let asked = one.redis.admit(&alone, amount(10).into(), next, one.now(), known);
        one.runtime.block_on(asked).unwrap().decision
    };
    assert!(ask(0).is_ok());
    assert_eq!(ask(95).unwrap_err().kind, Kind::MonthlyTokens, "95 are booked in the month the replica is in");
}

/// Whoever asks together is decided upon as if one had asked after the other.
#[test]
fn requests_that_go_together_are_decided_one_by_one() {
    let server = Server::start();
    for_each_input(24, &(any_caps(), any_caps(), prop::collection::vec((0_u64..40, any::<bool>()), 2..150)), |input| {
        let (first, second, wants) = input;
        let () = server.command(&["FLUSHALL"]);
        let (replica, process) = (Replica::new(&server, b'a'), Process::new());
        let demands = [
            Demand { subject: Subject::User(UserId(1)), caps: *first },
            Demand { subject: Subject::Key(UserId(1), KeyId(1)), caps: *second },
        ];
        let of = |both: bool| if both { &demands[..] } else { &demands[..1] };
        let alone: Vec<_> = wants.iter().map(|(want, both)| process.admit(of(*both), amount(*want).into())).collect();
        let together =
            futures::future::join_all(
                wants.iter().map(|(want, both)| {
                    let known = || of(*both).iter().map(|demand| replica.known(demand)).collect();
                    let all = Arc::from(of(*both));
                    let redis = &replica.redis;
                    async move {
                        redis.admit(&all, amount(*want).into(), month(NOW), NOW, known).await.expect("Redis answers")
                    }
                }),
            );
        let together = replica.runtime.block_on(together);
        for ((decision, standing), verdict) in alone.iter().zip(together) {
            prop_assert_eq!(decision.as_ref().err(), verdict.decision.as_ref().err());
            let remaining =
                |standing: &Standing| [standing.requests, standing.tokens].map(|left| left.map(|left| left.remaining));
            prop_assert_eq!(remaining(standing), remaining(&verdict.standing));
        }
        Ok(())
    });
}

#[test]
fn what_is_given_back_between_two_requests_is_free_for_the_second() {
    let server = Server::start();
    let replica = Replica::new(&server, b'a');
    let one = someone(at_once(1));
    let demands: Arc<[Demand]> = Arc::from([one.clone()]);
    let mut held = replica.one(&one, 0).unwrap();
    for _ in 0..50 {
        // Not flushed: it rides along with the next request.
        replica.redis.change(held.reserved, || {
            replica.memory.settle(&held.demands, held.taken, 0, Amount::default(), NOW);
            vec![Change { ended: 1, ..Change::of(one.subject.clone()) }]
        });
        let asked = replica.redis.admit(&demands, Need::default(), month(NOW), NOW, || vec![replica.known(&one)]);
        let counted = replica.runtime.block_on(asked).unwrap().decision.expect("the place is free again");
        held = Held {
            demands: demands.to_vec(),
            taken: replica.memory.record(&demands, Amount::default(), NOW),
            reserved: Reserved { session: Some(counted.session), cells: Some(counted.cells) },
        };
        assert!(replica.one(&one, 0).is_err(), "and taken");
    }
}

#[test]
fn a_state_stays_below_two_kilobytes() {
    let server = Server::start();
    let first = Replica::new(&server, 0);
    let someone = someone(Caps { rpm: 1000, tpm: MAX_LIMIT, concurrency: 1000, ..quota(MAX_LIMIT) });
    let ask = |replica: &Replica| assert!(replica.one(&someone, 1_000_000).is_ok());
    for name in 0..60 {
        ask(&Replica::beside(&server, name, &first.time, &first.books));
        first.pass(400);
    }
    for _ in 0..70 {
        ask(&first);
        first.pass(1000);
    }
    let size: usize = server.command(&["STRLEN", &key_of(&someone.subject)]);
    assert!(size <= 2048, "{size}");
}
