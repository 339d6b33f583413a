//! Puts the server together: the only place that knows all parts.
//!
//! Everything that can fail fails in [`Assembly::build`], before a request is accepted: the database, the Fernet keys,
//! the sockets, the certificate. [`Assembly::run`] then serves until it is told to stop.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use arc_swap::ArcSwap;
use pingora_core::{
    apps::HttpServerOptions,
    connectors::ConnectorOptions,
    server::{RunArgs, Server, configuration::ServerConf},
    services::background::background_service,
};
use pingora_proxy::{ProcessCustomSession, ProxyServiceBuilder};
use tokio::sync::{Notify, watch};
use tollgate_core::{
    price::book::PriceBook, redact::Redactor, retention::Kept, retry::Budget, secret::Secret, snapshot::Snapshot,
    upstream::Upstream,
};

use crate::{
    admin::Admin,
    config::{self, Audit, Config, CredentialSource, OnRedisDown, UpstreamSpec},
    connector::OnePieceConnector,
    content::{self, Contents},
    drain::{Drain, Stop},
    jobs::{
        self,
        content_writer::{self, ContentWriter},
        journal_keeper::JournalKeeper,
        limits::Limits,
        models::Models,
        probe::Probes,
        refresh::{Fixed, Refresh},
        retention::Retention,
        together::Together,
        token_counter::TokenCounter,
        usage_writer::{Calm, Hurried, UsageWriter},
    },
    journal::{self, Journal},
    limiter::{self, Limiter, gate::Gate},
    listen::{DataPlane, bind},
    metrics::Metrics,
    peers::Peers,
    proxy::Gateway,
    seal::Sealer,
    secrets::{self, FernetKeys},
    shared::{KeyDirectory, Notices, Settings, Shared, View},
    store::Store,
    tls,
};

/// How long the last usage may take to reach the database. What does not stays in the journal.
const LAST_FLUSH: Duration = Duration::from_secs(10);

/// Longer timeouts, in seconds, are left to Tokio. Pingora's own are cheaper, but remain until their time has come, whether
/// anybody still waits or not: some 350 bytes for each hundredth of a second in which one began, in each thread. That is
/// 3 MB for connections that are kept, and would be 20 MB for the ten minutes that the first byte may take.
const LONGEST_CHEAP_TIMEOUT_S: u64 = 90;

/// A server that is ready to run.
pub struct Assembly {
    server: Server,
    shared: Arc<Shared>,
    writer: Arc<UsageWriter>,
    content_writer: Arc<ContentWriter>,
    listeners: watch::Sender<bool>,
    grace: Duration,
    /// Where it listens.
    pub addresses: Addresses,
}

/// Where a server listens, port 0 resolved.
#[derive(Clone, Debug, Default)]
pub struct Addresses {
    /// Plain HTTP.
    pub plain: Vec<SocketAddr>,
    /// HTTPS.
    pub tls: Vec<SocketAddr>,
    /// The admin plane.
    pub admin: Option<SocketAddr>,
}

impl Assembly {
    /// Opens the database, learns what is in it, and binds every socket.
    ///
    /// # Errors
    /// What is wrong, with the setting it is about and the mend.
    pub fn build(config: Config) -> anyhow::Result<Self> {
        // Pools belong to the runtime they are made in; this one is gone before the server starts.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let Loaded { shared, refresh, writer, content_writer, limits } = runtime.block_on(load(&config))?;
        drop(runtime);
        let (listeners, drain) = watch::channel(false);
        let mut server = Server::new_with_opt_and_conf(None, server_conf(&config));
        server.bootstrap();
        let (data_plane, mut addresses) = data_plane(&config, &server, &shared, drain.clone())?;
        server.add_service(data_plane);
        let content_writer = Arc::new(content_writer);
        let jobs = Together::default()
            .with(content_writer::Service(Arc::clone(&content_writer)))
            .with(refresh)
            .with(Probes::new(Arc::clone(&shared)))
            .with(jobs::notices::Notices::new(Arc::clone(&shared)))
            .with(Models::new(Arc::clone(&shared)))
            .with(Retention::new(Arc::clone(&shared), config.store.url.clone(), kept(&config.audit)));
        server.add_service(background_service("jobs", jobs));
        server.add_service(background_service("limits", limits));
        server.add_service(background_service("journal", JournalKeeper::new(Arc::clone(&shared))));
        server.add_service(background_service("token counter", TokenCounter::new(Arc::clone(&shared))));
        let writer = Arc::new(writer);
        server.add_service(background_service("usage writer", Calm(Arc::clone(&writer))));
        server.add_service(background_service("hurried usage writer", Hurried(Arc::clone(&writer))));
        if let Some(address) = config.server.admin_listen {
            let listener = bind("admin_listen", &address.to_string())?;
            addresses.admin = Some(listener.local_addr()?);
            server.add_service(background_service("admin", Admin::new(Arc::clone(&shared), listener, drain.clone())));
        }
        let grace = config.server.grace_period;
        Ok(Self { server, shared, writer, content_writer, listeners, grace, addresses })
    }

