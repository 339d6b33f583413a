//! A gateway that may be killed and started again, and clients that keep books of their own.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::task::JoinSet;
use tollgate::{
    secrets::generate_key,
    store::{AuditFilter, AuditRow, GroupBy, KeySpec, Store, UsageQuery},
};

use super::{
    client::{Connection, h1},
    gateway::{PATIENCE, first_key},
    openai::{DONE, chat, chat_stream, event, usage_event},
    program::{Program, Serving},
    upstream::{Answer, Script, Upstream},
};

const CHAT: &str = "/v1/chat/completions";
/// What every whole answer, and every stream, uses.
const USED: (i64, i64) = (7, 5);

/// An upstream for [`Clients`]: half of its answers are streams that take their time.
pub(crate) fn upstream() -> Upstream {
    Upstream::start(Script::by(|request| {
        if !String::from_utf8_lossy(&request.body).contains("\"stream\":true") {
            return super::openai::completion();
        }
        let words = ["a", "b", "c"].map(|word| event(word, Some("null")));
        let parts = words.into_iter().chain([usage_event(7, 5), DONE.to_owned()]);
        Answer::sse(parts).pause(Duration::from_millis(5))
    }))
}

/// A gateway that may be running.
pub(crate) struct Mortal {
    pub(crate) key: String,
    pub(crate) store_url: String,
    program: Program,
    serving: Option<Serving>,
    /// What its clients call themselves.
    pub(crate) user_agent: String,
    /// May it refuse them, because its journal is full?
    pub(crate) may_be_full: bool,
}

impl Mortal {
    /// One on the database at `store_url`, reached by the gateway at `through`; `usage` are lines of its `[usage]`.
    pub(crate) fn new(store_url: Option<&str>, through: Option<&str>, base_url: &str, usage: &str) -> Self {
        let program = Program::new("").variable("TOLLGATE_FERNET_KEYS", generate_key().expose());
        let sqlite = format!("sqlite://{}/tollgate.db", program.directory().display());
        let store_url = store_url.map_or(sqlite, str::to_owned);
        let key = first_key(&store_url, &KeySpec::default());
        let config = format!(
            "[server]\nlisten = [\"127.0.0.1:0\"]\nadmin_listen = \"\"\nthreads = 2\n[store]\nurl = \"{}\"\n\
             [usage]\nflush_interval = \"50ms\"\n{usage}\n[log]\nlevel = \"warn,tollgate::server=info\"\n\
             [[upstream]]\nname = \"main\"\nbase_url = \"{base_url}\"\ncredential = \"sk-main\"\n",
            through.unwrap_or(&store_url)
        );
        program.write("tollgate.toml", &config);
        Self { key, store_url, program, serving: None, user_agent: "test".to_owned(), may_be_full: false }
    }

    /// Starts it; where it listens.
    pub(crate) fn start(&mut self) -> SocketAddr {
        self.serving.insert(self.program.serve()).http()
    }

    /// Kills it, whatever it is doing.
    pub(crate) fn kill(&mut self) {
        self.serving = None;
    }

    /// Stops it in order: what it has is on the books then, if the database takes it.
    pub(crate) fn stop(&mut self) {
        self.serving.take().expect("it runs").stop();
    }

    /// The memory that it takes, in KiB.
    pub(crate) fn resident_kb(&self) -> u64 {
        self.serving.as_ref().expect("it runs").resident_kb()
    }

    /// The directory of its journal.
    pub(crate) fn journal(&self) -> PathBuf {
        self.program.directory().join("data/journal")
    }

    /// What it said.
    pub(crate) fn log(&self) -> String {
        self.program.log()
    }

    /// Clients that ask it, at once so many, until they are told to stop.
    pub(crate) fn clients(&self, address: SocketAddr, count: usize) -> Clients {
        let (stop, books) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Books::new())));
        let mut running = JoinSet::new();
        for number in 0..count {
            let (key, user_agent) = (self.key.clone(), self.user_agent.clone());
            let (stop, books, may_be_refused) = (Arc::clone(&stop), Arc::clone(&books), self.may_be_full);
            let client = Client { address, key, user_agent, may_be_refused, stop, books };
            running.spawn(client.run(number % 2 == 0));
        }
        Clients { stop, books, running }
    }

    /// Compares what clients got with what is booked: nothing missing, nothing twice, and the sums are the sums.
    pub(crate) async fn check(&self, seen: &Books) {
        let store = Store::open(&self.store_url).await.unwrap();
        let rows = rows(&store).await;
        let mut by_id: BTreeMap<&str, &AuditRow> = BTreeMap::new();
        for row in &rows {
            assert!(by_id.insert(&row.request_id, row).is_none(), "{} is booked twice", row.request_id);
        }
        let missing: Vec<_> =
            seen.iter().filter(|(id, is_whole)| **is_whole && !by_id.contains_key(id.as_str())).collect();
        let (count, log) = (missing.len(), self.log());
        assert!(
            missing.is_empty(),
            "{count} of {} answers are not booked, such as {:?}:\n{log}",
            seen.len(),
            missing[0]
        );
        for (id, row) in by_id {
            let used = (row.prompt_tokens, row.completion_tokens);
            match (seen.get(id), row.code.as_deref()) {
                (_, None) => assert_eq!((used, row.interrupted, row.status), (USED, false, 200), "{row:?}"),
                (Some(true), code) => panic!("a whole answer is booked as {code:?}: {row:?}"),
                (_, Some("interrupted" | "client_closed" | "upstream_error")) => {
                    assert!(row.interrupted && row.estimated && row.prompt_tokens > 0, "{row:?}");
                }
                (_, Some(_)) => panic!("nobody was refused: {row:?}"),
            }
        }
        check_sums(&store, &rows).await;
        store.close().await;
    }
}

