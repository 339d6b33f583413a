//! Clients that frame a request as they are told, over HTTP/1.1 and HTTP/2, in the clear and over TLS.
//!
//! A usual client decides the framing itself; whether a body arrives must not depend on that, so these leave it to the
//! test: with `content-length`, chunked, or (HTTP/2) as frames without a length. Responses can be read whole or chunk by
//! chunk with the time of arrival, and tell a clean end from a broken one.
//!
//! ```ignore
//! let answer = h1(addr).post("/v1/chat/completions").bearer(key).body_chunked(body, 1000).send().await?.whole().await;
//! ```

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::stream;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    client::conn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

/// Whatever went wrong.
pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;
type Body = UnsyncBoxBody<Bytes, Error>;

/// HTTP/1.1 in the clear.
pub(crate) fn h1(addr: SocketAddr) -> Target {
    Target { addr, version: Version::H1, ca: None }
}

/// HTTP/2 in the clear, without asking first.
pub(crate) fn h2(addr: SocketAddr) -> Target {
    Target { addr, version: Version::H2, ca: None }
}

/// Sends these bytes and gives everything that comes back until the connection ends.
pub(crate) async fn raw(addr: SocketAddr, bytes: &str) -> String {
    let mut stream = TcpStream::connect(addr).await.expect("a connection");
    stream.write_all(bytes.as_bytes()).await.expect("the request is sent");
    let mut seen = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut seen)).await;
    drop(read.expect("the connection ends"));
    String::from_utf8_lossy(&seen).into_owned()
}

/// A server, and how it is spoken to.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    addr: SocketAddr,
    version: Version,
    ca: Option<Arc<PrivateCa>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    H1,
    H2,
}

impl Target {
    /// The same over TLS as `localhost`, trusting `ca` alone and offering only this version by ALPN.
    pub(crate) fn tls(self, ca: &Arc<PrivateCa>) -> Self {
        Self { ca: Some(Arc::clone(ca)), ..self }
    }

    /// A GET without a body.
    pub(crate) fn get(&self, path: &str) -> Request {
        self.request(Method::GET, path)
    }

    /// A POST, still without a body.
    pub(crate) fn post(&self, path: &str) -> Request {
        self.request(Method::POST, path)
    }

    fn request(&self, method: Method, path: &str) -> Request {
        let body = Framed::None;
        Request { target: self.clone(), method, path: path.to_owned(), headers: HeaderMap::new(), body }
    }

    /// Opens a connection, for several requests one after the other.
    pub(crate) async fn connect(&self) -> Result<Connection, Error> {
        let stream = TcpStream::connect(self.addr).await?;
        stream.set_nodelay(true)?;
        let Some(ca) = &self.ca else { return Connection::handshake(stream, self.version).await };
        let mut config = ca.client_config()?;
        config.alpn_protocols = vec![match self.version {
            Version::H1 => b"http/1.1".to_vec(),
            Version::H2 => b"h2".to_vec(),
        }];
        let name = ServerName::try_from("localhost")?;
        let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
        Connection::handshake(stream, self.version).await
    }
}

/// An open connection.
pub(crate) enum Connection {
    H1(conn::http1::SendRequest<Body>),
    H2(conn::http2::SendRequest<Body>),
}

impl Connection {
    async fn handshake<S>(stream: S, version: Version) -> Result<Self, Error>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let io = TokioIo::new(stream);
        // The connection's task ends with its last handle; its errors show on the request that they hit.
        match version {
            Version::H1 => {
                let (send, connection) = conn::http1::handshake(io).await?;
                tokio::spawn(async { drop(connection.await) });
                Ok(Self::H1(send))
            }
            Version::H2 => {
                let (send, connection) = conn::http2::handshake(TokioExecutor::new(), io).await?;
                tokio::spawn(async { drop(connection.await) });
                Ok(Self::H2(send))
            }
        }
    }

    /// Sends a request and waits for the header of its answer.
    pub(crate) async fn send(&mut self, request: Request) -> Result<Response, Error> {
        let request = request.build()?;
        let sent = Instant::now();
        let response = match self {
            Self::H1(send) => {
                send.ready().await?;
                send.send_request(request).await?
            }
            Self::H2(send) => {
                send.ready().await?;
                send.send_request(request).await?
            }
        };
        let (head, body) = response.into_parts();
        Ok(Response { status: head.status, headers: head.headers, body, sent })
    }
}

/// A request that is being put together.
#[derive(Debug)]
pub(crate) struct Request {
    target: Target,
    method: Method,
    path: String,
    headers: HeaderMap,
    body: Framed,
}

/// A body with its framing.
#[derive(Debug)]
enum Framed {
    None,
    Length(Bytes),
    Chunked(Bytes, usize),
}

