//! Several gateways that share a database and a Redis: the real program, each in a process of its own.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tokio::sync::{Mutex, Semaphore};
use tollgate::{secrets::generate_key, store::KeySpec};
use tollgate_core::limit::Limits;

use super::{
    client::{Connection, Error, Request, Response, Whole, h1},
    gateway::{PATIENCE, first_key},
    postgres,
    process::{Process, log},
};

const CHAT: &str = "/v1/chat/completions";
/// Connections to one gateway at once: as many requests are under way there at the most.
const CONNECTIONS: usize = 16;

/// Running gateways with one key.
pub(crate) struct Fleet {
    key: String,
    replicas: Vec<Replica>,
}

/// One of them.
struct Replica {
    address: SocketAddr,
    process: Option<Process>,
    idle: Mutex<Vec<Connection>>,
    free: Semaphore,
    directory: TempDir,
}

impl Fleet {
    /// Starts `count` gateways on a new database and this Redis, in front of one upstream; `limits` are the key's.
    pub(crate) fn start(count: usize, redis: &str, base_url: &str, limits: Limits) -> Self {
        let database = postgres::database();
        let key = first_key(&database, &KeySpec { limits, ..KeySpec::default() });
        // An address has limits too: in a cluster they live on another node than those of the key.
        let config = format!(
            "[server]\nlisten = [\"127.0.0.1:0\"]\nadmin_listen = \"\"\n\
             [store]\nurl = \"{database}\"\n[limiter]\nredis = \"{redis}\"\nredis_timeout = \"2s\"\n[limits.ip]\nrpm = 1_000_000\n\
             [log]\nlevel = \"warn,tollgate::server=info,tollgate::limiter=info\"\n\
             [[upstream]]\nname = \"main\"\nbase_url = \"{base_url}\"\ncredential = \"sk-main\"\n"
        );
        let fernet_key = generate_key();
        let start = |_| Replica::start(&config, fernet_key.expose());
        Self { key, replicas: (0..count).map(start).collect() }
    }

    /// A request to one of them, on a connection of its own.
    pub(crate) async fn send(&self, replica: usize, body: &str) -> Result<Response, Error> {
        self.request(replica, body).send().await
    }

    /// A request to one of them, on one of its open connections as soon as one is free.
    pub(crate) async fn ask(&self, replica: usize, body: &str) -> Result<Whole, Error> {
        let Replica { address, idle, free, .. } = &self.replicas[replica];
        let _permit = free.acquire().await?;
        let connection = idle.lock().await.pop();
        let mut connection = match connection {
            Some(connection) => connection,
            None => h1(*address).connect().await?,
        };
        let answer = connection.send(self.request(replica, body)).await?.whole().await;
        if answer.error.is_none() {
            idle.lock().await.push(connection);
        }
        Ok(answer)
    }

    /// Kills one, whatever it is doing.
    pub(crate) fn kill(&mut self, replica: usize) {
        self.replicas[replica].process = None;
    }

    /// What they warned of.
    pub(crate) fn warnings(&self) -> String {
        let logs = self.replicas.iter().map(|replica| log(replica.directory.path()));
        let warned = |log: String| {
            log.lines()
                .filter(|line| line.contains(" WARN tollgate") || line.contains(" ERROR tollgate"))
                .collect::<Vec<_>>()
                .join("\n")
        };
        logs.map(warned).collect::<Vec<_>>().join("\n")
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.replicas.len()
    }

    fn request(&self, replica: usize, body: &str) -> Request {
        let request = h1(self.replicas[replica].address).post(CHAT).bearer(&self.key);
        request.body_content_length(body.to_owned())
    }
}

impl Replica {
    fn start(config: &str, fernet_key: &str) -> Self {
        let directory = tempfile::Builder::new().prefix("tollgate-replica-").tempdir().unwrap();
        let file = directory.path().join("tollgate.toml");
        fs::write(&file, config).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_tollgate"));
        command.arg("--config").arg(file).arg("serve").current_dir(directory.path());
        command.env("TOLLGATE_FERNET_KEYS", fernet_key);
        let mut process = Process::start(command, directory.path(), "the gateway is built with its tests");
        let address = wait_for_address(&mut process, directory.path());
        let (idle, free) = (Mutex::default(), Semaphore::new(CONNECTIONS));
        Self { address, process: Some(process), idle, free, directory }
    }
}

/// Where a gateway listens, as it says itself.
pub(crate) fn wait_for_address(process: &mut Process, directory: &Path) -> SocketAddr {
    let start = Instant::now();
    loop {
        let said = log(directory);
        let serving = said.lines().find_map(|line| line.split_once("plain=[")?.1.split_once(']'));
        if let Some(address) = serving.and_then(|(address, _)| address.parse().ok()) {
            return address;
        }
        assert!(!process.has_ended() && start.elapsed() < PATIENCE, "the gateway does not start:\n{said}");
        thread::sleep(Duration::from_millis(10));
    }
}
