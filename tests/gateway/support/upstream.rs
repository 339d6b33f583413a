//! A scripted upstream: it records exactly what arrives and answers exactly as told, however wrong that is.
//!
//! It reads and writes HTTP/1.1 itself, because a server library would tidy up what a test wants to see (the order and
//! the spelling of headers, the framing of the body) and could not be made to misbehave on the wire. It has a thread
//! and a runtime of its own, so a test may be blocking or not, and it ends when it is dropped.
//!
//! ```ignore
//! let upstream = Upstream::start([Answer::json(429, &json!({})).header("retry-after", "1"), Answer::json(200, &body)]);
//! // ... send requests to upstream.addr() ...
//! assert_eq!(upstream.wait_for(2).await[1].header("authorization"), Some("Bearer sk-upstream"));
//! ```

mod answer;
mod wire;

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Notify, oneshot},
};

pub(crate) use self::answer::Answer;
pub(crate) use self::wire::{Framing, Received};
use self::{answer::After, wire::Reader};

/// How many requests are kept; those that come later are answered, but not recorded.
const MOST_RECORDED: usize = 1024;
/// How long a test waits for what it expects.
const PATIENCE: Duration = Duration::from_secs(10);

/// The models that every scripted upstream lists. Whoever asks for the list is not recorded: the gateway asks when it likes.
pub(crate) const LISTED_MODELS: [&str; 2] = ["gpt-4o", "listed-only"];

/// What is answered: the same always, one after the other, or by a function of the request.
pub(crate) struct Script(Box<dyn FnMut(&Received) -> Answer + Send>);

impl Script {
    /// Answers by `choose`.
    pub(crate) fn by(choose: impl FnMut(&Received) -> Answer + Send + 'static) -> Self {
        Self(Box::new(choose))
    }
}

impl From<Answer> for Script {
    fn from(answer: Answer) -> Self {
        Self::by(move |_| answer.clone())
    }
}

/// The answers one after the other; what comes after the last is told so with a 500.
impl<const N: usize> From<[Answer; N]> for Script {
    fn from(answers: [Answer; N]) -> Self {
        let mut answers = VecDeque::from(answers);
        let used_up = || Answer::json(500, &serde_json::json!({"error": {"message": "the script is used up"}}));
        Self::by(move |_| answers.pop_front().unwrap_or_else(used_up))
    }
}

/// A running upstream.
pub(crate) struct Upstream {
    addr: SocketAddr,
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Notify,
    lists_models: bool,
}

struct State {
    script: Script,
    received: Vec<Received>,
    hang_ups: usize,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, request: Received) -> Answer {
        if self.lists_models
            && request.method == "GET"
            && request.target.split('?').next().is_some_and(|path| path.ends_with("/models"))
        {
            let models: Vec<_> = LISTED_MODELS.iter().map(|id| serde_json::json!({ "id": id })).collect();
            return Answer::json(200, &serde_json::json!({ "object": "list", "data": models }));
        }
        let mut state = self.state();
        let answer = (state.script.0)(&request);
        if state.received.len() < MOST_RECORDED {
            state.received.push(request);
        }
        self.changed.notify_waiters();
        answer
    }

    fn hung_up(&self) {
        self.state().hang_ups += 1;
        self.changed.notify_waiters();
    }
}

impl Upstream {
    /// Starts one on a free port. It lists [`LISTED_MODELS`] by itself; everything else is answered by the script.
    pub(crate) fn start(script: impl Into<Script>) -> Self {
        Self::listen(script.into(), true)
    }

    /// Starts one whose script answers for the list of models too.
    pub(crate) fn without_list(script: impl Into<Script>) -> Self {
        Self::listen(script.into(), false)
    }