    /// Serves until `stop`, finishes what is under way, and writes the last usage.
    ///
    /// # Errors
    /// If the system has no means for the runtime in which that is written.
    pub fn run(self, stop: Box<dyn Stop>) -> anyhow::Result<()> {
        tracing::info!(
            plain = ?self.addresses.plain,
            tls = ?self.addresses.tls,
            admin = ?self.addresses.admin,
            keys = self.shared.keys.len(),
            upstreams = self.shared.view.load().snapshot.members().len(),
            "serving"
        );
        let requests = self.shared.in_flight.clone();
        let drain = Drain { stop, listeners: self.listeners, requests, grace: self.grace };
        self.server.run(RunArgs { shutdown_signal: Box::new(drain) });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async { tokio::join!(self.writer.drain(LAST_FLUSH), self.content_writer.drain(LAST_FLUSH)) });
        self.shared.journal.close();
        Ok(())
    }
}

/// What is there once the database was read.
struct Loaded {
    shared: Arc<Shared>,
    refresh: Refresh,
    writer: UsageWriter,
    content_writer: ContentWriter,
    limits: Limits,
}

async fn load(config: &Config) -> anyhow::Result<Loaded> {
    let store = Store::open(config.store.url.expose()).await?;
    store.migrate().await.context("[store] url: the database cannot be used")?;
    let fernet = secrets::keys_for(&config.secrets.fernet_keys, &config.secrets.fernet_keys_file, &store).await?;
    let empty = View {
        snapshot: Snapshot::new(0, Vec::new(), config.models.clone(), PriceBook::default(), config.pool.strategy),
        peers: Peers::new(Vec::new()),
    };
    let metrics = Metrics::try_new()?;
    let limiter = limiter(config, &metrics)?;
    let journal = journal(config, &metrics, &limiter)?;
    let (contents, sealer) = (contents(config, &metrics), sealer(config, &fernet, &store).await?);
    let shared = Arc::new(Shared {
        view: ArcSwap::from_pointee(empty),
        keys: KeyDirectory::default(),
        journal,
        contents,
        gate: Gate::new(config.limits.gate.requests_per_second, config.limits.gate.failed_keys_per_minute),
        limiter,
        metrics,
        settings: Settings {
            max_body_bytes: config.server.max_body_bytes,
            max_attempts: config.retry.attempts,
            wait: config.pool.wait,
            deadline: config.retry.deadline,
            trusted_proxies: config.server.trusted_proxies.clone(),
            client_timeout: config.server.client_timeout,
        },
        in_flight: crate::shared::Requests::default(),
        retry_budget: Budget::new(config.retry.budget),
        upstream_changed: Notify::new(),
        notices: Notices::default(),
        started: Instant::now(),
    });
    let fixed = Fixed {
        upstreams: file_upstreams(&config.upstreams, &fernet)?,
        credential_files: config.upstreams.iter().filter_map(credential_file).collect(),
        models: config.models.clone(),
        shipped_prices: config::prices::shipped(),
        handling: config.upstream_defaults,
        strategy: config.pool.strategy,
        breaker: config.breaker,
        fernet,
    };
    let refresh = Refresh::new(Arc::clone(&shared), config.store.url.clone(), fixed);
    refresh.step(&store).await?;
    let (url, usage) = (config.store.url.clone(), &config.usage);
    let writer = UsageWriter::new(Arc::clone(&shared), url, usage.flush_interval, usage.batch);
    let url = config.store.url.clone();
    let content_writer = ContentWriter::new(Arc::clone(&shared), url, sealer, usage.flush_interval);
    let limits = Limits::new(Arc::clone(&shared), config.store.url.clone());
    limits.load(&store).await?;
    store.close().await;
    Ok(Loaded { shared, refresh, writer, content_writer, limits })
}

fn contents(config: &Config, metrics: &Metrics) -> Contents {
    let audit = &config.audit;
    Contents::new(content::Options {
        mode: audit.content,
        max_content_bytes: audit.max_content_bytes,
        buffer_bytes: audit.buffer_bytes,
        dropped: metrics.content_dropped_total.clone(),
    })
}

async fn sealer(config: &Config, fernet: &FernetKeys, store: &Store) -> anyhow::Result<Sealer> {
    let audit = &config.audit;
    let redactor = Redactor::try_new(audit.redact.iter().map(String::as_str)).context("[audit] redact")?;
    let hash_key = fernet.hash_key(store).await.context("the key of the hashes of prompts in the database")?;
    Ok(Sealer::new(fernet.clone(), hash_key, redactor, audit.max_content_bytes))
}

fn limiter(config: &Config, metrics: &Metrics) -> anyhow::Result<Limiter> {
    Limiter::try_new(limiter::Options {
        policy: config.limits.policy.clone(),
        assumed_output_tokens: config.limits.assumed_output_tokens,
        redis: config.limiter.redis.clone().map(|nodes| limiter::redis::Options {
            nodes,
            patience: config.limiter.redis_timeout,
            degraded: metrics.limiter_degraded.clone(),
        }),
        refuses_without_redis: config.limiter.on_redis_down == OnRedisDown::Deny,
    })
}

