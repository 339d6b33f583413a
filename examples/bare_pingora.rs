//! The yardstick: the least one can write to proxy HTTP with Pingora, built and run with Pingora's defaults.
//!
//! It picks one upstream and does nothing else: no keys, no limits, no accounting, no tuning, the system's
//! allocator. `benches/side_by_side` runs it beside the gateway, so that "what governance costs" is a ratio of two
//! processes on the same machine in the same minute, and not a number from somebody else's hardware.
//! Keep it naive: each trick that it learns makes the gateway look dearer than it is against what people would write.
//!
//! Usage: `bare_pingora LISTEN_ADDR UPSTREAM_ADDR` (one worker thread, Pingora's own default).

use async_trait::async_trait;
use pingora_core::server::Server;
use pingora_core::server::configuration::ServerConf;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_proxy::{ProxyHttp, Session};
use std::net::SocketAddr;

struct PassThrough {
    upstream: SocketAddr,
}

#[async_trait]
impl ProxyHttp for PassThrough {
    type CTX = ();

    fn new_ctx(&self) -> Self::CTX {}

    async fn upstream_peer(&self, _session: &mut Session, _ctx: &mut ()) -> pingora_core::Result<Box<HttpPeer>> {
        Ok(Box::new(HttpPeer::new(self.upstream, false, String::new())))
    }
}

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(listen), Some(upstream)) = (args.next(), args.next()) else {
        anyhow::bail!("usage: bare_pingora LISTEN_ADDR UPSTREAM_ADDR");
    };
    let pass_through = PassThrough { upstream: upstream.parse()? };

    let mut server = Server::new_with_opt_and_conf(None, ServerConf::default());
    server.bootstrap();
    let mut service = pingora_proxy::http_proxy_service(&server.configuration, pass_through);
    service.add_tcp(&listen);
    server.add_service(service);
    server.run_forever()
}
