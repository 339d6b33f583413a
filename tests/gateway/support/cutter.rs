//! A way to a database that can be cut: a TCP proxy in front of PostgreSQL's socket.
//!
//! It passes everything until it is told otherwise. It can refuse all, or cut a connection where it hurts most: when a commit
//! is on its way, before the server sees it, or after, with the answer on its way back.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixStream},
    sync::{Notify, oneshot},
};

/// What becomes of what goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Mode {
    /// It passes.
    Pass,
    /// Connections are cut, and no new ones are taken.
    Refuse,
    /// Each second commit is cut off before the server sees it, each other one after it did.
    CutCommits,
}

/// A running proxy.
pub(crate) struct Cutter {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    socket: PathBuf,
    mode: AtomicU8,
    changed: Notify,
    /// Commits that were cut off.
    cuts: AtomicUsize,
}

impl Cutter {
    /// Starts one in front of the server whose socket is in `directory`.
    pub(crate) fn start(directory: &Path) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            socket: directory.join(".s.PGSQL.5432"),
            mode: AtomicU8::new(Mode::Pass as u8),
            changed: Notify::new(),
            cuts: AtomicUsize::new(0),
        });
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let listener = TcpListener::from_std(listener).unwrap();
                    tokio::select! {
                        () = accept(listener, shared) => {}
                        _ = stopped => {}
                    }
                });
            }
        });
        Self { address, shared, stop: Some(stop), thread: Some(thread) }
    }

    /// The URL of a database through it.
    pub(crate) fn url(&self, database: &str) -> String {
        format!("postgres://postgres@{}/{database}", self.address)
    }

    /// From now on.
    pub(crate) fn set(&self, mode: Mode) {
        self.shared.mode.store(mode as u8, Ordering::SeqCst);
        self.shared.changed.notify_waiters();
    }

    /// How many commits were cut off.
    pub(crate) fn cuts(&self) -> usize {
        self.shared.cuts.load(Ordering::SeqCst)
    }
}

impl Drop for Cutter {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

impl Shared {
    fn is(&self, mode: Mode) -> bool {
        self.mode.load(Ordering::SeqCst) == mode as u8
    }

    async fn refused(&self) {
        loop {
            let changed = self.changed.notified();
            if self.is(Mode::Refuse) {
                return;
            }
            changed.await;
        }
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((client, _)) = listener.accept().await {
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            tokio::select! {
                // However it ends, both sides are closed.
                _ = pass(client, &shared) => {}
                () = shared.refused() => {}
            }
        });
    }
}

async fn pass(client: TcpStream, shared: &Shared) -> std::io::Result<()> {
    client.set_nodelay(true)?;
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = UnixStream::connect(&shared.socket).await?.into_split();
    let there = async {
        let mut bytes = vec![0; 64 * 1024];
        loop {
            let length = from_client.read(&mut bytes).await?;
            if length == 0 {
                return Ok(());
            }
            let is_commit = bytes[..length].windows(6).any(|word| word == b"COMMIT");
            if is_commit && shared.is(Mode::CutCommits) {
                let number = shared.cuts.fetch_add(1, Ordering::SeqCst);
                if number.is_multiple_of(2) {
                    to_server.write_all(&bytes[..length]).await?;
                    // The server closes its side once it has done what it was told; its answer goes nowhere.
                    to_server.shutdown().await?;
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
                return Err(std::io::ErrorKind::ConnectionReset.into());
            }
            to_server.write_all(&bytes[..length]).await?;
        }
    };
    let back = tokio::io::copy(&mut from_server, &mut to_client);
    tokio::select! {
        done = there => done,
        done = back => done.map(drop),
    }
}