impl Request {
    /// Adds a header. Panics on a name or value that cannot be sent.
    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        let name = HeaderName::try_from(name).expect("a header name");
        self.headers.append(name, HeaderValue::try_from(value).expect("a header value"));
        self
    }

    /// Presents a key.
    pub(crate) fn bearer(self, key: &str) -> Self {
        self.header("authorization", &format!("Bearer {key}"))
    }

    /// A body with `content-length`.
    pub(crate) fn body_content_length(mut self, body: impl Into<Bytes>) -> Self {
        self.body = Framed::Length(body.into());
        self
    }

    /// A body without a length, in chunks of `size` bytes: chunked on HTTP/1.1, plain frames on HTTP/2.
    pub(crate) fn body_chunked(mut self, body: impl Into<Bytes>, size: usize) -> Self {
        self.body = Framed::Chunked(body.into(), size);
        self
    }

    /// Sends it on a connection of its own.
    pub(crate) async fn send(self) -> Result<Response, Error> {
        self.target.connect().await?.send(self).await
    }

    fn build(self) -> Result<http::Request<Body>, Error> {
        let Self { target, method, path, headers, body } = self;
        let host =
            if target.ca.is_some() { format!("localhost:{}", target.addr.port()) } else { target.addr.to_string() };
        let mut request = http::Request::builder().method(method);
        request = match target.version {
            Version::H1 => request.uri(path).header("host", host),
            Version::H2 => {
                let scheme = if target.ca.is_some() { "https" } else { "http" };
                request.uri(format!("{scheme}://{host}{path}"))
            }
        };
        if let Some(all) = request.headers_mut() {
            all.extend(headers);
        }
        Ok(request.body(body.into_body())?)
    }
}

impl Framed {
    fn into_body(self) -> Body {
        let whole = |bytes| Full::new(bytes).map_err(|never| match never {}).boxed_unsync();
        match self {
            Self::None => whole(Bytes::new()),
            Self::Length(bytes) => whole(bytes),
            Self::Chunked(bytes, size) => {
                let starts = (0..bytes.len()).step_by(size.max(1));
                let chunks = starts.map(move |at| bytes.slice(at..bytes.len().min(at.saturating_add(size.max(1)))));
                StreamBody::new(stream::iter(chunks.map(|chunk| Ok(Frame::data(chunk))))).boxed_unsync()
            }
        }
    }
}

/// An answer whose body may still be on its way.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    body: Incoming,
    sent: Instant,
}

/// A part of a body as it arrived.
#[derive(Debug)]
pub(crate) struct Chunk {
    pub(crate) bytes: Bytes,
    /// Since the request was sent.
    pub(crate) at: Duration,
}

impl Response {
    /// The next part; `None` at a clean end.
    pub(crate) async fn chunk(&mut self) -> Option<Result<Chunk, Error>> {
        loop {
            match self.body.frame().await? {
                Err(error) => return Some(Err(error.into())),
                Ok(frame) => {
                    if let Ok(bytes) = frame.into_data() {
                        return Some(Ok(Chunk { bytes, at: self.sent.elapsed() }));
                    }
                }
            }
        }
    }

    /// Everything, as far as it came.
    pub(crate) async fn whole(mut self) -> Whole {
        let (mut body, mut error) = (Vec::new(), None);
        while let Some(chunk) = self.chunk().await {
            match chunk {
                Ok(chunk) => body.extend_from_slice(&chunk.bytes),
                Err(broken) => {
                    error = Some(broken.to_string());
                    break;
                }
            }
        }
        Whole { status: self.status, headers: self.headers, body: Bytes::from(body), error }
    }
}

/// An answer that has ended.
#[derive(Debug)]
pub(crate) struct Whole {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    /// Why it ended early; `None`: it did not.
    pub(crate) error: Option<String>,
}

impl Whole {
    /// The header `name`, if it is there and is text.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The body as JSON. Panics, showing it, if it is something else.
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error} in {}", String::from_utf8_lossy(&self.body)))
    }
}

/// A certificate authority that nobody knows, and a certificate of its for `localhost` and 127.0.0.1.
#[derive(Debug)]
pub(crate) struct PrivateCa {
    /// The authority's certificate, for clients.
    pub(crate) ca_pem: String,
    /// The server's certificate.
    pub(crate) cert_pem: String,
    /// The server's private key.
    pub(crate) key_pem: String,
    ca_der: rustls::pki_types::CertificateDer<'static>,
}

