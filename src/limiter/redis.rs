//! The limiter that all replicas share: the law of [`window`](tollgate_core::limit::window) as scripts in Redis.
//!
//! **One round trip.** An admission is one script call for all subjects of a request. What earlier requests gave back
//! ([`Change`]) waits in a queue and rides along in front of it, so that a client's next request finds free what its last
//! one held; a tick carries what nobody took along. The keys of a user, of its keys and of their models have one hash tag;
//! in a Redis Cluster the address is another, its script runs at the same time, and if one of the two refuses, the other
//! one is undone.
//!
//! **Holders.** Reservations are kept per replica, as sums. Every call of a replica renews its own; a replica that died
//! ceases to, and its sums lapse after [`LEASE_S`](super::redis_wire::LEASE_S). A replica that Redis does not know, or knows from an earlier session,
//! brings its own sums along: so a Redis that lost its memory, or a call whose outcome nobody knows, heals by a new number.
//!
//! **Silence.** No request waits for Redis longer than [`Options::patience`]; after [`SILENCE`] times as long without an answer
//! nobody asks it until it answers again. An answer that comes late is waited for in the background, and the sums are told anew.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use prometheus::IntGauge;
use redis::{RedisError, Value};
use tokio::{
    sync::{Notify, mpsc},
    time::timeout,
};
use tollgate_core::{
    limit::{
        Amount, Month, Subject,
        policy::MAX_DEMANDS,
        standing::Standing,
        state::{Demand, Need, Refusal, Share},
        window::CELL_MS,
    },
    secret::Secret,
};

use super::{
    redis_link::{Answers, Connection, LATE, Link, Scripts, pipeline, send},
    redis_wire::{
        Asked, Caller, Change, Known, NodeAnswer, Shown, float, floats, groups, key_of, numbers, parse_state,
    },
};

/// How long nothing may be answered before Redis counts as gone, in times of what a request waits: that is four requests
/// one after the other, or any number at once.
const SILENCE: u64 = 4;
/// How long a silent replica still counts when limits are shared out, in seconds.
const REPLICA_S: u32 = 10;
/// Corrections that may wait; beyond them Redis is told the sums anew instead.
const MAX_CHANGES: usize = 65_536;
/// Corrections that ride along with one admission.
const RIDERS: usize = 32;
/// Subjects in one call of the sync script.
pub const SYNC_BATCH: usize = 128;
/// How far Redis's clock may be ahead of what it was, in milliseconds, before it counts as jumped.
const CLOCK_TOLERANCE_MS: i64 = 2_000;
/// What a replica that lost sight of the others gives out of its share of a window, in per cent.
const DEGRADED_PERCENT: u32 = 90;

/// The limiter in Redis.
#[derive(Debug)]
pub struct Redis {
    nodes: Secret,
    holder: [u8; 8],
    clock: Clock,
    link: ArcSwapOption<Link>,
    queue: Mutex<Queue>,
    has_changes: Notify,
    is_lost: Notify,
    late: mpsc::Sender<Answers>,
    late_answers: tokio::sync::Mutex<mpsc::Receiver<Answers>>,
    rank: AtomicU32,
    replicas: AtomicU32,
    /// 1 while it cannot be asked.
    degraded: IntGauge,
    patience: Duration,
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
    fn argument(&self) -> String {
        match self {
            Self::Server => String::new(),
            Self::Given(ms) => ms.load(Ordering::Relaxed).to_string(),
        }
    }
}

/// Corrections on their way, and the number under which Redis knows this replica's sums.
#[derive(Debug, Default)]
struct Queue {
    session: u32,
    changes: Vec<Change>,
}

/// Redis cannot be asked now.
#[derive(Debug)]
pub struct Gone;

/// What Redis decided.
#[derive(Debug)]
pub struct Verdict {
    /// Is the request admitted?
    pub decision: Result<Counted, Refusal>,
    /// What is left of the windows.
    pub standing: Standing,
    /// Had Redis no state of a subject that was in use a moment ago?
    pub has_forgotten: bool,
    /// Did Redis's clock jump ahead? The nodes of a cluster have a clock each, so of them nobody can tell.
    pub clock_jumped: bool,
}

/// Where an admitted request was counted.
#[derive(Clone, Copy, Debug)]
pub struct Counted {
    /// The session.
    pub session: u32,
    /// The cell at each subject, in the time of its node.
    pub cells: [u64; MAX_DEMANDS],
}

