//! The way to Redis: one server or a cluster, and the scripts on it.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64},
    },
    time::Duration,
};

use redis::{
    AsyncConnectionConfig, Client, Cmd, Pipeline, RedisError, Value,
    aio::{ConnectionLike, MultiplexedConnection},
    cluster::ClusterClient,
    cluster_async::ClusterConnection,
};

use super::redis_wire::{Caller, Change, floats, groups};

/// How long an answer is waited for in the background.
pub const LATE: Duration = Duration::from_secs(2);

/// A connection that works.
#[derive(Debug)]
pub struct Link {
    /// The connection.
    pub connection: Connection,
    /// What it can run.
    pub scripts: Scripts,
    /// When the first request since the last answer was asked that got none; 0: there is no such request.
    pub silent_since_ms: AtomicU64,
    /// Redis's clock minus ours, when the link was made.
    pub clock_ms: AtomicI64,
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
    /// `lua/admit.lua`
    pub admit: String,
    /// `lua/change.lua`
    pub change: String,
    /// `lua/sync.lua`
    pub sync: String,
    /// `lua/replicas.lua`
    pub replicas: String,
}

/// Answers on their way.
pub type Answers = Pin<Box<dyn Future<Output = Result<Vec<Value>, RedisError>> + Send>>;

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

    /// Sends each pipeline to the node that has its keys; returns what the last command of each answered.
    ///
    /// # Errors
    /// If an answer does not come. What a node says against a command is among the answers.
    pub async fn send(&self, pipelines: Vec<Pipeline>) -> Result<Vec<Value>, RedisError> {
        let each = pipelines.into_iter().map(|pipeline| {
            let connection = self.clone();
            async move {
                let count = pipeline.len();
                let values = match connection {
                    Self::Single(mut single) => single.req_packed_commands(&pipeline, 0, count).await,
                    Self::Cluster(mut cluster) => cluster.req_packed_commands(&pipeline, 0, count).await,
                };
                values.map(|mut values| values.pop().unwrap_or(Value::Nil))
            }
        });
        futures::future::try_join_all(each).await
    }
}

impl Scripts {
    /// Loads all of them, on every node.
    ///
    /// # Errors
    /// What a node answered.
    pub async fn load(connection: &mut Connection) -> Result<Self, RedisError> {
        const STATE: &str = include_str!("lua/state.lua");
        let with_state = |script: &str| format!("{STATE}\n{script}");
        Ok(Self {
            admit: load(connection, with_state(include_str!("lua/admit.lua"))).await?,
            change: load(connection, with_state(include_str!("lua/change.lua"))).await?,
            sync: load(connection, with_state(include_str!("lua/sync.lua"))).await?,
            replicas: load(connection, include_str!("lua/replicas.lua").to_owned()).await?,
        })
    }
}

async fn load(connection: &mut Connection, script: String) -> Result<String, RedisError> {
    let mut command = redis::cmd("SCRIPT");
    command.arg("LOAD").arg(script);
    match connection {
        Connection::Single(single) => command.query_async(single).await,
        Connection::Cluster(cluster) => command.query_async(cluster).await,
    }
}

/// Sends `changes` and then `pipelines`; what is meant for the same node goes in this order. Returns the answers to the
/// pipelines.
pub fn send(link: &Arc<Link>, caller: &Caller, changes: Vec<Change>, pipelines: Vec<Pipeline>) -> Answers {
    let mut before: Vec<Pipeline> = Vec::new();
    if !changes.is_empty() {
        let keys: Vec<String> = changes.iter().map(|change| change.key.clone()).collect();
        for group in groups(&keys, link.connection.is_cluster()) {
            let mut call = caller.call(&link.scripts.change, &group, &keys);
            for &index in &group {
                call.arg(floats(&changes[index].numbers()));
            }
            before.push(pipeline(call));
        }
    }
    let connection = link.connection.clone();
    let unanswered = before.len();
    let pipelines = if link.connection.is_cluster() { [before, pipelines].concat() } else { joined(before, pipelines) };
    let skipped = if link.connection.is_cluster() { unanswered } else { 0 };
    Box::pin(async move {
        let mut values = connection.send(pipelines).await?;
        values.drain(..skipped.min(values.len()));
        Ok(values)
    })
}

/// One pipeline of all: one write, one read.
fn joined(before: Vec<Pipeline>, after: Vec<Pipeline>) -> Vec<Pipeline> {
    let mut all = Pipeline::new();
    for command in before.iter().chain(&after).flat_map(Pipeline::cmd_iter) {
        all.add_command(command.clone());
    }
    vec![all]
}

/// A pipeline of one command.
pub fn pipeline(call: Cmd) -> Pipeline {
    let mut pipeline = Pipeline::with_capacity(1);
    pipeline.add_command(call);
    pipeline
}