/// The sums of each day are those of the log.
async fn check_sums(store: &Store, rows: &[AuditRow]) {
    let days = store.usage(&UsageQuery::by(GroupBy::Day)).await.unwrap();
    let months = store.usage(&UsageQuery::by(GroupBy::Month)).await.unwrap();
    for sums in [days, months] {
        let sum = |of: fn(&AuditRow) -> i64| rows.iter().map(of).sum::<i64>();
        assert_eq!(sums.iter().map(|day| day.requests).sum::<i64>(), i64::try_from(rows.len()).unwrap());
        assert_eq!(sums.iter().map(|day| day.prompt_tokens).sum::<i64>(), sum(|row| row.prompt_tokens));
        assert_eq!(sums.iter().map(|day| day.completion_tokens).sum::<i64>(), sum(|row| row.completion_tokens));
        assert_eq!(sums.iter().map(|day| day.cost_nano_usd).sum::<i64>(), sum(|row| row.cost_nano_usd));
    }
}

/// The whole request log.
pub(crate) async fn rows(store: &Store) -> Vec<AuditRow> {
    store.audit(&AuditFilter { limit: 1_000_000, ..AuditFilter::default() }).await.unwrap()
}

/// Ids of requests, and whether their answers came whole.
pub(crate) type Books = BTreeMap<String, bool>;

/// Clients at work.
pub(crate) struct Clients {
    stop: Arc<AtomicBool>,
    books: Arc<Mutex<Books>>,
    running: JoinSet<()>,
}

impl Clients {
    /// How many answers came whole so far.
    pub(crate) fn count(&self) -> usize {
        self.books.lock().unwrap().values().filter(|is_whole| **is_whole).count()
    }

    /// Waits until so many answers came whole.
    pub(crate) async fn wait_for(&self, count: usize) {
        let start = Instant::now();
        while self.count() < count {
            assert!(start.elapsed() < PATIENCE * 3, "only {} of {count} answers", self.count());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Stops them; what they got.
    pub(crate) async fn stop(mut self) -> Books {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(done) = self.running.join_next().await {
            done.unwrap();
        }
        std::mem::take(&mut *self.books.lock().unwrap())
    }
}

struct Client {
    address: SocketAddr,
    key: String,
    user_agent: String,
    may_be_refused: bool,
    stop: Arc<AtomicBool>,
    books: Arc<Mutex<Books>>,
}

impl Client {
    async fn run(self, streams: bool) {
        let body = if streams { chat_stream() } else { chat() }.to_string();
        let mut connection = None;
        while !self.stop.load(Ordering::Relaxed) {
            if self.ask(&mut connection, &body, streams).await.is_none() {
                connection = None;
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
    }

    /// One request; `None` if it failed.
    async fn ask(&self, connection: &mut Option<Connection>, body: &str, streams: bool) -> Option<()> {
        let target = h1(self.address);
        if connection.is_none() {
            *connection = Some(target.connect().await.ok()?);
        }
        let request = target.post(CHAT).bearer(&self.key).header("user-agent", &self.user_agent);
        let request = request.body_content_length(body.to_owned());
        let mut answer = connection.as_mut()?.send(request).await.ok()?;
        let id = answer.headers.get("x-request-id")?.to_str().ok()?.to_owned();
        if answer.status == 503 && self.may_be_refused {
            return None;
        }
        assert_eq!(answer.status, 200, "{id}");
        self.books.lock().unwrap().insert(id.clone(), false);
        let mut text = Vec::new();
        while let Some(chunk) = answer.chunk().await {
            text.extend(chunk.ok()?.bytes);
            // As SDKs do: a stream is over at its end mark.
            if streams && text.ends_with(DONE.as_bytes()) {
                self.books.lock().unwrap().insert(id.clone(), true);
            }
        }
        self.books.lock().unwrap().insert(id, true);
        Some(())
    }
}

/// How many bytes the files of a directory have.
pub(crate) fn bytes_in(directory: &Path) -> u64 {
    fs::read_dir(directory).unwrap().filter_map(|entry| entry.ok()?.metadata().ok()).map(|file| file.len()).sum()
}
