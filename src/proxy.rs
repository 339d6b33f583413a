//! The data plane: what happens to a request, phase by phase.
//!
//! Pingora calls one hook per phase; each hook here is one line into the file of that phase, so the place of any behaviour
//! is found from Pingora's phase chart. The files share nothing but [`ctx::RequestCtx`], with the [`attempt`] under way, how
//! one is begun ([`pick`]) and [`judge`]d, and the wrapper of the client's session ([`downstream`]).
//!
//! | phase | file |
//! |---|---|
//! | `early_request_filter`, `request_filter` | [`request`], with [`body`] and [`route`] |
//! | `upstream_peer`, `fail_to_connect`, `error_while_proxy` | [`peer`], [`failure`] |
//! | `upstream_request_filter`, `request_body_filter` | [`upstream_request`] |
//! | `upstream_response_filter`, `response_filter` | [`response`] |
//! | `response_body_filter` | [`meter`] |
//! | `fail_to_proxy` | [`failure`] |
//! | `logging` | [`finish`] |
//!
//! [`record`] makes what is written down of a request, for whichever of them ends it.

mod attempt;
mod body;
mod ctx;
mod downstream;
mod failure;
mod finish;
mod judge;
mod meter;
mod peer;
mod pick;
mod record;
mod reply;
mod request;
mod response;
mod route;
mod upstream_request;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora_core::{Error, Result, modules::http::HttpModules, upstreams::peer::HttpPeer};
use pingora_proxy::{FailToProxy, ProxyHttp, ProxyWarnLogContext, Session};

use self::ctx::RequestCtx;
use crate::shared::Shared;

/// The gateway as Pingora sees it.
#[derive(Clone, Debug)]
pub struct Gateway {
    shared: Arc<Shared>,
}

impl Gateway {
    /// A gateway over this world.
    #[must_use]
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

#[async_trait]
impl ProxyHttp for Gateway {
    // Pingora hands it from future to future by value.
    type CTX = Box<RequestCtx>;

    fn new_ctx(&self) -> Self::CTX {
        Box::new(RequestCtx::new(self.shared.in_flight.hold(), self.shared.journal.clone()))
    }

    /// None: the default compression module costs every request and would only get in the way of streams.
    fn init_downstream_modules(&self, _modules: &mut HttpModules) {}

    async fn early_request_filter(&self, session: &mut Session, ctx: &mut Self::CTX) -> Result<()> {
        request::begin(&self.shared, session, ctx);
        Ok(())
    }

    async fn request_filter(&self, session: &mut Session, ctx: &mut Self::CTX) -> Result<bool> {
        request::filter(&self.shared, session, ctx).await
    }

    async fn upstream_peer(&self, _session: &mut Session, ctx: &mut Self::CTX) -> Result<Box<HttpPeer>> {
        peer::next(&self.shared, ctx).await
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        upstream_request: &mut RequestHeader,
        ctx: &mut Self::CTX,
    ) -> Result<()> {
        upstream_request::filter(&self.shared, session, upstream_request, ctx)
    }

    async fn request_body_filter(
        &self,
        _session: &mut Session,
        body: &mut Option<Bytes>,
        end_of_stream: bool,
        ctx: &mut Self::CTX,
    ) -> Result<()> {
        upstream_request::body(body, end_of_stream, ctx);
        Ok(())
    }

    async fn upstream_response_filter(
        &self,
        _session: &mut Session,
        upstream_response: &mut ResponseHeader,
        ctx: &mut Self::CTX,
    ) -> Result<()> {
        response::classify(&self.shared, upstream_response, ctx)
    }

    async fn response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        ctx: &mut Self::CTX,
    ) -> Result<()> {
        response::filter(session, response, ctx)
    }

    fn response_body_filter(
        &self,
        session: &mut Session,
        body: &mut Option<Bytes>,
        end_of_stream: bool,
        ctx: &mut Self::CTX,
    ) -> Result<Option<Duration>> {
        meter::filter(&self.shared, session, body, end_of_stream, ctx).map(|()| None)
    }

    fn fail_to_connect(
        &self,
        _session: &mut Session,
        _peer: &HttpPeer,
        ctx: &mut Self::CTX,
        e: Box<Error>,
    ) -> Box<Error> {
        failure::to_connect(&self.shared, ctx, e)
    }

    fn error_while_proxy(
        &self,
        _peer: &HttpPeer,
        session: &mut Session,
        e: Box<Error>,
        ctx: &mut Self::CTX,
        client_reused: bool,
    ) -> Box<Error> {
        failure::while_proxying(&self.shared, session, ctx, e, client_reused)
    }

    async fn fail_to_proxy(&self, session: &mut Session, e: &Error, ctx: &mut Self::CTX) -> FailToProxy {
        failure::answer(&self.shared, session, ctx, e).await
    }

    async fn logging(&self, session: &mut Session, e: Option<&Error>, ctx: &mut Self::CTX) {
        finish::finish(&self.shared, session, ctx, e);
    }

    /// Failures are told once, in the access log, with the outcome of the whole request.
    fn suppress_error_log(&self, _session: &Session, _ctx: &Self::CTX, _error: &Error) -> bool {
        true
    }

    fn suppress_proxy_warn_log(
        &self,
        _session: &Session,
        _ctx: &Self::CTX,
        _error: &Error,
        _context: ProxyWarnLogContext,
    ) -> bool {
        true
    }
}
