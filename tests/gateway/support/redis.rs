//! Real Redis servers for tests: each test has its own, because tests stop, empty and pause them.
//!
//! A server keeps its port for life, also while it is stopped: a socket that is bound but does not listen holds it. The
//! system gives a port that is so held to nobody who asks for any port, and refuses connections to it; yet the server
//! may listen on it, because both sockets are set to share. So parallel tests cannot take each other's ports.

use std::{
    net::{Ipv4Addr, SocketAddr},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use redis::{Client, FromRedisValue, RedisResult};
use rustix::process::Signal;
use tempfile::TempDir;
use tokio::net::TcpSocket;

use super::process::{Process, log};

const MISSING: &str = "these tests need Redis 7: `apt-get install redis-server` (or put redis-server in PATH)";
/// How long a server may take for anything.
const PATIENCE: Duration = Duration::from_secs(20);
/// The number of hash slots of every Redis cluster.
const SLOTS: usize = 16_384;

/// A running server.
pub(crate) struct Redis {
    port: Port,
    directory: TempDir,
    settings: Vec<String>,
    process: Option<Process>,
}

impl Redis {
    /// A server that keeps nothing on disk.
    pub(crate) fn start() -> Self {
        Self::with(&[])
    }

    fn with(settings: &[&str]) -> Self {
        let directory = tempfile::Builder::new().prefix("tollgate-redis-").tempdir().unwrap();
        let settings = settings.iter().map(ToString::to_string).collect();
        let mut redis = Self { port: Port::free(), directory, settings, process: None };
        redis.restart();
        redis
    }

    /// Where clients find it.
    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port.number)
    }

    /// Starts it again, on the same port; it has forgotten everything.
    pub(crate) fn restart(&mut self) {
        self.stop();
        self.process = Some(Process::start(self.command_line(), self.directory.path(), MISSING));
        self.wait_until_ready();
    }

    /// Kills it: its connections break, and new ones are refused.
    pub(crate) fn stop(&mut self) {
        self.process = None;
    }

    /// Freezes it: connections stay, new ones are accepted by the system, and nobody is answered.
    pub(crate) fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Ends the pause: everything that was sent in the meantime is answered.
    pub(crate) fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Runs a command, on a connection of its own.
    pub(crate) fn command<T: FromRedisValue>(&self, words: &[&str]) -> T {
        self.try_command(words).unwrap_or_else(|error| panic!("{words:?}: {error}"))
    }

    fn try_command<T: FromRedisValue>(&self, words: &[&str]) -> RedisResult<T> {
        let mut connection = Client::open(self.url())?.get_connection_with_timeout(PATIENCE)?;
        connection.set_read_timeout(Some(PATIENCE))?;
        redis::Cmd::new().arg(words).query(&mut connection)
    }

    fn command_line(&self) -> Command {
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--port", &self.port.number.to_string(), "--daemonize", "no"]);
        command.args(["--save", "", "--appendonly", "no", "--dir"]).arg(self.directory.path()).args(&self.settings);
        command
    }

    fn wait_until_ready(&mut self) {
        let start = Instant::now();
        while self.try_command::<String>(&["PING"]).is_err() {
            let ended = self.process.as_mut().is_none_or(Process::has_ended);
            let log = || log(self.directory.path());
            assert!(!ended && start.elapsed() < PATIENCE, "Redis does not start:\n{}", log());
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn signal(&self, signal: Signal) {
        self.process.as_ref().expect("the server runs").signal(signal);
    }
}

/// A cluster of three servers that share the hash slots, without replicas.
pub(crate) struct Cluster {
    nodes: Vec<Redis>,
    /// The ports on which the nodes talk to each other.
    buses: Vec<Port>,
}

impl Cluster {
    /// Takes some two seconds: so long a node waits before it joins in.
    pub(crate) fn start() -> Self {
        let buses: Vec<_> = (0..3).map(|_| Port::free()).collect();
        let cluster = Self { nodes: buses.iter().map(Self::node).collect(), buses };
        cluster.share_slots();
        cluster.introduce();
        cluster.wait_until_ready();
        cluster
    }

    fn node(bus: &Port) -> Redis {
        let bus = bus.number.to_string();
        // It must not guess its own address: clients are sent to it.
        Redis::with(&["--cluster-enabled", "yes", "--cluster-port", &bus, "--cluster-announce-ip", "127.0.0.1"])
    }

    /// The addresses of all nodes, separated by commas.
    pub(crate) fn urls(&self) -> String {
        self.nodes.iter().map(Redis::url).collect::<Vec<_>>().join(",")
    }

    fn share_slots(&self) {
        let count = self.nodes.len();
        for (index, node) in self.nodes.iter().enumerate() {
            let (first, next) = (index * SLOTS / count, (index + 1) * SLOTS / count);
            node.command::<()>(&["CLUSTER", "ADDSLOTSRANGE", &first.to_string(), &(next - 1).to_string()]);
            // Else all of them begin with epoch 0, and must first agree on who gives way.
            node.command::<()>(&["CLUSTER", "SET-CONFIG-EPOCH", &(index + 1).to_string()]);
        }
    }

    fn introduce(&self) {
        for (node, bus) in self.nodes.iter().zip(&self.buses).skip(1) {
            let (port, bus) = (node.port.number.to_string(), bus.number.to_string());
            self.nodes[0].command::<()>(&["CLUSTER", "MEET", "127.0.0.1", &port, &bus]);
        }
    }

    fn wait_until_ready(&self) {
        let start = Instant::now();
        let info = |node: &Redis| node.command::<String>(&["CLUSTER", "INFO"]);
        let ready = |node: &Redis| ["cluster_state:ok", "cluster_size:3"].iter().all(|line| info(node).contains(line));
        while !self.nodes.iter().all(ready) {
            assert!(start.elapsed() < PATIENCE, "the cluster does not form:\n{}", info(&self.nodes[0]));
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A port of this machine that is ours until we drop it.
struct Port {
    number: u16,
    _held_by: TcpSocket,
}

impl Port {
    fn free() -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
        Self { number: socket.local_addr().unwrap().port(), _held_by: socket }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;

    #[test]
    fn a_server_remembers_until_it_is_restarted() {
        let mut redis = Redis::start();
        redis.command::<()>(&["SET", "key", "value"]);
        assert_eq!(redis.command::<Option<String>>(&["GET", "key"]).as_deref(), Some("value"));
        let url = redis.url();
        redis.restart();
        assert_eq!(redis.url(), url);
        assert_eq!(redis.command::<Option<String>>(&["GET", "key"]), None);
    }

    #[test]
    fn servers_know_nothing_of_each_other() {
        let (one, other) = (Redis::start(), Redis::start());
        one.command::<()>(&["SET", "key", "value"]);
        assert_eq!(other.command::<Option<String>>(&["GET", "key"]), None);
    }

    #[test]
    fn a_stopped_server_keeps_its_port_and_refuses_connections() {
        let mut redis = Redis::start();
        redis.stop();
        let connected = TcpStream::connect((Ipv4Addr::LOCALHOST, redis.port.number));
        assert_eq!(connected.unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
        redis.restart();
        assert_eq!(redis.command::<String>(&["PING"]), "PONG");
    }

    #[test]
    fn a_paused_server_answers_when_it_is_resumed() {
        let redis = Redis::start();
        let mut connection = Client::open(redis.url()).unwrap().get_connection().unwrap();
        redis.pause();
        connection.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        assert!(redis::cmd("PING").query::<String>(&mut connection).unwrap_err().is_timeout());
        redis.resume();
        assert_eq!(redis.command::<String>(&["PING"]), "PONG");
    }

    #[test]
    fn a_server_ends_with_its_owner() {
        let redis = Redis::start();
        let mut connection = Client::open(redis.url()).unwrap().get_connection().unwrap();
        drop(redis);
        assert!(redis::cmd("PING").query::<String>(&mut connection).unwrap_err().is_connection_dropped());
    }

    #[test]
    fn a_cluster_answers_on_all_nodes() {
        let cluster = Cluster::start();
        let client = redis::cluster::ClusterClient::new(cluster.urls().split(',')).unwrap();
        let mut connection = client.get_connection().unwrap();
        for number in 0..30 {
            let set = redis::cmd("SET").arg(format!("key-{number}")).arg(number).query::<()>(&mut connection);
            set.unwrap();
        }
        let sizes: Vec<usize> = cluster.nodes.iter().map(|node| node.command(&["DBSIZE"])).collect();
        assert!(sizes.iter().all(|size| *size > 0) && sizes.iter().sum::<usize>() == 30, "{sizes:?}");
    }
}
