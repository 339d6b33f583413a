//! Learns what upstreams with patterns really serve, so that `/v1/models` can name it.
//!
//! A pattern says what may be asked for, not what exists. Each enabled upstream whose model list has one is asked for its
//! own list, soon after it appears and then every [`PERIOD`]. One that does not answer keeps its last list.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use pingora_core::{server::ShutdownWatch, services::background::BackgroundService};
use tokio::sync::Mutex;
use tollgate_core::{glob, snapshot::Member, upstream::Upstream};

use crate::{provider::list_models, shared::Shared};

/// How often an upstream is asked.
const PERIOD: Duration = Duration::from_secs(600);
/// How soon after it could not be.
const RETRY: Duration = Duration::from_secs(30);
/// How often it is looked who is due.
const STEP: Duration = Duration::from_millis(500);
/// Models that are kept of one list.
const MAX_MODELS: usize = 10_000;

/// The job.
#[derive(Debug)]
pub struct Models {
    shared: Arc<Shared>,
    due: Mutex<HashMap<String, (Arc<Upstream>, Instant)>>,
}

impl Models {
    /// The job over the upstreams of `shared`.
    #[must_use]
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared, due: Mutex::default() }
    }

    /// Asks every upstream that is due.
    pub async fn step(&self) {
        let view = self.shared.view.load_full();
        let mut due = self.due.lock().await;
        let asked: Vec<&Member> =
            view.snapshot.members().iter().filter(|member| has_pattern(&member.upstream)).collect();
        due.retain(|name, _| asked.iter().any(|member| member.upstream.name == *name));
        for member in asked {
            let upstream = &member.upstream;
            let is_due =
                due.get(&upstream.name).is_none_or(|(of, at)| !Arc::ptr_eq(of, upstream) || *at <= Instant::now());
            if is_due {
                let pause = ask(member).await;
                due.insert(upstream.name.clone(), (Arc::clone(upstream), Instant::now() + pause));
            }
        }
    }
}

/// Asks one upstream; gives how long to wait before the next time.
async fn ask(member: &Member) -> Duration {
    match list_models(&member.upstream).await {
        Ok(mut models) => {
            models.truncate(MAX_MODELS);
            member.state.set_listed_models(models);
            PERIOD
        }
        Err(error) => {
            tracing::warn!(upstream = member.upstream.name, %error, "the upstream's models cannot be listed");
            RETRY
        }
    }
}

fn has_pattern(upstream: &Upstream) -> bool {
    let entries = &upstream.models;
    !upstream.disabled && (entries.is_empty() || entries.iter().any(|entry| glob::is_pattern(&entry.name)))
}

#[async_trait]
impl BackgroundService for Models {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        loop {
            tokio::select! {
                () = async { self.step().await; tokio::time::sleep(STEP).await } => {}
                _ = shutdown.changed() => return,
            }
        }
    }
}
