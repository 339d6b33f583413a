//! Limits: what is written down, whom it binds, and the law by which it is held.
//!
//! A *limit* is a window of a minute or a number of requests at once; a *quota* is a sum per calendar month. Both are
//! written down as [`Limits`], resolved into [`Caps`] for each [`Subject`] of a request, and decided upon in one step:
//! a request is admitted by all of its subjects or leaves no trace at any.
//!
//! | module | what it holds |
//! |---|---|
//! | [`window`] | the sliding window: the law of RPM and TPM |
//! | [`state`] | what is known of one subject, and the decision over several |
//! | [`policy`] | from what is written down to what binds a request |
//! | [`standing`] | what is left, and the headers that say so |
//! | [`estimate`] | what a request may consume, before it is known |
//! | [`hold`] | what a finished request holds until it is booked |
//! | [`written`] | limits as people write them |

pub mod ahead;
pub mod estimate;
pub mod hold;
pub mod policy;
pub mod standing;
pub mod state;
pub mod window;
pub mod written;

use std::{net::IpAddr, sync::Arc};

use chrono::{DateTime, Datelike, Utc};
use serde::{Deserialize, Serialize};

use crate::id::{KeyId, UserId};

/// Greatest limit that can be set. Sums of reservations below it are exact in 64 bits, and in the floating-point
/// numbers of a Redis script.
pub const MAX_LIMIT: u64 = 1_000_000_000_000_000;

/// Greatest TPM that is held: what fits into one cell of a window in Redis.
const MAX_TPM: u64 = 100_000_000_000_000;

/// Limits as they are written down. `None`: the default applies; `Some(0)`: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Requests per minute.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rpm: Option<u32>,
    /// Tokens per minute.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tpm: Option<u64>,
    /// Requests in flight at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<u32>,
    /// Tokens per calendar month (UTC).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub monthly_tokens: Option<u64>,
    /// Nano-dollars per calendar month (UTC).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub monthly_nano_usd: Option<u64>,
}

/// Limits for one model within a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelLimits {
    /// The model's proper name, or a pattern with `*`.
    pub model: String,
    /// Its limits.
    pub limits: Limits,
}

/// What binds one subject, defaults resolved. 0: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Caps {
    /// Requests per minute.
    pub rpm: u64,
    /// Tokens per minute.
    pub tpm: u64,
    /// Requests in flight at once.
    pub concurrency: u64,
    /// Tokens per calendar month (UTC).
    pub monthly_tokens: u64,
    /// Nano-dollars per calendar month (UTC).
    pub monthly_nano_usd: u64,
}

impl Caps {
    /// What `limits` say, and `default` where they say nothing. Nothing exceeds [`MAX_LIMIT`], which is as good as no
    /// limit but cannot overflow.
    #[must_use]
    pub fn resolve(limits: &Limits, default: &Limits) -> Self {
        let cap = |own: Option<u64>, default: Option<u64>| own.or(default).unwrap_or(0).min(MAX_LIMIT);
        Self {
            rpm: cap(limits.rpm.map(u64::from), default.rpm.map(u64::from)),
            tpm: cap(limits.tpm, default.tpm).min(MAX_TPM),
            concurrency: cap(limits.concurrency.map(u64::from), default.concurrency.map(u64::from)),
            monthly_tokens: cap(limits.monthly_tokens, default.monthly_tokens),
            monthly_nano_usd: cap(limits.monthly_nano_usd, default.monthly_nano_usd),
        }
    }

    /// Is there no limit at all?
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Is there a quota?
    #[must_use]
    pub fn has_quota(&self) -> bool {
        self.monthly_tokens > 0 || self.monthly_nano_usd > 0
    }

    /// Does it matter who has requests in flight?
    #[must_use]
    pub fn counts_holders(&self) -> bool {
        self.concurrency > 0 || self.has_quota()
    }
}

/// Whom a limit binds. The order is that in which subjects of one request are locked.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Subject {
    /// An address; of IPv6 its network of 64 bits, which is what one subscriber has.
    Ip(IpAddr),
    /// A user, over all keys.
    User(UserId),
    /// A key.
    Key(UserId, KeyId),
    /// A model within a key.
    KeyModel(UserId, KeyId, Arc<str>),
    /// All that found no room of their own, by kind of subject.
    Others(Class),
}

/// The kinds of subjects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// An address.
    Ip,
    /// A user.
    User,
    /// A key.
    Key,
    /// A model within a key.
    KeyModel,
}