    fn listen(script: Script, lists_models: bool) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let addr = listener.local_addr().expect("the port");
        listener.set_nonblocking(true).expect("a listener that does not block");
        let state = State { script, received: Vec::new(), hang_ups: 0 };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Notify::new(), lists_models });
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
                runtime.block_on(async {
                    let listener = TcpListener::from_std(listener).expect("a listener");
                    tokio::select! {
                        () = accept(listener, shared) => {}
                        _ = stopped => {}
                    }
                });
            }
        });
        Self { addr, shared, stop: Some(stop), thread: Some(thread) }
    }

    /// Where it listens.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Its base URL, as an OpenAI client wants it.
    pub(crate) fn base_url(&self) -> String {
        format!("http://{}/v1", self.addr)
    }

    /// The requests so far, in the order in which their bodies ended.
    pub(crate) fn received(&self) -> Vec<Received> {
        self.shared.state().received.clone()
    }

    /// How many clients hung up before their answer ended.
    pub(crate) fn hang_ups(&self) -> usize {
        self.shared.state().hang_ups
    }

    /// The requests, as soon as there are `n`. Panics if that takes too long.
    pub(crate) async fn wait_for(&self, n: usize) -> Vec<Received> {
        self.wait_until(|state| state.received.len() >= n, &format!("{n} requests")).await;
        self.received()
    }

    /// Waits until `n` clients have hung up. Panics if that takes too long.
    pub(crate) async fn wait_for_hang_ups(&self, n: usize) {
        self.wait_until(|state| state.hang_ups >= n, &format!("{n} clients that hang up")).await;
    }

    async fn wait_until(&self, is_true: impl Fn(&State) -> bool, what: &str) {
        let wait = async {
            loop {
                let changed = self.shared.changed.notified();
                if is_true(&self.shared.state()) {
                    return;
                }
                changed.await;
            }
        };
        if tokio::time::timeout(PATIENCE, wait).await.is_err() {
            let state = self.shared.state();
            panic!("waited for {what}; there are {} requests and {} hang-ups", state.received.len(), state.hang_ups);
        }
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic over there has shown itself already.
            drop(thread.join());
        }
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    for connection in 0_u64.. {
        let Ok((stream, _)) = listener.accept().await else { return };
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            // A connection that breaks is what some tests are about; they look at what was recorded.
            drop(serve(stream, connection, &shared).await);
        });
    }
}

