//! What goes over the wire to the scripts in Redis and comes back, as bytes and numbers.
//!
//! Numbers travel as packed doubles, one argument per subject: a script unpacks them in one call, where a dozen texts each
//! would have to be sent, split and read. The forms are those that the heads of `lua/*.lua` describe.

use std::collections::BTreeMap;

use redis::{Cmd, RedisError, Value};
use tollgate_core::limit::{
    Amount, Month, Subject,
    standing::{Left, Standing},
    state::{Demand, Kind, Mirror, Need, Refusal, Wait},
    window::{CELL_MS, CELLS},
};

/// How long what a replica holds outlives its last sign of life, in seconds.
pub const LEASE_S: u32 = 30;

/// What is corrected at one subject.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Change {
    /// Name of its state.
    pub key: String,
    /// Requests that ended.
    pub ended: u64,
    /// Cell of the reservation, in Redis's time, from which the next two are taken back.
    pub cell: u64,
    /// Requests to take back.
    pub requests: u64,
    /// Tokens to take back.
    pub tokens: u64,
    /// Requests to add now.
    pub begun: u64,
    /// Tokens to add now.
    pub more: u64,
    /// What is held from now on.
    pub hold: Amount,
    /// What is no longer held.
    pub release: Amount,
    /// What was booked, and in which month.
    pub booked: Option<(Month, Amount)>,
    /// What the books in Redis have too much, to be taken out: a correction.
    pub unbook: Amount,
}

/// What one subject brings to an admission.
#[derive(Clone, Copy, Debug, Default)]
pub struct Known {
    /// What the database has booked.
    pub booked: Amount,
    /// Requests that this replica has in flight.
    pub in_flight: u64,
    /// What this replica holds.
    pub held: Amount,
    /// Was it in use in the last minute, as far as this replica knew when it asked?
    pub is_recent: bool,
}

/// What a state in Redis shows.
#[derive(Debug)]
pub struct Shown {
    /// Its windows.
    pub mirror: Mirror,
    /// What it has booked, and of which month; `None`: no quota.
    pub booked: Option<(Month, Amount)>,
}

/// The name of a subject's state. All subjects of a user share a hash tag, which is the part in braces.
#[must_use]
pub fn key_of(subject: &Subject) -> String {
    match subject {
        Subject::Ip(ip) => format!("tollgate:1:{{{ip}}}:ip"),
        Subject::User(user) => format!("tollgate:1:{{u{user}}}:user"),
        Subject::Key(user, key) => format!("tollgate:1:{{u{user}}}:key:{key}"),
        Subject::KeyModel(user, key, model) => format!("tollgate:1:{{u{user}}}:key:{key}:{model}"),
        Subject::Others(class) => format!("tollgate:1:{{others}}:{}", class.word()),
    }
}

/// The hash tag of a name made by [`key_of`].
fn tag(key: &str) -> &str {
    key.split_once('}').map_or(key, |(tag, _)| tag)
}

/// One admission, as it is asked of every node.
#[derive(Debug)]
pub struct Asked<'a> {
    /// What binds the request.
    pub demands: &'a [Demand],
    /// The name of each subject's state.
    pub keys: Vec<String>,
    /// What this replica knows of each.
    pub known: Vec<Known>,
    /// What is to be reserved.
    pub need: Need,
    /// Whose quota it counts against.
    pub month: Month,
}

impl Asked<'_> {
    /// The call for those subjects (by index) whose state is on one node.
    pub fn call(&self, script: &str, caller: &Caller, group: &[usize]) -> Cmd {
        let mut call = caller.call(script, group, &self.keys);
        let Need { amount, least } = self.need;
        call.arg(floats(&[float(amount.tokens), float(amount.nano_usd), float(least.tokens), float(least.nano_usd)]));
        for &index in group {
            call.arg(floats(&self.subject(index)));
        }
        call
    }

    fn subject(&self, index: usize) -> [f64; 11] {
        let (caps, known) = (&self.demands[index].caps, &self.known[index]);
        [
            float(caps.rpm),
            float(caps.tpm),
            float(caps.concurrency),
            float(caps.monthly_tokens),
            float(caps.monthly_nano_usd),
            f64::from(self.month.0),
            float(known.booked.tokens),
            float(known.booked.nano_usd),
            float(known.in_flight),
            float(known.held.tokens),
            float(known.held.nano_usd),
        ]
    }
}

