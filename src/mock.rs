//! `tollgate mock`: a stand-in for OpenAI and Azure OpenAI.
//!
//! For trying the gateway without an account, and for tests. It speaks the real wire format: answers, streams, errors,
//! headers, and token counts by the real tokenizers. It keeps no state, wants some key but not a certain one, and says
//! the same passage every time.
//!
//! What it serves: chat completions, completions, embeddings, responses and models, under `/v1/...` with OpenAI's
//! manners, and under `/openai/...` (with `api-version`, by deployment) and `/openai/v1/...` with Azure's.
//!
//! What it can be told to do wrong: see [`MockArgs`] for flags that hold for every request, and `faults.rs` (or
//! `tollgate mock --help`) for directives that hold for one: `slow`, `chunk-delay`, `stall`, `status`, `code`,
//! `retry-after`, `retry-after-ms`, `html`, `tokens`, `no-usage`, `break`, `error-event`, `split-utf8`, `crlf`. They
//! are read from the header `x-mock`, from the field `user` (`"mock:status=429;retry-after=3"`) and from the model's
//! name (`gpt-4o-mini@status=500`), because a gateway passes the latter two on and drops the first.
//!
//! The endpoints are functions from a request to an answer; time and sockets are in `exchange.rs` and `delivery.rs`
//! alone.

mod azure;
mod call;
mod chat;
mod completions;
mod delivery;
mod embeddings;
mod error;
mod exchange;
mod faults;
mod fields;
mod headers;
mod models;
mod options;
mod prompt;
mod responses;
mod text;
mod tools;

use std::{
    collections::HashMap,
    future::{Future, IntoFuture},
    io::Write,
    pin::pin,
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use axum::{
    Router,
    extract::{Path, Request},
    response::Response,
    routing::{get, post},
    serve::ListenerExt,
};
use futures::future::{BoxFuture, FutureExt};
use tokio::{net::TcpListener, sync::oneshot, time::timeout};

use self::{
    error::ApiError,
    exchange::{Endpoint, Mock, Style, Target, refuse},
    options::Failing,
};
pub use self::{
    faults::Faults,
    options::{FailRule, MockArgs, MockOptions},
};

/// How long answers that are under way may take at the end.
const GRACE: Duration = Duration::from_secs(2);

/// Listens as `args` say, prints where, and serves until the process is told to end.
pub async fn run(args: MockArgs) -> anyhow::Result<()> {
    let listener = TcpListener::bind(args.listen).await.with_context(|| format!("cannot listen on {}", args.listen))?;
    let address = listener.local_addr()?;
    writeln!(std::io::stdout(), "tollgate mock listens on {address}; base URL: http://{address}/v1")?;
    serve(listener, MockOptions::from(&args), end_of_process()).await
}

/// Serves on `listener` until `shutdown` is done; what is under way then has two seconds left.
pub async fn serve(listener: TcpListener, options: MockOptions, shutdown: impl Future) -> anyhow::Result<()> {
    let listener = listener.tap_io(|stream| {
        // Without it each chunk of a stream would wait for the acknowledgement of the one before.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::warn!(%error, "cannot switch Nagle's algorithm off");
        }
    });
    let app = router(&Arc::new(Mock { failing: Failing::new(&options.fail), faults: options.faults }));
    let (stop, stopping) = oneshot::channel::<()>();
    let server = axum::serve(listener, app).with_graceful_shutdown(async { drop(stopping.await) });
    let mut server = pin!(server.into_future());
    tokio::select! {
        served = &mut server => return served.context("the mock stopped serving"),
        _ = shutdown => drop(stop),
    }
    match timeout(GRACE, server).await {
        Ok(served) => served.context("the mock did not end well"),
        Err(_) => Ok(()),
    }
}

async fn end_of_process() {
    let terminated = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut signal) => drop(signal.recv().await),
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        () = terminated => {}
    }
}

fn router(mock: &Arc<Mock>) -> Router {
    const ENDPOINTS: [(&str, Endpoint); 4] = [
        ("chat/completions", Endpoint::Chat),
        ("completions", Endpoint::Completions),
        ("embeddings", Endpoint::Embeddings),
        ("responses", Endpoint::Responses),
    ];
    let mut router = Router::new();
    for (prefix, style) in [("/v1", Style::OpenAi), ("/openai/v1", Style::AzureV1)] {
        for (path, endpoint) in ENDPOINTS {
            router = router.route(&format!("{prefix}/{path}"), post(handler(mock, style, Some(endpoint))));
        }
        for path in ["models", "models/{*name}"] {
            router = router.route(&format!("{prefix}/{path}"), get(handler(mock, style, None)));
        }
    }
    for (path, endpoint) in ENDPOINTS.into_iter().take(3) {
        let path = format!("/openai/deployments/{{name}}/{path}");
        router = router.route(&path, post(handler(mock, Style::AzureDated, Some(endpoint))));
    }
    router
        .route("/openai/responses", post(handler(mock, Style::AzureDated, Some(Endpoint::Responses))))
        .route("/openai/models", get(handler(mock, Style::AzureDated, None)))
        .fallback(async |request: Request| refuse(&request, ApiError::no_such_path))
        .method_not_allowed_fallback(async |request: Request| refuse(&request, ApiError::wrong_method))
}

/// Handles a route; `endpoint` is `None` on those of the models.
fn handler(
    mock: &Arc<Mock>,
    style: Style,
    endpoint: Option<Endpoint>,
) -> impl Fn(Path<HashMap<String, String>>, Request) -> BoxFuture<'static, Response> + Clone + Send + Sync + 'static {
    let mock = Arc::clone(mock);
    move |Path(mut names), request| {
        let name = names.remove("name");
        let target = endpoint.map_or(Target::Models(name.clone()), |endpoint| Target::Json(endpoint, name));
        Arc::clone(&mock).exchange(style, target, request).boxed()
    }
}
