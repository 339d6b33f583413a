//! The client's session, wrapped where Pingora's own falls short.
//!
//! * **Replay.** Pingora forwards a body that was read early only from its retry buffer, at most 64 KiB. The wrapper answers
//!   for that buffer with the whole body.
//! * **Hold.** Pingora writes the head of an answer as soon as it comes. A stream whose first event is an error, or an error
//!   whose body says that the account is used up, must not be seen if another upstream may do better. The wrapper
//!   keeps what is written until it is released, discarded, or replaced by an answer of the gateway's own: an error that
//!   ends like any other answer leaves both connections fit for the next request.
//! * **Watch.** Pingora has one timeout for every read from an upstream. While an answer goes by, the proxy always waits for
//!   the client to hang up, too; that wait ends here when the first byte, the next piece, or the end is overdue.
//!
//! Everything else goes to the real session. Pingora ends the connection of a wrapped session after the answer, so the real
//! one is put back before that ([`restore`]): the wrapper leaves it behind when it is dropped. Most requests never need a
//! wrapper.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::Stream;
use http::HeaderMap;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora_core::{
    Error, ErrorSource, ErrorType, Result,
    protocols::{
        Digest,
        http::{
            HttpTask, ServerSession,
            custom::{CustomMessageWrite, server::Session as CustomSession},
        },
        l4::socket::SocketAddr,
    },
};
use pingora_proxy::Session;
use tokio::time::{Sleep, sleep_until};

use super::reply::Answer;

/// Error type of an upstream that let a piece of its answer, or its end, be waited for too long.
pub const OVERDUE: ErrorType = ErrorType::new("Overdue");
/// How much is held back at the most; what is longer is passed on, whatever it may turn out to be.
const HELD: usize = 1 << 20;
/// No deadline.
const NEVER: u64 = u64::MAX;

/// What requests tell their wrapper.
#[derive(Clone, Debug)]
pub struct Handle(Arc<Shared>);

struct Shared {
    made: Instant,
    is_holding: AtomicBool,
    /// Is what was held back until now to be forgotten?
    discards: AtomicBool,
    replacement: Mutex<Option<Answer>>,
    /// The longest pause between two pieces, in milliseconds.
    chunk_ms: AtomicU64,
    last_piece_ms: AtomicU64,
    /// When the answer must have ended.
    end_ms: AtomicU64,
    left_behind: Mutex<Option<ServerSession>>,
}

/// Makes `session` forward `body`, as often as there are attempts.
pub fn replay(session: &mut Session, handle: &mut Option<Handle>, body: Bytes) {
    wrap(session, handle, Some(body));
}

/// Holds back what is written from now on.
pub fn hold(session: &mut Session, handle: &mut Option<Handle>) {
    wrap(session, handle, None).0.is_holding.store(true, Relaxed);
}

/// From now on, the answer may not be waited for longer than `first`.
pub fn await_first(session: &mut Session, handle: &mut Option<Handle>, first: Duration) {
    set_deadlines(&wrap(session, handle, None).0, None, Some(first));
}

/// From now on, no piece of the answer may be waited for longer than `chunk`, and its end no longer than `rest`.
pub fn watch(session: &mut Session, handle: &mut Option<Handle>, chunk: Duration, rest: Option<Duration>) {
    set_deadlines(&wrap(session, handle, None).0, Some(chunk), rest);
}

fn set_deadlines(shared: &Shared, chunk: Option<Duration>, rest: Option<Duration>) {
    let now_ms = shared.now_ms();
    shared.last_piece_ms.store(now_ms, Relaxed);
    shared.chunk_ms.store(chunk.map_or(NEVER, millis), Relaxed);
    // Never a moment too early: somebody may look how much time is left.
    shared.end_ms.store(rest.map_or(NEVER, |rest| millis(shared.made.elapsed() + rest).saturating_add(1)), Relaxed);
}

/// Puts the real session back.
pub fn restore(session: &mut Session, handle: &mut Option<Handle>) {
    let Some(Handle(shared)) = handle.take() else { return };
    drop(std::mem::replace(&mut *session.downstream_session, placeholder()));
    if let Some(real) = lock(&shared.left_behind).take() {
        *session.downstream_session = real;
    }
}

fn wrap<'h>(session: &mut Session, handle: &'h mut Option<Handle>, body: Option<Bytes>) -> &'h Handle {
    handle.get_or_insert_with(|| {
        let handle = Handle(Arc::new(Shared::new()));
        let inner = std::mem::replace(&mut *session.downstream_session, placeholder());
        let wrapper = Wrapper { inner, shared: Arc::clone(&handle.0), body, kept: Vec::new(), timer: None };
        *session.downstream_session = ServerSession::new_custom(Box::new(wrapper));
        handle
    })
}

fn placeholder() -> ServerSession {
    ServerSession::new_custom(Box::new(()))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(NEVER)
}

impl Handle {
    /// Lets what is held back go, with what is written next.
    pub fn release(&self) {
        self.0.is_holding.store(false, Relaxed);
    }

