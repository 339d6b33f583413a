//! Tells other replicas what a provider said of an account, and hears what they were told.
//!
//! A 429 that one replica got spares the others theirs, and a credential that one of them found revoked is not tried by all.
//! That an upstream is *open* is not told: it may be unreachable only from here, and each replica finds out for itself. Notices
//! are about accounts, not names: a renewed credential is another account, about which nothing was said.

use std::{collections::HashMap, convert::Infallible, sync::Arc, time::Duration};

use async_trait::async_trait;
use pingora_core::{server::ShutdownWatch, services::background::BackgroundService};
use tokio::time::sleep;
use tollgate_core::{breaker::Notice, snapshot::Member, upstream::Account};

use crate::{limiter::Told, shared::Shared};

/// How often the others are asked.
const PERIOD: Duration = Duration::from_millis(250);

/// The job.
#[derive(Debug)]
pub struct Notices {
    shared: Arc<Shared>,
}

impl Notices {
    /// The job over the upstreams of `shared`.
    #[must_use]
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Tells what is new, and believes what is heard.
    pub async fn step(&self) {
        let view = self.shared.view.load_full();
        let mut members: HashMap<Account, Vec<&Member>> = HashMap::new();
        for member in view.snapshot.members() {
            members.entry(member.upstream.account()).or_default().push(member);
        }
        let mine = self.shared.notices.take();
        let told = mine.iter().map(|(account, notice)| (*account, self.told(*notice))).collect();
        let is_known = |account: &Account| members.contains_key(account);
        let Some(heard) = self.shared.limiter.exchange_notices(told, is_known).await else {
            // Redis is away: it is told when it is back, unless something newer has come by then.
            self.shared.notices.put_back(mine);
            return;
        };
        for (account, told) in heard {
            for member in members.get(&account).into_iter().flatten() {
                let now_ms = self.shared.now_ms();
                if let Some(transition) = member.state.health.share(notice(told, now_ms), now_ms) {
                    self.shared.changed(&member.upstream, &transition);
                }
            }
        }
    }

    /// Clocks differ between processes, so what is told is how much time is left.
    fn told(&self, notice: Notice) -> Told {
        let left = |at_ms: u64| at_ms.saturating_sub(self.shared.now_ms());
        match notice {
            Notice::Cooling { until_ms } => Told::Cooling { left_ms: left(until_ms) },
            Notice::Quarantined { slow_probe_at_ms } => Told::Quarantined { left_ms: left(slow_probe_at_ms) },
            Notice::Cleared => Told::Cleared,
        }
    }

    async fn run(&self) -> Infallible {
        loop {
            self.step().await;
            sleep(PERIOD).await;
        }
    }
}

fn notice(told: Told, now_ms: u64) -> Notice {
    match told {
        Told::Cooling { left_ms } => Notice::Cooling { until_ms: now_ms.saturating_add(left_ms) },
        Told::Quarantined { left_ms } => Notice::Quarantined { slow_probe_at_ms: now_ms.saturating_add(left_ms) },
        Told::Cleared => Notice::Cleared,
    }
}

#[async_trait]
impl BackgroundService for Notices {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        if !self.shared.limiter.has_redis() {
            return;
        }
        tokio::select! {
            _ = self.run() => {}
            _ = shutdown.changed() => {}
        }
    }
}
