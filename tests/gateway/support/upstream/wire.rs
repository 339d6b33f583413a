//! Reading requests off the wire, keeping every byte that matters.

use std::io;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::tcp::{OwnedReadHalf, OwnedWriteHalf},
};

const MOST_HEADER: usize = 256 << 10;

/// One request, as it arrived.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    pub(crate) method: String,
    /// Path and query.
    pub(crate) target: String,
    /// Names and values in their order, spelt as they were.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    pub(crate) framing: Framing,
    /// Number of the connection, from 0.
    pub(crate) connection: u64,
    /// Did the body arrive whole?
    pub(crate) is_complete: bool,
}

/// How a body was delimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    None,
    ContentLength(usize),
    Chunked,
}

impl Received {
    /// The first header `name`, in any spelling.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }
}

/// The receiving side of a connection.
pub(super) struct Reader {
    read: OwnedReadHalf,
    buffer: Vec<u8>,
}

impl Reader {
    pub(super) fn new(read: OwnedReadHalf) -> Self {
        Self { read, buffer: Vec::new() }
    }

    /// The next request; `None` when the client has closed. A body that breaks off is returned as far as it came.
    pub(super) async fn request(
        &mut self,
        write: &mut OwnedWriteHalf,
        connection: u64,
    ) -> io::Result<Option<Received>> {
        let Some(head) = self.head().await? else { return Ok(None) };
        let mut lines = head.split("\r\n");
        let mut words = lines.next().unwrap_or_default().split(' ').map(str::to_owned);
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let headers = lines.filter_map(|line| line.split_once(':')).map(|(n, v)| (n.to_owned(), v.trim().to_owned()));
        let mut request = Received {
            method,
            target,
            headers: headers.collect(),
            body: Vec::new(),
            framing: Framing::None,
            connection,
            is_complete: true,
        };
        if request.header("expect").is_some() {
            write.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
        }
        if request.header("transfer-encoding").is_some() {
            request.framing = Framing::Chunked;
            request.is_complete = self.chunks(&mut request.body).await.is_ok();
        } else if let Some(length) = request.header("content-length").and_then(|length| length.parse().ok()) {
            request.framing = Framing::ContentLength(length);
            request.is_complete = self.exactly(length, &mut request.body).await.is_ok();
        }
        Ok(Some(request))
    }

    /// Done when the client closes. What it sends in the meantime is kept for the next request.
    pub(super) async fn closed(&mut self) {
        while self.buffer.len() < MOST_HEADER {
            if self.fill().await.is_err() {
                return;
            }
        }
        std::future::pending::<()>().await;
    }

    async fn head(&mut self) -> io::Result<Option<String>> {
        loop {
            if let Some(end) = find(&self.buffer, b"\r\n\r\n") {
                let head = self.take(end);
                self.take(4);
                return String::from_utf8(head).map(Some).map_err(io::Error::other);
            }
            match self.fill().await {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof && self.buffer.is_empty() => {
                    return Ok(None);
                }
                filled => filled?,
            }
            if self.buffer.len() > MOST_HEADER {
                return Err(io::Error::other("the header is too long"));
            }
        }
    }

    async fn chunks(&mut self, body: &mut Vec<u8>) -> io::Result<()> {
        loop {
            let line = self.line().await?;
            let size = line.split(';').next().unwrap_or_default().trim();
            let size = usize::from_str_radix(size, 16).map_err(io::Error::other)?;
            if size == 0 {
                while !self.line().await?.is_empty() {}
                return Ok(());
            }
            self.exactly(size, body).await?;
            if !self.line().await?.is_empty() {
                return Err(io::Error::other("a chunk is longer than it said"));
            }
        }
    }

    async fn line(&mut self) -> io::Result<String> {
        loop {
            if let Some(end) = find(&self.buffer, b"\r\n") {
                let line = self.take(end);
                self.take(2);
                return String::from_utf8(line).map_err(io::Error::other);
            }
            self.fill().await?;
        }
    }

    async fn exactly(&mut self, mut left: usize, body: &mut Vec<u8>) -> io::Result<()> {
        loop {
            let part = self.take(left.min(self.buffer.len()));
            left -= part.len();
            body.extend(part);
            if left == 0 {
                return Ok(());
            }
            self.fill().await?;
        }
    }

    fn take(&mut self, n: usize) -> Vec<u8> {
        self.buffer.drain(..n).collect()
    }

    async fn fill(&mut self) -> io::Result<()> {
        let n = self.read.read_buf(&mut self.buffer).await?;
        if n == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}