    /// Is what is written held back?
    #[must_use]
    pub fn is_holding(&self) -> bool {
        self.0.is_holding.load(Relaxed)
    }

    /// Forgets what is held back: an earlier attempt wrote it.
    pub fn discard(&self) {
        self.0.discards.store(true, Relaxed);
    }

    /// Gives the client `answer` instead of what is held back, once the upstream's has ended.
    pub fn replace(&self, answer: Answer) {
        *lock(&self.0.replacement) = Some(answer);
    }

    /// Notes that a piece of the answer came.
    pub fn touch(&self) {
        self.0.touch();
    }

    /// All that matters was seen: the end may not be waited for longer than `rest`.
    pub fn expect_end(&self, rest: Duration) {
        set_deadlines(&self.0, None, Some(rest));
    }

    /// The answer of this attempt is no longer waited for.
    pub fn relax(&self) {
        self.0.chunk_ms.store(NEVER, Relaxed);
        self.0.end_ms.store(NEVER, Relaxed);
        self.release();
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("is_holding", &self.is_holding).finish_non_exhaustive()
    }
}

impl Shared {
    fn new() -> Self {
        Self {
            made: Instant::now(),
            is_holding: AtomicBool::new(false),
            discards: AtomicBool::new(false),
            replacement: Mutex::new(None),
            chunk_ms: AtomicU64::new(NEVER),
            last_piece_ms: AtomicU64::new(0),
            end_ms: AtomicU64::new(NEVER),
            left_behind: Mutex::new(None),
        }
    }

    fn now_ms(&self) -> u64 {
        millis(self.made.elapsed())
    }

    fn touch(&self) {
        self.last_piece_ms.store(self.now_ms(), Relaxed);
    }

    /// When the answer is overdue, if it can be.
    fn deadline(&self) -> Option<Instant> {
        let piece_ms = self.last_piece_ms.load(Relaxed).saturating_add(self.chunk_ms.load(Relaxed));
        let deadline_ms = piece_ms.min(self.end_ms.load(Relaxed));
        (deadline_ms != NEVER).then(|| self.made + Duration::from_millis(deadline_ms))
    }

    fn take_replacement(&self) -> Option<Answer> {
        lock(&self.replacement).take()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Wrapper {
    inner: ServerSession,
    shared: Arc<Shared>,
    /// What is forwarded; `None`: what Pingora has itself.
    body: Option<Bytes>,
    /// What is held back.
    kept: Vec<HttpTask>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Wrapper {
    /// May what is kept be written?
    fn may_go(&mut self) -> Result<bool> {
        if let Some(at) = self.kept.iter().position(|task| matches!(task, HttpTask::Failed(_)))
            && let HttpTask::Failed(error) = self.kept.swap_remove(at)
        {
            return Err(error);
        }
        if !self.shared.is_holding.load(Relaxed) {
            return Ok(true);
        }
        let size = |task: &HttpTask| match task {
            HttpTask::Body(Some(piece), _) => piece.len(),
            _ => 0,
        };
        if self.kept.iter().map(size).sum::<usize>() > HELD {
            self.shared.is_holding.store(false, Relaxed);
            return Ok(true);
        }
        if self.kept.iter().any(HttpTask::is_end) {
            return Err(Error::create(ErrorType::ConnectionClosed, ErrorSource::Upstream, None, None));
        }
        Ok(false)
    }
}

impl Drop for Wrapper {
    fn drop(&mut self) {
        *lock(&self.shared.left_behind) = Some(std::mem::replace(&mut self.inner, placeholder()));
    }
}

type MessageReader = Box<dyn Stream<Item = Result<Bytes>> + Unpin + Send + Sync + 'static>;

fn no_messages<T>() -> Result<T> {
    Error::e_explain(ErrorType::InternalError, "a wrapped session has no custom messages")
}

fn begins_an_answer(task: &HttpTask) -> bool {
    matches!(task, HttpTask::Header(header, _) if !header.status.is_informational())
}

#[async_trait]
impl CustomSession for Wrapper {
    fn get_retry_buffer(&self) -> Option<Bytes> {
        self.body.clone().or_else(|| self.inner.get_retry_buffer())
    }

    fn retry_buffer_truncated(&self) -> bool {
        self.body.is_none() && self.inner.retry_buffer_truncated()
    }

    fn enable_retry_buffering(&mut self) {
        if self.body.is_none() {
            self.inner.enable_retry_buffering();
        }
    }

    fn is_body_done(&mut self) -> bool {
        self.body.is_some() || self.inner.is_body_done()
    }

    fn is_body_empty(&mut self) -> bool {
        self.body.is_none() && self.inner.is_body_empty()
    }

    async fn read_body_bytes(&mut self) -> Result<Option<Bytes>> {
        if self.body.is_some() { Ok(None) } else { self.inner.read_request_body().await }
    }

    async fn drain_request_body(&mut self) -> Result<()> {
        if self.body.is_some() { Ok(()) } else { self.inner.drain_request_body().await }
    }

    /// Of a body that was read, what is left to wait for is that the client hangs up, or that the upstream is overdue.
    async fn read_body_or_idle(&mut self, no_body_expected: bool) -> Result<Option<Bytes>> {
        let no_body_expected = no_body_expected || self.body.is_some();
        while let Some(deadline) = self.shared.deadline() {
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline.into())));
            timer.as_mut().reset(deadline.into());
            tokio::select! {
                biased;
                read = self.inner.read_body_or_idle(no_body_expected) => return read,
                () = timer => {
                    // A piece may have come meanwhile.
                    if self.shared.deadline().is_some_and(|deadline| deadline <= Instant::now()) {
                        return Error::e_explain(OVERDUE, "the rest of the answer");
                    }
                }
            }
        }
        self.inner.read_body_or_idle(no_body_expected).await
    }

