//! What goes over the wire to the scripts in Redis and comes back, as bytes and numbers.
//!
//! Numbers travel there as MessagePack and back as packed doubles, which is what scripts read and write at the least cost; a
//! dozen texts for each subject would have to be split and converted. The forms are those that the heads of `lua/*.lua`
//! describe.

use redis::{Cmd, ErrorKind, RedisError, Value};
use tollgate_core::limit::{
    Amount, Month, Subject,
    state::{Demand, Mirror},
    window::{CELL_MS, CELLS},
};

/// What is corrected at one subject.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// Whose state.
    pub subject: Subject,
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
        Subject::Ip(ip) => format!("tollgate:3:{{{ip}}}:ip"),
        Subject::User(user) => format!("tollgate:3:{{u{user}}}:user"),
        Subject::Key(user, key) => format!("tollgate:3:{{u{user}}}:key:{key}"),
        Subject::KeyModel(user, key, model) => format!("tollgate:3:{{u{user}}}:key:{key}:{model}"),
        Subject::Others(class) => format!("tollgate:3:{{others}}:{}", class.word()),
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
    /// A call of a script for `keys`, with the arguments that every script but the register begins with.
    pub fn call(&self, script: &str, keys: &[String]) -> Cmd {
        let mut call = redis::cmd("EVALSHA");
        call.arg(script).arg(keys.len());
        for key in keys {
            call.arg(key);
        }
        let [session, holder] = [&self.session.to_le_bytes()[..], &self.holder];
        call.arg(&self.clock).arg([session, holder].concat());
        call
    }
}

impl Change {
    /// Nothing to correct at `subject` yet.
    #[must_use]
    pub fn of(subject: Subject) -> Self {
        let (hold, release, unbook) = (Amount::default(), Amount::default(), Amount::default());
        let (ended, cell, requests, tokens, begun, more, booked) = (0, 0, 0, 0, 0, 0, None);
        Self { subject, ended, cell, requests, tokens, begun, more, hold, release, booked, unbook }
    }

    /// Takes in a later correction of the same subject; `false`, and nothing done, if the two must stay apart: what is taken
    /// back is taken from one cell, and what is booked belongs to one month.
    pub fn take_in(&mut self, later: &Self) -> bool {
        let takes_back = |change: &Self| change.requests > 0 || change.tokens > 0;
        let month = |change: &Self| change.booked.map(|(month, _)| month);
        let months_differ = month(self).zip(month(later)).is_some_and(|(mine, other)| mine != other);
        if months_differ || (takes_back(self) && takes_back(later) && self.cell != later.cell) {
            return false;
        }
        if !takes_back(self) {
            self.cell = later.cell;
        }
        for (sum, n) in [
            (&mut self.ended, later.ended),
            (&mut self.requests, later.requests),
            (&mut self.tokens, later.tokens),
            (&mut self.begun, later.begun),
            (&mut self.more, later.more),
        ] {
            *sum = sum.saturating_add(n);
        }
        self.hold = self.hold.plus(later.hold);
        self.release = self.release.plus(later.release);
        self.unbook = self.unbook.plus(later.unbook);
        if let Some((month, amount)) = later.booked {
            let sum = self.booked.map_or(amount, |(_, known)| known.plus(amount));
            self.booked = Some((month, sum));
        }
        true
    }

    /// Is more counted after it than before, of anything?
    #[must_use]
    pub fn adds(&self) -> bool {
        let booked = self.booked.map_or(Amount::default(), |(_, amount)| amount);
        let counts_no_more = self.hold.plus(booked).fits_in(self.release.plus(self.unbook));
        self.begun > 0 || self.more > 0 || !counts_no_more
    }

    /// What was admitted without asking.
    #[must_use]
    pub fn unasked(demand: &Demand, tokens: u64) -> Self {
        let (begun, more) = (u64::from(demand.caps.rpm > 0), if demand.caps.tpm > 0 { tokens } else { 0 });
        Self { begun, more, ..Self::of(demand.subject.clone()) }
    }

    /// So many admissions that reserved so much together, undone as if they had never been.
    #[must_use]
    pub fn undo(demand: &Demand, cell: u64, requests: u64, amount: Amount) -> Self {
        let release = if demand.caps.has_quota() { amount } else { Amount::default() };
        let ended = if demand.caps.counts_holders() { requests } else { 0 };
        Self { ended, cell, requests, tokens: amount.tokens, release, ..Self::of(demand.subject.clone()) }
    }

    /// The same at all subjects of a request. `cell`: that at the subject of an index.
    pub fn undo_all(demands: &[Demand], cell: impl Fn(usize) -> u64, requests: u64, amount: Amount) -> Vec<Self> {
        let each = demands.iter().enumerate();
        each.map(|(index, demand)| Self::undo(demand, cell(index), requests, amount)).collect()
    }

