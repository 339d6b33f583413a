//! Which upstream takes the next attempt.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use pingora_core::upstreams::peer::HttpPeer;
use tokio::time::timeout;
use tollgate_core::{
    azure,
    breaker::Outcome,
    denial::Denial,
    health,
    openai::rewrite,
    pool::{Fitness, Strategy, sticky_hash},
    upstream::{Upstream, UpstreamKind},
};

use super::{
    attempt::{Current, PROBE_STEP},
    ctx::{Ask, RequestCtx},
};
use crate::{
    connector::BY_CONNECTOR,
    peers::Peer,
    shared::{Shared, View},
};

const MILLISECOND: Duration = Duration::from_millis(1);
/// How often it is looked whether an upstream is ready: a probe may end without a word.
const STEP: Duration = PROBE_STEP;

/// Picks an upstream that this request has not tried, and prepares its attempt.
///
/// # Errors
/// Why there is none.
pub async fn pick(shared: &Shared, ctx: &mut RequestCtx) -> Result<Box<HttpPeer>, Denial> {
    let Some(view) = ctx.view.clone() else { return Err(Denial::Internal) };
    loop {
        let Some((index, health)) = enter_or_wait(shared, &view, ctx).await else {
            return Err(ctx.no_upstream(shared));
        };
        let Some(ask) = &ctx.ask else { return Err(Denial::Internal) };
        let peer = view.peers.get(index);
        let current = begin(ask, &view.snapshot.member(index).upstream, peer, health);
        if !ctx.attempts.is_empty() {
            shared.metrics.retries_total.inc();
        }
        ctx.forwarded.get_or_insert(current.began);
        ctx.upstream_model = Some(current.model.clone());
        ctx.forget_answer();
        ctx.attempt = Some(current);
        match peer.connect_to(ctx.time_left(shared)).await {
            Ok(mut peer) => {
                peer.options.alpn = BY_CONNECTOR.clone();
                return Ok(peer);
            }
            Err(error) => {
                let name = &view.snapshot.member(index).upstream.name;
                tracing::warn!(upstream = name, %error, "the upstream's name cannot be resolved");
                ctx.conclude(shared, Outcome::Failure, "dns", Some("dns"));
                if !ctx.may_retry(shared, false) {
                    return Err(ctx.no_upstream(shared));
                }
            }
        }
    }
}

/// Picks a member and enters it; waits for one, if one will be ready soon.
async fn enter_or_wait(shared: &Shared, view: &View, ctx: &mut RequestCtx) -> Option<(usize, health::Attempt)> {
    let until = Instant::now() + shared.settings.wait.min(ctx.time_left(shared).unwrap_or(Duration::MAX));
    loop {
        let changed = shared.upstream_changed.notified();
        if let Some(entered) = enter(shared, view, ctx) {
            return Some(entered);
        }
        let left = until.saturating_duration_since(Instant::now());
        let wait = ctx.untried_wait(shared).filter(|wait| !left.is_zero() && *wait <= left)?;
        let woken = timeout(wait.clamp(MILLISECOND, STEP), changed).await;
        drop(woken);
    }
}

/// Picks a member and enters it; another one if it has just closed its doors.
fn enter(shared: &Shared, view: &View, ctx: &mut RequestCtx) -> Option<(usize, health::Attempt)> {
    let ask = ctx.ask.as_ref()?;
    let now_ms = shared.now_ms();
    let health = |index: usize| &view.snapshot.member(index).state.health;
    let strategy = ask.target.strategy;
    let sticky = (strategy == Strategy::Sticky).then(|| sticky_key(ctx)).flatten();
    let mut closed = Vec::new();
    loop {
        let fit = |index| match ctx.tried.contains(&index) || closed.contains(&index) {
            true => Fitness::No,
            false => health(index).fitness(now_ms, ask.tokens),
        };
        let index = ask.target.pool.pick(strategy, sticky, fit, |index| health(index).in_flight())?;
        if let Some(attempt) = health(index).enter(now_ms, ask.tokens) {
            ctx.tried.push(index);
            return Some((index, attempt));
        }
        closed.push(index);
    }
}

/// What keeps requests together that share a prompt: what the client says of it, or else its key.
fn sticky_key(ctx: &RequestCtx) -> Option<u64> {
    let head = &ctx.ask.as_ref()?.head;
    let hint = head.prompt_cache_key.as_ref().or(head.user.as_ref());
    let key = || ctx.key.as_ref().map(|key| sticky_hash(&key.id.0.to_le_bytes()));
    hint.map(|hint| sticky_hash(hint.as_bytes())).or_else(key)
}

fn begin(ask: &Ask, upstream: &Arc<Upstream>, peer: &Arc<Peer>, health: health::Attempt) -> Current {
    let model = upstream.resolve_model(&ask.target.model).unwrap_or(&ask.target.model);
    let asked_usage = asks_usage(ask, upstream);
    let edits = rewrite::Edits { model: (model != ask.head.model).then_some(model), ask_usage: asked_usage };
    Current {
        upstream: Arc::clone(upstream),
        peer: Arc::clone(peer),
        body: rewrite::rewrite(&ask.body, &ask.head, &edits),
        model: model.to_owned(),
        asked_usage,
        began: Instant::now(),
        health,
        status: 0,
        answered_after: None,
        cooling_ms: None,
        has_begun: false,
    }
}

/// Does the gateway ask for usage, because the client did not?
fn asks_usage(ask: &Ask, upstream: &Upstream) -> bool {
    ask.head.can_ask_usage()
        && ask.dialect.asks_for_usage()
        && (upstream.kind == UpstreamKind::OpenAi
            || azure::reports_usage_in_streams(&upstream.base_url.path, upstream.api_version.as_deref()))
}
