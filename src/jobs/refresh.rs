//! Keeps what the data plane knows in step with the database.
//!
//! Every change of a user, key, upstream or price has a number in one sequence; this job asks for what came after the last number
//! it saw, twice a second, and at once when PostgreSQL announces a change. A revoked key thus stops working on every
//! replica within a second, and a database that is away leaves everything as it was.
//!
//! Beside that it looks, as often, whether the file of a credential has changed; that needs no database.
//!
//! An upstream that is announced again was changed by an operator, if only to say `enable`: whatever kept traffic away from it
//! ends, and it gets another chance.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::Context;
use async_trait::async_trait;
use pingora_core::{server::ShutdownWatch, services::background::BackgroundService};
use tokio::{
    sync::Mutex,
    time::{MissedTickBehavior, interval, timeout},
};
use tollgate_core::{
    breaker,
    id::{KeyId, UpstreamId},
    pool::Strategy,
    price::book::{Histories, PriceBook},
    secret::Secret,
    snapshot::{Member, ModelInfo, Snapshot, UpstreamState},
    upstream::{Account, Handling, Upstream},
};

use crate::{
    jobs::credential_files::CredentialFiles,
    peers::{Peer, Peers},
    secrets::FernetKeys,
    shared::{Shared, View},
    store::{Changes, Store, StoreError, StoredUpstream},
};

/// How often the database is asked.
const PERIOD: Duration = Duration::from_millis(500);

/// How long the database may take to answer. A server that hangs is no better than one that is not there.
const PATIENCE: Duration = Duration::from_secs(10);

/// What does not come from the database.
#[derive(Debug)]
pub struct Fixed {
    /// Upstreams of the config file.
    pub upstreams: Vec<Arc<Upstream>>,
    /// Where their credentials are, of those whose are in files of their own.
    pub credential_files: Vec<(String, PathBuf)>,
    /// Prices and aliases.
    pub models: HashMap<String, ModelInfo>,
    /// What models cost of which nobody says anything else.
    pub shipped_prices: Arc<Histories>,
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
    store_url: Secret,
    fixed: Fixed,
    known: Mutex<Known>,
}

/// What was learned so far.
#[derive(Debug, Default)]
struct Known {
    seq: i64,
    generation: u64,
    /// Those of the config file, with the credentials that their files hold now.
    in_file: Vec<Arc<Upstream>>,
    credential_files: CredentialFiles,
    stored: BTreeMap<UpstreamId, Arc<Upstream>>,
    prices: Histories,
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
    pub fn new(shared: Arc<Shared>, store_url: Secret, fixed: Fixed) -> Self {
        let in_file = fixed.upstreams.clone();
        let credential_files = CredentialFiles::new(fixed.credential_files.iter().cloned());
        Self { shared, store_url, fixed, known: Mutex::new(Known { in_file, credential_files, ..Known::default() }) }
    }

    /// Learns what changed since the last step; the first one learns everything.
    ///
    /// # Errors
    /// If the database does not answer, or holds a credential that cannot be decrypted.
    pub async fn step(&self, store: &Store) -> anyhow::Result<()> {
        self.look_at_files().await?;
        let seq = self.known.lock().await.seq;
        // Nobody waits for the database: the files are looked at meanwhile.
        let asked = store.changes_since(seq);
        // Everything there is may take its time.
        let patience = if seq == 0 { Duration::MAX } else { PATIENCE };
        let changes = timeout(patience, asked).await.unwrap_or(Err(StoreError::TooSlow));
        self.shared.metrics.store_up.set(i64::from(changes.is_ok()));
        self.apply(&mut *self.known.lock().await, changes?)
    }

    /// Takes in the credentials whose files have changed.
    async fn look_at_files(&self) -> anyhow::Result<()> {
        let mut known = self.known.lock().await;
        let mut changed = false;
        for (name, credential) in known.credential_files.look(SystemTime::now()) {
            let upstream = known.in_file.iter_mut().find(|upstream| upstream.name == name);
            let Some(upstream) = upstream.filter(|upstream| upstream.credential != credential) else { continue };
            *upstream = Arc::new(Upstream { credential, ..Upstream::clone(upstream) });
            tracing::info!(upstream = name, "the credential in credential_file has changed; it is used from now on");
            changed = true;
        }
        // Before the first look at the database there is nothing to be replaced.
        if changed && known.generation > 0 { self.swap(&mut known) } else { Ok(()) }
    }

