//! Logging: one line per request (target `access`), and what operators must know.
//!
//! Logs hold no key, no secret and no content of a request. Pingora and other libraries log through `log`; their lines are
//! taken into the same stream, from `warn` up, because Pingora reports every hung-up client as an error of its own.
//!
//! Lines are collected and written ten times a second, by a thread of their own: a system call, or only waking another
//! thread, would cost a request more than everything else the gateway does for it. Where there are many they are written
//! more often, because whoever else wants the core waits while the kernel takes them. Where nobody reads standard error,
//! lines are dropped beyond [`MAX_WAITING`]: a full pipe must not stop requests.

mod access;
mod line;

use std::{
    io::{self, Write},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt, util::SubscriberInitExt};

pub use access::Access;

/// How long a line waits at the most, and how long the thread sleeps at least.
const PERIOD: Duration = Duration::from_millis(100);
const SHORTEST: Duration = Duration::from_millis(5);
/// Bytes that wait to be written at the most.
const MAX_WAITING: usize = 4 * 1024 * 1024;
/// Bytes of whole lines that are written at once, unless one is longer.
const PIECE: usize = 16 * 1024;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For humans.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Lines on their way to standard error.
#[derive(Clone, Debug, Default)]
struct Lines(Arc<Mutex<Waiting>>);

#[derive(Debug, Default)]
struct Waiting {
    bytes: Vec<u8>,
    dropped: u64,
    ended: bool,
}

impl Lines {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a line to those that wait.
    fn put(&self, line: &[u8]) {
        let mut waiting = self.waiting();
        if waiting.bytes.len() + line.len() > MAX_WAITING {
            waiting.dropped += 1;
        } else {
            waiting.bytes.extend_from_slice(line);
        }
    }

    /// Writes what waits, and what comes, until the end.
    fn keep_writing(&self) {
        let (mut spare, mut last) = (Vec::new(), Instant::now());
        while let Some(bytes) = self.flush(&mut spare) {
            let elapsed = last.elapsed();
            last = Instant::now();
            std::thread::park_timeout(pause(bytes, elapsed));
        }
    }

    /// Writes what waits; says how much that was, unless it was the last.
    fn flush(&self, spare: &mut Vec<u8>) -> Option<usize> {
        let mut waiting = self.waiting();
        std::mem::swap(&mut waiting.bytes, spare);
        let (dropped, ended) = (std::mem::take(&mut waiting.dropped), waiting.ended);
        drop(waiting);
        let mut stderr = io::stderr().lock();
        let mut written = pieces(spare).try_for_each(|piece| stderr.write_all(piece));
        if dropped > 0 {
            written = written
                .and(writeln!(stderr, "{dropped} log lines were dropped: standard error is not read fast enough"));
        }
        // A closed standard error leaves nowhere to complain.
        drop(written);
        let bytes = spare.len();
        spare.clear();
        (!ended).then_some(bytes)
    }
}

/// How long it takes until about a piece waits, if lines go on to come as these `bytes` did in the time `elapsed`.
fn pause(bytes: usize, elapsed: Duration) -> Duration {
    elapsed.mul_f64(PIECE as f64 / bytes.max(1) as f64).clamp(SHORTEST, PERIOD)
}

/// Whole lines, as many as fit into a [`PIECE`] each time.
fn pieces(mut lines: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let piece = &lines[..lines.len().min(PIECE)];
        let end = memchr::memrchr(b'\n', piece).or_else(|| memchr::memchr(b'\n', lines));
        let piece;
        (piece, lines) = lines.split_at(end.map_or(lines.len(), |end| end + 1));
        (!piece.is_empty()).then_some(piece)
    })
}

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.put(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Keeps the log going; dropping it writes what is left.
#[derive(Debug)]
#[must_use = "lines that wait are lost when the process ends without it"]
pub struct LogGuard {
    lines: Lines,
    thread: Option<JoinHandle<()>>,
}

impl Drop for LogGuard {
    fn drop(&mut self) {
        self.lines.waiting().ended = true;
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It does nothing that could panic; and if it did, it has said so.
            drop(thread.join());
        }
    }
}