fn journal(config: &Config, metrics: &Metrics, limiter: &Limiter) -> anyhow::Result<Journal> {
    let usage = &config.usage;
    Journal::open(journal::Options {
        directory: usage.journal.clone(),
        max_bytes: usage.journal_max_bytes,
        on_full: usage.on_journal_full,
        fsync: usage.fsync,
        batch: usage.batch,
        limiter: limiter.clone(),
        lost: metrics.journal_lost_records_total.clone(),
        damaged: metrics.journal_corrupt_bytes_total.clone(),
    })
}

/// The upstreams of the config file, with their credentials decrypted.
///
/// # Errors
/// Names the upstream whose credential no Fernet key decrypts.
pub fn file_upstreams(specs: &[UpstreamSpec], fernet: &FernetKeys) -> anyhow::Result<Vec<Arc<Upstream>>> {
    specs.iter().map(|spec| file_upstream(spec, fernet).map(Arc::new)).collect()
}

fn file_upstream(spec: &UpstreamSpec, fernet: &FernetKeys) -> anyhow::Result<Upstream> {
    let credential: Secret = match &spec.credential {
        CredentialSource::Plain(secret) | CredentialSource::File { secret, .. } => secret.clone(),
        CredentialSource::Fernet(token) => fernet.decrypt(token).with_context(|| {
            format!("upstream {:?}: credential: no key of [secrets] fernet_keys_file decrypts it", spec.name)
        })?,
    };
    Ok(Upstream {
        id: None,
        name: spec.name.clone(),
        kind: spec.kind,
        base_url: spec.base_url.clone(),
        credential,
        models: spec.models.clone(),
        weight: spec.weight,
        priority: spec.priority,
        api_version: spec.api_version.clone(),
        handling: spec.handling,
        ca_pem: spec.ca_pem.clone(),
        disabled: spec.disabled,
    })
}

fn credential_file(spec: &UpstreamSpec) -> Option<(String, PathBuf)> {
    match &spec.credential {
        CredentialSource::File { path, .. } => Some((spec.name.clone(), path.clone())),
        _ => None,
    }
}

/// The tables that grow, and for how long their rows are kept. Content is nobody's business a day longer than was said.
fn kept(audit: &Audit) -> Vec<Kept> {
    vec![
        Kept { table: "request_log", days: audit.retention_days, is_exact: false },
        Kept { table: "request_content", days: audit.content_retention_days, is_exact: true },
    ]
}

fn server_conf(config: &Config) -> ServerConf {
    ServerConf {
        threads: config.server.threads,
        work_stealing: config.server.work_stealing,
        // One more than upstreams that are tried: a stale connection is tried anew.
        max_retries: config.retry.attempts + 1,
        upstream_keepalive_pool_size: config.server.keepalive_pool,
        // `Drain` has waited already.
        grace_period_seconds: Some(0),
        graceful_shutdown_timeout_seconds: Some(1),
        fast_timeout_to_tokio_threshold_seconds: Some(LONGEST_CHEAP_TIMEOUT_S),
        ..ServerConf::default()
    }
}

fn data_plane(
    config: &Config,
    server: &Server,
    shared: &Arc<Shared>,
    drain: watch::Receiver<bool>,
) -> anyhow::Result<(DataPlane, Addresses)> {
    let mut options = HttpServerOptions::default();
    options.h2c = true;
    let connector = OnePieceConnector::new(ConnectorOptions::from_server_conf(&server.configuration));
    // Nobody speaks a custom protocol to us: no listener offers one.
    let no_custom_clients: ProcessCustomSession<_, _> = Arc::new(|_, _, _| Box::pin(std::future::ready(None)));
    let proxy = ProxyServiceBuilder::new(&server.configuration, Gateway::new(Arc::clone(shared)))
        .server_options(options)
        .custom(connector, no_custom_clients)
        .build();
    let mut plane = DataPlane::new(proxy, drain);
    let mut addresses = Addresses::default();
    for address in &config.server.listen {
        addresses.plain.push(plane.add_plain(bind("listen", &address.to_string())?)?);
    }
    if let Some(tls) = &config.tls {
        let store = Arc::new(tls::CertStore::new(Arc::clone(&tls.certified)));
        for address in &config.server.tls_listen {
            let settings = tls::listener_settings(Arc::clone(&store))?;
            addresses.tls.push(plane.add_tls(bind("tls_listen", &address.to_string())?, settings)?);
        }
        let left = tls.expires_at.duration_since(std::time::SystemTime::now()).unwrap_or_default();
        let expiry = shared.metrics.certificate_expiry_seconds.with_label_values(&["default"]);
        expiry.set(i64::try_from(left.as_secs()).unwrap_or(i64::MAX));
    }
    Ok((plane, addresses))
}