impl Redis {
    /// The limiter there, to which this replica is known as `holder`. Not connected yet.
    #[must_use]
    pub fn new(options: Options, holder: [u8; 8], clock: Clock) -> Self {
        let Options { nodes, patience, degraded } = options;
        degraded.set(1);
        let (late, late_answers) = mpsc::channel(256);
        Self {
            nodes,
            holder,
            clock,
            link: ArcSwapOption::empty(),
            queue: Mutex::default(),
            has_changes: Notify::new(),
            is_lost: Notify::new(),
            late,
            late_answers: tokio::sync::Mutex::new(late_answers),
            rank: AtomicU32::new(0),
            replicas: AtomicU32::new(1),
            degraded,
            patience,
        }
    }

    /// Can it be asked?
    #[must_use]
    pub fn is_linked(&self) -> bool {
        self.link.load().is_some()
    }

    /// The part of every limit that is this replica's while the others are out of sight.
    #[must_use]
    pub fn share(&self) -> Share {
        let of = self.replicas.load(Ordering::Relaxed).max(1);
        let percent = if of == 1 { 100 } else { DEGRADED_PERCENT };
        Share { rank: self.rank.load(Ordering::Relaxed), of, percent }
    }

    /// Decides on a request at all subjects at once. `known` reads, subject by subject, what this replica knows of each;
    /// it is called at the moment from which on corrections count as later.
    ///
    /// # Errors
    /// [`Gone`], if Redis cannot be asked or does not answer in time.
    pub async fn admit(
        &self,
        demands: &[Demand],
        need: Need,
        month: Month,
        local_ms: u64,
        known: impl FnOnce() -> Vec<Known>,
    ) -> Result<Verdict, Gone> {
        let link = self.link.load_full().ok_or(Gone)?;
        let keys: Vec<String> = demands.iter().map(|demand| key_of(&demand.subject)).collect();
        let (known, riders, session) = {
            let mut queue = self.queue();
            let known = known();
            let count = queue.changes.len().min(RIDERS);
            let riders: Vec<Change> = queue.changes.drain(..count).collect();
            (known, riders, queue.session)
        };
        let groups = groups(&keys, link.connection.is_cluster());
        let caller = self.caller(session);
        let asked = Asked { demands, keys, known, need, month };
        let calls = groups.iter().map(|group| pipeline(asked.call(&link.scripts.admit, &caller, group)));
        let mut answers = send(&link, &caller, riders, calls.collect());
        let values = match timeout(self.patience, &mut answers).await {
            Ok(Ok(values)) => values,
            Ok(Err(error)) => return Err(self.failed(&link, &error)),
            Err(_late) => return Err(self.missed(&link, local_ms, answers)),
        };
        link.silent_since_ms.store(0, Ordering::Relaxed);
        if self.queue().session != session {
            return Err(Gone); // its sums were told anew meanwhile, without this request
        }
        let judged = self.judge(&asked, session, &groups, values);
        let (now_ms, mut verdict) = judged.map_err(|error| self.failed(&link, &error))?;
        verdict.clock_jumped = !link.connection.is_cluster()
            && clock_ms(now_ms, local_ms) - link.clock_ms.load(Ordering::Relaxed) > CLOCK_TOLERANCE_MS;
        Ok(verdict)
    }

    /// Puts the answers of all nodes together; what one admitted and another refused is undone. Returns Redis's time too.
    fn judge(
        &self,
        asked: &Asked<'_>,
        session: u32,
        groups: &[Vec<usize>],
        values: Vec<Value>,
    ) -> Result<(u64, Verdict), RedisError> {
        let mut standing = Standing::default();
        let (mut has_forgotten, mut now_ms, mut admitted, mut cells) = (false, 0, Vec::new(), [0; MAX_DEMANDS]);
        let mut refusal: Option<Refusal> = None;
        for (group, value) in groups.iter().zip(values) {
            let answer = NodeAnswer::parse(value, group, asked, &mut standing)?;
            (now_ms, has_forgotten) = (answer.now_ms, has_forgotten || answer.has_forgotten);
            group.iter().for_each(|&index| cells[index] = answer.now_ms / CELL_MS);
            if answer.is_admitted {
                admitted.extend(group.iter().copied());
            }
            if let Some(new) = answer.refusal.filter(|new| refusal.is_none_or(|known| known.wait < new.wait)) {
                refusal = Some(new);
            }
        }
        let decision = match refusal {
            None => Ok(Counted { session, cells }),
            Some(refusal) => {
                for index in admitted {
                    self.push(session, Change::undo(&asked.demands[index], cells[index], asked.need.amount));
                }
                Err(refusal)
            }
        };
        Ok((now_ms, Verdict { decision, standing, has_forgotten, clock_jumped: false }))
    }

