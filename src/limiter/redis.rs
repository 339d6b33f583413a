//! The limiter that all replicas share: the law of [`window`](tollgate_core::limit::window) as scripts in Redis.
//!
//! **One round trip, shared.** Requests do not each ask Redis: whoever finds nobody on the way there takes along all that wait,
//! with what earlier requests gave back ([`Change`]) in between, in the order in which it all came about
//! ([`queue`](super::redis_queue)). Alone, a request is asked for at once; among many it waits for one round trip at most,
//! and the script reads and writes each state once for all of them. Measured with eight at a time, that is little more than
//! half of Redis's time, which bounds how much all replicas together can admit. Because only one batch is on its way, no request
//! is refused for want of what an earlier one of its client gave back, whatever thread it is on: those that are asked for
//! together with others may overtake it, but if they are refused they ask again. A tick carries what nobody took along.
//!
//! The keys of a user, of its keys and of their models have one hash tag; in a Redis Cluster the address is another, its
//! script runs at the same time, and if one of the two refuses, the other one is undone.
//!
//! **Holders.** Reservations are kept per replica, as sums. Every call of a replica renews its own; a replica that died
//! ceases to, and its sums lapse after half a minute (`LEASE` in `form.lua`). A replica that Redis does not know, or knows from an earlier session,
//! brings its own sums along: so a Redis that lost its memory, or a call whose outcome nobody knows, heals by a new number.
//!
//! **Silence.** No request waits for Redis longer than [`Options::patience`]; after [`SILENCE`] times as long without an answer
//! nobody asks it until it answers again. A batch outlives the patience of whoever sent it: its answer is waited for in the
//! background, and until then nobody else goes.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use prometheus::IntGauge;
use redis::RedisError;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    task::yield_now,
    time::timeout,
};
use tollgate_core::{
    limit::{policy::MAX_DEMANDS, state::Share},
    secret::Secret,
};

pub use super::redis_ask::{Asked, Counted, Gone, Verdict};
use super::{
    redis_ask::{Answer, Ask, Asker},
    redis_batch::Batch,
    redis_link::{Answers, Connection, Link},
    redis_notices::Heard,
    redis_queue::{Queue, Step},
    redis_wire::{Caller, Change, Known},
};

/// How long nothing may be answered before Redis counts as gone, in times of what a request waits: that is four requests
/// one after the other, or any number at once.
const SILENCE: u64 = 4;
/// How far Redis's clock may be ahead of what it was, in milliseconds, before it counts as jumped.
pub(super) const CLOCK_TOLERANCE_MS: i64 = 2_000;
/// What a replica that lost sight of the others gives out of its share of a window, in per cent.
const DEGRADED_PERCENT: u32 = 90;

/// The limiter in Redis.
#[derive(Debug)]
pub struct Redis {
    pub(super) nodes: Secret,
    pub(super) holder: [u8; 8],
    pub(super) clock: Clock,
    pub(super) link: ArcSwapOption<Link>,
    queue: Mutex<Queue>,
    /// Whose turn it is to go to Redis: one at a time.
    turn: Arc<Semaphore>,
    /// What other replicas told of accounts.
    pub(super) heard: Heard,
    pub(super) has_changes: Notify,
    pub(super) is_lost: Notify,
    late: mpsc::Sender<Sent>,
    pub(super) late_answers: tokio::sync::Mutex<mpsc::Receiver<Sent>>,
    pub(super) rank: AtomicU32,
    pub(super) replicas: AtomicU32,
    /// 1 while it cannot be asked.
    pub(super) degraded: IntGauge,
    patience: Duration,
    /// Where the time of its connections begins.
    started: Instant,
    /// When many requests last went to Redis together, in microseconds since then.
    many_went_us: AtomicU64,
}

/// Where Redis is and how it is asked.
#[derive(Clone, Debug)]
pub struct Options {
    /// URLs, separated by commas; more than one, or one of a cluster: a cluster.
    pub nodes: Secret,
    /// How long a request waits for it.
    pub patience: Duration,
    /// Set to 1 while it cannot be asked.
    pub degraded: IntGauge,
}

/// Whose clock the windows go by.
#[derive(Clone, Debug)]
pub enum Clock {
    /// Redis's own, which all replicas share.
    Server,
    /// This one, in milliseconds: how tests simulate time.
    Given(Arc<AtomicU64>),
}

impl Clock {
    /// What the scripts are given: an empty text stands for Redis's own.
    pub(super) fn argument(&self) -> String {
        match self {
            Self::Server => String::new(),
            Self::Given(ms) => ms.load(Ordering::Relaxed).to_string(),
        }
    }
}