async fn serve(stream: TcpStream, connection: u64, shared: &Shared) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (read, mut write) = stream.into_split();
    let mut reader = Reader::new(read);
    while let Some(request) = reader.request(&mut write, connection).await? {
        let wants_close = request.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
        if !request.is_complete {
            shared.answer(request);
            return Ok(());
        }
        let answer = shared.answer(request);
        let played = tokio::select! {
            played = answer.play(&mut write) => played,
            () = reader.closed() => Err(io::ErrorKind::BrokenPipe.into()),
        };
        match played {
            Ok(After::Keep) if !wants_close => {}
            Ok(_) => return Ok(()),
            Err(error) => {
                shared.hung_up();
                return Err(error);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use serde_json::json;

    use super::*;
    use crate::support::client::h1;

    #[tokio::test]
    async fn what_arrives_is_recorded_exactly() {
        let upstream = Upstream::start(Answer::json(200, &json!({"ok": true})));
        let request = h1(upstream.addr()).post("/v1/x?y=1").header("x-b", "2").header("x-a", "1");
        request.body_content_length(vec![7; 100_000]).send().await.unwrap().whole().await;
        h1(upstream.addr()).post("/v1/y").body_chunked(vec![8; 100_000], 1000).send().await.unwrap().whole().await;
        h1(upstream.addr()).get("/v1/z").send().await.unwrap().whole().await;
        let received = upstream.wait_for(3).await;
        assert_eq!((received[0].method.as_str(), received[0].target.as_str()), ("POST", "/v1/x?y=1"));
        let order = received[0].headers.iter().map(|(name, _)| name.as_str()).filter(|n| n.starts_with("x-"));
        assert_eq!(order.collect::<Vec<_>>(), ["x-b", "x-a"]);
        assert_eq!(received[0].framing, Framing::ContentLength(100_000));
        assert_eq!(received[0].body, vec![7; 100_000]);
        assert_eq!(received[1].framing, Framing::Chunked);
        assert_eq!(received[1].body, vec![8; 100_000]);
        assert_eq!(received[2].framing, Framing::None);
        let connections: Vec<_> = received.iter().map(|request| request.connection).collect();
        assert_eq!(connections, [0, 1, 2]);
        assert!(received.iter().all(|request| request.is_complete));
    }

    #[tokio::test]
    async fn a_queue_is_answered_in_order_and_says_when_it_is_empty() {
        let upstream = Upstream::start([
            Answer::json(429, &json!({})).header("retry-after", "3"),
            Answer::json(200, &json!({"n": 2})),
        ]);
        let mut connection = h1(upstream.addr()).connect().await.unwrap();
        let mut send = async || connection.send(h1(upstream.addr()).post("/").body_content_length("x")).await.unwrap();
        let first = send().await.whole().await;
        assert_eq!((first.status.as_u16(), first.header("retry-after")), (429, Some("3")));
        assert_eq!(send().await.whole().await.json()["n"], 2);
        assert_eq!(send().await.whole().await.status.as_u16(), 500);
        assert!(upstream.received().iter().all(|request| request.connection == 0));
    }

    #[tokio::test]
    async fn a_function_answers_by_the_request() {
        let upstream = Upstream::start(Script::by(|request| Answer::json(200, &json!({"path": request.target}))));
        assert!(upstream.base_url().ends_with("/v1"));
        let answer = h1(upstream.addr()).get("/here").send().await.unwrap().whole().await;
        assert_eq!(answer.json()["path"], "/here");
    }

    #[tokio::test]
    async fn a_stream_arrives_in_its_chunks_with_its_pauses() {
        let pause = Duration::from_millis(60);
        let upstream = Upstream::start(Answer::sse(["data: 1\n\n", "data: 2\n\n", "data: [DONE]\n\n"]).pause(pause));
        let mut response = h1(upstream.addr()).get("/").send().await.unwrap();
        let mut chunks = Vec::new();
        while let Some(chunk) = response.chunk().await {
            chunks.push(chunk.unwrap());
        }
        let texts: Vec<_> = chunks.iter().map(|chunk| std::str::from_utf8(&chunk.bytes).unwrap()).collect();
        assert_eq!(texts, ["data: 1\n\n", "data: 2\n\n", "data: [DONE]\n\n"]);
        assert!(chunks[2].at - chunks[0].at >= pause * 2 - Duration::from_millis(10));
    }

    #[tokio::test]
    async fn broken_answers_show_as_broken() {
        let body = json!({"text": "0123456789"});
        for (answer, arrived) in [
            (Answer::json(200, &body).cut_after(5), 5),
            (Answer::json(200, &body).declare_length(1000), body.to_string().len()),
            (Answer::sse(["data: 1\n\n", "data: 2\n\n"]).cut_after(9), 9),
            (Answer::sse(["data: 1\n\n", "data: 2\n\n"]).pause(Duration::from_millis(20)).reset_after(9), 9),
        ] {
            let upstream = Upstream::start(answer);
            let whole = h1(upstream.addr()).get("/").send().await.unwrap().whole().await;
            assert!(whole.error.is_some());
            assert_eq!(whole.body.len(), arrived);
        }
    }

    #[tokio::test]
    async fn answers_without_a_header_fail_the_request() {
        for answer in [Answer::reset(), Answer::half_header(), Answer::raw("nonsense\r\n\r\n")] {
            let upstream = Upstream::start(answer);
            assert!(h1(upstream.addr()).get("/").send().await.is_err());
            assert_eq!(upstream.received().len(), 1);
        }
    }

    #[tokio::test]
    async fn a_client_that_hangs_up_is_noticed() {
        for answer in [Answer::never(), Answer::sse(["data: 1\n\n"]).never_end()] {
            let upstream = Upstream::start(answer);
            let request = h1(upstream.addr()).get("/").send();
            let response = tokio::time::timeout(Duration::from_millis(200), request).await;
            upstream.wait_for(1).await;
            assert_eq!(upstream.hang_ups(), 0);
            drop(response);
            upstream.wait_for_hang_ups(1).await;
        }
    }

    #[tokio::test]
    async fn a_delay_comes_before_the_header() {
        let delay = Duration::from_millis(80);
        let upstream = Upstream::start(Answer::text(503, "text/plain", "busy").after(delay));
        let started = Instant::now();
        let response = h1(upstream.addr()).get("/").send().await.unwrap();
        assert!(started.elapsed() >= delay);
        assert_eq!(response.whole().await.body, "busy");
    }
}
