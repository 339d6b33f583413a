//! Answers, right and wrong, and how they are written.

use std::{io, time::Duration};

use bytes::Bytes;
use serde_json::Value;
use tokio::{io::AsyncWriteExt, net::tcp::OwnedWriteHalf, time::sleep};

/// One answer of a script. Begin with [`Answer::json`], [`Answer::sse`] or a way to fail, and change it from there.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    start: Start,
    delay: Duration,
    status: u16,
    headers: Vec<(String, String)>,
    parts: Vec<Bytes>,
    body_after: Duration,
    pause: Duration,
    framing: Declared,
    end: End,
}

#[derive(Clone, Debug)]
enum Start {
    Header,
    HalfHeader,
    Raw(Bytes),
    Reset,
    Never,
}

#[derive(Clone, Copy, Debug)]
enum Declared {
    Length,
    WrongLength(usize),
    Chunked,
}

#[derive(Clone, Copy, Debug)]
enum End {
    Proper,
    Close,
    CutAfter(usize),
    ResetAfter(usize),
    Never,
}

/// What becomes of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    Keep,
    Close,
}

impl Answer {
    /// A JSON document, with its length.
    pub(crate) fn json(status: u16, body: &Value) -> Self {
        Self::text(status, "application/json", body.to_string())
    }

    /// Any text, with its length.
    pub(crate) fn text(status: u16, content_type: &str, body: impl Into<Bytes>) -> Self {
        let body = Self { status, parts: vec![body.into()], ..Self::starting(Start::Header) };
        body.header("content-type", content_type)
    }

    /// A stream: every part is one chunk of the transfer and one write.
    pub(crate) fn sse<B: Into<Bytes>>(parts: impl IntoIterator<Item = B>) -> Self {
        let parts = parts.into_iter().map(Into::into).collect();
        let stream = Self { parts, framing: Declared::Chunked, ..Self::starting(Start::Header) };
        stream.header("content-type", "text/event-stream; charset=utf-8")
    }

    /// Nothing, for ever.
    pub(crate) fn never() -> Self {
        Self::starting(Start::Never)
    }

    /// The connection is reset before the first byte.
    pub(crate) fn reset() -> Self {
        Self::starting(Start::Reset)
    }

    /// The connection is closed in the middle of the header.
    pub(crate) fn half_header() -> Self {
        Self::starting(Start::HalfHeader)
    }

    /// These bytes, then the connection is closed.
    pub(crate) fn raw(bytes: impl Into<Bytes>) -> Self {
        Self::starting(Start::Raw(bytes.into()))
    }

    fn starting(start: Start) -> Self {
        Self {
            start,
            delay: Duration::ZERO,
            status: 200,
            headers: Vec::new(),
            parts: Vec::new(),
            body_after: Duration::ZERO,
            pause: Duration::ZERO,
            framing: Declared::Length,
            end: End::Proper,
        }
    }

    /// Adds a header.
    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Waits before it begins.
    pub(crate) fn after(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    /// Waits between its header and its body.
    pub(crate) fn body_after(mut self, delay: Duration) -> Self {
        self.body_after = delay;
        self
    }

    /// Waits between its parts.
    pub(crate) fn pause(mut self, pause: Duration) -> Self {
        self.pause = pause;
        self
    }

    /// Says another `content-length` than it has; the connection is closed after the body.
    pub(crate) fn declare_length(mut self, length: usize) -> Self {
        self.framing = Declared::WrongLength(length);
        self.end = End::Close;
        self
    }

    /// Closes the connection after so many bytes of the body.
    pub(crate) fn cut_after(mut self, bytes: usize) -> Self {
        self.end = End::CutAfter(bytes);
        self
    }

    /// Resets the connection after so many bytes of the body. What the client has not read by then is lost to it.
    pub(crate) fn reset_after(mut self, bytes: usize) -> Self {
        self.end = End::ResetAfter(bytes);
        self
    }

    /// Sends everything but the end.
    pub(crate) fn never_end(mut self) -> Self {
        self.end = End::Never;
        self
    }

    /// Writes itself; an error means that the client has gone.
    pub(super) async fn play(&self, write: &mut OwnedWriteHalf) -> io::Result<After> {
        sleep(self.delay).await;
        match &self.start {
            Start::Header => self.play_properly(write).await,
            Start::Never => std::future::pending().await,
            Start::Reset => reset(write),
            Start::HalfHeader => close_after(write, b"HTTP/1.1 200 OK\r\ncontent-ty").await,
            Start::Raw(bytes) => close_after(write, bytes).await,
        }
    }

    async fn play_properly(&self, write: &mut OwnedWriteHalf) -> io::Result<After> {
        write.write_all(self.head().as_bytes()).await?;
        let mut left = match self.end {
            End::CutAfter(bytes) | End::ResetAfter(bytes) => bytes,
            _ => usize::MAX,
        };
        sleep(self.body_after).await;
        for (i, part) in self.parts.iter().enumerate() {
            if i > 0 {
                sleep(self.pause).await;
            }
            let part = part.slice(..part.len().min(left));
            left -= part.len();
            write.write_all(&self.framed(&part)).await?;
        }
        match self.end {
            End::Proper => {
                if matches!(self.framing, Declared::Chunked) {
                    write.write_all(b"0\r\n\r\n").await?;
                }
                Ok(After::Keep)
            }
            End::Close | End::CutAfter(_) => Ok(After::Close),
            End::ResetAfter(_) => {
                sleep(self.pause).await;
                reset(write)
            }
            End::Never => std::future::pending().await,
        }
    }

    fn head(&self) -> String {
        let framing = match self.framing {
            Declared::Length => format!("content-length: {}", self.parts.iter().map(Bytes::len).sum::<usize>()),
            Declared::WrongLength(length) => format!("content-length: {length}"),
            Declared::Chunked => "transfer-encoding: chunked".to_owned(),
        };
        let headers: String = self.headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        format!("HTTP/1.1 {} Scripted\r\n{headers}{framing}\r\n\r\n", self.status)
    }

    fn framed(&self, part: &Bytes) -> Bytes {
        if !matches!(self.framing, Declared::Chunked) || part.is_empty() {
            return part.clone();
        }
        Bytes::from([format!("{:x}\r\n", part.len()).as_bytes(), part, b"\r\n"].concat())
    }
}

async fn close_after(write: &mut OwnedWriteHalf, bytes: &[u8]) -> io::Result<After> {
    write.write_all(bytes).await?;
    Ok(After::Close)
}

fn reset(write: &OwnedWriteHalf) -> io::Result<After> {
    write.as_ref().set_zero_linger()?;
    Ok(After::Close)
}