impl Redis {
    /// The limiter there, to which this replica is known as `holder`. Not connected yet.
    #[must_use]
    pub fn new(options: Options, holder: [u8; 8], clock: Clock) -> Self {
        let Options { nodes, patience, degraded } = options;
        degraded.set(1);
        let (late, late_answers) = mpsc::channel(1);
        Self {
            nodes,
            holder,
            clock,
            link: ArcSwapOption::empty(),
            queue: Mutex::default(),
            turn: Arc::new(Semaphore::new(1)),
            heard: Heard::default(),
            has_changes: Notify::new(),
            is_lost: Notify::new(),
            late,
            late_answers: tokio::sync::Mutex::new(late_answers),
            rank: AtomicU32::new(0),
            replicas: AtomicU32::new(1),
            degraded,
            patience,
            started: Instant::now(),
            many_went_us: AtomicU64::new(0),
        }
    }

    /// Can it be asked?
    #[must_use]
    pub fn is_linked(&self) -> bool {
        self.link.load().is_some()
    }

    /// Do the windows go by a clock that runs with this process's?
    pub(super) fn has_clock(&self) -> bool {
        matches!(self.clock, Clock::Server)
    }

    /// The part of every limit that is this replica's while the others are out of sight.
    #[must_use]
    pub fn share(&self) -> Share {
        let of = self.replicas.load(Ordering::Relaxed).max(1);
        let percent = if of == 1 { 100 } else { DEGRADED_PERCENT };
        Share { rank: self.rank.load(Ordering::Relaxed), of, percent }
    }

    /// Decides on requests at all subjects at once: all of them are admitted, or none. `known` reads, subject by subject,
    /// what this replica knows of each; it is called at the moment from which on corrections count as later.
    ///
    /// # Errors
    /// [`Gone`], if Redis cannot be asked or does not answer in time.
    pub async fn admit(
        &self,
        asked: Asked<'_>,
        local_ms: u64,
        known: impl Fn() -> Vec<Known>,
    ) -> Result<Verdict, Gone> {
        let mut link = self.link.load_full().ok_or(Gone)?;
        let mut answer = self.ask(asked, asked.may_join, &known);
        let mut joined_in_vain = false;
        let decided = async {
            loop {
                match self.served(&link, &mut answer).await? {
                    Answer::Verdict(verdict) => return Ok(Verdict { joined_in_vain, ..verdict }),
                    Answer::TooManyTogether => joined_in_vain = true,
                    Answer::Forgotten => link = self.link.load_full().ok_or(Gone)?,
                }
                answer = self.ask(asked, asked.may_join && !joined_in_vain, &known);
            }
        };
        match timeout(self.patience, decided).await {
            Ok(verdict) => verdict,
            Err(_late) => {
                // It may come at this very moment; after this, whoever sends it finds nobody.
                answer.close();
                match answer.try_recv() {
                    Ok(Answer::Verdict(verdict)) => Ok(verdict),
                    Ok(Answer::TooManyTogether | Answer::Forgotten) => Err(Gone),
                    Err(_silence) => Err(self.missed(&link, local_ms)),
                }
            }
        }
    }

    fn ask(&self, asked: Asked<'_>, may_join: bool, known: impl Fn() -> Vec<Known>) -> oneshot::Receiver<Answer> {
        let Asked { demands, times, need, month, .. } = asked;
        let (answer, waiting) = oneshot::channel();
        self.queue().ask(demands, month, Asker { times, need, answer }, may_join, known);
        waiting
    }

    /// Waits for a verdict, or for the turn to fetch it.
    async fn served(&self, link: &Arc<Link>, answer: &mut oneshot::Receiver<Answer>) -> Result<Answer, Gone> {
        loop {
            tokio::select! {
                biased;
                answer = &mut *answer => return answer.map_err(|_| Gone),
                turn = Arc::clone(&self.turn).acquire_owned() => {
                    let turn = turn.map_err(|_| Gone)?;
                    // Others that are about to ask come along.
                    yield_now().await;
                    let (steps, session) = { let mut queue = self.queue(); (queue.next_asks(), queue.session()) };
                    let batch = Batch::new(steps, session, link.connection.is_cluster());
                    // Empty if another one has just taken everything along.
                    if !batch.is_empty() {
                        Journey::new(self, self.send(link, batch, turn)).finish().await?;
                    }
                }
            }
        }
    }

