//! One keep-alive HTTP/1.1 connection of the load generator: prepared bytes out, as little parsing as is safe in.
//!
//! The generator shares a core with the mock, so each microsecond it spends is one that the process under test may
//! have to wait for. It therefore finds the end of a response and nothing more; whether the bytes are the right ones
//! is checked beforehand with a real client (see `verify.rs`).

use anyhow::{Context, bail, ensure};
use std::io::ErrorKind;
use std::net::SocketAddr;
use tokio::net::TcpStream;

const BUFFER_BYTES: usize = 64 * 1024;
/// How a chunked body ends. An SSE body cannot hold these bytes: it has no carriage returns.
const LAST_CHUNK: &[u8] = b"\r\n0\r\n\r\n";

/// A connection with no request in flight.
pub(crate) struct Connection {
    stream: TcpStream,
    buffer: Box<[u8]>,
}

/// How the end of a body is told.
#[derive(Debug, PartialEq, Eq)]
enum Framing {
    Length(usize),
    Chunked,
}

impl Connection {
    pub(crate) async fn open(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await.with_context(|| format!("connect to {address}"))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: vec![0; BUFFER_BYTES].into_boxed_slice() })
    }

    /// Sends `request` and reads its answer to the end. Anything but a 200 is an error.
    pub(crate) async fn exchange(&mut self, request: &[u8]) -> anyhow::Result<()> {
        self.send(request).await?;
        let mut filled = 0;
        let head_len = loop {
            filled += self.receive(filled).await?;
            if let Some(head_len) = head_len(&self.buffer[..filled]) {
                break head_len;
            }
        };
        match framing(&self.buffer[..head_len])? {
            Framing::Length(length) => self.skip(length, filled - head_len).await,
            Framing::Chunked => self.skip_chunked(head_len, filled).await,
        }
    }

    async fn send(&self, mut request: &[u8]) -> anyhow::Result<()> {
        while !request.is_empty() {
            match self.stream.try_write(request) {
                Ok(written) => request = &request[written..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.stream.writable().await?,
                Err(error) => return Err(error).context("send a request"),
            }
        }
        Ok(())
    }

    /// Reads what is there, or the next that comes, to `buffer[from..]`; returns how much.
    async fn receive(&mut self, from: usize) -> anyhow::Result<usize> {
        ensure!(from < self.buffer.len(), "the head of the response is longer than {BUFFER_BYTES} bytes");
        loop {
            // Waiting first: right after a request was sent there is nothing to read yet.
            self.stream.readable().await?;
            match self.stream.try_read(&mut self.buffer[from..]) {
                Ok(0) => bail!("the connection was closed in the middle of a response"),
                Ok(read) => return Ok(read),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("read a response"),
            }
        }
    }

    async fn skip(&mut self, length: usize, mut received: usize) -> anyhow::Result<()> {
        while received < length {
            received += self.receive(0).await?;
        }
        ensure!(received == length, "{received} bytes arrived where the head promised {length}");
        Ok(())
    }

    /// Reads until the last chunk. There is one request in flight, so nothing can follow it.
    async fn skip_chunked(&mut self, head_len: usize, mut filled: usize) -> anyhow::Result<()> {
        // The head ends in a line break, so an empty body (`0\r\n\r\n` at once) ends in the same bytes.
        let mut start = head_len - 2;
        while !self.buffer[start..filled].ends_with(LAST_CHUNK) {
            let kept = (filled - start).min(LAST_CHUNK.len() - 1);
            self.buffer.copy_within(filled - kept..filled, 0);
            (start, filled) = (0, kept + self.receive(kept).await?);
        }
        Ok(())
    }
}

/// Length of the head, with the empty line that ends it, once it is complete.
fn head_len(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4)
}

fn framing(head: &[u8]) -> anyhow::Result<Framing> {
    let head = std::str::from_utf8(head).context("the head is not text")?;
    let mut lines = head.lines();
    let status = lines.next().unwrap_or_default();
    ensure!(status.starts_with("HTTP/1.1 200 "), "answered {status:?}");
    for line in lines {
        let Some((name, value)) = line.split_once(':') else { continue };
        if name.eq_ignore_ascii_case("content-length") {
            return Ok(Framing::Length(value.trim().parse().context("content-length")?));
        }
        if name.eq_ignore_ascii_case("transfer-encoding") && value.trim().eq_ignore_ascii_case("chunked") {
            return Ok(Framing::Chunked);
        }
    }
    bail!("the response has neither content-length nor chunked framing:\n{head}")
}