    async fn response_duplex_vec(&mut self, tasks: Vec<HttpTask>) -> Result<bool> {
        if self.shared.discards.swap(false, Relaxed) || tasks.iter().any(begins_an_answer) {
            self.kept.clear();
        }
        let tasks = match self.shared.take_replacement() {
            Some(answer) => {
                self.kept.clear();
                vec![HttpTask::Header(Box::new(answer.header), false), HttpTask::Body(Some(answer.body), true)]
            }
            None if self.kept.is_empty() && !self.shared.is_holding.load(Relaxed) => tasks,
            None => {
                self.kept.extend(tasks);
                if !self.may_go()? {
                    return Ok(false);
                }
                std::mem::take(&mut self.kept)
            }
        };
        let written = self.inner.response_duplex_vec(tasks).await;
        // Had the client to be waited for, the upstream is not to blame.
        self.shared.touch();
        written
    }

    fn req_header(&self) -> &RequestHeader {
        self.inner.req_header()
    }

    fn req_header_mut(&mut self) -> &mut RequestHeader {
        self.inner.req_header_mut()
    }

    async fn write_response_header(&mut self, resp: Box<ResponseHeader>, end: bool) -> Result<()> {
        self.inner.write_response_header(resp).await?;
        if end { self.inner.finish_body().await } else { Ok(()) }
    }

    async fn write_response_header_ref(&mut self, resp: &ResponseHeader, end: bool) -> Result<()> {
        self.write_response_header(Box::new(resp.clone()), end).await
    }

    async fn write_body(&mut self, data: Bytes, end: bool) -> Result<()> {
        self.inner.write_response_body(data, end).await
    }

    async fn write_trailers(&mut self, trailers: HeaderMap) -> Result<()> {
        self.inner.write_response_trailers(trailers).await
    }

    fn set_read_timeout(&mut self, timeout: Option<Duration>) {
        self.inner.set_read_timeout(timeout);
    }

    fn get_read_timeout(&self) -> Option<Duration> {
        self.inner.get_read_timeout()
    }

    fn set_write_timeout(&mut self, timeout: Option<Duration>) {
        self.inner.set_write_timeout(timeout);
    }

    fn get_write_timeout(&self) -> Option<Duration> {
        self.inner.get_write_timeout()
    }

    fn set_total_drain_timeout(&mut self, timeout: Option<Duration>) {
        self.inner.set_total_drain_timeout(timeout);
    }

    fn get_total_drain_timeout(&self) -> Option<Duration> {
        self.inner.get_total_drain_timeout()
    }

    fn request_summary(&self) -> String {
        self.inner.request_summary()
    }

    fn response_written(&self) -> Option<&ResponseHeader> {
        self.inner.response_written()
    }

    async fn shutdown(&mut self, _code: u32, _ctx: &str) {
        self.inner.shutdown().await;
    }

    async fn finish(&mut self) -> Result<()> {
        self.inner.finish_body().await
    }

    fn body_bytes_sent(&self) -> usize {
        self.inner.body_bytes_sent()
    }

    fn body_bytes_read(&self) -> usize {
        self.inner.body_bytes_read()
    }

    fn digest(&self) -> Option<&Digest> {
        self.inner.digest()
    }

    fn digest_mut(&mut self) -> Option<&mut Digest> {
        self.inner.digest_mut()
    }

    fn client_addr(&self) -> Option<&SocketAddr> {
        self.inner.client_addr()
    }

    fn server_addr(&self) -> Option<&SocketAddr> {
        self.inner.server_addr()
    }

    fn pseudo_raw_h1_request_header(&self) -> Bytes {
        self.inner.to_h1_raw()
    }

    async fn finish_custom(&mut self) -> Result<()> {
        Ok(())
    }

    fn take_custom_message_reader(&mut self) -> Option<MessageReader> {
        None
    }

    fn restore_custom_message_reader(&mut self, _reader: MessageReader) -> Result<()> {
        no_messages()
    }

    fn take_custom_message_writer(&mut self) -> Option<Box<dyn CustomMessageWrite>> {
        None
    }

    fn restore_custom_message_writer(&mut self, _writer: Box<dyn CustomMessageWrite>) -> Result<()> {
        no_messages()
    }
}