    /// What a settlement changes in Redis; `None`: nothing.
    #[must_use]
    pub fn settlement(demand: &Demand, cell: u64, need: Amount, actual: Amount) -> Option<Self> {
        let (limits_tokens, has_quota) = (demand.caps.tpm > 0, demand.caps.has_quota());
        let if_limited = |tokens: u64| if limits_tokens { tokens } else { 0 };
        let if_quota = |amount: Amount| if has_quota { amount } else { Amount::default() };
        let change = Self {
            ended: u64::from(demand.caps.counts_holders()),
            cell,
            tokens: if_limited(need.tokens.saturating_sub(actual.tokens)),
            more: if_limited(actual.tokens.saturating_sub(need.tokens)),
            hold: if_quota(actual),
            release: if_quota(need),
            ..Self::of(demand.subject.clone())
        };
        (change.ended > 0 || change.tokens > 0 || change.more > 0).then_some(change)
    }

    /// As the script takes it.
    #[must_use]
    pub fn numbers(&self) -> [i64; 11] {
        let (month, booked) = self.booked.map_or((-1, Amount::default()), |(month, sum)| (month.0.into(), sum));
        let less = |a: u64, b: u64| number(a).saturating_sub(number(b));
        [
            number(self.ended),
            number(self.cell),
            number(self.requests),
            number(self.tokens),
            number(self.begun),
            number(self.more),
            less(self.hold.tokens, self.release.tokens),
            less(self.hold.nano_usd, self.release.nano_usd),
            month,
            less(booked.tokens, self.unbook.tokens),
            less(booked.nano_usd, self.unbook.nano_usd),
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

/// The numbers of a reply that are packed as doubles.
///
/// # Errors
/// The server's, or that it is none.
pub fn doubles(value: Value) -> Result<Vec<i64>, RedisError> {
    let bytes: Vec<u8> = redis::from_redis_value(value).map_err(RedisError::from)?;
    let (doubles, rest) = bytes.as_chunks();
    if !rest.is_empty() {
        return Err(RedisError::from((ErrorKind::Parse, "not a row of doubles")));
    }
    #[expect(clippy::cast_possible_truncation, reason = "all of them are whole and below 2^53")]
    let whole = |double: &[u8; 8]| f64::from_le_bytes(*double) as i64;
    Ok(doubles.iter().map(whole).collect())
}

/// Reads the head and the cells of a state, in the form of `form.lua`.
pub fn parse_state(bytes: &[u8], now_ms: u64, local_ms: u64) -> Option<Shown> {
    const CELLS_AT: usize = 57;
    if bytes.len() < CELLS_AT + 9 * CELLS || bytes[0] != b'3' {
        return None;
    }
    let uint = |at: usize, width: usize| {
        bytes[at..at + width].iter().rev().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte))
    };
    let newest = uint(1, 4);
    let mut mirror = Mirror::default();
    let now = now_ms / CELL_MS;
    for back in 0..(CELLS as u64).min(newest) {
        let cell = newest - back;
        let slot = usize::try_from(cell % CELLS as u64).unwrap_or(0);
        let age = usize::try_from(now.saturating_sub(cell)).unwrap_or(usize::MAX);
        mirror.requests.put_aged(local_ms, age, uint(CELLS_AT + 9 * slot, 3));
        mirror.tokens.put_aged(local_ms, age, uint(CELLS_AT + 9 * slot + 3, 6));
    }
    let month = i32::try_from(uint(9, 4)).unwrap_or(0);
    let sum = |at: usize| whole(f64::from_bits(uint(at, 8)));
    let booked = Amount { tokens: sum(13), nano_usd: sum(21) };
    Some(Shown { mirror, booked: (month > 0).then_some((Month(month), booked)) })
}

/// As it travels. Numbers of the limiter are far below 2^53, where the doubles of a script are exact.
pub fn number(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// Adds numbers to a message.
pub fn put(bytes: &mut Vec<u8>, numbers: &[i64]) {
    for &number in numbers {
        let Ok(_) = rmp::encode::write_sint(bytes, number) else { unreachable!("a vector takes everything") };
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "sums are whole, positive and below 2^53")]
fn whole(double: f64) -> u64 {
    double as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use tollgate_core::id::UserId;

    #[test]
    fn corrections_are_taken_together_unless_they_are_about_different_cells_or_months() {
        let back = |cell, tokens| Change { cell, tokens, ended: 1, ..Change::of(Subject::User(UserId(1))) };
        let mut change = back(7, 10);
        assert!(change.take_in(&back(7, 5)));
        assert_eq!((change.tokens, change.ended), (15, 2));
        assert!(!change.take_in(&back(8, 5)));
        assert_eq!((change.tokens, change.ended), (15, 2));
        assert!(change.take_in(&back(8, 0)), "nothing is taken from the other cell");
        assert_eq!((change.cell, change.tokens, change.ended), (7, 15, 3));
        let mut late = back(0, 0);
        assert!(late.take_in(&back(9, 1)));
        assert_eq!((late.cell, late.tokens), (9, 1));
        let booked = |month| Change { booked: Some((Month(month), Amount { tokens: 1, nano_usd: 2 })), ..back(7, 0) };
        assert!(change.take_in(&booked(1)) && change.take_in(&booked(1)));
        assert!(!change.take_in(&booked(2)));
        assert_eq!(change.booked, Some((Month(1), Amount { tokens: 2, nano_usd: 4 })));
    }
}