impl PrivateCa {
    /// Makes one.
    pub(crate) fn new() -> Result<Arc<Self>, Error> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "tollgate test authority");
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let key = KeyPair::generate()?;
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let cert = CertificateParams::new(names)?.signed_by(&key, &authority)?;
        Ok(Arc::new(Self {
            ca_pem: authority.pem(),
            cert_pem: cert.pem(),
            key_pem: key.serialize_pem(),
            ca_der: authority.der().clone(),
        }))
    }

    /// A client that trusts nobody else.
    fn client_config(&self) -> Result<ClientConfig, Error> {
        let mut roots = RootCertStore::empty();
        roots.add(self.ca_der.clone())?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        Ok(builder.with_root_certificates(roots).with_no_client_auth())
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use hyper::{server, service::service_fn};
    use rustls::{
        ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    };
    use serde_json::{Value, json};
    use tokio::net::TcpListener;
    use tokio_rustls::TlsAcceptor;

    use super::*;

    /// A server that answers how it was asked, over HTTP/2, or HTTP/1.1 if `alpn` says so.
    async fn serve_echo(tls: Option<(&PrivateCa, &[u8])>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let is_h1 = tls.is_some_and(|(_, alpn)| alpn == b"http/1.1");
        let acceptor = tls.map(|(ca, alpn)| acceptor(ca, alpn));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                match &acceptor {
                    None => drop(tokio::spawn(echo(stream, is_h1))),
                    Some(acceptor) => {
                        if let Ok(stream) = acceptor.accept(stream).await {
                            tokio::spawn(echo(stream, is_h1));
                        }
                    }
                }
            }
        });
        addr
    }

    fn acceptor(ca: &PrivateCa, alpn: &[u8]) -> TlsAcceptor {
        let cert = CertificateDer::from_pem_slice(ca.cert_pem.as_bytes()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(ca.key_pem.as_bytes()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let mut config = builder.with_no_client_auth().with_single_cert(vec![cert], key).unwrap();
        config.alpn_protocols = vec![alpn.to_vec()];
        TlsAcceptor::from(Arc::new(config))
    }

    async fn echo<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(stream: S, is_h1: bool) {
        let answer = service_fn(async |request: http::Request<Incoming>| {
            let (head, body) = request.into_parts();
            let text = |name: &str| head.headers.get(name).map(|value| value.to_str().unwrap().to_owned());
            let answer = json!({
                "version": format!("{:?}", head.version),
                "content-length": text("content-length"),
                "transfer-encoding": text("transfer-encoding"),
                "authorization": text("authorization"),
                "bytes": body.collect().await.unwrap().to_bytes().len(),
            });
            Ok::<_, Infallible>(http::Response::new(Full::new(Bytes::from(answer.to_string()))))
        });
        let io = TokioIo::new(stream);
        if is_h1 {
            drop(server::conn::http1::Builder::new().serve_connection(io, answer).await);
        } else {
            drop(server::conn::http2::Builder::new(TokioExecutor::new()).serve_connection(io, answer).await);
        }
    }

    async fn both_framings(target: &Target) -> (Value, Value) {
        let body = vec![b'x'; 300_000];
        let with = target.post("/").bearer("k").body_content_length(body.clone()).send().await.unwrap();
        let without = target.post("/").body_chunked(body, 10_000).send().await.unwrap();
        (with.whole().await.json(), without.whole().await.json())
    }

    #[tokio::test]
    async fn http2_sends_bodies_with_and_without_a_length() {
        let addr = serve_echo(None).await;
        let (with, without) = both_framings(&h2(addr)).await;
        assert_eq!((&with["version"], &with["content-length"]), (&json!("HTTP/2.0"), &json!("300000")));
        assert_eq!(with["authorization"], "Bearer k");
        assert_eq!((&without["content-length"], &without["bytes"]), (&Value::Null, &json!(300_000)));
    }

    #[tokio::test]
    async fn both_versions_work_over_tls_with_a_private_ca() {
        let ca = PrivateCa::new().unwrap();
        let (with, without) = both_framings(&h2(serve_echo(Some((&ca, b"h2"))).await).tls(&ca)).await;
        assert_eq!((&with["version"], &without["bytes"]), (&json!("HTTP/2.0"), &json!(300_000)));
        let (with, without) = both_framings(&h1(serve_echo(Some((&ca, b"http/1.1"))).await).tls(&ca)).await;
        assert_eq!((&with["version"], &with["content-length"]), (&json!("HTTP/1.1"), &json!("300000")));
        assert_eq!((&without["transfer-encoding"], &without["bytes"]), (&json!("chunked"), &json!(300_000)));
    }

    #[tokio::test]
    async fn another_authority_is_not_trusted() {
        let (ca, other) = (PrivateCa::new().unwrap(), PrivateCa::new().unwrap());
        assert_ne!(ca.ca_pem, other.ca_pem);
        let addr = serve_echo(Some((&ca, b"h2"))).await;
        assert!(h2(addr).tls(&other).get("/").send().await.is_err());
    }
}
