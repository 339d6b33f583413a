//! Finds out, without a client's request, whether upstreams are well.
//!
//! Two kinds of probes, both a request for the provider's list of models, which costs nothing. An upstream with a
//! `probe_interval` is probed all the time, so that one that failed is back before a client has to find out. A quarantined one is
//! probed seldom, whatever its settings: its credential may have been renewed, its account topped up. What a probe says goes
//! to the breaker, which knows how much to believe ([`Breaker::probed`](tollgate_core::breaker::Breaker::probed)).
//!
//! A probe that hangs holds up no other one: each upstream has at most one on its way.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use pingora_core::{server::ShutdownWatch, services::background::BackgroundService};
use tokio::time::{MissedTickBehavior, interval};
use tollgate_core::snapshot::Member;

use crate::{
    provider::{ProviderError, list_models},
    shared::Shared,
};

/// How often it is looked who is due.
const STEP: Duration = Duration::from_millis(250);

/// The job.
#[derive(Debug)]
pub struct Probes {
    shared: Arc<Shared>,
}

/// What a probe found out.
struct Word {
    member: Member,
    result: Result<(), ProviderError>,
}

/// Probes on their way, and when each upstream was probed last.
#[derive(Default)]
struct Rounds {
    running: FuturesUnordered<BoxFuture<'static, Word>>,
    busy: HashSet<String>,
    last_ms: HashMap<String, u64>,
}

impl Probes {
    /// The job over the upstreams of `shared`.
    #[must_use]
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    async fn run(&self) {
        let mut rounds = Rounds::default();
        let mut tick = interval(STEP);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => self.send(&mut rounds),
                Some(word) = rounds.running.next() => {
                    rounds.busy.remove(&word.member.upstream.name);
                    self.take(&word);
                }
            }
        }
    }

    /// Sends a probe to everyone that is due.
    fn send(&self, rounds: &mut Rounds) {
        let view = self.shared.view.load();
        let (now_ms, members) = (self.shared.now_ms(), view.snapshot.members());
        rounds.last_ms.retain(|name, _| members.iter().any(|member| member.upstream.name == *name));
        for member in members.iter().filter(|member| !member.upstream.disabled) {
            let name = &member.upstream.name;
            if rounds.busy.contains(name) || !is_due(member, rounds.last_ms.get(name).copied(), now_ms) {
                continue;
            }
            rounds.busy.insert(name.clone());
            rounds.last_ms.insert(name.clone(), now_ms);
            rounds.running.push(Box::pin(probe(member.clone())));
        }
    }

    fn take(&self, word: &Word) {
        let (upstream, metrics) = (&word.member.upstream, &self.shared.metrics);
        let outcome = if word.result.is_ok() { "probe_ok" } else { "probe_failed" };
        metrics.upstream_requests_total.with_label_values(&[&upstream.name, outcome]).inc();
        if let Err(error) = &word.result {
            tracing::debug!(upstream = upstream.name, %error, "a probe failed");
        }
        // Without randomness replicas come back at the same time, which is bad, but no reason to fail.
        let jitter = getrandom::u32().map_or(0.0, |random| f64::from(random) / f64::from(u32::MAX));
        let health = &word.member.state.health;
        if let Some(transition) = health.probed(word.result.is_ok(), self.shared.now_ms(), jitter) {
            self.shared.changed(upstream, &transition);
        }
    }
}

fn is_due(member: &Member, last_ms: Option<u64>, now_ms: u64) -> bool {
    if let Some(at_ms) = member.state.health.slow_probe_at_ms() {
        return at_ms <= now_ms;
    }
    let Some(interval) = member.upstream.handling.probe_interval else { return false };
    let interval_ms = u64::try_from(interval.as_millis()).unwrap_or(u64::MAX);
    last_ms.is_none_or(|last_ms| last_ms.saturating_add(interval_ms) <= now_ms)
}

async fn probe(member: Member) -> Word {
    let result = match list_models(&member.upstream).await {
        // It is there, and says nothing against our credential but that it may not list models, or not now.
        Err(ProviderError::Refused { status, .. }) if matches!(status.as_u16(), 400 | 403 | 404 | 405 | 429) => Ok(()),
        result => result.map(drop),
    };
    Word { member, result }
}

#[async_trait]
impl BackgroundService for Probes {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        tokio::select! {
            () = self.run() => {}
            _ = shutdown.changed() => {}
        }
    }
}