impl Subject {
    /// The subject of an address.
    #[must_use]
    pub fn of_ip(ip: IpAddr) -> Self {
        Self::Ip(network_of(ip))
    }

    /// Which kind it is.
    #[must_use]
    pub fn class(&self) -> Class {
        match self {
            Self::Ip(_) => Class::Ip,
            Self::User(_) => Class::User,
            Self::Key(..) => Class::Key,
            Self::KeyModel(..) => Class::KeyModel,
            Self::Others(class) => *class,
        }
    }
}

/// What an address is counted as: itself, or of IPv6 the first address of its network of 64 bits.
#[must_use]
pub fn network_of(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() & (u128::MAX << 64)).into()),
        v4 => v4,
    }
}

impl Class {
    /// The word for it in messages.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Ip => "address",
            Self::User => "user",
            Self::Key => "key",
            Self::KeyModel => "key and model",
        }
    }
}

/// Tokens and money: what is reserved, used, or left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// Tokens.
    pub tokens: u64,
    /// Nano-dollars.
    pub nano_usd: u64,
}

impl Amount {
    /// Both sums; they stop at the greatest number.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            tokens: self.tokens.saturating_add(other.tokens),
            nano_usd: self.nano_usd.saturating_add(other.nano_usd),
        }
    }

    /// Both differences; they stop at 0.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        Self {
            tokens: self.tokens.saturating_sub(other.tokens),
            nano_usd: self.nano_usd.saturating_sub(other.nano_usd),
        }
    }

    /// So many of it; it stops at the greatest number.
    #[must_use]
    pub fn times(self, times: u64) -> Self {
        Self { tokens: self.tokens.saturating_mul(times), nano_usd: self.nano_usd.saturating_mul(times) }
    }

    /// The greater of both, each for itself.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self { tokens: self.tokens.max(other.tokens), nano_usd: self.nano_usd.max(other.nano_usd) }
    }

    /// Is neither more than in `other`?
    #[must_use]
    pub fn fits_in(self, other: Self) -> bool {
        self.tokens <= other.tokens && self.nano_usd <= other.nano_usd
    }

    /// Is it nothing?
    #[must_use]
    pub fn is_zero(self) -> bool {
        self == Self::default()
    }
}

/// A calendar month (UTC), counted from January of the year 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Month(pub i32);

impl Month {
    /// The month of a moment.
    #[must_use]
    pub fn of(time: DateTime<Utc>) -> Self {
        Self(time.year() * 12 + time.month0().cast_signed())
    }

    /// Its first moment.
    #[must_use]
    pub fn start(self) -> DateTime<Utc> {
        let day = chrono::NaiveDate::from_ymd_opt(self.0.div_euclid(12), self.0.rem_euclid(12).cast_unsigned() + 1, 1);
        day.unwrap_or_default().and_time(chrono::NaiveTime::MIN).and_utc()
    }

    /// The month after it.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_subscriber_is_one_subject() {
        let of = |text: &str| Subject::of_ip(text.parse().unwrap());
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), of("2001:db8:1:2::1"));
        assert_ne!(of("2001:db8:1:3::1"), of("2001:db8:1:2::1"));
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
        assert_ne!(of("10.0.0.2"), of("10.0.0.1"));
    }

    #[test]
    fn months_begin_at_midnight_utc() {
        let month = |text: &str| Month::of(text.parse().unwrap());
        assert_eq!(month("2026-11-30T23:59:59Z").next(), month("2026-12-01T00:00:00Z"));
        assert_eq!(month("2026-12-31T23:59:59Z").next(), month("2027-01-01T00:00:00Z"));
        assert_eq!(month("2026-12-15T12:00:00Z").start().to_rfc3339(), "2026-12-01T00:00:00+00:00");
        assert_eq!(month("2027-01-01T00:00:00Z").start().to_rfc3339(), "2027-01-01T00:00:00+00:00");
    }

    #[test]
    fn own_limits_go_before_defaults_and_nothing_overflows() {
        let default = Limits { rpm: Some(5), tpm: Some(u64::MAX), ..Limits::default() };
        let own = Limits { rpm: Some(0), concurrency: Some(2), ..Limits::default() };
        let caps = Caps::resolve(&own, &default);
        assert_eq!(caps, Caps { rpm: 0, tpm: MAX_TPM, concurrency: 2, ..Caps::default() });
        assert!(Caps::resolve(&Limits::default(), &Limits::default()).is_none());
    }
}