    /// Lets `act` change what this replica knows, and queues what it returns, in one step: what is told to Redis as a sum
    /// and what as a correction must not overlap. `counted`: whether Redis knows of the reservation, and from which session.
    pub fn change(&self, counted: Reserved, act: impl FnOnce() -> Vec<Change>) {
        let mut queue = self.queue();
        let mut changes = act();
        let same_session = counted.session == Some(queue.session);
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

    fn caller(&self, session: u32) -> Caller {
        Caller { clock: self.clock.argument(), holder: self.holder, session }
    }

    fn push(&self, session: u32, change: Change) {
        let mut queue = self.queue();
        if queue.session == session {
            self.queue_all(&mut queue, vec![change]);
        }
    }

    fn queue_all(&self, queue: &mut Queue, changes: Vec<Change>) {
        if self.link.load().is_none() {
            return; // the next session begins with the sums
        }
        if queue.changes.len() + changes.len() > MAX_CHANGES {
            queue.renew();
        } else {
            queue.changes.extend(changes);
            self.has_changes.notify_one();
        }
    }

    /// The session under which a reservation that is made now is known.
    #[must_use]
    pub fn session(&self) -> u32 {
        self.queue().session
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

    fn failed(&self, link: &Arc<Link>, error: &RedisError) -> Gone {
        if error.code() == Some("FOREIGN") {
            tracing::error!(%error, "delete the key; until then this caller's limits are held by each replica alone");
        } else if self.is_current(link) {
            self.lose(&error.to_string());
        }
        Gone
    }

    /// No answer in time to a request that was asked at `local_ms`.
    fn missed(&self, link: &Arc<Link>, local_ms: u64, late: Answers) -> Gone {
        let (asked_ms, patience_ms) = (local_ms.max(1), u64::try_from(self.patience.as_millis()).unwrap_or(u64::MAX));
        let first = link.silent_since_ms.compare_exchange(0, asked_ms, Ordering::Relaxed, Ordering::Relaxed);
        let since_ms = first.map_or_else(|since_ms| since_ms, |_none| asked_ms);
        if asked_ms + patience_ms >= since_ms + SILENCE * patience_ms && self.is_current(link) {
            self.lose("Redis does not answer in time");
        } else if self.late.try_send(late).is_err() {
            self.lose("Redis answers too late, too often");
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

impl Queue {
    /// A new session: sums instead of corrections.
    fn renew(&mut self) {
        self.session = self.session.wrapping_add(1);
        self.changes.clear();
    }
}

/// The part of [`Redis`] that runs in the background.
impl Redis {
    /// Connects, loads the scripts and registers this replica. From then on Redis is asked.
    ///
    /// # Errors
    /// What Redis, or the way to it, answered.
    pub async fn connect(&self, local_ms: u64) -> Result<(), RedisError> {
        let mut connection = Connection::open(self.nodes.expose()).await?;
        let scripts = Scripts::load(&mut connection).await?;
        let Registered { now_ms, .. } = self.register(&mut connection, &scripts, false).await?;
        self.queue().renew();
        let clock_ms = AtomicI64::new(clock_ms(now_ms, local_ms));
        self.degraded.set(0);
        self.link.store(Some(Arc::new(Link { connection, scripts, silent_since_ms: AtomicU64::new(0), clock_ms })));
        Ok(())
    }

    /// Waits until the link is lost.
    pub async fn lost(&self) {
        self.is_lost.notified().await;
    }

    /// Waits until there are changes that nobody took along.
    pub async fn has_changes(&self) {
        self.has_changes.notified().await;
    }

    /// Waits for answers that are overdue. What they admitted was decided otherwise: the sums are told anew, and in the
    /// windows it passes within the minute.
    pub async fn settle_late_answers(&self) {
        let mut late_answers = self.late_answers.lock().await;
        while let Some(answers) = late_answers.recv().await {
            match timeout(LATE, answers).await {
                Ok(_decided) => self.queue().renew(),
                Err(_elapsed) => self.lose("Redis does not answer at all"),
            }
        }
    }

    /// Sends the changes that wait.
    pub async fn flush(&self) {
        let Some(link) = self.link.load_full() else { return };
        let (changes, session) = {
            let mut queue = self.queue();
            let count = queue.changes.len().min(1024);
            (queue.changes.drain(..count).collect::<Vec<_>>(), queue.session)
        };
        if changes.is_empty() {
            return;
        }
        let caller = self.caller(session);
        if let Err(error) = send(&link, &caller, changes, Vec::new()).await {
            self.failed(&link, &error);
        }
        if !self.queue().changes.is_empty() {
            self.has_changes.notify_one();
        }
    }

    /// Says that this replica is alive, and learns which of how many it is.
    /// `may_shrink`: may there be fewer than before? A Redis that was emptied has yet to hear of the others.
    pub async fn beat(&self, local_ms: u64, may_shrink: bool) {
        let Some(link) = self.link.load_full() else { return };
        let mut connection = link.connection.clone();
        match timeout(LATE, self.register(&mut connection, &link.scripts, may_shrink)).await {
            Ok(Ok(Registered { now_ms, was_known: true })) => {
                // Clocks drift apart slowly, and nobody minds; a jump is what comes all at once.
                let clock_ms = clock_ms(now_ms, local_ms);
                if (clock_ms - link.clock_ms.load(Ordering::Relaxed)).abs() < CLOCK_TOLERANCE_MS {
                    link.clock_ms.store(clock_ms, Ordering::Relaxed);
                }
            }
            Ok(Ok(_forgotten)) => self.lose("Redis lost the register of replicas, and with it all it knew"),
            Ok(Err(error)) => {
                self.failed(&link, &error);
            }
            Err(_elapsed) => self.lose("Redis does not answer"),
        }
    }

    /// Renews what this replica holds of `subjects` (at most [`SYNC_BATCH`]) and shows what Redis has of each. `known`: what
    /// this replica holds of a subject.
    pub async fn sync(
        &self,
        subjects: &[Subject],
        local_ms: u64,
        known: impl Fn(&Subject) -> (u64, Amount),
    ) -> Option<Vec<Option<Shown>>> {
        let link = self.link.load_full()?;
        let keys: Vec<String> = subjects.iter().map(key_of).collect();
        let (known, changes, session) = {
            let mut queue = self.queue();
            let known: Vec<_> = subjects.iter().map(known).collect();
            (known, std::mem::take(&mut queue.changes), queue.session)
        };
        let groups = groups(&keys, link.connection.is_cluster());
        let caller = self.caller(session);
        let calls = groups.iter().map(|group| {
            let mut call = caller.call(&link.scripts.sync, group, &keys);
            for &index in group {
                let (in_flight, held) = known[index];
                call.arg(floats(&[float(in_flight), float(held.tokens), float(held.nano_usd)]));
            }
            pipeline(call)
        });
        let answers = timeout(LATE, send(&link, &caller, changes, calls.collect()));
        let values = match answers.await {
            Ok(Ok(values)) => values,
            Ok(Err(error)) => {
                self.failed(&link, &error);
                return None;
            }
            Err(_elapsed) => {
                self.lose("Redis does not answer");
                return None;
            }
        };
        let mut shown: Vec<Option<Shown>> = subjects.iter().map(|_| None).collect();
        for (group, value) in groups.iter().zip(values) {
            let Value::Array(states) = value else { continue };
            let [Value::Int(now_ms), states @ ..] = &*states else { continue };
            for (&index, state) in group.iter().zip(states) {
                let Value::BulkString(bytes) = state else { continue };
                shown[index] = parse_state(bytes, u64::try_from(*now_ms).unwrap_or(0), local_ms);
            }
        }
        Some(shown)
    }

    async fn register(
        &self,
        connection: &mut Connection,
        scripts: &Scripts,
        may_shrink: bool,
    ) -> Result<Registered, RedisError> {
        let mut call = redis::cmd("EVALSHA");
        let name: String = self.holder.iter().map(|byte| format!("{byte:02x}")).collect();
        call.arg(&scripts.replicas)
            .arg(1)
            .arg("tollgate:1:{replicas}")
            .arg(self.clock.argument())
            .arg(name)
            .arg(REPLICA_S);
        let values = connection.send(vec![pipeline(call)]).await?;
        let numbers = numbers(values.into_iter().next().unwrap_or(Value::Nil))?;
        if let [rank, of, now_ms, was_known] = numbers[..] {
            let (rank, of) = (u32::try_from(rank).unwrap_or(0), u32::try_from(of).unwrap_or(1));
            if may_shrink || of >= self.replicas.load(Ordering::Relaxed) {
                self.rank.store(rank, Ordering::Relaxed);
                self.replicas.store(of, Ordering::Relaxed);
            }
            return Ok(Registered { now_ms: u64::try_from(now_ms).unwrap_or(0), was_known: was_known == 1 });
        }
        Err(RedisError::from((redis::ErrorKind::Parse, "not the reply of the register")))
    }
}

/// What Redis says to a replica that registers.
struct Registered {
    now_ms: u64,
    /// Was it registered already?
    was_known: bool,
}

/// Redis's clock minus ours.
fn clock_ms(redis_ms: u64, local_ms: u64) -> i64 {
    redis_ms.cast_signed() - local_ms.cast_signed()
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
