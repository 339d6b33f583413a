//! One batch: what is asked and told of Redis in one round trip, and what it answers to each request.
//!
//! A batch is one script call, which reads and writes each state once, however many of the requests need it. In a cluster
//! it is one call for each hash tag; a request that only some of its calls admit is undone at those.

use std::collections::HashMap;

use redis::{Cmd, ErrorKind, RedisError, Value};
use tollgate_core::{
    id::UserId,
    limit::{
        Subject,
        policy::MAX_DEMANDS,
        standing::{Left, Standing},
        state::{Demand, Kind, Refusal, Wait},
        window::{CELL_MS, CELLS},
    },
};

use super::{
    redis::{Counted, Verdict},
    redis_ask::Ask,
    redis_queue::Step,
    redis_wire::{Caller, Change, Known, doubles, key_of, number, put},
};

/// The verdict on requests that were asked for together: `None`: a state is not ours, so there is none.
pub(super) type Judged = (Ask, Option<Verdict>);

/// What goes to Redis together.
#[derive(Debug)]
pub(super) struct Batch {
    asks: Vec<Ask>,
    calls: Vec<Call>,
    /// The session that all of it belongs to.
    pub session: u32,
}

/// What one script call is about.
#[derive(Debug)]
struct Call {
    tag: Tag,
    keys: Vec<String>,
    places: HashMap<Subject, u16>,
    /// Its first request.
    first: Option<usize>,
    /// How many steps are written.
    count: i64,
    steps: Vec<u8>,
    /// The correction that comes after them, if one does.
    last: Option<Run>,
    /// Requests, and which of their subjects, by index.
    parts: Vec<(usize, Vec<usize>)>,
}

/// A correction that is the same at subjects whose keys follow each other, as it mostly is at all of one request.
#[derive(Debug)]
struct Run {
    numbers: [i64; 11],
    first: u16,
    count: u16,
}

/// The hash tag of a subject's state; see [`key_of`]. One for all, unless it is a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Tag {
    /// No cluster.
    All,
    /// A user and all that is its.
    User(UserId),
    /// Something on its own.
    Subject(Subject),
}

impl Tag {
    /// That of `subject`.
    pub fn of(subject: &Subject, is_cluster: bool) -> Self {
        match subject {
            _ if !is_cluster => Self::All,
            Subject::User(user) | Subject::Key(user, _) | Subject::KeyModel(user, ..) => Self::User(*user),
            Subject::Ip(_) | Subject::Others(_) => Self::Subject(subject.clone()),
        }
    }
}

impl Batch {
    /// Puts the steps together.
    pub fn new(mut steps: Vec<Step>, session: u32, is_cluster: bool) -> Self {
        steps.retain_mut(|step| if let Step::Ask(ask) = step { ask.is_awaited() } else { true });
        let mut batch = Self { asks: Vec::new(), calls: Vec::new(), session };
        batch.place_first(&steps, is_cluster);
        for step in steps {
            match step {
                Step::Change(change) => batch.add_change(&change, is_cluster),
                Step::Ask(ask) => batch.add_ask(ask, is_cluster),
            }
        }
        batch
    }

    /// Makes the subjects of the first request of each call its first keys, in their order: `alone.lua` relies on it.
    fn place_first(&mut self, steps: &[Step], is_cluster: bool) {
        let asks = steps.iter().filter_map(|step| if let Step::Ask(ask) = step { Some(ask) } else { None });
        for (nth, ask) in asks.enumerate().take(if is_cluster { usize::MAX } else { 1 }) {
            for Demand { subject, .. } in ask.demands.iter() {
                let call = self.call_for(subject, is_cluster);
                if *self.calls[call].first.get_or_insert(nth) == nth {
                    self.calls[call].place(subject);
                }
            }
        }
    }

    /// Is there nothing to send?
    pub fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// Does any ask stand for several requests, as it does where many come?
    pub fn is_for_many(&self) -> bool {
        self.asks.iter().any(|ask| ask.times() > 1)
    }

    fn call_for(&mut self, subject: &Subject, is_cluster: bool) -> usize {
        let tag = Tag::of(subject, is_cluster);
        let known = self.calls.iter().position(|call| call.tag == tag);
        known.unwrap_or_else(|| {
            self.calls.push(Call::new(tag));
            self.calls.len() - 1
        })
    }

