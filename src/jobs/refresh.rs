//! Keeps what the data plane knows in step with the database.
//!
//! Every change of a user, key or upstream has a number in one sequence; this job asks for what came after the last number
//! it saw, twice a second, and at once when PostgreSQL announces a change. A revoked key thus stops working on every
//! replica within a second, and a database that is away leaves everything as it was.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use async_trait::async_trait;
use pingora_core::{server::ShutdownWatch, services::background::BackgroundService};
use tokio::sync::Mutex;
use tollgate_core::{
    breaker,
    id::{KeyId, UpstreamId},
    pool::Strategy,
    snapshot::{Member, ModelInfo, Snapshot, UpstreamState},
    upstream::{Account, Handling, Upstream},
};

use crate::{
    peers::{Peer, Peers},
    secrets::FernetKeys,
    shared::{Shared, View},
    store::{Changes, Store, StoredUpstream},
};

/// How often the database is asked.
const PERIOD: Duration = Duration::from_millis(500);

/// What does not come from the database.
#[derive(Debug)]
pub struct Fixed {
    /// Upstreams of the config file.
    pub upstreams: Vec<Arc<Upstream>>,
    /// Prices and aliases.
    pub models: HashMap<String, ModelInfo>,
    /// How upstreams in the database are handled where they do not say.
    pub handling: Handling,
    /// How models are shared out where they do not say.
    pub strategy: Strategy,
    /// What every breaker goes by.
    pub breaker: breaker::Rules,
    /// Decrypts their credentials.
    pub fernet: FernetKeys,
}

/// The job.
#[derive(Debug)]
pub struct Refresh {
    shared: Arc<Shared>,
    store_url: String,
    fixed: Fixed,
    known: Mutex<Known>,
}

/// What was learned so far.
#[derive(Debug, Default)]
struct Known {
    seq: i64,
    generation: u64,
    stored: BTreeMap<UpstreamId, Arc<Upstream>>,
    running: HashMap<String, Running>,
}

/// What of an upstream outlives a change of the view.
#[derive(Clone, Debug)]
struct Running {
    state: Arc<UpstreamState>,
    peer: Arc<Peer>,
    account: Account,
}

impl Refresh {
    /// The job over `shared`, which knows nothing until the first step.
    #[must_use]
    pub fn new(shared: Arc<Shared>, store_url: String, fixed: Fixed) -> Self {
        Self { shared, store_url, fixed, known: Mutex::default() }
    }

    /// Learns what changed since the last step; the first one learns everything.
    ///
    /// # Errors
    /// If the database does not answer, or holds a credential that cannot be decrypted.
    pub async fn step(&self, store: &Store) -> anyhow::Result<()> {
        let mut known = self.known.lock().await;
        let changes = store.changes_since(known.seq).await;
        self.shared.metrics.store_up.set(i64::from(changes.is_ok()));
        self.apply(&mut known, changes?)
    }

    fn apply(&self, known: &mut Known, changes: Changes) -> anyhow::Result<()> {
        if changes.complete {
            let kept: HashSet<KeyId> = changes.keys.iter().map(|(_, entry)| entry.id).collect();
            self.shared.keys.retain(|id| kept.contains(&id));
        }
        for (hash, entry) in changes.keys {
            self.shared.keys.put(hash, entry);
        }
        let pool_changed = changes.complete || !changes.upstreams.is_empty() || !changes.removed_upstreams.is_empty();
        if changes.complete {
            known.stored.clear();
        }
        for stored in changes.upstreams {
            match self.prepare(&stored) {
                Ok(upstream) => {
                    known.stored.insert(stored.id, Arc::new(upstream));
                }
                // At the start it is a mistake to be mended; later it must not keep other changes from being seen.
                Err(error) if known.generation > 0 => {
                    tracing::error!(
                        upstream = stored.spec.name,
                        error = format!("{error:#}"),
                        "the upstream is not used"
                    );
                    known.stored.remove(&stored.id);
                }
                Err(error) => return Err(error),
            }
        }
        for id in changes.removed_upstreams {
            known.stored.remove(&id);
        }
        if pool_changed {
            self.swap(known)?;
        }
        known.seq = changes.seq;
        Ok(())
    }

