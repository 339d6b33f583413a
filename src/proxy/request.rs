//! From the arrival of a request to the decision that it may be forwarded.
//!
//! The order is by cost and by what may be learned: route, key, address, and only then the body. Nothing is read from a
//! caller that is not known, and nothing is sent upstream before all of it has passed, and an upstream was found.

use std::{net::IpAddr, sync::Arc, time::Instant};

use bytes::Bytes;
use chrono::{DateTime, Utc};
use http::{HeaderMap, HeaderName, header};
use percent_encoding::percent_decode_str;
use pingora_core::Result;
use pingora_proxy::Session;
use tollgate_core::{
    denial::Denial,
    journal::entry::Begin,
    key::{IpNet, KeyEntry, KeyHash, looks_like_key},
    limit::state::Need,
    openai::request::parse,
    route::{Action, Dialect},
};

use super::{
    body::{self, Failure},
    ctx::{Ask, RequestCtx},
    pick::pick,
    reply, route,
};
use crate::{
    content::Asked,
    limiter::{self, Admission, Refused},
    shared::{KeyDirectory, Shared},
};

/// Longest name of a model, in bytes. Nobody's are a tenth of it; what is booked must be able to hold it whole.
const MAX_MODEL: usize = 256;

/// What a session must go on to know of the headers of its request.
static LEFT: [HeaderName; 4] = [header::HOST, header::CONTENT_LENGTH, header::TRANSFER_ENCODING, header::EXPECT];

/// Where a key is presented: as OpenAI's clients do, and as those of Azure do.
static KEYS: [HeaderName; 2] = [header::AUTHORIZATION, HeaderName::from_static("api-key")];

/// Notes who is speaking, and settles how the connection is treated.
pub fn begin(shared: &Shared, session: &mut Session, ctx: &mut RequestCtx) {
    // A provider's 1xx headers are none of the client's business.
    session.set_ignore_info_resp(true);
    // A client that stops reading would otherwise hold its upstream's connection for ever.
    session.set_write_timeout(Some(shared.settings.client_timeout));
    let peer = session.client_addr().and_then(|addr| addr.as_inet()).map(|addr| addr.ip().to_canonical());
    ctx.ip = peer.map(|peer| client_ip(peer, &session.req_header().headers, &shared.settings.trusted_proxies));
}

/// Decides on the request. `Ok(true)`: it has been answered; `Ok(false)`: it is to be forwarded.
///
/// # Errors
/// If the client is gone.
pub async fn filter(shared: &Shared, session: &mut Session, ctx: &mut RequestCtx) -> Result<bool> {
    let denial = match decide(shared, session, ctx).await {
        Ok(answered) => return Ok(answered),
        Err(Failure::Gone(error)) => return Err(error),
        Err(Failure::Denied(denial)) => denial,
    };
    body::drain(session, shared.settings.max_body_bytes, shared.settings.client_timeout).await;
    shared.metrics.denial(&denial);
    let answer = reply::denial(ctx.request_id, &ctx.standing, &denial);
    ctx.denial = Some(denial);
    let answer = answer?;
    ctx.replace_content(&answer.body);
    answer.send(session).await.map(|()| true)
}