    fn add_change(&mut self, change: &Change, is_cluster: bool) {
        let call = self.call_for(&change.subject, is_cluster);
        self.calls[call].add_change(change);
    }

    fn add_ask(&mut self, ask: Ask, is_cluster: bool) {
        let mut parts: Vec<(usize, Vec<usize>)> = Vec::with_capacity(2);
        for (index, demand) in ask.demands.iter().enumerate() {
            let call = self.call_for(&demand.subject, is_cluster);
            match parts.iter_mut().find(|(of, _)| *of == call) {
                Some((_, indexes)) => indexes.push(index),
                None => parts.push((call, vec![index])),
            }
        }
        let number = self.asks.len();
        for (call, indexes) in parts {
            self.calls[call].add_ask(number, &ask, indexes);
        }
        self.asks.push(ask);
    }

    /// Tells all who asked to ask again.
    pub fn forget(self) {
        self.asks.into_iter().for_each(Ask::forget);
    }

    /// The calls.
    pub fn commands<'a>(&'a self, script: &'a str, caller: &'a Caller) -> impl Iterator<Item = Cmd> {
        self.calls.iter().map(move |call| {
            let mut command = caller.call(script, &call.keys);
            command.arg(call.message());
            command
        })
    }

    /// Reads what each call answered. Also says what is to be undone, because another call refused it.
    ///
    /// # Errors
    /// What a node answered instead.
    pub fn judge(self, answers: Vec<Value>) -> Result<(Vec<Judged>, Vec<Change>), RedisError> {
        let mut pending: Vec<Pending> = self.asks.iter().map(|_| Pending::new(self.session)).collect();
        for (call, answer) in self.calls.iter().zip(answers) {
            call.read(&doubles(answer)?, &self.asks, &mut pending)?;
        }
        let mut undone = Vec::new();
        let judge = |(ask, pending): (Ask, Pending)| {
            let (verdict, undo) = pending.judge(&ask);
            undone.extend(undo);
            (ask, verdict)
        };
        let judged = self.asks.into_iter().zip(pending).map(judge).collect();
        Ok((judged, undone))
    }
}

impl Call {
    fn new(tag: Tag) -> Self {
        Self {
            tag,
            keys: Vec::new(),
            places: HashMap::new(),
            first: None,
            count: 0,
            steps: Vec::with_capacity(512),
            last: None,
            parts: Vec::new(),
        }
    }

    /// Names a subject's state, and gives its number among the keys, from 1.
    fn place(&mut self, subject: &Subject) -> u16 {
        if let Some(place) = self.places.get(subject) {
            return *place;
        }
        self.keys.push(key_of(subject));
        // A batch has a few hundred steps.
        let place = u16::try_from(self.keys.len()).unwrap_or(u16::MAX);
        self.places.insert(subject.clone(), place);
        place
    }

    fn add_change(&mut self, change: &Change) {
        let (place, numbers) = (self.place(&change.subject), change.numbers());
        if let Some(run) = &mut self.last
            && run.numbers == numbers
            && run.first + run.count == place
        {
            run.count += 1;
            return;
        }
        self.end_run();
        self.last = Some(Run { numbers, first: place, count: 1 });
    }

    fn end_run(&mut self) {
        if let Some(run) = self.last.take() {
            self.count += 1;
            run.put(&mut self.steps);
        }
    }

    /// What the script is told.
    fn message(&self) -> Vec<u8> {
        let mut message = Vec::with_capacity(self.steps.len() + 128);
        put(&mut message, &[self.count + i64::from(self.last.is_some())]);
        message.extend_from_slice(&self.steps);
        if let Some(run) = &self.last {
            run.put(&mut message);
        }
        message
    }

    fn add_ask(&mut self, nth: usize, ask: &Ask, indexes: Vec<usize>) {
        self.end_run();
        self.count += 1;
        let (amount, least) = (ask.amount(), ask.least());
        let numbers = [indexes.len() as u64, ask.times(), amount.tokens, amount.nano_usd, least.tokens, least.nano_usd]
            .map(number);
        put(&mut self.steps, &numbers);
        put(&mut self.steps, &[ask.month.0.into()]);
        for &index in &indexes {
            let caps = &ask.demands[index].caps;
            let caps = [caps.rpm, caps.tpm, caps.concurrency, caps.monthly_tokens, caps.monthly_nano_usd];
            put(&mut self.steps, &caps.map(number));
        }
        for &index in &indexes {
            let place = self.place(&ask.demands[index].subject);
            put(&mut self.steps, &[place.into()]);
            let Known { booked, in_flight, held, .. } = ask.known[index];
            let known = [booked.tokens, booked.nano_usd, in_flight, held.tokens, held.nano_usd];
            put(&mut self.steps, &known.map(number));
        }
        self.parts.push((nth, indexes));
    }

