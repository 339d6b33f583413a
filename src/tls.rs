//! The TLS listener's certificate.
//!
//! Every handshake asks [`CertStore`] for its certificate, through rustls' own resolver: which one a client gets is decided
//! per connection, not when the listener is made.

use std::sync::Arc;

use anyhow::Context;
use pingora_core::{listeners::tls::TlsSettings, protocols::ALPN};
use rustls::{
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};

/// The certificate that handshakes get.
#[derive(Debug)]
pub struct CertStore(Arc<CertifiedKey>);

impl CertStore {
    /// A store that hands out `certified`.
    #[must_use]
    pub fn new(certified: Arc<CertifiedKey>) -> Self {
        Self(certified)
    }
}

impl ResolvesServerCert for CertStore {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

/// Settings of a TLS listener that offers HTTP/2 and HTTP/1.1 by ALPN and takes its certificate from `store`.
///
/// # Errors
/// If Pingora refuses the settings.
pub fn listener_settings(store: Arc<CertStore>) -> anyhow::Result<TlsSettings> {
    // The empty paths are never read: the resolver takes their place.
    let mut settings = TlsSettings::intermediate("", "").context("TLS settings")?;
    settings.set_cert_resolver(store);
    settings.set_alpn(ALPN::H2H1);
    Ok(settings)
}
