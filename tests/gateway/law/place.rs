//! What is asked of a limiter, of the one in this process and of the one in Redis, by a simulated clock.

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
    redis::{Asked, Clock, Options, Redis, Reserved},
    redis_wire::{Change, Known},
};
use tollgate_core::{
    id::{KeyId, UserId},
    limit::{
        Amount, Caps, Month, Subject,
        standing::Standing,
        state::{Circumstances, Demand, Need, Refusal, Share},
    },
    secret::Secret,
};

use crate::support::redis::Redis as Server;

/// Simulated clocks have no hurry.
pub(super) fn options(url: impl Into<String>) -> Options {
    let degraded = IntGauge::new("degraded", "degraded").unwrap();
    Options { nodes: Secret::new(url.into()), patience: Duration::from_secs(2), degraded }
}

/// A moment in the middle of a month and of a second.
pub(super) const NOW: u64 = 1_792_000_000_250;
/// How long what a silent replica holds is kept.
pub(super) const LEASE_MS: u64 = 30_000;

/// The clock of a test.
pub(super) type Time = Arc<AtomicU64>;

/// A limiter that is asked by a simulated clock.
pub(super) trait Place {
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
pub(super) struct Held {
    pub(super) demands: Vec<Demand>,
    pub(super) taken: Taken,
    pub(super) reserved: Reserved,
}

/// How a request ends.
#[derive(Clone, Copy, Debug)]
pub(super) enum End {
    Settle,
    SettleAndBook,
    Undo,
}

/// What a finished request used.
pub(super) struct Unbooked {
    pub(super) held: Held,
    pub(super) used: Amount,
}

/// What the database has booked.
#[derive(Default)]
pub(super) struct Books(std::sync::Mutex<HashMap<(Month, Subject), Amount>>);

impl Books {
    pub(super) fn of(&self, month: Month, subject: &Subject) -> Amount {
        self.0.lock().unwrap().get(&(month, subject.clone())).copied().unwrap_or_default()
    }

