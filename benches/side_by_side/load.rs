//! The two loads: a closed loop (as fast as answers come) and an open loop (at a fixed rate, come what may).
//!
//! The closed loop tells what a request costs. Latency is taken from the open loop only, and counted from the moment a
//! request was *due*: if the system stalls, the requests that pile up behind the stall count too, as they would for
//! callers that do not wait for each other.

use crate::connection::Connection;
use crate::options::WARM_UP;
use crate::process::Process;
use anyhow::Context;
use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// After this a load counts as hung; the longest window is a minute.
const PATIENCE: Duration = Duration::from_secs(90);

/// Where a load goes, and what it says.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) address: SocketAddr,
    /// A whole HTTP/1.1 request, head and body.
    pub(crate) request: Arc<[u8]>,
}

/// What was counted in one measured window.
pub(crate) struct Window {
    pub(crate) requests: u32,
    pub(crate) elapsed: Duration,
    /// CPU time of the process under test.
    pub(crate) cpu: Duration,
}

impl Window {
    pub(crate) fn requests_per_second(&self) -> f64 {
        f64::from(self.requests) / self.elapsed.as_secs_f64()
    }

    pub(crate) fn cpu_us_per_request(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / f64::from(self.requests.max(1))
    }
}

/// Keeps `connections` busy without a pause and measures `window` of it.
pub(crate) async fn closed_loop(
    target: &Target,
    connections: usize,
    window: Duration,
    process: &Process,
) -> anyhow::Result<Window> {
    let done = Rc::new(Cell::new(0_u32));
    let ended = Rc::new(Cell::new(false));
    let mut clients = JoinSet::new();
    for _ in 0..connections {
        let (target, done, ended) = (target.clone(), Rc::clone(&done), Rc::clone(&ended));
        clients.spawn_local(async move {
            let mut connection = Connection::open(target.address).await?;
            while !ended.get() {
                connection.exchange(&target.request).await?;
                done.set(done.get() + 1);
            }
            anyhow::Ok(())
        });
    }
    sleep(WARM_UP).await;
    let (started, cpu_before, done_before) = (Instant::now(), process.cpu()?, done.get());
    sleep(window).await;
    let cpu = process.cpu()?.saturating_sub(cpu_before);
    let counted = Window { requests: done.get() - done_before, elapsed: started.elapsed(), cpu };
    ended.set(true);
    join(clients).await?;
    Ok(counted)
}

/// Sends requests at `rate` per second over `connections`; returns each latency in microseconds, ascending, and the
/// measured window.
pub(crate) async fn open_loop(
    target: &Target,
    connections: usize,
    rate: f64,
    window: Duration,
    process: &Process,
) -> anyhow::Result<(Vec<f64>, Window)> {
    let mut opened = Vec::new();
    for _ in 0..connections {
        let mut connection = Connection::open(target.address).await?;
        connection.exchange(&target.request).await?;
        opened.push(connection);
    }
    let started = Instant::now();
    let cpu_before = process.cpu()?;
    let due = Arc::new(Mutex::new(clock(rate, window)));
    let mut clients = JoinSet::new();
    for mut connection in opened {
        let (target, due) = (target.clone(), Arc::clone(&due));
        clients.spawn_local(async move {
            let mut latencies = Vec::new();
            loop {
                let next = due.lock().await.recv().await;
                let Some(intended) = next else { return anyhow::Ok(latencies) };
                connection.exchange(&target.request).await?;
                latencies.push(intended.elapsed().as_secs_f64() * 1e6);
            }
        });
    }
    let mut latencies: Vec<f64> = join(clients).await?.into_iter().flatten().collect();
    let cpu = process.cpu()?.saturating_sub(cpu_before);
    let requests = u32::try_from(latencies.len()).context("more requests than a window can hold")?;
    latencies.sort_by(f64::total_cmp);
    Ok((latencies, Window { requests, elapsed: started.elapsed(), cpu }))
}

/// Tells the moments at which requests are due, each one when it has come. A thread of its own, because the runtime's
/// timer counts in milliseconds.
fn clock(rate: f64, window: Duration) -> mpsc::UnboundedReceiver<Instant> {
    let (sender, receiver) = mpsc::unbounded_channel();
    thread::spawn(move || {
        let started = Instant::now();
        for number in 0_u32.. {
            let after = Duration::from_secs_f64(f64::from(number) / rate);
            if after > window {
                break;
            }
            let due = started + after;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if sender.send(due).is_err() {
                break; // a client failed, and the load with it
            }
        }
    });
    receiver
}

async fn join<T: 'static>(mut clients: JoinSet<anyhow::Result<T>>) -> anyhow::Result<Vec<T>> {
    let mut results = Vec::new();
    let all = async {
        while let Some(result) = clients.join_next().await {
            results.push(result??);
        }
        anyhow::Ok(())
    };
    timeout(PATIENCE, all).await.context("a request was never answered")??;
    Ok(results)
}
