//! The words that a breaker is spoken to in, and answers with.

/// What became of an attempt, as far as it says something about its upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The first bytes of a good answer came, the end is yet to come: enough for a probe, not enough to be counted.
    Begun,
    /// A good answer.
    Success,
    /// No connection, a broken one, a timeout, 5xx, 408, an error as the body of a 200, a stream that broke off.
    Failure,
    /// Says nothing about the upstream: the request was at fault (400, 404, 409, 413, 422), or the client went away.
    Neutral,
    /// 429.
    Limited {
        /// How long the provider wants to be left alone, in milliseconds; `None`: it does not say.
        for_ms: Option<u64>,
    },
    /// 401 or 403: the credential is not accepted.
    Refused,
    /// `insufficient_quota`: the account is used up.
    Exhausted,
}

/// Where an upstream stands, as logs and metrics show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It gets work.
    Closed,
    /// It failed and is left alone.
    Open,
    /// One request at a time finds out whether it is well again.
    HalfOpen,
    /// The provider asked to be left alone for a while.
    Cooling,
    /// Its credential or account is bad; it gets nothing until it is freed.
    Quarantined,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Closed, Self::Open, Self::HalfOpen, Self::Cooling, Self::Quarantined];

    /// The word for it in logs and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
            Self::Cooling => "cooling",
            Self::Quarantined => "quarantined",
        }
    }
}

/// Why a state changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Failures in a row.
    ConsecutiveFailures,
    /// Too great a share of failures.
    FailureShare,
    /// The request that probed failed.
    ProbeFailed,
    /// The request that probed succeeded.
    ProbeSucceeded,
    /// A probe that is no request succeeded.
    ActiveProbe,
    /// 429.
    Limited,
    /// 401 or 403.
    Refused,
    /// `insufficient_quota`.
    Exhausted,
    /// An operator freed it.
    Freed,
    /// Another replica said so.
    Told,
}

impl Reason {
    /// The word for it in logs and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ConsecutiveFailures => "consecutive_failures",
            Self::FailureShare => "failure_share",
            Self::ProbeFailed => "probe_failed",
            Self::ProbeSucceeded => "probe_succeeded",
            Self::ActiveProbe => "active_probe",
            Self::Limited => "limited",
            Self::Refused => "refused",
            Self::Exhausted => "exhausted",
            Self::Freed => "freed",
            Self::Told => "told",
        }
    }
}

/// A change that is worth a line in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transition {
    /// The state before.
    pub from: State,
    /// What was entered. Beneath a cooling it is not yet what [`State`] shows.
    pub to: State,
    /// Why.
    pub reason: Reason,
    /// When it ends, on the caller's clock: of open the backoff, of cooling the cooling, of quarantined the wait for the
    /// slow probe. `None`: the state has no end of its own.
    pub until_ms: Option<u64>,
}

impl Transition {
    /// What other replicas should be told of it. That an upstream is open is for each of them to find out: it may be
    /// unreachable only from here. What the provider said of an account holds everywhere.
    #[must_use]
    pub fn notice(&self) -> Option<Notice> {
        match (self.reason, self.to) {
            (Reason::Told, _) => None,
            (_, State::Cooling) => self.until_ms.map(|until_ms| Notice::Cooling { until_ms }),
            (_, State::Quarantined) => self.until_ms.map(|slow_probe_at_ms| Notice::Quarantined { slow_probe_at_ms }),
            (Reason::Freed, _) => Some(Notice::Cleared),
            (Reason::ActiveProbe, _) if self.from == State::Quarantined => Some(Notice::Cleared),
            _ => None,
        }
    }
}

/// The word of another replica. Times are of the clock of whoever holds it: between processes, send what is left of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The provider wants to be left alone until then.
    Cooling {
        /// Until when.
        until_ms: u64,
    },
    /// Its credential or account is bad.
    Quarantined {
        /// When the slow probe is due.
        slow_probe_at_ms: u64,
    },
    /// It was freed.
    Cleared,
}

/// When an upstream may get its next request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ready {
    /// At once.
    Now,
    /// Not before this time, in milliseconds of the caller's clock.
    At(u64),
    /// Not by the passing of time.
    Never,
}

impl Ready {
    /// What `ready_at_ms` (0: at once, `u64::MAX`: never) means at `now_ms`.
    #[must_use]
    pub fn of(ready_at_ms: u64, now_ms: u64) -> Self {
        match ready_at_ms {
            u64::MAX => Self::Never,
            at if at <= now_ms => Self::Now,
            at => Self::At(at),
        }
    }
}

/// The leave to make one attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permit {
    /// The stretch of one state in which it was given.
    pub(super) epoch: u32,
    /// Its number, if it is a probe; else 0.
    pub(super) probe: u32,
}

impl Permit {
    /// Is it the request that finds out whether the upstream is well again?
    #[must_use]
    pub fn is_probe(self) -> bool {
        self.probe != 0
    }
}
