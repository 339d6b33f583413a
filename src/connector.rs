//! Connections to upstreams that send a request in one piece.
//!
//! Pingora writes the head of a request, flushes, then writes its body and flushes again: two system calls, two packets,
//! and over TLS two records. Measured, the second one costs a tenth of all the CPU that a request takes. [`OnePiece`] holds
//! the head back until the body has come, or until the proxy wants to read the answer, which shows that no body will.
//!
//! Everything else stays Pingora's: its connector makes the connection (names, TLS, timeouts), its pool keeps it, its
//! HTTP/1.1 client speaks on it. The way in is Pingora's seam for custom protocols: a connector that is asked for a
//! session may return a plain stream instead, and HTTP/1.1 goes over that.

use std::{
    fmt,
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use async_trait::async_trait;
use once_cell::sync::Lazy;
use pingora_core::{
    Result,
    connectors::{
        ConnectorOptions, TransportConnector,
        http::custom::{Connection, Connector},
    },
    protocols::{
        ALPN, GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, Stream,
        TimingDigest, UniqueID, UniqueIDType,
        raw_connect::ProxyDigest,
        tls::{CustomALPN, SslDigest, TlsRef},
    },
    upstreams::peer::Peer,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// How much is held back at the most. A larger body goes on its own; what one more write costs then is nothing beside it.
const HELD: usize = 16 * 1024;

/// What makes Pingora ask [`OnePieceConnector`]. Never offered to an upstream.
pub static BY_CONNECTOR: Lazy<ALPN> = Lazy::new(|| ALPN::Custom(CustomALPN::new(b"tollgate".to_vec())));

/// Makes connections as Pingora does, and wraps them.
pub struct OnePieceConnector(TransportConnector);

impl OnePieceConnector {
    /// A connector with these options.
    #[must_use]
    pub fn new(options: ConnectorOptions) -> Self {
        Self(TransportConnector::new(Some(options)))
    }
}

#[async_trait]
impl Connector for OnePieceConnector {
    type Session = ();

    async fn get_http_session<P: Peer + Send + Sync + 'static>(&self, peer: &P) -> Result<(Connection<()>, bool)> {
        let mut peer = peer.clone();
        if let Some(options) = peer.get_mut_peer_options() {
            options.alpn = ALPN::H1;
        }
        let stream = self.0.new_stream(&peer).await?;
        Ok((Connection::Stream(Box::new(OnePiece::new(stream))), false))
    }

    /// Never: what is kept for reuse is in Pingora's pool of HTTP/1.1 connections.
    async fn reused_http_session<P: Peer + Send + Sync + 'static>(&self, _peer: &P) -> Option<()> {
        None
    }

    async fn release_http_session<P: Peer + Send + Sync + 'static>(
        &self,
        _session: (),
        _peer: &P,
        _idle_timeout: Option<Duration>,
    ) {
    }
}

/// How far the request is that is being written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// Nothing of it was written.
    Fresh,
    /// Its head is held back.
    Head,
    /// The answer is wanted, and the other half of the proxy has its turn to write the body first.
    LastCall,
    /// The body has begun, or there is none.
    Sending,
}

/// A stream that holds the first write back until the second one has come.
struct OnePiece {
    inner: Stream,
    progress: Progress,
    held: Vec<u8>,
    sent: usize,
}

impl OnePiece {
    fn new(inner: Stream) -> Self {
        Self { inner, progress: Progress::Fresh, held: Vec::new(), sent: 0 }
    }

    /// Writes what is held back.
    fn poll_release(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.held.len() {
            match ready!(Pin::new(&mut self.inner).poll_write(cx, &self.held[self.sent..]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.sent += written,
            }
        }
        self.held.clear();
        self.sent = 0;
        Poll::Ready(Ok(()))
    }

    /// May these bytes be added to what is held back?
    fn holds(&self, more: usize) -> bool {
        self.progress != Progress::Sending && self.sent == 0 && self.held.len() + more <= HELD
    }
}

impl fmt::Debug for OnePiece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not what is held back: a credential is in it.
        f.debug_struct("OnePiece").field("progress", &self.progress).finish_non_exhaustive()
    }
}

impl AsyncRead for OnePiece {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.progress {
            Progress::Fresh => {}
            Progress::Head => {
                self.progress = Progress::LastCall;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Progress::LastCall | Progress::Sending if self.held.is_empty() => {}
            Progress::LastCall | Progress::Sending => {
                ready!(self.poll_release(cx))?;
                ready!(Pin::new(&mut self.inner).poll_flush(cx))?;
            }
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buf))?;
        if buf.filled().len() > before {
            self.progress = Progress::Fresh;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for OnePiece {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.holds(buf.len()) {
            self.held.extend_from_slice(buf);
            self.progress = if self.progress == Progress::Fresh { Progress::Head } else { Progress::Sending };
            return Poll::Ready(Ok(buf.len()));
        }
        self.progress = Progress::Sending;
        ready!(self.poll_release(cx))?;
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if matches!(self.progress, Progress::Head | Progress::LastCall) {
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_release(cx))?;
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_release(cx))?;
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let first = bufs.iter().find(|buf| !buf.is_empty()).map_or(&[][..], |buf| buf);
        self.poll_write(cx, first)
    }
}