async fn decide(shared: &Shared, session: &mut Session, ctx: &mut RequestCtx) -> Result<bool, Failure> {
    let route = route::find(session).map_err(Failure::Denied)?;
    ctx.route = Some(route);
    if route.action == Action::Health {
        let alive = Bytes::from_static(br#"{"status":"ok"}"#);
        return reply::json(session, ctx.request_id, alive).await.map(|()| true).map_err(Failure::Gone);
    }
    ctx.asked = lift(session);
    let key = identify(shared, ctx).map_err(Failure::Denied)?;
    for name in &KEYS {
        ctx.asked.remove(name);
    }
    ctx.key = Some(Arc::clone(&key));
    let view = shared.view.load_full();
    ctx.view = Some(Arc::clone(&view));
    match route.action {
        Action::Forward(dialect) => {
            if !shared.journal.is_taking() {
                return Err(Failure::Denied(Denial::JournalFull));
            }
            let mut ask = ask(shared, session, ctx, dialect).await?;
            let need = admit(shared, ctx, &key, &ask).await.map_err(Failure::Denied)?;
            begin_record(shared, ctx, &key, &ask, need).map_err(Failure::Denied)?;
            ask.tokens = need.amount.tokens;
            ctx.content = shared.contents.begin(&key, || asked(ctx, &ask));
            ctx.ask = Some(ask);
            shared.retry_budget.deposit(shared.now_ms());
            // Here and not in Pingora's own phase: that one's connection ends if there is no upstream.
            ctx.picked = Some(pick(shared, ctx).await.map_err(Failure::Denied)?);
            return Ok(false);
        }
        Action::ListModels => {
            let list = serde_json::json!({
                "object": "list",
                "data": view.snapshot.models_for(&key).iter().map(|name| model_object(name)).collect::<Vec<_>>(),
            });
            reply::json(session, ctx.request_id, list.to_string().into()).await
        }
        Action::ShowModel => {
            let path = session.req_header().uri.path();
            let name = percent_decode_str(&path[route.path.len()..]).decode_utf8_lossy().into_owned();
            if view.snapshot.resolve(&name, &key, ctx.arrived_at).is_none() {
                return Err(Failure::Denied(Denial::ModelNotFound { model: name }));
            }
            reply::json(session, ctx.request_id, model_object(&name).to_string().into()).await
        }
        Action::Health => Ok(()),
    }
    .map(|()| true)
    .map_err(Failure::Gone)
}

/// Reads the body and resolves what it asks for.
async fn ask(shared: &Shared, session: &mut Session, ctx: &mut RequestCtx, dialect: Dialect) -> Result<Ask, Failure> {
    check_encoding(&ctx.asked).map_err(Failure::Denied)?;
    let began = Instant::now();
    let (max, patience) = (shared.settings.max_body_bytes, shared.settings.client_timeout);
    let read = body::read(session, &mut ctx.downstream, max, patience).await;
    ctx.waited_for_client = began.elapsed();
    let body = read?;
    let head = parse(&body).map_err(|error| {
        Failure::Denied(Denial::InvalidBody { message: error.to_string(), param: error.param().map(str::to_owned) })
    })?;
    let (Some(view), Some(key)) = (&ctx.view, &ctx.key) else {
        return Err(Failure::Denied(Denial::Internal));
    };
    let target = Some(&*head.model)
        .filter(|model| model.len() <= MAX_MODEL)
        .and_then(|model| view.snapshot.resolve(model, key, ctx.arrived_at))
        .ok_or_else(|| Failure::Denied(Denial::ModelNotFound { model: head.model.clone() }))?;
    Ok(Ask { dialect, body, head, target, tokens: 0 })
}

/// Reserves what the request may consume, at everything that limits it.
async fn admit(shared: &Shared, ctx: &mut RequestCtx, key: &KeyEntry, ask: &Ask) -> Result<Need, Denial> {
    let request = limiter::Request {
        key,
        ip: ctx.ip,
        model: &ask.target.model,
        body: &ask.body,
        head: &ask.head,
        dialect: ask.dialect,
        price: ask.target.price.as_deref(),
        at: ctx.arrived_at,
    };
    match shared.limiter.admit(request).await {
        Ok(Admission { reservation, standing, need }) => {
            (ctx.reservation, ctx.standing) = (Some(reservation), standing);
            Ok(need)
        }
        Err(Refused { denial, standing }) => {
            ctx.standing = standing;
            Err(denial)
        }
    }
}

/// Writes down that the request was admitted, with what it may consume.
fn begin_record(shared: &Shared, ctx: &mut RequestCtx, key: &KeyEntry, ask: &Ask, need: Need) -> Result<(), Denial> {
    ctx.open = shared.journal.begin(&Begin {
        request_id: ctx.request_id,
        started_at: ctx.arrived_at,
        user_id: key.user.id,
        key_id: key.id,
        ip: ctx.ip,
        route: ctx.route.map_or("", |route| route.name),
        model: &ask.target.model,
        stream: ask.head.stream,
        prompt_tokens: need.prompt_tokens,
        output_tokens: need.amount.tokens.saturating_sub(need.prompt_tokens),
        cost_nano_usd: need.amount.nano_usd,
    });
    if ctx.open.is_none() {
        // It was never sent.
        ctx.reservation = None;
        return Err(Denial::JournalFull);
    }
    Ok(())
}

/// What of the request is kept, where content is.
fn asked(ctx: &RequestCtx, ask: &Ask) -> Asked {
    Asked { request_id: ctx.request_id, started_at: ctx.arrived_at, dialect: ask.dialect, body: ask.body.clone() }
}

fn model_object(name: &str) -> serde_json::Value {
    serde_json::json!({ "id": name, "object": "model", "created": 0, "owned_by": "tollgate" })
}

fn check_encoding(headers: &HeaderMap) -> Result<(), Denial> {
    match headers.get(header::CONTENT_ENCODING) {
        Some(encoding) if !encoding.as_bytes().eq_ignore_ascii_case(b"identity") => Err(Denial::InvalidBody {
            message: format!(
                "This gateway does not accept compressed request bodies (content-encoding: {}). Send the JSON as it is.",
                String::from_utf8_lossy(encoding.as_bytes()).escape_debug()
            ),
            param: None,
        }),
        _ => Ok(()),
    }
}

/// Takes the client's headers out of the session, but for what says where its body ends. Of every request Pingora copies and
/// cleans them before it asks what an upstream is to be sent, which is none of them.
fn lift(session: &mut Session) -> HeaderMap {
    let header = session.req_header_mut();
    let (mut left, ()) = http::Request::new(()).into_parts();
    (left.method, left.uri, left.version) = (header.method.clone(), header.uri.clone(), header.version);
    for name in &LEFT {
        // All of them: whoever says twice where a body ends is to be found out.
        for value in header.headers.get_all(name) {
            left.headers.append(name, value.clone());
        }
    }
    http::request::Parts::from(std::mem::replace(header, left.into())).headers
}

/// Lets an address in that has not asked too much, and finds out whose key it presents.
fn identify(shared: &Shared, ctx: &RequestCtx) -> Result<Arc<KeyEntry>, Denial> {
    let entered = ctx.ip.map_or(Ok(()), |ip| shared.gate.enter(ip));
    entered.map_err(|retry_after_ms| Denial::TooManyFromAddress { retry_after_ms })?;
    let key = authenticate(&shared.keys, &ctx.asked, ctx.ip, ctx.arrived_at);
    if let (Err(Denial::InvalidApiKey), Some(ip)) = (&key, ctx.ip) {
        shared.gate.failed(ip);
    }
    key
}

/// Finds the key that was presented and checks that it may be used, now and from here.
fn authenticate(
    keys: &KeyDirectory,
    headers: &HeaderMap,
    ip: Option<IpAddr>,
    now: DateTime<Utc>,
) -> Result<Arc<KeyEntry>, Denial> {
    let presented = presented_key(headers).ok_or(Denial::MissingApiKey)?;
    if !looks_like_key(presented) {
        return Err(Denial::InvalidApiKey);
    }
    let key = keys.get(&KeyHash::of(presented)).ok_or(Denial::InvalidApiKey)?;
    if key.revoked_at.is_some() || key.user.disabled {
        return Err(Denial::KeyRevoked);
    }
    if key.expires_at.is_some_and(|at| at <= now) {
        return Err(Denial::KeyExpired);
    }
    if !ip.map_or(key.allow_ip.is_empty(), |ip| key.allows_ip(ip)) {
        return Err(Denial::IpNotAllowed);
    }
    Ok(key)
}

/// `Authorization: Bearer ...`, or `api-key: ...` as Azure clients send it.
fn presented_key(headers: &HeaderMap) -> Option<&[u8]> {
    let [bearer, plain] = &KEYS;
    let bearer = headers.get(bearer).map(http::HeaderValue::as_bytes).and_then(|value| {
        let (scheme, rest) = value.split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then(|| rest.trim_ascii())
    });
    bearer.or_else(|| headers.get(plain).map(|value| value.as_bytes().trim_ascii())).filter(|key| !key.is_empty())
}

/// The address of the client: that of the connection, or what trusted proxies report.
///
/// `x-forwarded-for` is read from the right, as long as the reporter is trusted: everything further left may be forged.
fn client_ip(peer: IpAddr, headers: &HeaderMap, trusted: &[IpNet]) -> IpAddr {
    let is_trusted = |ip: IpAddr| trusted.iter().any(|net| net.contains(ip));
    let mut client = peer;
    if !is_trusted(client) {
        return client;
    }
    let forwarded = headers.get_all("x-forwarded-for").iter().rev();
    for entry in forwarded.filter_map(|value| value.to_str().ok()).flat_map(|value| value.rsplit(',')) {
        if !is_trusted(client) {
            break;
        }
        match entry.trim().parse::<IpAddr>() {
            Ok(ip) => client = ip.to_canonical(),
            Err(_) => break,
        }
    }
    client
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn keys_are_read_from_both_headers() {
        assert_eq!(presented_key(&headers(&[("authorization", "Bearer tg-a")])), Some(&b"tg-a"[..]));
        assert_eq!(presented_key(&headers(&[("authorization", "bearer  tg-a ")])), Some(&b"tg-a"[..]));
        assert_eq!(presented_key(&headers(&[("api-key", "tg-b")])), Some(&b"tg-b"[..]));
        assert_eq!(presented_key(&headers(&[("authorization", "Basic x"), ("api-key", "tg-b")])), Some(&b"tg-b"[..]));
        for none in [&[("authorization", "Bearer ")][..], &[("authorization", "Basic x")], &[("api-key", "")], &[]] {
            assert_eq!(presented_key(&headers(none)), None, "{none:?}");
        }
    }

    #[test]
    fn forwarded_addresses_count_only_from_trusted_proxies() {
        let trusted = [IpNet::parse("10.0.0.0/8").unwrap()];
        let ip = |peer: &str, xff: &'static str| {
            client_ip(peer.parse().unwrap(), &headers(&[("x-forwarded-for", xff)]), &trusted).to_string()
        };
        assert_eq!(ip("10.0.0.1", "1.2.3.4"), "1.2.3.4");
        assert_eq!(ip("10.0.0.1", "6.6.6.6, 1.2.3.4, 10.0.0.2"), "1.2.3.4", "what stands further left may be forged");
        assert_eq!(ip("9.9.9.9", "1.2.3.4"), "9.9.9.9", "who is not trusted cannot speak for others");
        assert_eq!(ip("10.0.0.1", "nonsense"), "10.0.0.1");
    }
}