    async fn watch_files(&self) {
        let mut tick = interval(PERIOD);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            if let Err(error) = self.look_at_files().await {
                tracing::error!(error = format!("{error:#}"), "a new credential cannot be used");
            }
        }
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
        let prices_changed = !changes.prices.is_empty();
        if changes.complete {
            known.stored.clear();
            known.prices.clear();
        }
        for stored in changes.prices {
            known.prices.entry(stored.model).or_default().insert(stored.effective_from, Arc::new(stored.price));
        }
        let mut touched = Vec::new();
        for stored in changes.upstreams {
            if known.stored.contains_key(&stored.id) && !stored.spec.disabled {
                touched.push(stored.id);
            }
            match self.prepare(&stored, known.stored.get(&stored.id).map(|before| &**before)) {
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
        if pool_changed || prices_changed {
            self.swap(known)?;
        }
        touched.iter().for_each(|id| self.free(known, *id));
        known.seq = changes.seq;
        Ok(())
    }

    /// The upstream as requests see it. A new credential that only others can decrypt, because this gateway has not been told of
    /// a new Fernet key yet, changes nothing: it goes on with the one it has, though never at another address.
    fn prepare(&self, stored: &StoredUpstream, before: Option<&Upstream>) -> anyhow::Result<Upstream> {
        let (name, handling) = (&stored.spec.name, self.fixed.handling);
        match (self.fixed.fernet.decrypt(&stored.spec.credential), before) {
            (Ok(credential), _) => Ok(stored.to_upstream(credential, handling)),
            (Err(error), Some(before)) if before.base_url == stored.spec.base_url => {
                tracing::error!(upstream = name, %error, "the credential in the database cannot be decrypted; the one before stays in use");
                Ok(stored.to_upstream(before.credential.clone(), handling))
            }
            (Err(error), _) => Err(error).with_context(|| {
                format!(
                    "the credential of the upstream {name:?} in the database cannot be decrypted; bring back its Fernet \
                     key, or give it a new credential with `tollgate upstream update --new-credential`"
                )
            }),
        }
    }

    /// Ends what keeps traffic away from an upstream: somebody has just changed it.
    fn free(&self, known: &Known, id: UpstreamId) {
        let Some(upstream) = known.stored.get(&id).filter(|upstream| !self.is_in_file(&upstream.name)) else { return };
        let Some(running) = known.running.get(&upstream.name) else { return };
        if let Some(transition) = running.state.health.free(self.shared.now_ms()) {
            self.shared.changed(upstream, &transition);
        }
    }

    fn is_in_file(&self, name: &str) -> bool {
        self.fixed.upstreams.iter().any(|upstream| upstream.name == name)
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
        let mut members: Vec<Arc<Upstream>> = known.in_file.clone();
        for stored in known.stored.values() {
            if self.is_in_file(&stored.name) {
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
        let prices = PriceBook::new(HashMap::new(), known.prices.clone(), Arc::clone(&self.fixed.shipped_prices));
        let snapshot = Snapshot::new(known.generation, members, self.fixed.models.clone(), prices, self.fixed.strategy);
        self.shared.view.store(Arc::new(View { snapshot, peers: Peers::new(peers) }));
        self.shared.metrics.config_generation.set(i64::try_from(known.generation).unwrap_or(i64::MAX));
        known.running = running;
        Ok(())
    }

    async fn run(&self) -> anyhow::Result<()> {
        let store = Store::open(self.store_url.expose()).await?;
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
        if let Ok(Err(error)) = timeout(PERIOD, announced).await {
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
            () = self.watch_files(), if !self.fixed.credential_files.is_empty() => {}
            _ = shutdown.changed() => {}
        }
    }
}
