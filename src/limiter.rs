//! Admission: every limit that binds a request, checked and reserved in one step.
//!
//! A request is admitted by all of its subjects (address, user, key, model within the key) or leaves no trace at any.
//! What it may consume is reserved; [`Reservation::settle`] corrects that to the truth when the answer is there. Each
//! reservation is let go exactly once, by its use or by its drop, so that no path through the proxy can leak one. What
//! remains is *held* against the quotas until the usage writer has booked it: a [`Hold`] is plain numbers, because it waits
//! in the journal with the record, for as long as the database is away, and comes back with it to [`Limiter::release`].
//!
//! Without Redis the decision is made in [`memory`]. With Redis it is made there, for all replicas, in one round trip (for who
//! sends much, [`ahead`] of several requests together), and [`memory`] keeps a copy of what this replica did. If Redis
//! cannot be asked, the copy goes on at once with this replica's share of every limit, or everything is refused, as the configuration chose. When Redis is back, both must
//! agree until Redis has seen a whole window: a window that was lost is never given out twice.

mod ahead;
pub mod books;
pub mod gate;
pub mod lengths;
pub mod memory;
pub mod redis;
mod redis_ask;
mod redis_background;
mod redis_batch;
mod redis_link;
mod redis_notices;
mod redis_queue;
pub mod redis_wire;
mod reservation;
mod upkeep;

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use tokio::sync::watch;
use tollgate_core::{
    denial::Denial,
    key::KeyEntry,
    limit::{
        Amount, Month, Subject,
        estimate::{self, tightest_tpm},
        hold::{Hold, Holder},
        policy::{MAX_DEMANDS, Policy},
        standing::Standing,
        state::{Circumstances, Demand, Need, Refusal, Share},
    },
    openai::request::RequestHead,
    price::Price,
    route::Dialect,
    upstream::Account,
};

use self::{
    ahead::{Ahead, NoneReady},
    books::Books,
    lengths::Lengths,
    memory::{Memory, Taken},
    redis::{Asked, Clock, Gone, Options as RedisOptions, Redis, Reserved, Verdict, new_holder},
    redis_wire::{Change, Known},
};
pub use self::{redis_notices::Told, reservation::Reservation, upkeep::Active};

/// How long a request waits at the start for the first word of Redis. Until then a replica knows of no others and would
/// give out all of every limit.
const FIRST_WORD: Duration = Duration::from_secs(1);

/// The limiter; every holder of a reservation has a handle to it.
#[derive(Clone, Debug)]
pub struct Limiter(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    policy: Policy,
    memory: Memory,
    books: Books,
    lengths: Lengths,
    redis: Option<Redis>,
    ahead: Ahead,
    refuses_without_redis: bool,
    /// Until when Redis may not know a whole window.
    learning_until_ms: AtomicU64,
    /// Has Redis been tried?
    tried: watch::Sender<bool>,
    started: Instant,
}

/// How limits are held.
#[derive(Debug)]
pub struct Options {
    /// The defaults of limits.
    pub policy: Policy,
    /// How long an answer of an unknown model is taken to be, in tokens.
    pub assumed_output_tokens: u64,
    /// Where limits are shared between replicas.
    pub redis: Option<RedisOptions>,
    /// Is everything refused while Redis cannot be asked?
    pub refuses_without_redis: bool,
}

/// A request that may go on.
#[derive(Debug)]
pub struct Admission {
    /// What it holds.
    pub reservation: Reservation,
    /// What is left, for the headers of its answer.
    pub standing: Standing,
    /// What it may consume.
    pub need: Need,
}

/// A request that may not go on.
#[derive(Debug)]
pub struct Refused {
    /// Why.
    pub denial: Denial,
    /// What is left, for the headers of its answer.
    pub standing: Standing,
}

/// What is asked of the limiter for one request.
#[derive(Clone, Copy, Debug)]
pub struct Request<'r> {
    /// With which key.
    pub key: &'r KeyEntry,
    /// From where.
    pub ip: Option<IpAddr>,
    /// For which model, by its proper name.
    pub model: &'r Arc<str>,
    /// The body, from which the prompt is estimated.
    pub body: &'r [u8],
    /// What stands in it.
    pub head: &'r RequestHead,
    /// How it is to be read.
    pub dialect: Dialect,
    /// What the model's tokens cost.
    pub price: Option<&'r Price>,
    /// When it arrived: the month whose quota it counts against.
    pub at: DateTime<Utc>,
}

/// A request, resolved into what is asked of whom.
struct Plan {
    demands: Arc<[Demand]>,
    need: Need,
    month: Month,
    now_ms: u64,
}

