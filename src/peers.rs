//! How to speak to each upstream: addresses, certificate authorities, timeouts, and what every request to it carries.
//!
//! What is the same for all requests is made once: the values of headers, the paths of endpoints. The value that carries the
//! credential lives in one piece of memory, which is wiped when the last request lets go of it.
//!
//! Pingora's `HttpPeer::new` resolves names with a blocking call, on the thread that serves requests. Here a name is
//! resolved by Tokio's resolver and kept for [`FRESH`]; when a later look-up fails, the old addresses stay in use, because
//! a name server that is away says nothing about the upstream. Several addresses are used in turn.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use arc_swap::ArcSwapOption;
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Uri};
use pingora_core::{
    protocols::{TcpKeepalive, tls::CaType},
    upstreams::peer::HttpPeer,
    utils::tls::{WrappedX509, parse_x509},
};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use tollgate_core::{
    azure, openai,
    route::ROUTES,
    upstream::{Account, BaseUrl, Timeouts, Upstream, UpstreamKind},
};
use zeroize::Zeroizing;

/// How long resolved addresses are used before the name is looked up again.
const FRESH: Duration = Duration::from_secs(30);
/// How long a look-up may take when there are addresses from before.
const LOOKUP_WITH_SPARE: Duration = Duration::from_millis(500);
/// How long an idle connection to an upstream is kept. OpenAI's edge closes them after some minutes.
const IDLE: Duration = Duration::from_secs(90);

/// Connection settings of every member of a snapshot, by its index.
#[derive(Debug)]
pub struct Peers(Vec<Arc<Peer>>);

impl Peers {
    /// Takes the peers in the order of the snapshot's members.
    #[must_use]
    pub fn new(peers: Vec<Arc<Peer>>) -> Self {
        Self(peers)
    }

    /// The settings of one member.
    #[must_use]
    pub fn get(&self, index: usize) -> &Arc<Peer> {
        &self.0[index]
    }
}

/// How to connect to one upstream.
pub struct Peer {
    url: BaseUrl,
    ca_pem: Option<String>,
    timeouts: Timeouts,
    account: Account,
    template: HttpPeer,
    host: HeaderValue,
    credential: (HeaderName, HeaderValue),
    targets: Targets,
    /// Where there is nothing to resolve.
    fixed: Option<SocketAddr>,
    resolved: ArcSwapOption<Resolved>,
    turn: AtomicUsize,
}

#[derive(Debug)]
struct Resolved {
    addresses: Vec<SocketAddr>,
    at: Instant,
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peer").field("url", &self.url).finish_non_exhaustive()
    }
}

impl Peer {
    /// Prepares the connection settings of `upstream`.
    ///
    /// # Errors
    /// If its certificate authorities cannot be parsed.
    pub fn try_new(upstream: &Upstream) -> anyhow::Result<Self> {
        let ca = upstream.ca_pem.as_deref().map(parse_authorities).transpose();
        let ca = ca.with_context(|| format!("upstream {:?}: ca_file", upstream.name))?;
        let timeouts = upstream.handling.timeouts;
        Ok(Self {
            url: upstream.base_url.clone(),
            ca_pem: upstream.ca_pem.clone(),
            timeouts,
            account: upstream.account(),
            host: HeaderValue::from_str(&upstream.base_url.authority).context("base_url: the host")?,
            credential: credential(upstream)?,
            targets: Targets::try_new(upstream)?,
            template: template(&upstream.base_url, ca, timeouts),
            fixed: upstream.base_url.host.parse().ok().map(|ip: IpAddr| SocketAddr::new(ip, upstream.base_url.port)),
            resolved: ArcSwapOption::empty(),
            turn: AtomicUsize::new(0),
        })
    }

    /// Does this still describe how to connect to `upstream`?
    #[must_use]
    pub fn fits(&self, upstream: &Upstream) -> bool {
        self.url == upstream.base_url
            && self.timeouts == upstream.handling.timeouts
            && self.ca_pem == upstream.ca_pem
            && self.account == upstream.account()
            && self.targets.fits(upstream)
    }

    /// Value of the `host` header.
    #[must_use]
    pub fn host(&self) -> &HeaderValue {
        &self.host
    }

    /// The header that carries the credential.
    #[must_use]
    pub fn credential(&self) -> (HeaderName, HeaderValue) {
        self.credential.clone()
    }

    /// Path and query of `endpoint` (as the route table has it) for `model`.
    ///
    /// # Errors
    /// If the two make no path: a defect, since both were checked when they were read.
    pub fn target(&self, endpoint: &'static str, model: &str) -> anyhow::Result<Uri> {
        self.targets.of(endpoint, model)
    }

    /// What Pingora needs to connect. `left`: how long the request may still take, if not as long as it likes.
    ///
    /// # Errors
    /// If the upstream's name cannot be resolved and never was.
    pub async fn connect_to(&self, left: Option<Duration>) -> std::io::Result<Box<HttpPeer>> {
        let mut peer = Box::new(self.template.clone());
        peer._address = pingora_core::protocols::l4::socket::SocketAddr::Inet(self.address().await?);
        let Timeouts { connect, total, .. } = self.timeouts;
        let connect = [Some(connect), left, total].into_iter().flatten().min();
        let options = &mut peer.options;
        options.connection_timeout = connect;
        options.total_connection_timeout = connect;
        Ok(peer)
    }