/// The filter, without what libraries say that means nothing to a user: that a request failed says its access log line, and
/// that another thread was just about to let go of a connection, so that a new one is made, is an error to Pingora.
fn quiet(filter: &str) -> anyhow::Result<EnvFilter> {
    const QUIET: [&str; 4] = ["pingora_core=warn", "pingora_core::connectors=off", "pingora_proxy=off", "sqlx=warn"];
    let filter = EnvFilter::builder()
        .parse(filter)
        .map_err(|e| anyhow::anyhow!("[log] level: {filter:?} is not a log filter ({e}); use for example \"info\""))?;
    Ok(QUIET.iter().filter_map(|d| d.parse().ok()).fold(filter, EnvFilter::add_directive))
}

/// Starts logging to standard error. Later calls change nothing: the first one of a process counts.
///
/// `filter` is in `tracing`'s syntax: `info`, or `info,tollgate::proxy=debug`.
///
/// # Errors
/// If `filter` cannot be parsed.
pub fn start(format: LogFormat, filter: &str) -> anyhow::Result<LogGuard> {
    let registry = tracing_subscriber::registry().with(quiet(filter)?);
    let lines = Lines::default();
    let (writer, stderr) = (lines.clone(), lines.clone());
    let thread = std::thread::Builder::new().name("log".to_owned()).spawn(move || {
        writer.keep_writing();
    })?;
    access::start(format, lines.clone());
    let stderr = move || stderr.clone();
    let started = match format {
        LogFormat::Text => registry.with(fmt::layer().with_writer(stderr).event_format(line::Line)).try_init(),
        LogFormat::Json => registry.with(fmt::layer().json().flatten_event(true).with_writer(stderr)).try_init(),
    };
    // An error means that this process logs already, as in-process tests do.
    drop(started);
    Ok(LogGuard { lines, thread: Some(thread) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_written_in_pieces_of_whole_lines() {
        let long = [b"a".repeat(PIECE + 7), b"\n".to_vec()].concat();
        let short: Vec<u8> = b"12345678901234\n".repeat(PIECE / 5);
        let lines = [&short[..], &long, b"x\n", b"no end"].concat();
        let pieces: Vec<&[u8]> = pieces(&lines).collect();
        assert_eq!(pieces.concat(), lines);
        let (last, others) = pieces.split_last().unwrap();
        assert_eq!(*last, b"no end");
        assert!(others.iter().all(|piece| piece.ends_with(b"\n")));
        assert_eq!(others.iter().filter(|piece| piece.len() > PIECE).count(), 1, "the long line");
        assert!(others.iter().filter(|piece| piece.len() > PIECE / 2).count() >= 4);
    }

    #[test]
    fn a_connection_that_was_not_free_yet_is_no_error_to_a_user() {
        let lines = Lines::default();
        let writer = lines.clone();
        let layer = fmt::layer().with_writer(move || writer.clone());
        let registry = tracing_subscriber::registry().with(quiet("warn").unwrap()).with(layer);
        tracing::subscriber::with_default(registry, || {
            tracing::error!(target: "pingora_core::connectors", "failed to acquire reusable stream");
            tracing::error!(target: "pingora_core::server", "of note");
        });
        let text = String::from_utf8(std::mem::take(&mut lines.waiting().bytes)).unwrap();
        assert!(text.contains("of note") && !text.contains("reusable"), "{text}");
    }

    #[test]
    fn the_more_lines_come_the_more_often_they_are_written() {
        assert_eq!(pause(0, PERIOD), PERIOD);
        assert_eq!(pause(PIECE / 2, PERIOD), PERIOD);
        assert_eq!(pause(4 * PIECE, PERIOD), PERIOD / 4);
        assert_eq!(pause(PIECE, PERIOD / 4), PERIOD / 4, "and go on so");
        assert_eq!(pause(usize::MAX, PERIOD), SHORTEST);
    }
}
