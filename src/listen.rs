//! Listening sockets, bound before the server starts.
//!
//! Pingora binds inside its services, where a port in use means thirty seconds of retries and then a panic. Here every
//! socket is bound first: a bad address is an error with a message, port 0 has a number before anyone connects, and the
//! sockets are handed to Pingora through the table that it keeps for upgrades.
//!
//! The listeners also have an end of their own: [`crate::drain`] closes them while requests under way go on.

use std::{
    net::{SocketAddr, TcpListener},
    os::fd::IntoRawFd,
};

use anyhow::Context;
use async_trait::async_trait;
use pingora_core::{
    listeners::tls::TlsSettings,
    server::{ListenFds, ShutdownWatch},
    services::{Service, listening},
};
use pingora_proxy::HttpProxy;
use tokio::sync::watch;

use crate::{connector::OnePieceConnector, proxy::Gateway};

/// Binds one address.
///
/// # Errors
/// Names the setting, the address and the reason.
pub fn bind(setting: &str, address: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).with_context(|| {
        format!("[server] {setting}: cannot listen on {address}; is another process using it, or is it not an address of this machine?")
    })
}

/// The data plane's listeners, as one service.
pub struct DataPlane {
    proxy: listening::Service<HttpProxy<Gateway, OnePieceConnector>>,
    bound: Vec<(SocketAddr, TcpListener)>,
    drain: watch::Receiver<bool>,
}

impl DataPlane {
    /// Wraps the proxy service; `drain` turns true when no more connections are to be taken.
    #[must_use]
    pub fn new(proxy: listening::Service<HttpProxy<Gateway, OnePieceConnector>>, drain: watch::Receiver<bool>) -> Self {
        Self { proxy, bound: Vec::new(), drain }
    }

    /// Adds a listener for HTTP/1.1 and HTTP/2 with prior knowledge.
    ///
    /// # Errors
    /// If the socket has no address.
    pub fn add_plain(&mut self, listener: TcpListener) -> anyhow::Result<SocketAddr> {
        let address = listener.local_addr()?;
        self.proxy.add_tcp(&address.to_string());
        self.bound.push((address, listener));
        Ok(address)
    }

    /// Adds a listener for TLS.
    ///
    /// # Errors
    /// If the socket has no address.
    pub fn add_tls(&mut self, listener: TcpListener, settings: TlsSettings) -> anyhow::Result<SocketAddr> {
        let address = listener.local_addr()?;
        self.proxy.add_tls_with_settings(&address.to_string(), None, settings);
        self.bound.push((address, listener));
        Ok(address)
    }
}

#[async_trait]
impl Service for DataPlane {
    async fn start_service(&mut self, fds: Option<ListenFds>, _shutdown: ShutdownWatch, listeners_per_fd: usize) {
        if let Some(fds) = &fds {
            let mut table = fds.lock();
            for (address, listener) in self.bound.drain(..) {
                if let Err(error) = listener.set_nonblocking(true) {
                    tracing::error!(%address, %error, "the listener cannot be used");
                }
                table.add(address.to_string(), listener.into_raw_fd());
            }
        }
        self.proxy.start_service(fds, self.drain.clone(), listeners_per_fd).await;
    }

    fn name(&self) -> &str {
        "data plane"
    }

    fn listen_addresses(&self) -> Option<Vec<String>> {
        Some(self.bound.iter().map(|(address, _)| address.to_string()).collect())
    }
}