    /// How long the first byte may be waited for, if that is less than the timeout of every read says. `left`: how long the
    /// request may still take.
    #[must_use]
    pub fn first_byte_within(&self, left: Option<Duration>) -> Option<Duration> {
        let Timeouts { first_byte, total, .. } = self.timeouts;
        let first_byte = [Some(first_byte), left, total].into_iter().flatten().min();
        first_byte.filter(|first_byte| *first_byte < read_timeout(self.timeouts))
    }

    async fn address(&self) -> std::io::Result<SocketAddr> {
        if let Some(address) = self.fixed {
            return Ok(address);
        }
        let known = self.resolved.load_full();
        if let Some(known) = known.as_ref().filter(|known| known.at.elapsed() < FRESH) {
            return Ok(self.next_of(&known.addresses));
        }
        let patience =
            if known.is_some() { LOOKUP_WITH_SPARE.min(self.timeouts.connect) } else { self.timeouts.connect };
        let looking_up = tokio::net::lookup_host((self.url.host.as_str(), self.url.port));
        let looked_up = tokio::time::timeout(patience, looking_up).await.unwrap_or_else(|late| Err(late.into()));
        match (looked_up.map(Iterator::collect::<Vec<_>>), known) {
            (Ok(addresses), _) if !addresses.is_empty() => Ok(self.keep(addresses)),
            (_, Some(known)) => Ok(self.keep(known.addresses.clone())),
            (Err(error), None) => Err(error),
            (Ok(_), None) => Err(std::io::Error::new(std::io::ErrorKind::NotFound, "the name has no address")),
        }
    }

    fn keep(&self, addresses: Vec<SocketAddr>) -> SocketAddr {
        let first = self.next_of(&addresses);
        self.resolved.store(Some(Arc::new(Resolved { addresses, at: Instant::now() })));
        first
    }

    fn next_of(&self, addresses: &[SocketAddr]) -> SocketAddr {
        addresses[self.turn.fetch_add(1, Ordering::Relaxed) % addresses.len()]
    }
}

/// Paths at an upstream.
struct Targets {
    kind: UpstreamKind,
    base_path: String,
    api_version: Option<String>,
    /// Those that are the same for every model.
    known: Vec<(&'static str, Uri)>,
}

impl Targets {
    fn try_new(upstream: &Upstream) -> anyhow::Result<Self> {
        let (base_path, api_version) = (upstream.base_url.path.clone(), upstream.api_version.clone());
        let mut targets = Self { kind: upstream.kind, base_path, api_version, known: Vec::new() };
        if targets.kind == UpstreamKind::OpenAi {
            let paths = ROUTES.iter().map(|route| route.path);
            targets.known = paths.map(|path| Ok((path, targets.of(path, "")?))).collect::<anyhow::Result<_>>()?;
        }
        Ok(targets)
    }

    fn fits(&self, upstream: &Upstream) -> bool {
        self.kind == upstream.kind && self.api_version == upstream.api_version
    }

    fn of(&self, endpoint: &'static str, model: &str) -> anyhow::Result<Uri> {
        if let Some((_, uri)) = self.known.iter().find(|(known, _)| *known == endpoint) {
            return Ok(uri.clone());
        }
        let path = match self.kind {
            UpstreamKind::OpenAi => openai::path(&self.base_path, endpoint),
            UpstreamKind::Azure => azure::path(&self.base_path, endpoint, model, self.api_version.as_deref()),
        };
        path.parse().with_context(|| format!("{path:?} is no path"))
    }
}

/// The header that carries the credential, wiped with its last copy.
fn credential(upstream: &Upstream) -> anyhow::Result<(HeaderName, HeaderValue)> {
    let (name, before) = azure::auth_header(upstream.kind);
    let text = Zeroizing::new(format!("{before}{}", upstream.credential.expose()).into_bytes());
    let value = HeaderValue::from_maybe_shared(Bytes::from_owner(text));
    let mut value = value.map_err(|_| anyhow::anyhow!("the credential cannot be sent in a header"))?;
    value.set_sensitive(true);
    Ok((name, value))
}

/// Pingora has one timeout for every read, of the head as of the body.
fn read_timeout(timeouts: Timeouts) -> Duration {
    timeouts.first_byte.max(timeouts.chunk)
}

/// What is the same for every connection.
fn template(url: &BaseUrl, ca: Option<Arc<CaType>>, timeouts: Timeouts) -> HttpPeer {
    let nowhere = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), url.port);
    let mut peer = HttpPeer::new(nowhere, url.tls, url.host.clone());
    let options = &mut peer.options;
    options.read_timeout = Some(read_timeout(timeouts));
    options.write_timeout = Some(timeouts.first_byte);
    options.idle_timeout = Some(IDLE);
    options.ca = ca;
    options.tcp_keepalive = Some(TcpKeepalive {
        idle: Duration::from_secs(60),
        interval: Duration::from_secs(15),
        count: 4,
        #[cfg(target_os = "linux")]
        user_timeout: Duration::ZERO,
    });
    peer
}

fn parse_authorities(pem: &str) -> anyhow::Result<Arc<CaType>> {
    let certificates = CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>()?;
    anyhow::ensure!(!certificates.is_empty(), "holds no certificate in PEM format");
    let mut roots = rustls::RootCertStore::empty();
    certificates.iter().try_for_each(|der| roots.add(der.clone()))?;
    Ok(certificates.iter().map(|der| WrappedX509::new(der.to_vec(), parse_x509)).collect())
}
