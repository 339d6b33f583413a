//! What the data plane knows: the whole world of `proxy`.
//!
//! Everything a request needs is in memory. The request path never asks the database: it may be down, and a request with
//! an unknown key costs no query.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use foldhash::quality::RandomState;
use tokio::sync::Notify;
use tollgate_core::{
    breaker::{Notice, Transition},
    id::KeyId,
    key::{IpNet, KeyEntry, KeyHash},
    retry::Budget,
    snapshot::Snapshot,
    upstream::{Account, Upstream},
};

use crate::{
    content::Contents,
    journal::Journal,
    limiter::{Limiter, gate::Gate},
    metrics::Metrics,
    peers::Peers,
};

/// What must agree: upstreams and models, and how to connect to each upstream (by the same index).
#[derive(Debug)]
pub struct View {
    /// Upstreams and models, resolved.
    pub snapshot: Snapshot,
    /// Connection settings of each member of the snapshot.
    pub peers: Peers,
}

/// Settings of the data plane that do not change while it runs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Largest body that is accepted, in bytes.
    pub max_body_bytes: usize,
    /// Upstreams tried for one request at the most.
    pub max_attempts: usize,
    /// How long a request waits for an upstream that will be ready again, if none is.
    pub wait: Duration,
    /// How long after its arrival a request may still be given to another upstream; `None`: any time.
    pub deadline: Option<Duration>,
    /// Proxies in front of the gateway whose `x-forwarded-for` is believed.
    pub trusted_proxies: Vec<IpNet>,
    /// How long a client may take from one piece of its body to the next.
    pub client_timeout: Duration,
}

/// The world of the data plane.
#[derive(Debug)]
pub struct Shared {
    /// The current view; a request takes it once.
    pub view: ArcSwap<View>,
    /// Every key.
    pub keys: KeyDirectory,
    /// Where usage is handed over.
    pub journal: Journal,
    /// Where content is handed over, of requests whose content is kept.
    pub contents: Contents,
    /// Who turns an address away that asks too much.
    pub gate: Gate,
    /// What holds everybody to their limits.
    pub limiter: Limiter,
    /// Every series.
    pub metrics: Metrics,
    /// What does not change.
    pub settings: Settings,
    /// Requests under way.
    pub in_flight: Requests,
    /// Retries that the traffic pays for.
    pub retry_budget: Budget,
    /// Wakes requests that wait for an upstream.
    pub upstream_changed: Notify,
    /// What other replicas are to be told of upstreams.
    pub notices: Notices,
    /// Where [`Shared::now_ms`] begins.
    pub started: Instant,
}

impl Shared {
    /// Milliseconds of a clock that never goes back.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// The state of an upstream changed: a line in the log, and a word to the other replicas.
    pub fn changed(&self, upstream: &Upstream, transition: &Transition) {
        let until_s = transition.until_ms.map(|until_ms| until_ms.saturating_sub(self.now_ms()).div_ceil(1000));
        tracing::warn!(
            upstream = upstream.name,
            from = transition.from.as_str(),
            to = transition.to.as_str(),
            reason = transition.reason.as_str(),
            for_s = until_s,
            "an upstream changed its state"
        );
        self.upstream_changed.notify_waiters();
        self.metrics.upstream_transitions_total.with_label_values(&[&upstream.name, transition.to.as_str()]).inc();
        if let Some(notice) = transition.notice() {
            self.notices.tell(upstream.account(), notice);
        }
    }
}

/// What other replicas are to be told of accounts: the last word on each of them.
#[derive(Debug, Default)]
pub struct Notices(Mutex<HashMap<Account, Notice>>);

impl Notices {
    /// Adds the last word on an account.
    pub fn tell(&self, account: Account, notice: Notice) {
        self.words().insert(account, notice);
    }

    /// Puts words back that could not be told.
    pub fn put_back(&self, untold: HashMap<Account, Notice>) {
        let mut words = self.words();
        for (account, notice) in untold {
            words.entry(account).or_insert(notice);
        }
    }

    /// Takes out what is to be told.
    #[must_use]
    pub fn take(&self) -> HashMap<Account, Notice> {
        std::mem::take(&mut *self.words())
    }

    fn words(&self) -> MutexGuard<'_, HashMap<Account, Notice>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts the requests under way, so that a process that ends can wait for them.
#[derive(Clone, Debug, Default)]
pub struct Requests(Arc<AtomicUsize>);

impl Requests {
    /// Counts one request until the result is dropped.
    #[must_use]
    pub fn hold(&self) -> Held {
        self.0.fetch_add(1, Ordering::Relaxed);
        Held(Arc::clone(&self.0))
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// One request under way.
#[derive(Debug)]
pub struct Held(Arc<AtomicUsize>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Every key, by its hash. Reads take no lock; one job writes.
#[derive(Debug, Default)]
pub struct KeyDirectory {
    by_hash: papaya::HashMap<KeyHash, Arc<KeyEntry>, RandomState>,
    hash_of: papaya::HashMap<KeyId, KeyHash, RandomState>,
}

impl KeyDirectory {
    /// The entry of a presented key.
    #[must_use]
    pub fn get(&self, hash: &KeyHash) -> Option<Arc<KeyEntry>> {
        self.by_hash.pin().get(hash).map(Arc::clone)
    }

    /// Adds a key or replaces what is known of it, also when its secret was rotated.
    pub fn put(&self, hash: KeyHash, entry: Arc<KeyEntry>) {
        let by_hash = self.by_hash.pin();
        let old = self.hash_of.pin().insert(entry.id, hash).copied();
        by_hash.insert(hash, entry);
        if let Some(old) = old.filter(|old| *old != hash) {
            by_hash.remove(&old);
        }
    }

    /// Forgets every key for which `is_kept` does not hold.
    pub fn retain(&self, is_kept: impl Fn(KeyId) -> bool) {
        let by_hash = self.by_hash.pin();
        self.hash_of.pin().retain(|id, hash| {
            let kept = is_kept(*id);
            if !kept {
                by_hash.remove(hash);
            }
            kept
        });
    }

    /// How many keys there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_hash.len()
    }

    /// Is there no key at all?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_hash.is_empty()
    }
}