/// The answer of one node to an admission.
#[derive(Debug)]
pub struct NodeAnswer {
    /// Does it admit the request?
    pub is_admitted: bool,
    /// The time there, in milliseconds.
    pub now_ms: u64,
    /// Had it no state of a subject that was in use a moment ago?
    pub has_forgotten: bool,
    /// Why it refuses.
    pub refusal: Option<Refusal>,
}

impl NodeAnswer {
    /// Reads it, and adds what is left of the windows to `standing`.
    ///
    /// # Errors
    /// The node's error, or that the reply is none.
    pub fn parse(
        value: Value,
        group: &[usize],
        asked: &Asked<'_>,
        standing: &mut Standing,
    ) -> Result<Self, RedisError> {
        let (numbers, demands) = (numbers(value)?, asked.demands);
        let is_admitted = numbers.first() == Some(&1);
        let of_each = if is_admitted { 2 } else { 3 };
        if numbers.len() != 6 + of_each * group.len() {
            return Err(RedisError::from((redis::ErrorKind::Parse, "not the reply of an admission")));
        }
        show(standing, group, demands, &numbers);
        Ok(Self {
            is_admitted,
            now_ms: u64::try_from(numbers[1]).unwrap_or(0),
            has_forgotten: group
                .iter()
                .enumerate()
                .any(|(bit, &index)| numbers[2] >> bit & 1 == 1 && asked.known[index].is_recent),
            refusal: if is_admitted { None } else { refusal(group, demands, &numbers) },
        })
    }
}

/// Who calls a script, and when.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The time it is, if it is not for Redis to say.
    pub clock: String,
    /// Its name.
    pub holder: [u8; 8],
    /// The session of its sums.
    pub session: u32,
}

impl Caller {
    /// A call of a script for those of `keys` that `group` names, with the arguments that every script but the register
    /// begins with.
    pub fn call(&self, script: &str, group: &[usize], keys: &[String]) -> Cmd {
        let mut call = redis::cmd("EVALSHA");
        call.arg(script).arg(group.len());
        for &index in group {
            call.arg(&keys[index]);
        }
        call.arg(&self.clock).arg(&self.holder[..]).arg(self.session).arg(LEASE_S);
        call
    }
}

/// The indexes of `keys` by hash tag; all together unless it is a cluster.
pub fn groups(keys: &[String], is_cluster: bool) -> Vec<Vec<usize>> {
    if !is_cluster {
        return vec![(0..keys.len()).collect()];
    }
    let mut by_tag: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (index, key) in keys.iter().enumerate() {
        by_tag.entry(tag(key)).or_default().push(index);
    }
    by_tag.into_values().collect()
}

impl Change {
    /// What was admitted without asking.
    #[must_use]
    pub fn unasked(demand: &Demand, tokens: u64) -> Self {
        let (begun, more) = (u64::from(demand.caps.rpm > 0), if demand.caps.tpm > 0 { tokens } else { 0 });
        Self { key: key_of(&demand.subject), begun, more, ..Self::default() }
    }

    /// An admission that is undone as if it had never been.
    #[must_use]
    pub fn undo(demand: &Demand, cell: u64, need: Amount) -> Self {
        let release = if demand.caps.has_quota() { need } else { Amount::default() };
        let key = key_of(&demand.subject);
        Self { key, ended: 1, cell, requests: 1, tokens: need.tokens, release, ..Self::default() }
    }

    /// What a settlement changes in Redis; `None`: nothing.
    #[must_use]
    pub fn settlement(demand: &Demand, cell: u64, need: Amount, actual: Amount) -> Option<Self> {
        let (limits_tokens, has_quota) = (demand.caps.tpm > 0, demand.caps.has_quota());
        let if_limited = |tokens: u64| if limits_tokens { tokens } else { 0 };
        let if_quota = |amount: Amount| if has_quota { amount } else { Amount::default() };
        let change = Self {
            key: key_of(&demand.subject),
            ended: 1,
            cell,
            tokens: if_limited(need.tokens.saturating_sub(actual.tokens)),
            more: if_limited(actual.tokens.saturating_sub(need.tokens)),
            hold: if_quota(actual),
            release: if_quota(need),
            ..Self::default()
        };
        let counts = demand.caps.concurrency > 0 || has_quota;
        (counts || change.tokens > 0 || change.more > 0).then_some(change)
    }

