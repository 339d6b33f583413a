//! The admin listener: metrics, health, readiness. Never reachable by callers; by default it listens on loopback.

use std::{net::TcpListener, sync::Arc};

use async_trait::async_trait;
use axum::{
    Router,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use pingora_core::{server::ShutdownWatch, services::background::BackgroundService};
use tokio::sync::watch;
use tollgate_core::breaker;

use crate::shared::Shared;

mod ready;

/// The admin plane as a service of the server.
#[derive(Debug)]
pub struct Admin {
    plane: Plane,
    listener: TcpListener,
}

/// What its pages tell of.
#[derive(Clone, Debug)]
struct Plane {
    shared: Arc<Shared>,
    /// Has the server been told to stop?
    drain: watch::Receiver<bool>,
}

impl Admin {
    /// Serves on `listener`; `drain` turns true when the server has been told to stop.
    #[must_use]
    pub fn new(shared: Arc<Shared>, listener: TcpListener, drain: watch::Receiver<bool>) -> Self {
        Self { plane: Plane { shared, drain }, listener }
    }

    async fn serve(&self, mut shutdown: ShutdownWatch) -> std::io::Result<()> {
        let listener = self.listener.try_clone()?;
        listener.set_nonblocking(true)?;
        axum::serve(tokio::net::TcpListener::from_std(listener)?, router(self.plane.clone()))
            .with_graceful_shutdown(async move {
                let ended = shutdown.wait_for(|ending| *ending).await;
                drop(ended);
            })
            .await
    }
}

#[async_trait]
impl BackgroundService for Admin {
    async fn start(&self, shutdown: ShutdownWatch) {
        if let Err(error) = self.serve(shutdown).await {
            tracing::error!(%error, "the admin listener has failed");
        }
    }
}

fn router(plane: Plane) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(plane)
}

async fn metrics(State(Plane { shared, .. }): State<Plane>) -> Response {
    show_upstreams(&shared);
    shared.metrics.journal_pending_records.set(i64::try_from(shared.journal.pending()).unwrap_or(i64::MAX));
    shared.metrics.journal_bytes.set(i64::try_from(shared.journal.bytes()).unwrap_or(i64::MAX));
    shared.metrics.content_bytes.set(i64::try_from(shared.contents.bytes()).unwrap_or(i64::MAX));
    match shared.metrics.encode() {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// Says of each upstream where it stands now. Of one that was removed nothing more is said.
fn show_upstreams(shared: &Shared) {
    let metrics = &shared.metrics;
    metrics.upstream_in_flight.reset();
    metrics.upstream_state.reset();
    let now_ms = shared.now_ms();
    for member in shared.view.load().snapshot.members() {
        let name = &member.upstream.name;
        metrics.upstream_in_flight.with_label_values(&[name]).set(member.state.in_flight().into());
        let now = member.state.health.state(now_ms);
        for state in breaker::State::ALL {
            let gauge = metrics.upstream_state.with_label_values(&[name, state.as_str()]);
            gauge.set((state == now && !member.upstream.disabled).into());
        }
        let gauge = metrics.upstream_state.with_label_values(&[name, "disabled"]);
        gauge.set(member.upstream.disabled.into());
    }
}

/// JSON, or text for whoever asks for that: `curl -H 'accept: text/plain'`.
async fn ready(State(plane): State<Plane>, headers: HeaderMap) -> Response {
    let readiness = ready::readiness(&plane.shared, *plane.drain.borrow());
    let status = if readiness.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let accepts = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if accepts.starts_with("text/plain") {
        return (status, readiness.to_text()).into_response();
    }
    // With line breaks: it is looked at by people too.
    let json = format!("{:#}\n", readiness.to_json());
    (status, [(header::CONTENT_TYPE, "application/json")], json).into_response()
}
