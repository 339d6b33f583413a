//! The real server, in this process: built from a real configuration, on ports of the system, stopped when dropped.

use std::{
    fmt::Write as _,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use async_trait::async_trait;
use tempfile::TempDir;
use tokio::sync::Notify;
use tollgate::{
    config,
    drain::Stop,
    server::{Addresses, Assembly},
    store::{AuditFilter, AuditRow, KeySpec, Store, UserSpec},
};
use tollgate_core::key::ApiKey;

use super::client::{PrivateCa, Request, Whole, h1};

/// How long anything in a test may take before it counts as hanging.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A gateway that is being described.
pub struct Builder {
    dir: TempDir,
    top: String,
    upstreams: String,
    tables: String,
    usage: String,
    journal: PathBuf,
    store_url: String,
    tls: Option<Arc<PrivateCa>>,
    key: KeySpec,
    shared_key: Option<String>,
}

impl Builder {
    /// Adds an upstream; `more` are further lines of its table.
    pub fn upstream(mut self, name: &str, base_url: &str, more: &str) -> Self {
        let credential =
            if more.contains("credential") { String::new() } else { format!("credential = \"sk-{name}\"\n") };
        writeln!(self.upstreams, "[[upstream]]\nname = \"{name}\"\nbase_url = \"{base_url}\"\n{credential}{more}")
            .unwrap();
        self
    }

    /// Adds lines to `[server]`.
    pub fn server(mut self, lines: &str) -> Self {
        writeln!(self.top, "{lines}").unwrap();
        self
    }

    /// Adds lines to `[usage]`.
    pub fn usage(mut self, lines: &str) -> Self {
        writeln!(self.usage, "{lines}").unwrap();
        self
    }

    /// Has its journal there, instead of in its own directory.
    pub fn journal(mut self, directory: &Path) -> Self {
        directory.clone_into(&mut self.journal);
        self
    }

    /// Adds whole tables.
    pub fn tables(mut self, toml: &str) -> Self {
        writeln!(self.tables, "{toml}").unwrap();
        self
    }

    /// Uses this database instead of a SQLite file.
    pub fn store(mut self, url: &str) -> Self {
        url.clone_into(&mut self.store_url);
        self
    }

    /// Makes it another replica of `first`: on its database, for its key.
    pub fn beside(mut self, first: &Gateway) -> Self {
        std::fs::copy(first.dir().join("fernet.key"), self.dir.path().join("fernet.key")).unwrap();
        self.shared_key = Some(first.key.clone());
        self.store(&first.store_url)
    }

    /// Listens for TLS too.
    pub fn tls(mut self) -> Self {
        let ca = PrivateCa::new().unwrap();
        std::fs::write(self.dir.path().join("cert.pem"), &ca.cert_pem).unwrap();
        std::fs::write(self.dir.path().join("key.pem"), &ca.key_pem).unwrap();
        self.tls = Some(ca);
        self
    }

    /// Leaves its database as it is, without a key.
    pub fn without_key(mut self) -> Self {
        self.shared_key = Some(String::new());
        self
    }

    /// What the first key may do.
    pub fn key(mut self, key: KeySpec) -> Self {
        self.key = key;
        self
    }

    /// Work stealing is on because Pingora's other runtime remembers a process's first server by the numbers of its threads,
    /// and a test process has many servers; `tests/clients` runs the default.
    fn config_text(&self) -> String {
        let dir = self.dir.path().display();
        let (tls_listen, tls) = match &self.tls {
            None => ("[]", String::new()),
            Some(_) => ("[\"127.0.0.1:0\"]", format!("[tls]\ncert = \"{dir}/cert.pem\"\nkey = \"{dir}/key.pem\"\n")),
        };
        format!(
            "[server]\nlisten = [\"127.0.0.1:0\"]\ntls_listen = {tls_listen}\nadmin_listen = \"127.0.0.1:0\"\nwork_stealing = true\n{}\n\
             {tls}[store]\nurl = \"{}\"\n[secrets]\nfernet_keys_file = \"{dir}/fernet.key\"\n\
             [usage]\njournal = \"{}\"\nflush_interval = \"20ms\"\n{}\n{}\n{}",
            self.top,
            self.store_url,
            self.journal.display(),
            self.usage,
            self.tables,
            self.upstreams
        )
    }

    /// Why it does not start.
    pub fn refused(self) -> String {
        let text = self.config_text();
        let config = config::parse(None, &text, &|_| None).unwrap_or_else(|errors| panic!("{errors}\n{text}"));
        // A thread of its own: a test may be within a runtime already.
        let built = std::thread::spawn(|| Assembly::build(config).map(drop).map_err(|error| format!("{error:#}")));
        built.join().expect("no panic").expect_err("it must not start")
    }

    /// Starts it, with a user and a key in the database.
    pub fn start(self) -> Gateway {
        let text = self.config_text();
        let key = self.shared_key.unwrap_or_else(|| first_key(&self.store_url, &self.key));
        let stop = Arc::new(Notify::new());
        let (addresses, thread) = serve(&text, &stop);
        let (store_url, ca, dir) = (self.store_url, self.tls, self.dir);
        Gateway { addresses, key, store_url, ca, stop, thread: Some(thread), dir, text }
    }
}

/// Runs a server of this configuration until it is told to stop.
fn serve(text: &str, stop: &Arc<Notify>) -> (Addresses, JoinHandle<anyhow::Result<()>>) {
    let config = config::parse(None, text, &|_| None).unwrap_or_else(|errors| panic!("{errors}\n{text}"));
    let (started, start) = std::sync::mpsc::channel();
    let waiter = Arc::clone(stop);
    let thread = std::thread::spawn(move || {
        let assembly = Assembly::build(config).unwrap_or_else(|error| panic!("{error:#}"));
        started.send(assembly.addresses.clone()).unwrap();
        assembly.run(Box::new(WhenTold(waiter)))
    });
    let addresses = start.recv_timeout(PATIENCE).expect("the server starts");
    wait_until_listening(&addresses);
    (addresses, thread)
}

/// Makes the database with a user and a key, which is returned.
pub(crate) fn first_key(store_url: &str, spec: &KeySpec) -> String {
    // A thread of its own: a test is within a runtime already.
    std::thread::scope(|scope| scope.spawn(|| make_first_key(store_url, spec)).join())
        .expect("the database can be made")
}

fn make_first_key(store_url: &str, spec: &KeySpec) -> String {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).unwrap();
    let key = ApiKey::from_random(&seed);
    block_on(async {
        let store = Store::open(store_url).await.unwrap();
        store.migrate().await.unwrap();
        let user = store.create_user(&UserSpec { name: "alice".into(), ..UserSpec::default() }, "test").await.unwrap();
        let spec = KeySpec { name: "first".into(), ..spec.clone() };
        store.create_key(user.id, &spec, &key, "test").await.unwrap();
        store.close().await;
    });
    key.expose().to_owned()
}

