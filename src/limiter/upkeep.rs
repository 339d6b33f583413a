//! What keeps the limiter going in the background: the link to Redis, copies of the shared windows, and a sweep.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::atomic::Ordering,
    time::Duration,
};

use tokio::time::{MissedTickBehavior, interval, sleep};
use tollgate_core::{
    id::UserId,
    limit::{Amount, Month, Subject, policy::MAX_DEMANDS},
};

use super::{
    Limiter,
    redis::{Redis, Reserved},
    redis_background::SYNC_BATCH,
    redis_wire::Change,
};

/// How often the shared windows are copied, and this replica says that it is alive.
const SYNC: Duration = Duration::from_millis(500);
/// How often what is idle is taken out.
const SWEEP: Duration = Duration::from_secs(10);
/// How long to wait between two tries to reach Redis, at first and at the most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// How long Redis needs to know a whole window again: 61 s, and the time until the last replica found it.
const LEARNING_MS: u64 = 65_000;
/// Subjects whose windows are copied. Those beyond are shared out without a copy, should Redis go away.
const MAX_COPIES: usize = 4_096;
/// How long corrections wait for an admission to ride along with.
const CARRY: Duration = Duration::from_millis(2);
/// How long they wait after the last admission where many come, and the next will: a call of their own would cost Redis as
/// much. The stock of [`ahead`](super::ahead) lasts 25 ms.
const NEXT: Duration = Duration::from_millis(30);

/// What Redis has booked of each subject with a quota, by the last look.
pub type Seen = HashMap<Subject, (Month, Amount)>;

/// Those who were lately in use and may have quotas.
#[derive(Clone, Debug, Default)]
pub struct Active {
    /// Users, with all that is theirs.
    pub users: BTreeSet<UserId>,
    /// Addresses; none if addresses have no quota.
    pub addresses: BTreeSet<IpAddr>,
}

impl Active {
    /// Is there nobody?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.users.is_empty() && self.addresses.is_empty()
    }

    /// Does `subject` belong to them?
    #[must_use]
    pub fn has(&self, subject: &Subject) -> bool {
        user_of(subject).is_some_and(|user| self.users.contains(&user))
            || address_of(subject).is_some_and(|ip| self.addresses.contains(&ip))
    }
}

impl Limiter {
    /// Takes out of memory what is idle, from time to time, for ever.
    pub async fn keep_sweeping(&self) {
        loop {
            sleep(SWEEP).await;
            self.0.memory.sweep(self.now_ms());
        }
    }

    /// Keeps the link to Redis, for ever. Returns at once if there is none to keep.
    pub async fn keep_linked(&self) {
        let Some(redis) = &self.0.redis else { return };
        tokio::join!(self.keep_link(redis), keep_carrying(redis), redis.settle_late_answers(), self.keep_ahead());
    }

    /// What Redis has booked of those subjects with a quota that were lately in use; empty without Redis.
    pub async fn seen_booked(&self) -> Seen {
        match &self.0.redis {
            Some(redis) if redis.is_linked() => self.sync(redis).await,
            _ => Seen::new(),
        }
    }

    /// Those whose books are compared with the database: at most so many users, and so many addresses.
    #[must_use]
    pub fn active(&self, most: usize) -> Active {
        let users = self.0.memory.subjects(MAX_COPIES, |subject, _| user_of(subject).is_some());
        let users = users.iter().filter_map(user_of).collect::<BTreeSet<_>>().into_iter().take(most).collect();
        let most = if self.has_quota_of_addresses() { most } else { 0 };
        let addresses = self.0.memory.subjects(most, |subject, _| address_of(subject).is_some());
        Active { users, addresses: addresses.iter().filter_map(address_of).collect() }
    }