    fn prepare(&self, stored: &StoredUpstream) -> anyhow::Result<Upstream> {
        let credential = self.fixed.fernet.decrypt(&stored.spec.credential).with_context(|| {
            format!("the credential of the upstream {:?} in the database cannot be decrypted", stored.spec.name)
        })?;
        Ok(stored.to_upstream(credential, self.fixed.handling))
    }

    /// What is known of an upstream's health; nothing, if it is at another account than before.
    fn state_of(&self, upstream: &Upstream, kept: Option<&Running>) -> Arc<UpstreamState> {
        let same = kept.filter(|kept| kept.account == upstream.account());
        let state = same.map_or_else(Arc::default, |kept| Arc::clone(&kept.state));
        let Handling { rpm, tpm, .. } = upstream.handling;
        state.health.configure(self.fixed.breaker, rpm, tpm, self.shared.now_ms());
        state
    }

    /// Puts a new view in place of the old one.
    fn swap(&self, known: &mut Known) -> anyhow::Result<()> {
        let mut members: Vec<Arc<Upstream>> = self.fixed.upstreams.clone();
        for stored in known.stored.values() {
            if members.iter().any(|upstream| upstream.name == stored.name) {
                tracing::warn!(
                    upstream = stored.name,
                    "the config file has an upstream of this name: the one in the database is not used"
                );
            } else {
                members.push(Arc::clone(stored));
            }
        }
        let mut running = HashMap::with_capacity(members.len());
        for upstream in &members {
            let kept = known.running.get(&upstream.name);
            let peer = match kept.filter(|kept| kept.peer.fits(upstream)) {
                Some(kept) => Arc::clone(&kept.peer),
                None => Arc::new(Peer::try_new(upstream)?),
            };
            let state = self.state_of(upstream, kept);
            let account = upstream.account();
            running.insert(upstream.name.clone(), Running { state, peer, account });
        }
        known.generation += 1;
        let peers = members.iter().map(|upstream| Arc::clone(&running[&upstream.name].peer)).collect();
        let members = members
            .into_iter()
            .map(|upstream| Member { state: Arc::clone(&running[&upstream.name].state), upstream })
            .collect();
        let snapshot = Snapshot::new(known.generation, members, self.fixed.models.clone(), self.fixed.strategy);
        self.shared.view.store(Arc::new(View { snapshot, peers: Peers::new(peers) }));
        self.shared.metrics.config_generation.set(i64::try_from(known.generation).unwrap_or(i64::MAX));
        known.running = running;
        Ok(())
    }

    async fn run(&self) -> anyhow::Result<()> {
        let store = Store::open(&self.store_url).await?;
        let mut is_failing = false;
        loop {
            let result = self.step(&store).await;
            if let Err(error) = &result
                && !is_failing
            {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "changes cannot be read; everything stays as it is until they can"
                );
            }
            if result.is_ok() && is_failing {
                tracing::info!("changes can be read again");
            }
            is_failing = result.is_err();
            self.wait(&store).await;
        }
    }

    /// Until the next change is announced, or the period is over.
    async fn wait(&self, store: &Store) {
        let announced = async {
            let mut listener = store.listen().await?;
            listener.changed().await
        };
        if let Ok(Err(error)) = tokio::time::timeout(PERIOD, announced).await {
            tracing::debug!(%error, "no announcements of changes");
            tokio::time::sleep(PERIOD).await;
        }
    }
}

#[async_trait]
impl BackgroundService for Refresh {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        tokio::select! {
            ended = self.run() => if let Err(error) = ended {
                tracing::error!(error = format!("{error:#}"), "changes in the database will not be seen");
            },
            _ = shutdown.changed() => {}
        }
    }
}