/// Runs a future on a runtime of its own.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// The sockets are bound; this waits until somebody accepts.
fn wait_until_listening(addresses: &Addresses) {
    let until = std::time::Instant::now() + PATIENCE;
    let all = addresses.plain.iter().chain(&addresses.tls).chain(&addresses.admin);
    for address in all {
        while std::net::TcpStream::connect(address).is_err() {
            assert!(std::time::Instant::now() < until, "{address} does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

struct WhenTold(Arc<Notify>);

#[async_trait]
impl Stop for WhenTold {
    async fn requested(&self) {
        self.0.notified().await;
    }
}

/// A running gateway.
pub struct Gateway {
    /// Where it listens.
    pub addresses: Addresses,
    /// A key that works.
    pub key: String,
    /// Its database.
    pub store_url: String,
    /// The authority of its certificate.
    pub ca: Option<Arc<PrivateCa>>,
    stop: Arc<Notify>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
    dir: TempDir,
    text: String,
}

impl Gateway {
    /// Describes a gateway with a SQLite file of its own.
    pub fn builder() -> Builder {
        let dir = TempDir::new().unwrap();
        let store_url = format!("sqlite://{}/tollgate.db", dir.path().display());
        Builder {
            journal: dir.path().join("journal"),
            dir,
            top: String::new(),
            upstreams: String::new(),
            tables: String::new(),
            usage: String::new(),
            store_url,
            tls: None,
            key: KeySpec::default(),
            shared_key: None,
        }
    }

    /// A gateway in front of one upstream.
    pub fn before(base_url: &str) -> Self {
        Self::builder().upstream("main", base_url, "").start()
    }

    /// Its plain listener.
    pub fn http(&self) -> SocketAddr {
        self.addresses.plain[0]
    }

    /// Its TLS listener.
    pub fn tls(&self) -> SocketAddr {
        self.addresses.tls[0]
    }

    /// A POST with the key of this gateway.
    pub fn post(&self, path: &str) -> Request {
        h1(self.http()).post(path).bearer(&self.key)
    }

    /// The whole answer to a JSON body.
    pub async fn ask(&self, path: &str, body: &serde_json::Value) -> Whole {
        self.post(path).body_content_length(body.to_string()).send().await.unwrap().whole().await
    }

    /// The text of a page of the admin listener.
    pub async fn admin(&self, path: &str) -> (u16, String) {
        let answer = h1(self.addresses.admin.unwrap()).get(path).send().await.unwrap().whole().await;
        (answer.status.as_u16(), String::from_utf8(answer.body.to_vec()).unwrap())
    }

    /// The value of a series of the metrics, by its full name with labels; 0 if there is none.
    pub async fn metric(&self, series: &str) -> f64 {
        let (_, text) = self.admin("/metrics").await;
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().unwrap())
    }

    /// Opens the database, for use on the caller's runtime.
    pub async fn store(&self) -> Store {
        Store::open(&self.store_url).await.unwrap()
    }

    /// The rows of the request log, newest first, once there are at least `count`.
    pub async fn rows(&self, count: usize) -> Vec<AuditRow> {
        let store = self.store().await;
        let until = std::time::Instant::now() + PATIENCE;
        loop {
            let rows = store.audit(&AuditFilter { limit: 100, ..AuditFilter::default() }).await.unwrap();
            if rows.len() >= count {
                store.close().await;
                return rows;
            }
            assert!(std::time::Instant::now() < until, "only {} of {count} rows", rows.len());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Asks it to stop. Asked a second time, it does not wait for what is under way.
    pub fn ask_to_stop(&self) {
        self.stop.notify_one();
    }

    /// Asks it to stop and waits until it has.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        self.stop.notify_one();
        match self.thread.take() {
            Some(thread) => thread.join().expect("the server does not panic"),
            None => Ok(()),
        }
    }

    /// Stops it and starts it again, on other ports.
    pub fn restart(&mut self) {
        self.stop().unwrap();
        let (addresses, thread) = serve(&self.text, &self.stop);
        (self.addresses, self.thread) = (addresses, Some(thread));
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            assert!(std::thread::panicking(), "the gateway ended with an error: {error:#}");
        }
    }
}