impl Limiter {
    /// A limiter that knows of nothing yet.
    ///
    /// # Errors
    /// If the system has no randomness to name this replica by.
    pub fn try_new(options: Options) -> anyhow::Result<Self> {
        let redis =
            options.redis.map(|nodes| anyhow::Ok(Redis::new(nodes, new_holder()?, Clock::Server))).transpose()?;
        Ok(Self(Arc::new(Inner {
            policy: options.policy,
            memory: Memory::default(),
            books: Books::default(),
            lengths: Lengths::new(options.assumed_output_tokens),
            redis,
            ahead: Ahead::default(),
            refuses_without_redis: options.refuses_without_redis,
            learning_until_ms: AtomicU64::new(0),
            tried: watch::Sender::new(false),
            started: Instant::now(),
        })))
    }

    /// Decides on a request and reserves what it may consume.
    ///
    /// # Errors
    /// Why it is refused; nothing was reserved.
    pub async fn admit(&self, request: Request<'_>) -> Result<Admission, Refused> {
        let mut plan = self.plan(&request);
        let Some(redis) = self.0.redis.as_ref().filter(|_| !plan.demands.is_empty()) else {
            let at = Circumstances::alone(plan.now_ms, Share::WHOLE);
            return self.decide(plan, at, Reserved::default());
        };
        let may_join = match self.take_ahead(redis, &plan) {
            Ok(admission) => return Ok(admission),
            Err(NoneReady { is_ample }) => is_ample,
        };
        self.wait_for_first_word().await;
        plan.now_ms = self.now_ms();
        let known = || plan.demands.iter().map(|demand| self.known(demand, &plan)).collect();
        let asked = Asked { demands: &plan.demands, times: 1, need: plan.need, month: plan.month, may_join };
        match redis.admit(asked, plan.now_ms, known).await {
            Ok(verdict) => {
                if verdict.joined_in_vain {
                    self.0.ahead.rest(&plan.demands, plan.now_ms);
                }
                self.follow(redis, plan, verdict)
            }
            Err(Gone) if self.0.refuses_without_redis => {
                Err(Refused { denial: Denial::LimiterUnavailable, standing: Standing::default() })
            }
            Err(Gone) => {
                let at = Circumstances::alone(plan.now_ms, redis.share());
                let (demands, tokens) = (Arc::clone(&plan.demands), plan.need.amount.tokens);
                let admission = self.decide(plan, at, Reserved { session: Some(redis.session()), cells: None })?;
                // Redis may be there for the others, who must know of it.
                redis.tell(demands.iter().map(|demand| Change::unasked(demand, tokens)).collect());
                Ok(admission)
            }
        }
    }

    /// What the database has booked of everything, and what is booked from now on.
    #[must_use]
    pub fn books(&self) -> &Books {
        &self.0.books
    }

    /// Has every address a quota? Then its usage must be booked.
    #[must_use]
    pub fn has_quota_of_addresses(&self) -> bool {
        self.0.policy.has_quota_of_addresses()
    }

    /// Are limits shared through Redis?
    #[must_use]
    pub fn has_redis(&self) -> bool {
        self.0.redis.is_some()
    }

    /// Is what has limits refused while Redis does not answer?
    #[must_use]
    pub fn refuses_without_redis(&self) -> bool {
        self.0.refuses_without_redis
    }

    /// Tells other replicas of accounts, and hears what they told of those that `is_known` holds for since the last time. `None`:
    /// Redis cannot be asked.
    pub async fn exchange_notices(
        &self,
        told: Vec<(Account, Told)>,
        is_known: impl Fn(&Account) -> bool,
    ) -> Option<Vec<(Account, Told)>> {
        self.0.redis.as_ref()?.exchange_notices(self.now_ms(), told, is_known).await
    }

    /// Lets go of what a finished request holds of the quotas of `of`. `booked`: the database has it now; `None`: it never will.
    /// `book` adds it to the books: before it is let go, and in the same step as far as Redis is concerned, so that no request
    /// finds it at neither.
    pub fn release(&self, of: Holder<'_>, hold: &Hold, booked: Option<(Month, Amount)>, book: impl FnOnce()) {
        let subjects: Vec<_> = hold.subjects(of).collect();
        let act = || {
            book();
            for (subject, is_shared) in &subjects {
                self.0.memory.release(subject, *is_shared, hold.amount);
            }
        };
        let reserved = Reserved { session: hold.session, cells: hold.is_counted.then_some([0; MAX_DEMANDS]) };
        self.change(reserved, act, || {
            let change =
                |(subject, _): &(Subject, bool)| Change { release: hold.amount, booked, ..Change::of(subject.clone()) };
            subjects.iter().map(change).collect()
        });
    }

    /// The database has what an earlier process of this gateway consumed. What that held is gone with it, but Redis, if it kept
    /// count, must learn that it is booked.
    pub fn booked_late(&self, of: Holder<'_>, hold: &Hold, month: Month, amount: Amount) {
        if let Some(redis) = self.0.redis.as_ref().filter(|_| hold.session.is_some()) {
            let booked = Some((month, amount));
            redis.tell(hold.subjects(of).map(|(subject, _)| Change { booked, ..Change::of(subject) }).collect());
        }
    }