    /// Sends a batch.
    fn send(&self, link: &Arc<Link>, batch: Batch, turn: OwnedSemaphorePermit) -> Sent {
        if batch.is_for_many() {
            let went_us = u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX);
            self.many_went_us.store(went_us, Ordering::Relaxed);
        }
        let lane = link.lane(self.started);
        let caller = self.caller(batch.session);
        let connection = lane.as_deref().unwrap_or(&link.connection);
        let answers = connection.send(batch.commands(&link.scripts.limits, &caller));
        Sent { link: Arc::clone(link), lane, batch, answers, _turn: turn }
    }

    /// Takes the answer to a batch, and gives everybody in it theirs.
    pub(super) fn arrived(&self, sent: Sent, answers: Result<Vec<redis::Value>, RedisError>) -> Result<(), Gone> {
        let Sent { link, lane, batch, .. } = sent;
        match answers {
            Ok(answers) => {
                link.silent_since_ms.store(0, Ordering::Relaxed);
                self.hand_out(&link, batch, answers)
            }
            Err(error) => {
                match lane {
                    // The link itself may be well; but what this batch did, nobody knows.
                    Some(lane) if link.drop_lane(&lane) => {
                        tracing::debug!(%error, "a connection to Redis broke");
                        self.renew();
                        batch.forget();
                        Ok(())
                    }
                    _ => Err(self.failed(&link, &error)),
                }
            }
        }
    }

    /// Gives everybody in the batch what Redis answered.
    pub(super) fn hand_out(&self, link: &Arc<Link>, batch: Batch, answers: Vec<redis::Value>) -> Result<(), Gone> {
        let session = batch.session;
        let (judged, undone) = batch.judge(answers).map_err(|error| self.failed(link, &error))?;
        let mut queue = self.queue();
        if queue.session() != session {
            // Its sums were told anew meanwhile, without these requests.
            judged.into_iter().for_each(|(ask, _)| ask.forget());
            return Ok(());
        }
        undone.into_iter().for_each(|change| queue.tell(change));
        for (ask, verdict) in judged {
            // Without a verdict the senders are dropped, which says as much.
            let Some(verdict) = verdict else { continue };
            let Ask { demands, askers, is_joined, .. } = ask;
            let are_too_many = is_joined && verdict.decision.is_err();
            for asker in askers {
                let (times, amount) = (asker.times.into(), asker.amount());
                let answer = if are_too_many { Answer::TooManyTogether } else { Answer::Verdict(verdict.clone()) };
                let Err(Answer::Verdict(Verdict { decision: Ok(counted), .. })) = asker.answer.send(answer) else {
                    continue;
                };
                // Nobody waited any longer: it was decided otherwise.
                let undone = Change::undo_all(&demands, |index| counted.cells[index], times, amount);
                undone.into_iter().for_each(|change| queue.tell(change));
            }
        }
        if !queue.is_empty() {
            self.has_changes.notify_one();
        }
        Ok(())
    }

    /// The turn to go to Redis; nobody else asks it anything meanwhile that corrections must not overtake.
    pub(super) async fn turn(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.turn).acquire_owned().await.ok()
    }

    /// How much longer corrections may wait for requests to take them along, where many come, and again within `next` of
    /// the last; `None`: nothing waits, or too much does, or it is too long ago.
    pub(super) fn may_be_carried(&self, next: Duration) -> Option<Duration> {
        let waits = {
            let queue = self.queue();
            !queue.is_empty() && queue.is_short()
        };
        let went = Duration::from_micros(self.many_went_us.load(Ordering::Relaxed));
        let rest = next.checked_sub(self.started.elapsed().saturating_sub(went));
        rest.filter(|rest| waits && !went.is_zero() && !rest.is_zero())
    }

    /// Takes out what is to be sent next, and says whether that is all.
    pub(super) fn take_next(&self) -> (Vec<Step>, u32, bool) {
        let mut queue = self.queue();
        (queue.next(), queue.session(), queue.is_empty())
    }

    /// Takes out what is to be sent next, if that is all, while `look` looks at what this replica knows.
    pub(super) fn take_last<T>(&self, look: impl FnOnce() -> T) -> Option<(T, Vec<Step>, u32)> {
        let mut queue = self.queue();
        queue.is_short().then(|| (look(), queue.next(), queue.session()))
    }

    /// Lets `act` change what this replica knows, and queues what it returns, in one step: what is told to Redis as a sum
    /// and what as a correction must not overlap. `counted`: whether Redis knows of the reservation, and from which session.
    pub fn change(&self, counted: Reserved, act: impl FnOnce() -> Vec<Change>) {
        let mut queue = self.queue();
        let mut changes = act();
        let same_session = counted.session == Some(queue.session());
        if same_session && counted.cells.is_none() {
            return; // Redis never heard of it
        }
        if !same_session {
            // Its sums came along with this session; its cell may be from before a loss.
            for change in &mut changes {
                (change.requests, change.tokens) = (0, 0);
            }
        }
        self.queue_all(&mut queue, changes);
    }

    /// Queues changes that are true whatever the session.
    pub fn tell(&self, changes: Vec<Change>) {
        self.queue_all(&mut self.queue(), changes);
    }

    pub(super) fn caller(&self, session: u32) -> Caller {
        Caller { clock: self.clock.argument(), holder: self.holder, session }
    }

    fn queue_all(&self, queue: &mut Queue, changes: Vec<Change>) {
        if self.link.load().is_none() {
            return; // the next session begins with the sums
        }
        changes.into_iter().for_each(|change| queue.tell(change));
        self.has_changes.notify_one();
    }

    /// Begins a new session: sums instead of corrections.
    pub(super) fn renew(&self) {
        self.queue().renew();
    }

    /// The session under which a reservation that is made now is known.
    #[must_use]
    pub fn session(&self) -> u32 {
        self.queue().session()
    }

    /// Gives the link up, and says why.
    pub fn lose(&self, why: &str) {
        if self.link.swap(None).is_some() {
            self.degraded.set(1);
            tracing::warn!(reason = why, "the limiter goes on without Redis");
            self.queue().renew();
            self.is_lost.notify_one();
        }
    }

    pub(super) fn failed(&self, link: &Arc<Link>, error: &RedisError) -> Gone {
        if self.is_current(link) {
            self.lose(&error.to_string());
        }
        Gone
    }

    /// No answer in time to a request that was asked at `local_ms`.
    fn missed(&self, link: &Arc<Link>, local_ms: u64) -> Gone {
        let (asked_ms, patience_ms) = (local_ms.max(1), u64::try_from(self.patience.as_millis()).unwrap_or(u64::MAX));
        let first = link.silent_since_ms.compare_exchange(0, asked_ms, Ordering::Relaxed, Ordering::Relaxed);
        let since_ms = first.map_or_else(|since_ms| since_ms, |_none| asked_ms);
        if asked_ms + patience_ms >= since_ms + SILENCE * patience_ms && self.is_current(link) {
            self.lose("Redis does not answer in time");
        }
        Gone
    }

    fn is_current(&self, link: &Arc<Link>) -> bool {
        self.link.load().as_ref().is_some_and(|current| Arc::ptr_eq(current, link))
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Poisoned only by a panic inside a push; the changes are still changes.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a reservation is known as in Redis.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reserved {
    /// The session it was made in; `None`: there was none.
    pub session: Option<u32>,
    /// The cell it was counted in at each subject; `None`: Redis did not count it.
    pub cells: Option<[u64; MAX_DEMANDS]>,
}

impl Reserved {
    /// The cell of the subject at `index`.
    #[must_use]
    pub fn cell(&self, index: usize) -> u64 {
        self.cells.map_or(0, |cells| cells[index])
    }
}

/// A batch on its way.
pub(super) struct Sent {
    link: Arc<Link>,
    /// Over which connection; `None`: that of the background.
    lane: Option<Arc<Connection>>,
    batch: Batch,
    /// What it will be answered.
    pub answers: Answers,
    /// Nobody else goes until it is back.
    _turn: OwnedSemaphorePermit,
}

/// A batch on its way, and a request that waits for it. If that gives up, the background waits instead: others came along.
struct Journey<'r> {
    redis: &'r Redis,
    sent: Option<Sent>,
}

impl<'r> Journey<'r> {
    fn new(redis: &'r Redis, sent: Sent) -> Self {
        Self { redis, sent: Some(sent) }
    }

    async fn finish(mut self) -> Result<(), Gone> {
        let Some(sent) = &mut self.sent else { return Ok(()) };
        let answers = (&mut sent.answers).await;
        self.sent.take().map_or(Ok(()), |sent| self.redis.arrived(sent, answers))
    }
}

impl Drop for Journey<'_> {
    fn drop(&mut self) {
        if let Some(sent) = self.sent.take()
            && self.redis.late.try_send(sent).is_err()
        {
            self.redis.lose("Redis answers too late, too often");
        }
    }
}

/// A name for this replica that no other has.
///
/// # Errors
/// If the system has no randomness.
pub fn new_holder() -> anyhow::Result<[u8; 8]> {
    let mut holder = [0; 8];
    getrandom::fill(&mut holder).map_err(|error| anyhow::anyhow!("no randomness: {error}"))?;
    Ok(holder)
}