    /// Reads the answer of the script; its form is in the head of `limits.lua`.
    fn read(&self, answer: &[i64], asks: &[Ask], pending: &mut [Pending]) -> Result<(), RedisError> {
        let (now_ms, mut rest) = answer.split_first().ok_or_else(no_reply)?;
        let now_ms = positive(*now_ms);
        for (number, indexes) in &self.parts {
            let is_admitted = rest.first() == Some(&1);
            let (head, of_each) = if is_admitted { (2, 2) } else { (5, 3) };
            let (head, more) = rest.split_at_checked(head).ok_or_else(no_reply)?;
            let (shown, more) = more.split_at_checked(of_each * indexes.len()).ok_or_else(no_reply)?;
            rest = more;
            pending[*number].see(&asks[*number], indexes, now_ms, head, shown);
        }
        Ok(())
    }
}

impl Run {
    fn put(&self, message: &mut Vec<u8>) {
        let mut numbers = Vec::with_capacity(99);
        put(&mut numbers, &self.numbers);
        put(message, &[0, self.first.into(), self.count.into(), number(numbers.len() as u64)]);
        message.append(&mut numbers);
    }
}

fn no_reply() -> RedisError {
    RedisError::from((ErrorKind::Parse, "not the reply of a decision"))
}

fn positive(n: i64) -> u64 {
    u64::try_from(n).unwrap_or(0)
}

/// What the calls said of one request so far.
struct Pending {
    verdict: Verdict,
    /// Subjects of the calls that admitted it.
    admitted: Vec<usize>,
    refusal: Option<Refusal>,
    is_foreign: bool,
    counted: Counted,
}

impl Pending {
    fn new(session: u32) -> Self {
        let counted = Counted { session, cells: [0; MAX_DEMANDS] };
        Self {
            verdict: Verdict {
                decision: Ok(counted),
                standing: Standing::default(),
                has_forgotten: false,
                now_ms: 0,
                cell_left_ms: CELL_MS,
                joined_in_vain: false,
            },
            admitted: Vec::new(),
            refusal: None,
            is_foreign: false,
            counted,
        }
    }

    /// `head` and `shown` are what a call says of the request and of those of its subjects that `indexes` name.
    fn see(&mut self, ask: &Ask, indexes: &[usize], now_ms: u64, head: &[i64], shown: &[i64]) {
        self.verdict.now_ms = now_ms;
        self.verdict.cell_left_ms = self.verdict.cell_left_ms.min(CELL_MS - now_ms % CELL_MS);
        let fresh = |bit: usize| head[1] >> bit & 1 == 1;
        self.verdict.has_forgotten |=
            indexes.iter().enumerate().any(|(bit, &index)| fresh(bit) && ask.known[index].is_recent);
        for &index in indexes {
            self.counted.cells[index] = now_ms / CELL_MS;
        }
        let nth = |place: i64| usize::try_from(place).ok().and_then(|place| indexes.get(place)).copied();
        match *head {
            [0, _, refusing, kind, wait] => {
                let refusal = nth(refusing).map(|demand| refusal(demand, &ask.demands[demand], kind, wait));
                if self.refusal.is_none_or(|known| refusal.is_some_and(|new| known.wait < new.wait)) {
                    self.refusal = refusal;
                }
            }
            [-1, _, refusing, ..] => {
                self.is_foreign = true;
                let key = nth(refusing).map(|demand| key_of(&ask.demands[demand].subject)).unwrap_or_default();
                tracing::error!(
                    key,
                    "holds something in Redis that is not a limit of tollgate: delete it; until then this caller's limits are held by each replica alone"
                );
            }
            _ => self.admitted.extend(indexes),
        }
        show(&mut self.verdict.standing, &ask.demands, indexes, now_ms, shown);
    }