#[async_trait]
impl Shutdown for OnePiece {
    async fn shutdown(&mut self) {
        self.inner.shutdown().await;
    }
}

#[async_trait]
impl Peek for OnePiece {
    async fn try_peek(&mut self, buf: &mut [u8]) -> io::Result<bool> {
        self.inner.try_peek(buf).await
    }
}

impl UniqueID for OnePiece {
    fn id(&self) -> UniqueIDType {
        self.inner.id()
    }
}

impl Ssl for OnePiece {
    fn get_ssl(&self) -> Option<&TlsRef> {
        self.inner.get_ssl()
    }

    fn get_ssl_digest(&self) -> Option<Arc<SslDigest>> {
        self.inner.get_ssl_digest()
    }

    fn selected_alpn_proto(&self) -> Option<ALPN> {
        self.inner.selected_alpn_proto()
    }
}

impl GetTimingDigest for OnePiece {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        self.inner.get_timing_digest()
    }

    fn get_read_pending_time(&self) -> Duration {
        self.inner.get_read_pending_time()
    }

    fn get_write_pending_time(&self) -> Duration {
        self.inner.get_write_pending_time()
    }
}

impl GetProxyDigest for OnePiece {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        self.inner.get_proxy_digest()
    }

    fn set_proxy_digest(&mut self, digest: ProxyDigest) {
        self.inner.set_proxy_digest(digest);
    }
}

impl GetSocketDigest for OnePiece {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        self.inner.get_socket_digest()
    }

    fn set_socket_digest(&mut self, digest: SocketDigest) {
        self.inner.set_socket_digest(digest);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    const HEAD: &[u8] = b"POST / HTTP/1.1\r\ncontent-length: 4\r\n\r\n";

    fn stream() -> (OnePiece, DuplexStream) {
        let (near, far) = duplex(1 << 20);
        (OnePiece::new(Box::new(near)), far)
    }

    async fn read_some(far: &mut DuplexStream) -> Vec<u8> {
        let mut seen = vec![0; 1 << 20];
        let count = far.read(&mut seen).await.unwrap();
        seen.truncate(count);
        seen
    }

    async fn send(stream: &mut OnePiece, piece: &[u8]) {
        stream.write_all(piece).await.unwrap();
        stream.flush().await.unwrap();
    }

    #[tokio::test]
    async fn head_and_body_leave_together() {
        let (mut stream, mut far) = stream();
        for _ in 0..3 {
            send(&mut stream, HEAD).await;
            assert!(far.read_u8().now_or_never().is_none(), "the head waits for the body");
            send(&mut stream, b"body").await;
            assert_eq!(read_some(&mut far).await, [HEAD, b"body"].concat());
            // The same on a connection that is used again.
            far.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
            stream.read_exact(&mut [0; 19]).await.unwrap();
        }
    }

    #[tokio::test]
    async fn what_has_no_body_leaves_when_the_answer_is_wanted() {
        let (mut stream, mut far) = stream();
        send(&mut stream, HEAD).await;
        let answer = tokio::spawn(async move { stream.read_u8().await.unwrap() });
        assert_eq!(read_some(&mut far).await, HEAD);
        far.write_all(b"H").await.unwrap();
        assert_eq!(answer.await.unwrap(), b'H');
    }

    #[tokio::test]
    async fn a_body_larger_than_what_is_held_arrives_whole() {
        for size in [1, HELD - HEAD.len(), HELD - HEAD.len() + 1, HELD, 300_000] {
            let (mut stream, mut far) = stream();
            let body = vec![b'x'; size];
            send(&mut stream, HEAD).await;
            send(&mut stream, &body).await;
            AsyncWriteExt::shutdown(&mut stream).await.unwrap();
            drop(stream);
            let mut seen = Vec::new();
            far.read_to_end(&mut seen).await.unwrap();
            assert!(seen == [HEAD, &body].concat(), "{size}");
        }
    }

    #[tokio::test]
    async fn a_body_in_pieces_is_not_held_back_piece_by_piece() {
        let (mut stream, mut far) = stream();
        send(&mut stream, HEAD).await;
        send(&mut stream, b"bo").await;
        assert_eq!(read_some(&mut far).await, [HEAD, b"bo"].concat());
        send(&mut stream, b"dy").await;
        assert_eq!(read_some(&mut far).await, b"dy");
    }
}