    /// As the script takes it.
    #[must_use]
    pub fn numbers(&self) -> [f64; 11] {
        let (month, booked) = self.booked.map_or((-1.0, Amount::default()), |(month, sum)| (f64::from(month.0), sum));
        [
            float(self.ended),
            float(self.cell),
            float(self.requests),
            float(self.tokens),
            float(self.begun),
            float(self.more),
            float(self.hold.tokens) - float(self.release.tokens),
            float(self.hold.nano_usd) - float(self.release.nano_usd),
            month,
            float(booked.tokens) - float(self.unbook.tokens),
            float(booked.nano_usd) - float(self.unbook.nano_usd),
        ]
    }
}

/// The numbers of a reply.
///
/// # Errors
/// The server's, or that it is none.
pub fn numbers(value: Value) -> Result<Vec<i64>, RedisError> {
    redis::from_redis_value(value).map_err(RedisError::from)
}

/// What a refusing group says. Kinds and waits are those of `admit.lua`.
fn refusal(group: &[usize], demands: &[Demand], numbers: &[i64]) -> Option<Refusal> {
    let demand = *group.get(usize::try_from(numbers[3]).ok()?)?;
    let caps = &demands[demand].caps;
    let (kind, limit) = match numbers[4] {
        0 => (Kind::Rpm, caps.rpm),
        1 => (Kind::Tpm, caps.tpm),
        2 => (Kind::Concurrency, caps.concurrency),
        3 => (Kind::MonthlyTokens, caps.monthly_tokens),
        _ => (Kind::MonthlyUsd, caps.monthly_nano_usd),
    };
    let wait = match numbers[5] {
        -1 => Wait::NextMonth,
        -2 => Wait::Never,
        ms => Wait::Ms(u64::try_from(ms).unwrap_or(0)),
    };
    Some(Refusal { demand, kind, limit, wait })
}

/// Adds what is left of the windows. Of a request that is admitted nobody needs to say when they will be whole again: it is
/// in the newest cell itself.
fn show(standing: &mut Standing, group: &[usize], demands: &[Demand], numbers: &[i64]) {
    let number = |n: i64| u64::try_from(n).unwrap_or(0);
    let now_ms = number(numbers[1]);
    let whole = (now_ms / CELL_MS + CELLS as u64) * CELL_MS - now_ms;
    let (used, resets) = numbers[6..].split_at(2 * group.len());
    for (place, &index) in group.iter().enumerate() {
        let caps = &demands[index].caps;
        let left = |limit: u64, which: usize| {
            let used = number(used[2 * place + which]);
            let reset_ms = resets.get(place).map_or(whole, |ms| number(*ms));
            Left { limit, remaining: limit.saturating_sub(used), reset_ms: if used == 0 { 0 } else { reset_ms } }
        };
        if caps.rpm > 0 {
            standing.see_requests(left(caps.rpm, 0));
        }
        if caps.tpm > 0 {
            standing.see_tokens(left(caps.tpm, 1));
        }
    }
}

/// Reads the head and the cells of a state, as `state.lua` writes them.
pub fn parse_state(bytes: &[u8], now_ms: u64, local_ms: u64) -> Option<Shown> {
    const CELLS_AT: usize = 50;
    if bytes.len() < CELLS_AT + 9 * CELLS || bytes[0] != b'1' {
        return None;
    }
    let number = |at: usize, width: usize| {
        bytes[at..at + width].iter().rev().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte))
    };
    let newest = number(1, 4);
    let mut mirror = Mirror::default();
    let now = now_ms / CELL_MS;
    for back in 0..(CELLS as u64).min(newest) {
        let cell = newest - back;
        let slot = usize::try_from(cell % CELLS as u64).unwrap_or(0);
        let age = usize::try_from(now.saturating_sub(cell)).unwrap_or(usize::MAX);
        mirror.requests.put_aged(local_ms, age, number(CELLS_AT + 9 * slot, 3));
        mirror.tokens.put_aged(local_ms, age, number(CELLS_AT + 9 * slot + 3, 6));
    }
    let month = Month(i32::try_from(number(22, 4)).unwrap_or(0));
    let booked = Amount { tokens: number(26, 7), nano_usd: number(33, 7) };
    Some(Shown { mirror, booked: (number(40, 1) == 1).then_some((month, booked)) })
}

/// Numbers of the limiter are far below 2^53, where doubles are exact.
pub fn float(n: u64) -> f64 {
    n as f64
}

/// Numbers as the scripts unpack them.
pub fn floats(numbers: &[f64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}
