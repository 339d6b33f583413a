//! The orderly end: take nothing new, finish what is under way, then stop.
//!
//! Pingora's own graceful end always waits for its whole grace period, also when nothing is under way. This one closes the
//! listeners, waits until the last request is over or the grace period ends, and only then lets the server go down.

use std::time::Duration;

use async_trait::async_trait;
use pingora_core::server::{ShutdownSignal, ShutdownSignalWatch};
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

use crate::shared::Requests;

/// How often the requests under way are counted.
const STEP: Duration = Duration::from_millis(10);

/// Asks for the end of the server.
#[async_trait]
pub trait Stop: Send + Sync {
    /// Returns when the server is to end.
    async fn requested(&self);
}

/// SIGTERM and SIGINT. A second one ends the wait.
#[derive(Clone, Copy, Debug)]
pub struct Signals;

#[async_trait]
impl Stop for Signals {
    async fn requested(&self) {
        use tokio::signal::unix::{SignalKind, signal};
        match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
            (Ok(mut terminate), Ok(mut interrupt)) => {
                tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            }
            (Err(error), _) | (_, Err(error)) => {
                tracing::error!(%error, "signals cannot be received: stop the process with SIGKILL");
                std::future::pending::<()>().await;
            }
        }
    }
}

/// Turns a wish to stop into Pingora's shutdown, after the drain.
pub struct Drain {
    /// Who asks.
    pub stop: Box<dyn Stop>,
    /// Tells the listeners.
    pub listeners: watch::Sender<bool>,
    /// What is under way.
    pub requests: Requests,
    /// How long to wait for it.
    pub grace: Duration,
}

#[async_trait]
impl ShutdownSignalWatch for Drain {
    async fn recv(&self) -> ShutdownSignal {
        self.stop.requested().await;
        tracing::info!(
            in_flight = self.requests.count(),
            "stopping: no new connections, waiting for requests under way"
        );
        self.listeners.send_replace(true);
        tokio::select! {
            () = self.drained() => {}
            () = self.stop.requested() => {}
        }
        ShutdownSignal::FastShutdown
    }
}

impl Drain {
    async fn drained(&self) {
        let until = Instant::now() + self.grace;
        // A connection may have been accepted a moment ago: its request is counted once its header was read.
        sleep(STEP).await;
        while self.requests.count() > 0 && Instant::now() < until {
            sleep(STEP).await;
        }
        if self.requests.count() > 0 {
            tracing::warn!(in_flight = self.requests.count(), "the grace period is over: requests are cut off");
        }
    }
}
