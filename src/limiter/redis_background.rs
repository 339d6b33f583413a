//! What keeps the limiter in Redis going, away from the requests: the link, the register of replicas, copies of the
//! windows, and what nobody took along.

use std::sync::{Arc, atomic::Ordering};

use redis::{ErrorKind, RedisError, Value};
use tokio::time::timeout;
use tollgate_core::limit::{Amount, Subject};

use super::{
    redis::{CLOCK_TOLERANCE_MS, Redis},
    redis_batch::{Batch, Tag},
    redis_link::{Answers, Connection, LATE, Link, Scripts},
    redis_wire::{Shown, key_of, number, numbers, parse_state, put},
};

/// How long a silent replica still counts when limits are shared out, in seconds.
const REPLICA_S: u32 = 10;
/// Subjects in one call of the sync script.
pub const SYNC_BATCH: usize = 128;

/// What Redis says to a replica that registers.
struct Registered {
    now_ms: u64,
    /// Was it registered already?
    was_known: bool,
}

impl Redis {
    /// Connects, loads the scripts and registers this replica. From then on Redis is asked.
    ///
    /// # Errors
    /// What Redis, or the way to it, answered.
    pub async fn connect(&self, local_ms: u64) -> Result<(), RedisError> {
        let mut connection = Connection::open(self.nodes.expose()).await?;
        let scripts = Scripts::load(&mut connection).await?;
        let Registered { now_ms, .. } = self.register(&connection, &scripts, false).await?;
        self.renew();
        self.degraded.set(0);
        let link = Link::new(connection, self.nodes.clone(), scripts, clock_ms(now_ms, local_ms));
        self.link.store(Some(Arc::new(link)));
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

    /// Waits for answers that are overdue.
    pub async fn settle_late_answers(&self) {
        let mut late_answers = self.late_answers.lock().await;
        while let Some(mut sent) = late_answers.recv().await {
            match timeout(LATE, &mut sent.answers).await {
                Ok(answers) => drop(self.arrived(sent, answers)),
                Err(_elapsed) => self.lose("Redis does not answer at all"),
            }
        }
    }

    /// Sends what waits, unless requests took it along.
    pub async fn flush(&self) {
        let Some(link) = self.link.load_full() else { return };
        let Some(_turn) = self.turn().await else { return };
        loop {
            let (steps, session, is_all) = self.take_next();
            let batch = Batch::new(steps, session, link.connection.is_cluster());
            if !batch.is_empty() {
                let caller = self.caller(session);
                let commands = batch.commands(&link.scripts.limits, &caller);
                let Some(answers) = self.answered(&link, link.connection.send(commands)).await else { return };
                if self.hand_out(&link, batch, answers).is_err() {
                    return;
                }
            }
            if is_all {
                return;
            }
        }
    }

    /// Waits for an answer in the background; without one the link is lost.
    async fn answered(&self, link: &Arc<Link>, answers: Answers) -> Option<Vec<Value>> {
        match timeout(LATE, answers).await {
            Ok(Ok(answers)) => return Some(answers),
            Ok(Err(error)) => drop(self.failed(link, &error)),
            Err(_elapsed) => self.lose("Redis does not answer"),
        }
        None
    }

    /// Says that this replica is alive, and learns which of how many it is.
    /// `may_shrink`: may there be fewer than before? A Redis that was emptied has yet to hear of the others.
    pub async fn beat(&self, local_ms: u64, may_shrink: bool) {
        let Some(link) = self.link.load_full() else { return };
        match timeout(LATE, self.register(&link.connection, &link.scripts, may_shrink)).await {
            Ok(Ok(Registered { now_ms, was_known: true })) => {
                // Clocks drift apart slowly, and nobody minds; a jump is what comes all at once.
                let clock_ms = clock_ms(now_ms, local_ms);
                if (clock_ms - link.clock_ms.load(Ordering::Relaxed)).abs() < CLOCK_TOLERANCE_MS {
                    link.clock_ms.store(clock_ms, Ordering::Relaxed);
                }
            }
            Ok(Ok(_forgotten)) => self.lose("Redis lost the register of replicas, and with it all it knew"),
            Ok(Err(error)) => drop(self.failed(&link, &error)),
            Err(_elapsed) => self.lose("Redis does not answer"),
        }
    }

    /// Did Redis's clock jump ahead, by what it said at `local_ms`? The nodes of a cluster have a clock each, so of them
    /// nobody can tell.
    #[must_use]
    pub fn has_jumped(&self, redis_ms: u64, local_ms: u64) -> bool {
        let link = self.link.load();
        let known = link.as_ref().filter(|link| !link.connection.is_cluster());
        known.is_some_and(|link| {
            clock_ms(redis_ms, local_ms) - link.clock_ms.load(Ordering::Relaxed) > CLOCK_TOLERANCE_MS
        })
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
        let look = || subjects.iter().map(&known).collect::<Vec<_>>();
        let (_turn, (known, steps, session)) = loop {
            self.flush().await;
            let turn = self.turn().await?;
            if let Some(taken) = self.take_last(look) {
                break (turn, taken);
            }
        };
        let is_cluster = link.connection.is_cluster();
        let (batch, caller) = (Batch::new(steps, session, is_cluster), self.caller(session));
        let mut commands: Vec<_> = batch.commands(&link.scripts.limits, &caller).collect();
        let before = commands.len();
        let groups = groups(subjects, is_cluster);
        for group in &groups {
            let keys: Vec<String> = group.iter().map(|&index| key_of(&subjects[index])).collect();
            let mut call = caller.call(&link.scripts.sync, &keys);
            for (in_flight, held) in group.iter().map(|&index| known[index]) {
                let mut numbers = Vec::with_capacity(27);
                put(&mut numbers, &[in_flight, held.tokens, held.nano_usd].map(number));
                call.arg(numbers);
            }
            commands.push(call);
        }
        let mut answers = self.answered(&link, link.connection.send(commands)).await?.into_iter();
        let decided: Vec<Value> = answers.by_ref().take(before).collect();
        self.hand_out(&link, batch, decided).ok()?;
        Some(shown(subjects.len(), &groups, answers, local_ms))
    }

    async fn register(
        &self,
        connection: &Connection,
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
        let values = connection.send([call]).await?;
        let numbers = numbers(values.into_iter().next().unwrap_or(Value::Nil))?;
        if let [rank, of, now_ms, was_known] = numbers[..] {
            let (rank, of) = (u32::try_from(rank).unwrap_or(0), u32::try_from(of).unwrap_or(1));
            if may_shrink || of >= self.replicas.load(Ordering::Relaxed) {
                self.rank.store(rank, Ordering::Relaxed);
                self.replicas.store(of, Ordering::Relaxed);
            }
            return Ok(Registered { now_ms: u64::try_from(now_ms).unwrap_or(0), was_known: was_known == 1 });
        }
        Err(RedisError::from((ErrorKind::Parse, "not the reply of the register")))
    }
}

/// The indexes of `subjects` by hash tag; all together unless it is a cluster.
fn groups(subjects: &[Subject], is_cluster: bool) -> Vec<Vec<usize>> {
    let mut by_tag: Vec<(Tag, Vec<usize>)> = Vec::new();
    for (index, subject) in subjects.iter().enumerate() {
        let tag = Tag::of(subject, is_cluster);
        match by_tag.iter_mut().find(|(known, _)| *known == tag) {
            Some((_, group)) => group.push(index),
            None => by_tag.push((tag, vec![index])),
        }
    }
    by_tag.into_iter().map(|(_, group)| group).collect()
}

/// What each group's answer shows of its subjects.
fn shown(
    count: usize,
    groups: &[Vec<usize>],
    answers: impl Iterator<Item = Value>,
    local_ms: u64,
) -> Vec<Option<Shown>> {
    let mut shown: Vec<Option<Shown>> = (0..count).map(|_| None).collect();
    for (group, value) in groups.iter().zip(answers) {
        let Value::Array(states) = value else { continue };
        let [Value::Int(now_ms), states @ ..] = &*states else { continue };
        for (&index, state) in group.iter().zip(states) {
            let Value::BulkString(bytes) = state else { continue };
            shown[index] = parse_state(bytes, u64::try_from(*now_ms).unwrap_or(0), local_ms);
        }
    }
    shown
}

/// Redis's clock minus ours.
fn clock_ms(redis_ms: u64, local_ms: u64) -> i64 {
    redis_ms.cast_signed() - local_ms.cast_signed()
}
