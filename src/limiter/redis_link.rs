//! The way to Redis: one server or a cluster, and the scripts on it.
//!
//! Each thread that serves requests has a connection of its own, a lane, which its own runtime drives: handing every request
//! over to another thread and back cost more than the rest of an admission. No request waits for its lane: until that is
//! there, and while it is being renewed, requests take the connection of the background.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;

use redis::{
    AsyncConnectionConfig, Client, Cmd, Pipeline, RedisError, Value,
    aio::{ConnectionLike, MultiplexedConnection},
    cluster::ClusterClient,
    cluster_async::ClusterConnection,
};
use thread_local::ThreadLocal;
use tollgate_core::secret::Secret;

/// How long an answer is waited for in the background.
pub const LATE: Duration = Duration::from_secs(2);
/// A lane that was idle for longer is made anew: Redis, or something on the way, may have dropped it.
const IDLE_MS: u64 = 30_000;

/// Connections that work.
#[derive(Debug)]
pub struct Link {
    /// The one of the background.
    pub connection: Connection,
    /// Where they lead.
    nodes: Secret,
    /// Those of the threads that serve requests, made when they are first needed.
    lanes: ThreadLocal<Arc<Lane>>,
    /// What it can run.
    pub scripts: Scripts,
    /// When the first request since the last answer was asked that got none; 0: there is no such request.
    pub silent_since_ms: AtomicU64,
    /// Redis's clock minus ours, when the link was made.
    pub clock_ms: AtomicI64,
}

/// The connection of one thread.
#[derive(Debug, Default)]
struct Lane {
    connection: ArcSwapOption<Connection>,
    is_opening: AtomicBool,
    used_ms: AtomicU64,
}

/// One server, or a cluster of them; both may be used by many at once.
#[derive(Clone)]
pub enum Connection {
    /// One server.
    Single(MultiplexedConnection),
    /// A cluster.
    Cluster(ClusterConnection),
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_cluster() { "Cluster" } else { "Single" })
    }
}

/// The scripts, by the names that Redis gave them.
#[derive(Debug)]
pub struct Scripts {
    /// `lua/limits.lua`
    pub limits: String,
    /// `lua/sync.lua`
    pub sync: String,
    /// `lua/replicas.lua`
    pub replicas: String,
}

/// Answers on their way.
pub type Answers = Pin<Box<dyn Future<Output = Result<Vec<Value>, RedisError>> + Send>>;

impl Link {
    /// A link over `connection`, which leads to `nodes`. `clock_ms`: their clock minus ours.
    #[must_use]
    pub fn new(connection: Connection, nodes: Secret, scripts: Scripts, clock_ms: i64) -> Self {
        let (lanes, silent_since_ms) = (ThreadLocal::new(), AtomicU64::new(0));
        Self { connection, nodes, lanes, scripts, silent_since_ms, clock_ms: AtomicI64::new(clock_ms) }
    }

    /// The connection of this thread. `None`: it has yet to be made, which begins now. `started`: where time begins.
    pub fn lane(&self, started: Instant) -> Option<Arc<Connection>> {
        let lane = self.lanes.get_or_default();
        let now_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let idle_ms = now_ms.saturating_sub(lane.used_ms.swap(now_ms, Relaxed));
        let connection = lane.connection.load_full().filter(|_| idle_ms < IDLE_MS);
        if connection.is_none() && !lane.is_opening.swap(true, Relaxed) {
            lane.connection.store(None);
            tokio::spawn(open(Arc::clone(lane), self.nodes.clone()));
        }
        connection
    }

    /// Gives up a lane that broke. `false`: it is none of these.
    pub fn drop_lane(&self, broken: &Arc<Connection>) -> bool {
        let is_it = |lane: &&Arc<Lane>| lane.connection.load().as_ref().is_some_and(|lane| Arc::ptr_eq(lane, broken));
        let lane = self.lanes.iter().find(is_it);
        lane.inspect(|lane| lane.connection.store(None)).is_some()
    }
}

async fn open(lane: Arc<Lane>, nodes: Secret) {
    match Connection::open(nodes.expose()).await {
        Ok(connection) => lane.connection.store(Some(Arc::new(connection))),
        Err(error) => tracing::debug!(%error, "a connection to Redis could not be made"),
    }
    lane.is_opening.store(false, Relaxed);
}

impl Connection {
    /// Is it a cluster?
    #[must_use]
    pub fn is_cluster(&self) -> bool {
        matches!(self, Self::Cluster(_))
    }

    /// Connects to `nodes`, URLs separated by commas.
    ///
    /// # Errors
    /// What the way to them, or they themselves, answered.
    pub async fn open(nodes: &str) -> Result<Self, RedisError> {
        let nodes: Vec<&str> = nodes.split(',').map(str::trim).filter(|node| !node.is_empty()).collect();
        let first = nodes.first().copied().unwrap_or_default();
        if nodes.len() == 1 {
            let config =
                AsyncConnectionConfig::new().set_connection_timeout(Some(LATE)).set_response_timeout(Some(LATE));
            let mut single = Client::open(first)?.get_multiplexed_async_connection_with_config(&config).await?;
            let info: String = redis::cmd("INFO").arg("cluster").query_async(&mut single).await?;
            if !info.contains("cluster_enabled:1") {
                return Ok(Self::Single(single));
            }
        }
        let client =
            ClusterClient::builder(nodes).connection_timeout(LATE).response_timeout(LATE).retries(2).build()?;
        client.get_async_connection().await.map(Self::Cluster)
    }

    /// Sends commands that are independent of each other, each to the node that has its keys, at the same time; returns what
    /// each was answered.
    ///
    /// # Errors
    /// If an answer does not come. What a node says against a command is among the answers.
    pub fn send(&self, commands: impl IntoIterator<Item = Cmd>) -> Answers {
        let commands: Vec<Cmd> = commands.into_iter().collect();
        match self {
            Self::Single(single) => {
                let mut single = single.clone();
                let mut all = Pipeline::with_capacity(commands.len());
                for command in commands {
                    all.add_command(command);
                }
                Box::pin(async move { single.req_packed_commands(&all, 0, all.len()).await })
            }
            Self::Cluster(cluster) => {
                let each = commands.into_iter().map(|command| {
                    let mut cluster = cluster.clone();
                    async move { cluster.req_packed_command(&command).await }
                });
                Box::pin(futures::future::try_join_all(each.collect::<Vec<_>>()))
            }
        }
    }
}

impl Scripts {
    /// Loads all of them, on every node.
    ///
    /// # Errors
    /// What a node answered.
    pub async fn load(connection: &mut Connection) -> Result<Self, RedisError> {
        const FORM: &str = include_str!("lua/form.lua");
        const STATE: &str = include_str!("lua/state.lua");
        Ok(Self {
            // The short way comes before all that it does not need: functions that are only defined take their time too.
            limits: load(connection, &[FORM, include_str!("lua/alone.lua"), STATE, include_str!("lua/limits.lua")])
                .await?,
            sync: load(connection, &[FORM, STATE, include_str!("lua/sync.lua")]).await?,
            replicas: load(connection, &[include_str!("lua/replicas.lua")]).await?,
        })
    }
}

async fn load(connection: &mut Connection, parts: &[&str]) -> Result<String, RedisError> {
    let mut command = redis::cmd("SCRIPT");
    command.arg("LOAD").arg(parts.join("\n"));
    match connection {
        Connection::Single(single) => command.query_async(single).await,
        Connection::Cluster(cluster) => command.query_async(cluster).await,
    }
}