    /// Puts together what all calls said, and what is to be undone at those that admitted what others refused.
    fn judge(mut self, ask: &Ask) -> (Option<Verdict>, Vec<Change>) {
        if self.refusal.is_none() && !self.is_foreign {
            self.verdict.decision = Ok(self.counted);
            return (Some(self.verdict), Vec::new());
        }
        let (times, amount) = (ask.times(), ask.amount());
        let undo = |&index: &usize| Change::undo(&ask.demands[index], self.counted.cells[index], times, amount);
        let undone = self.admitted.iter().map(undo).collect();
        let verdict = self.refusal.filter(|_| !self.is_foreign).map(|refusal| {
            self.verdict.decision = Err(refusal);
            self.verdict
        });
        (verdict, undone)
    }
}

/// Kinds and waits are those of `limits.lua`.
fn refusal(demand: usize, of: &Demand, kind: i64, wait: i64) -> Refusal {
    let (kind, limit) = match kind {
        0 => (Kind::Rpm, of.caps.rpm),
        1 => (Kind::Tpm, of.caps.tpm),
        2 => (Kind::Concurrency, of.caps.concurrency),
        3 => (Kind::MonthlyTokens, of.caps.monthly_tokens),
        _ => (Kind::MonthlyUsd, of.caps.monthly_nano_usd),
    };
    let wait = match wait {
        -1 => Wait::NextMonth,
        -2 => Wait::Never,
        ms => Wait::Ms(positive(ms)),
    };
    Refusal { demand, kind, limit, wait }
}

/// Adds what is left of the windows. Of a request that is admitted nobody needs to say when they will be whole again: it is
/// in the newest cell itself.
fn show(standing: &mut Standing, demands: &[Demand], indexes: &[usize], now_ms: u64, shown: &[i64]) {
    let whole = (now_ms / CELL_MS + CELLS as u64) * CELL_MS - now_ms;
    for (&index, shown) in indexes.iter().zip(shown.chunks_exact(shown.len() / indexes.len().max(1))) {
        let caps = &demands[index].caps;
        let left = |limit: u64, used: i64| {
            let (used, reset_ms) = (positive(used), shown.get(2).map_or(whole, |ms| positive(*ms)));
            Left { limit, remaining: limit.saturating_sub(used), reset_ms: if used == 0 { 0 } else { reset_ms } }
        };
        if caps.rpm > 0 {
            standing.see_requests(left(caps.rpm, shown[0]));
        }
        if caps.tpm > 0 {
            standing.see_tokens(left(caps.tpm, shown[1]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::redis_ask::Asker, *};
    use tokio::sync::oneshot;
    use tollgate_core::{
        id::KeyId,
        limit::{Caps, Month, state::Need},
    };

    #[test]
    fn the_first_request_of_each_call_has_its_first_keys() {
        let (answer, _waiting) = oneshot::channel();
        let (other_answer, _other_waiting) = oneshot::channel();
        let ask = |subjects: &[&Subject], answer| {
            let demands = subjects.iter().map(|&subject| Demand { subject: subject.clone(), caps: Caps::default() });
            let askers = vec![Asker { times: 1, need: Need::default(), answer }];
            let known = vec![Known::default(); subjects.len()];
            Step::Ask(Ask { demands: demands.collect(), known, month: Month(1), askers, is_joined: false })
        };
        let user = |id| Subject::User(UserId(id));
        let key = |user, id| Subject::Key(UserId(user), KeyId(id));
        let ip = Subject::of_ip("10.0.0.1".parse().unwrap());
        let steps = vec![
            Step::Change(Change::of(key(1, 1))),
            ask(&[&ip, &user(1), &key(1, 2)], answer),
            Step::Change(Change::of(key(2, 3))),
            ask(&[&ip, &user(2), &key(2, 4)], other_answer),
        ];
        let batch = Batch::new(steps, 0, true);
        let keys: Vec<&[String]> = batch.calls.iter().map(|call| &*call.keys).collect();
        let names = |subjects: &[Subject]| subjects.iter().map(key_of).collect::<Vec<_>>();
        assert_eq!(
            keys,
            [names(&[ip]), names(&[user(1), key(1, 2), key(1, 1)]), names(&[user(2), key(2, 4), key(2, 3)])]
        );
    }
}
