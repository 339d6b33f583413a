//! The admin listener: metrics, health, readiness. Never reachable by callers; by default it listens on loopback.

use std::{net::TcpListener, sync::Arc};

use async_trait::async_trait;
use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use pingora_core::{server::ShutdownWatch, services::background::BackgroundService};

use tollgate_core::breaker;

use crate::shared::Shared;

/// The admin plane as a service of the server.
#[derive(Debug)]
pub struct Admin {
    shared: Arc<Shared>,
    listener: TcpListener,
}

impl Admin {
    /// Serves on `listener`.
    #[must_use]
    pub fn new(shared: Arc<Shared>, listener: TcpListener) -> Self {
        Self { shared, listener }
    }

    async fn serve(&self, mut shutdown: ShutdownWatch) -> std::io::Result<()> {
        let listener = self.listener.try_clone()?;
        listener.set_nonblocking(true)?;
        axum::serve(tokio::net::TcpListener::from_std(listener)?, router(Arc::clone(&self.shared)))
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

fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(shared)
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
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

/// Ready means that a request could be served: there is a key and an upstream, and the database answers.
async fn ready(State(shared): State<Arc<Shared>>) -> Response {
    let view = shared.view.load();
    let parts = [
        ("keys", !shared.keys.is_empty(), "no key exists yet: tollgate key create"),
        (
            "upstreams",
            view.snapshot.members().iter().any(|member| !member.upstream.disabled),
            "no upstream is enabled: tollgate upstream add",
        ),
        ("store", shared.metrics.store_up.get() == 1, "the database does not answer; requests are still served"),
    ];
    let is_ready = parts.iter().all(|(_, ok, _)| *ok);
    let text: serde_json::Map<_, _> = parts
        .into_iter()
        .map(|(part, ok, why)| (part.to_owned(), serde_json::Value::from(if ok { "ok" } else { why })))
        .collect();
    let status = if is_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, axum::Json(serde_json::json!({ "ready": is_ready, "parts": text }))).into_response()
}