    /// Corrects what Redis has booked of `subject` by the difference of `truth` and `seen`.
    pub fn correct_redis(&self, subject: &Subject, month: Month, seen: Amount, truth: Amount) {
        if let Some(redis) = &self.0.redis {
            let change = Change {
                booked: Some((month, truth.minus(seen))),
                unbook: seen.minus(truth),
                ..Change::of(subject.clone())
            };
            redis.change(Reserved { session: Some(redis.session()), cells: Some([0; MAX_DEMANDS]) }, || vec![change]);
        }
    }

    async fn keep_link(&self, redis: &Redis) {
        let (mut backoff, mut was_linked, mut is_known_dead) = (BACKOFF.0, false, false);
        loop {
            match redis.connect(self.now_ms()).await {
                Ok(()) => {
                    self.linked(was_linked);
                    (backoff, was_linked, is_known_dead) = (BACKOFF.0, true, false);
                    self.keep_copies(redis).await;
                }
                Err(error) => {
                    if !is_known_dead {
                        tracing::warn!(%error, "Redis cannot be reached; {}", self.without_redis());
                        is_known_dead = true;
                    }
                    self.0.tried.send_replace(true);
                    sleep(backoff).await;
                    backoff = (backoff * 2).min(BACKOFF.1);
                }
            }
        }
    }

    fn without_redis(&self) -> &'static str {
        if self.0.refuses_without_redis {
            "every limited request is refused"
        } else {
            "each replica holds its share of the limits"
        }
    }

    fn linked(&self, was_linked: bool) {
        let now_ms = self.now_ms();
        if was_linked || self.0.memory.subjects(1, |_, state| state.is_recent(now_ms)).len() == 1 {
            self.begin_learning(now_ms);
        }
        self.0.tried.send_replace(true);
        tracing::info!(again = was_linked, "limits are shared through Redis");
    }

    /// From now on this process must agree, until Redis knows a whole window again.
    pub(super) fn begin_learning(&self, now_ms: u64) {
        self.0.learning_until_ms.store(now_ms + LEARNING_MS, Ordering::Relaxed);
    }

    /// Until the link is lost.
    async fn keep_copies(&self, redis: &Redis) {
        let mut tick = interval(SYNC);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = redis.lost() => return,
                _ = tick.tick() => {
                    redis.beat(self.now_ms(), !self.is_learning(self.now_ms())).await;
                    self.sync(redis).await;
                }
            }
        }
    }

    /// Renews what this replica holds, and copies the windows.
    async fn sync(&self, redis: &Redis) -> Seen {
        let (asked_ms, mut seen) = (self.now_ms(), Seen::new());
        let subjects = self.0.memory.subjects(MAX_COPIES, |subject, state| {
            let (in_flight, held) = state.told();
            let holds = in_flight > 0 || !held.is_zero();
            !matches!(subject, Subject::Others(_)) && (holds || state.is_recent(asked_ms))
        });
        for batch in subjects.chunks(SYNC_BATCH) {
            let Some(shown) = redis.sync(batch, asked_ms, |subject| self.0.memory.told(subject)).await else {
                break;
            };
            for (subject, shown) in batch.iter().zip(shown) {
                let Some(shown) = shown else { continue };
                seen.extend(shown.booked.map(|booked| (subject.clone(), booked)));
                // A Redis that is still learning knows less than the copy.
                if !self.is_learning(asked_ms) {
                    self.0.memory.set_mirror(subject, shown.mirror, asked_ms);
                }
            }
        }
        seen
    }
}

async fn keep_carrying(redis: &Redis) {
    loop {
        redis.has_changes().await;
        sleep(CARRY).await;
        while let Some(rest) = redis.may_be_carried(NEXT) {
            sleep(rest).await;
        }
        redis.flush().await;
    }
}

fn user_of(subject: &Subject) -> Option<UserId> {
    match subject {
        Subject::User(user) | Subject::Key(user, _) | Subject::KeyModel(user, ..) => Some(*user),
        Subject::Ip(_) | Subject::Others(_) => None,
    }
}

fn address_of(subject: &Subject) -> Option<IpAddr> {
    match subject {
        Subject::Ip(ip) => Some(*ip),
        _ => None,
    }
}
