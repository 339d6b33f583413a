//! Which upstream takes the next attempt.

use std::{sync::Arc, time::Instant};

use pingora_core::{Error, ErrorSource, ErrorType, Result, upstreams::peer::HttpPeer};
use tollgate_core::{
    azure,
    denial::Denial,
    openai::rewrite,
    snapshot::InFlight,
    upstream::{Upstream, UpstreamKind},
};

use super::ctx::{Ask, Current, RequestCtx};
use crate::{connector::BY_CONNECTOR, shared::Shared};

/// Error type of a request that no upstream is left for.
pub const NO_UPSTREAM: ErrorType = ErrorType::new("NoUpstream");
/// What a client is told to wait when nobody can serve it.
const RETRY_AFTER_S: u32 = 1;

/// Picks an upstream that this request has not tried, and prepares its attempt.
///
/// # Errors
/// [`NO_UPSTREAM`], with the denial in the context, if there is none.
pub async fn pick(shared: &Shared, ctx: &mut RequestCtx) -> Result<Box<HttpPeer>> {
    let Some(view) = ctx.view.clone() else { return none_left(ctx) };
    while ctx.counted_attempts() < shared.settings.max_attempts {
        let Some(ask) = &ctx.ask else { break };
        let Some(index) = ask.target.pool.pick(|index| !ctx.tried.contains(&index)) else { break };
        let member = view.snapshot.member(index);
        let current = begin(ask, &member.upstream, member.state.enter());
        if !ctx.attempts.is_empty() {
            shared.metrics.retries_total.inc();
        }
        ctx.tried.push(index);
        ctx.forwarded.get_or_insert(current.began);
        ctx.upstream_model = Some(current.model.clone());
        ctx.forget_answer();
        ctx.attempt = Some(current);
        match view.peers.get(index).connect_to().await {
            Ok(mut peer) => {
                peer.options.alpn = BY_CONNECTOR.clone();
                return Ok(Box::new(peer));
            }
            Err(error) => {
                tracing::warn!(upstream = member.upstream.name, %error, "the upstream's name cannot be resolved");
                shared.metrics.upstream_requests_total.with_label_values(&[&member.upstream.name, "dns"]).inc();
                ctx.end_attempt(Some("dns"));
            }
        }
    }
    none_left(ctx)
}

fn none_left<T>(ctx: &mut RequestCtx) -> Result<T> {
    ctx.denial.get_or_insert(match ctx.attempts.last() {
        Some(_) => Denial::UpstreamError,
        None => Denial::UpstreamUnavailable { retry_after_s: RETRY_AFTER_S },
    });
    Err(Error::create(NO_UPSTREAM, ErrorSource::Internal, None, None))
}

fn begin(ask: &Ask, upstream: &Arc<Upstream>, guard: InFlight) -> Current {
    let model = upstream.resolve_model(&ask.target.model).unwrap_or(&ask.target.model);
    let asked_usage = asks_usage(ask, upstream);
    let edits = rewrite::Edits { model: (model != ask.head.model).then_some(model), ask_usage: asked_usage };
    Current {
        upstream: Arc::clone(upstream),
        body: rewrite::rewrite(&ask.body, &ask.head, &edits),
        model: model.to_owned(),
        asked_usage,
        began: Instant::now(),
        guard,
        status: 0,
        answered_after: None,
    }
}

/// Does the gateway ask for usage, because the client did not?
fn asks_usage(ask: &Ask, upstream: &Upstream) -> bool {
    ask.head.can_ask_usage()
        && ask.dialect.asks_for_usage()
        && (upstream.kind == UpstreamKind::OpenAi
            || azure::reports_usage_in_streams(&upstream.base_url.path, upstream.api_version.as_deref()))
}