    pub(super) fn add(&self, month: Month, subject: &Subject, amount: Amount) {
        let mut sums = self.0.lock().unwrap();
        let sum = sums.entry((month, subject.clone())).or_default();
        *sum = sum.plus(amount);
    }
}

/// The limiter within a process.
pub(super) struct Process {
    pub(super) time: Time,
    pub(super) memory: Memory,
    pub(super) books: Books,
}

impl Process {
    pub(super) fn new() -> Self {
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
        self.memory.settle(&held.demands, held.taken, used, self.now());
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
pub(super) struct Replica {
    pub(super) time: Time,
    pub(super) memory: Memory,
    pub(super) books: Arc<Books>,
    pub(super) redis: Redis,
    pub(super) runtime: tokio::runtime::Runtime,
}

impl Replica {
    pub(super) fn new(server: &Server, name: u8) -> Self {
        Self::beside(server, name, &Arc::new(AtomicU64::new(NOW)), &Arc::default())
    }

    /// One that shares the clock and the database with others.
    pub(super) fn beside(server: &Server, name: u8, time: &Time, books: &Arc<Books>) -> Self {
        Self::at(server.url(), name, time, books)
    }

    /// One that asks whoever is at `nodes`.
    pub(super) fn at(nodes: String, name: u8, time: &Time, books: &Arc<Books>) -> Self {
        let redis = Redis::new(options(nodes), [name; 8], Clock::Given(Arc::clone(time)));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(redis.connect(NOW)).unwrap();
        Self { time: Arc::clone(time), memory: Memory::default(), books: Arc::clone(books), redis, runtime }
    }

    pub(super) fn known(&self, demand: &Demand) -> Known {
        let (in_flight, held) = self.memory.told(&demand.subject);
        let held = if demand.caps.has_quota() { held } else { Amount::default() };
        let is_recent = self.memory.is_recent(&demand.subject, self.now());
        Known { booked: self.books.of(month(self.now()), &demand.subject), in_flight, held, is_recent }
    }

    /// Changes what this replica knows, and tells Redis.
    pub(super) fn change(&self, held: &Held, act: impl FnOnce(), change: impl Fn(&Demand) -> Change) {
        self.redis.change(held.reserved, || {
            act();
            held.demands.iter().map(change).collect()
        });
        self.runtime.block_on(self.redis.flush());
    }

    /// Ends a request, and leaves it to later ones to take the correction along.
    pub(super) fn finish(&self, held: Held, end: End, used: u64) {
        let Held { demands, taken, reserved } = held;
        let (need, used) = (taken.need, Amount { tokens: used, nano_usd: 2 * used });
        let cell = |index| reserved.cell(index);
        let month = month(self.now());
        self.redis.change(reserved, || {
            let changes = demands.iter().enumerate();
            match end {
                End::Undo => {
                    self.memory.undo(&demands, taken);
                    Change::undo_all(&demands, cell, 1, need)
                }
                End::Settle | End::SettleAndBook => {
                    self.memory.settle(&demands, taken, used, self.now());
                    let settled = changes
                        .filter_map(|(index, demand)| Change::settlement(demand, cell(index), need, used))
                        .map(|change| match end {
                            End::SettleAndBook => Change { booked: Some((month, used)), ..change },
                            _ => change,
                        });
                    settled.collect()
                }
            }
        });
    }

    /// Says to Redis that this replica lives and what it holds.
    pub(super) fn sync(&self, subject: &Subject) {
        let known = |subject: &Subject| self.memory.told(subject);
        self.runtime.block_on(self.redis.sync(std::slice::from_ref(subject), self.now(), known)).unwrap();
    }

    /// Loses the link and finds it again: a new session.
    pub(super) fn reconnect(&self) {
        self.redis.lose("the test says so");
        self.runtime.block_on(self.redis.connect(self.now())).unwrap();
    }
}

impl Place for Replica {
    fn admit(&self, demands: &[Demand], need: Need) -> (Result<Held, Refusal>, Standing) {
        let known = || demands.iter().map(|demand| self.known(demand)).collect();
        let demands: Arc<[Demand]> = Arc::from(demands);
        let asked = self.redis.admit(Asked::alone(&demands, need, month(self.now())), self.now(), known);
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
            let change = Change::settlement(demand, cell, need, used);
            change.unwrap_or_else(|| Change::of(demand.subject.clone()))
        };
        self.change(&held, || self.memory.settle(&held.demands, held.taken, used, self.now()), settle);
        Unbooked { held, used }
    }

    fn undo(&self, held: Held) {
        let (need, cell) = (held.taken.need, held.reserved.cell(0));
        let undo = |demand: &Demand| Change::undo(demand, cell, 1, need);
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
pub(super) fn book(unbooked: &Unbooked, memory: &Memory, books: &Books, month: Month) {
    let Unbooked { held: Held { demands, taken, .. }, used } = unbooked;
    for (index, demand) in demands.iter().enumerate().filter(|(_, demand)| demand.caps.has_quota()) {
        books.add(month, &demand.subject, *used);
        memory.release(&demand.subject, taken.is_shared(index), *used);
    }
}

/// Runs what must be true of every place.
pub(super) fn everywhere(law: impl Fn(&dyn Place)) {
    law(&Process::new());
    let server = Server::start();
    law(&Replica::new(&server, b'a'));
}

/// Runs a property everywhere, a few times: each call of Redis takes its time.
pub(super) fn everywhere_for<S: Strategy>(
    cases: u32,
    inputs: &S,
    law: impl Fn(&dyn Place, &S::Value) -> Result<(), TestCaseError>,
) {
    everywhere(|place| for_each_input(cases, inputs, |input| law(place, input)));
}

pub(super) fn for_each_input<S: Strategy>(
    cases: u32,
    inputs: &S,
    property: impl Fn(&S::Value) -> Result<(), TestCaseError>,
) {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    TestRunner::new(config).run(inputs, |input| property(&input)).unwrap_or_else(|error| panic!("{error}"));
}

pub(super) fn month(now_ms: u64) -> Month {
    Month::of(DateTime::from_timestamp_millis(now_ms.cast_signed()).unwrap())
}

pub(super) fn amount(tokens: u64) -> Amount {
    Amount { tokens, nano_usd: 0 }
}

/// A key that nobody has used, with these limits.
pub(super) fn someone(caps: Caps) -> Demand {
    static KEYS: AtomicI64 = AtomicI64::new(1);
    Demand { subject: Subject::Key(UserId(1), KeyId(KEYS.fetch_add(1, Ordering::Relaxed))), caps }
}

pub(super) fn rpm(rpm: u64) -> Caps {
    Caps { rpm, ..Caps::default() }
}

pub(super) fn at_once(concurrency: u64) -> Caps {
    Caps { concurrency, ..Caps::default() }
}

pub(super) fn quota(monthly_tokens: u64) -> Caps {
    Caps { monthly_tokens, ..Caps::default() }
}

pub(super) fn any_caps() -> impl Strategy<Value = Caps> {
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

/// Limits that leave room, or soon none.
pub(super) fn roomy() -> impl Strategy<Value = Caps> {
    let times = prop_oneof![3 => Just(1000), 1 => Just(20)];
    (any_caps(), times, any::<bool>(), any::<bool>()).prop_map(|(caps, times, has_holders, has_quota)| Caps {
        rpm: times * caps.rpm,
        tpm: times * caps.tpm,
        concurrency: if has_holders { 1 + times * caps.concurrency } else { 0 },
        monthly_tokens: if has_quota { times * caps.monthly_tokens } else { 0 },
        monthly_nano_usd: if has_quota { times * caps.monthly_nano_usd } else { 0 },
    })
}
