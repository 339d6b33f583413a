//! Jobs that wait most of the time share one thread.
//!
//! Pingora gives every service a runtime and a thread of its own, which costs half a megabyte and buys nothing where each
//! step is short and waits for a network.

use async_trait::async_trait;
use futures::future::join_all;
use pingora_core::{server::ShutdownWatch, services::background::BackgroundService};

/// Several jobs as one service.
pub struct Together(Vec<Box<dyn BackgroundService + Send + Sync>>);

impl Together {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self(Vec::new())
    }

    /// One more.
    #[must_use]
    pub fn with(mut self, job: impl BackgroundService + Send + Sync + 'static) -> Self {
        self.0.push(Box::new(job));
        self
    }
}

impl Default for Together {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl BackgroundService for Together {
    async fn start(&self, shutdown: ShutdownWatch) {
        join_all(self.0.iter().map(|job| job.start(shutdown.clone()))).await;
    }
}