    /// How long answers are.
    #[must_use]
    pub fn lengths(&self) -> &Lengths {
        &self.0.lengths
    }

    fn plan(&self, request: &Request<'_>) -> Plan {
        let demands: Arc<[Demand]> = self.0.policy.demands(request.key, request.ip, request.model).into();
        let tightest = tightest_tpm(demands.iter().map(|demand| &demand.caps));
        let learned = self.0.lengths.of(request.model);
        let free = Price::default();
        let price = request.price.unwrap_or(&free);
        let need = estimate::need(request.body, request.head, request.dialect, price, learned, tightest);
        Plan { demands, need, month: Month::of(request.at), now_ms: self.now_ms() }
    }

    /// Decides in this process.
    fn decide(&self, plan: Plan, at: Circumstances, reserved: Reserved) -> Result<Admission, Refused> {
        let Plan { demands, need, month, .. } = plan;
        let (decision, standing) = self.0.memory.admit(&demands, |demand| self.booked(demand, month), need, at);
        match decision {
            Ok(taken) => Ok(Admission { reservation: self.reservation(demands, taken, reserved), standing, need }),
            Err(refusal) => Err(refused(&demands, &refusal, standing)),
        }
    }

    /// Follows what Redis decided. Where Redis may not know a whole window, this process must agree.
    fn follow(&self, redis: &Redis, plan: Plan, verdict: Verdict) -> Result<Admission, Refused> {
        let standing = verdict.standing;
        if redis.has_jumped(verdict.now_ms, plan.now_ms) {
            redis.lose("Redis's clock jumped ahead");
        } else if verdict.has_forgotten && self.is_learning(plan.now_ms) {
            self.begin_learning(plan.now_ms);
        } else if verdict.has_forgotten {
            redis.lose("Redis lost what it knew of the last minute");
        }
        let counted = match verdict.decision {
            Ok(counted) => counted,
            Err(refusal) => return Err(refused(&plan.demands, &refusal, standing)),
        };
        let reserved = Reserved { session: Some(counted.session), cells: Some(counted.cells) };
        self.0.ahead.see(&plan.demands, standing);
        if redis.is_linked() && !self.is_learning(plan.now_ms) {
            let taken = self.0.memory.record(&plan.demands, plan.need.amount, plan.now_ms);
            let need = plan.need;
            return Ok(Admission { reservation: self.reservation(plan.demands, taken, reserved), standing, need });
        }
        let at = Circumstances { now_ms: plan.now_ms, share: redis.share(), windows_only: true };
        let (demands, need) = (Arc::clone(&plan.demands), plan.need.amount);
        self.decide(plan, at, reserved).inspect_err(|_| {
            redis.change(reserved, || Change::undo_all(&demands, |index| reserved.cell(index), 1, need));
        })
    }

    fn reservation(&self, demands: Arc<[Demand]>, taken: Taken, reserved: Reserved) -> Reservation {
        Reservation::new(self.clone(), demands, taken, reserved)
    }

    fn known(&self, demand: &Demand, plan: &Plan) -> Known {
        // In this order: what is let go meanwhile is in the books before.
        let (in_flight, held) = self.0.memory.told(&demand.subject);
        let held = if demand.caps.has_quota() { held } else { Amount::default() };
        let is_recent = self.0.memory.is_recent(&demand.subject, plan.now_ms);
        Known { booked: self.booked(demand, plan.month), in_flight, held, is_recent }
    }

    fn booked(&self, demand: &Demand, month: Month) -> Amount {
        if !demand.caps.has_quota() {
            return Amount::default();
        }
        self.0.books.of(month, &demand.subject)
    }

    fn is_learning(&self, now_ms: u64) -> bool {
        now_ms < self.0.learning_until_ms.load(Ordering::Relaxed)
    }

    /// At the start: until Redis answered for the first time, or did not.
    async fn wait_for_first_word(&self) {
        if !*self.0.tried.borrow() {
            let mut tried = self.0.tried.subscribe();
            let waited = tokio::time::timeout(FIRST_WORD, tried.wait_for(|tried| *tried)).await;
            drop(waited);
        }
    }

    /// Milliseconds of a clock that never goes back.
    fn now_ms(&self) -> u64 {
        u64::try_from(self.0.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Changes what this process knows, and tells Redis, if there is one, what that means there.
    fn change(&self, reserved: Reserved, act: impl FnOnce(), changes: impl FnOnce() -> Vec<Change>) {
        match &self.0.redis {
            Some(redis) => redis.change(reserved, || {
                act();
                changes()
            }),
            None => act(),
        }
    }
}

fn refused(demands: &[Demand], refusal: &Refusal, standing: Standing) -> Refused {
    Refused { denial: Denial::of_refusal(refusal, demands[refusal.demand].subject.class()), standing }
}
