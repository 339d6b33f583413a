//! The gateway with everything on, a bare Pingora pass-through and nginx, side by side: `make bench`.
//!
//! Ratios taken in one run are the only figures that travel between machines. So all systems stand in front of one mock
//! upstream at the same time, each pinned to one core with one worker, and take their turns in short interleaved
//! rounds; mock and load generator have the other core. The tables show medians and ranges, and at the end the gateway
//! is held against its targets.

mod binaries;
mod connection;
mod figures;
mod load;
mod mock;
mod options;
mod process;
mod quiet;
mod report;
mod systems;
mod verify;

use anyhow::{Context, ensure};
use clap::Parser;
use figures::{AllFigures, Samples, quantile};
use load::{Target, closed_loop, open_loop};
use options::{JSON_CONNECTIONS, Optional, Options, STREAM_CONNECTIONS};
use quiet::Quiet;
use std::process::ExitCode;
use std::thread::available_parallelism;
use systems::{System, Systems};
use tokio::task::LocalSet;
use verify::Requests;

fn main() -> anyhow::Result<ExitCode> {
    let options = Options::parse();
    if !options.bench {
        println!("measures only under `cargo bench`");
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(address) = options.mock {
        mock::serve(address)?;
        return Ok(ExitCode::SUCCESS);
    }
    ensure!(available_parallelism()?.get() >= 2, "two cores are needed: one for the systems, one for the load");
    let binaries = binaries::build(!options.without.contains(&Optional::Gateway))?;
    process::pin_self()?;
    let directory = tempfile::tempdir()?;
    let systems = systems::start(&options, &binaries, directory.path())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (figures, rate) = LocalSet::new().block_on(&runtime, measure(&options, &systems))?;

    let targets = figures::targets(&figures);
    let order: Vec<&str> = systems.all.iter().map(|system| system.name).collect();
    report::print(&order, &figures, &targets, rate);
    if let Some(path) = &options.json {
        report::write_json(path, &figures, &targets, rate)?;
    }
    let missed = options.strict && targets.iter().any(|target| !target.met);
    Ok(if missed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// One comparison: what every load needs to know, and what it found so far.
struct Comparison<'a> {
    options: &'a Options,
    systems: &'a Systems,
    requests: Requests,
    quiet: Quiet,
    figures: AllFigures,
}

/// Runs every load on every system; returns the figures and the open loop's rate.
async fn measure(options: &Options, systems: &Systems) -> anyhow::Result<(AllFigures, f64)> {
    let (requests, quiet, figures) = (Requests::new(), Quiet::default(), AllFigures::new());
    for system in &systems.all {
        requests.verify(system).await.with_context(|| format!("{} answers wrongly", system.name))?;
    }
    let mut comparison = Comparison { options, systems, requests, quiet, figures };
    let rounds = options.rounds();
    for round in 1..=rounds {
        println!("JSON, closed loop: round {round} of {rounds}");
        for system in &systems.all {
            comparison.json_closed(system).await.with_context(|| system.name)?;
        }
    }
    let rate = figures::half_load(&comparison.figures).context("bare Pingora was not measured")?;
    for round in 1..=rounds {
        println!("JSON, open loop at {rate:.0} requests/s: round {round} of {rounds}");
        for system in &systems.all {
            comparison.json_open(system, rate).await.with_context(|| system.name)?;
        }
    }
    for round in 1..=rounds {
        println!("streams, closed loop: round {round} of {rounds}");
        for system in &systems.all {
            comparison.streams_closed(system).await.with_context(|| system.name)?;
        }
    }
    comparison.memory()?;
    let disturbed = comparison.quiet.disturbed();
    if disturbed > 0 {
        println!("\nWARNING: other work on this machine disturbed {disturbed} windows to the last try");
    }
    Ok((comparison.figures, rate))
}

impl Comparison<'_> {
    async fn json_closed(&mut self, system: &System) -> anyhow::Result<()> {
        let target = Target { address: system.address, request: self.requests.json(system) };
        let run = async || closed_loop(&target, JSON_CONNECTIONS, self.options.window(), &system.process).await;
        let window = self.quiet.measure(self.systems, run).await?;
        let entry = self.figures.entry(system.name).or_default();
        entry.json_requests_per_second.0.push(window.requests_per_second());
        entry.json_cpu_us.0.push(window.cpu_us_per_request());
        Ok(())
    }

    async fn json_open(&mut self, system: &System, rate: f64) -> anyhow::Result<()> {
        let target = Target { address: system.address, request: self.requests.json(system) };
        let run = async || open_loop(&target, JSON_CONNECTIONS, rate, self.options.window(), &system.process).await;
        let (latencies, window) = self.quiet.measure(self.systems, run).await?;
        let entry = self.figures.entry(system.name).or_default();
        entry.half_load_p50_us.0.push(quantile(&latencies, 0.50).context("no request was answered")?);
        entry.half_load_p99_us.0.push(quantile(&latencies, 0.99).context("no request was answered")?);
        entry.half_load_cpu_us.0.push(window.cpu_us_per_request());
        Ok(())
    }

    async fn streams_closed(&mut self, system: &System) -> anyhow::Result<()> {
        let target = Target { address: system.address, request: self.requests.stream(system) };
        let run = async || closed_loop(&target, STREAM_CONNECTIONS, self.options.window(), &system.process).await;
        let window = self.quiet.measure(self.systems, run).await?;
        let entry = self.figures.entry(system.name).or_default();
        entry.streams_per_second.0.push(window.requests_per_second());
        entry.chunk_cpu_us.0.push(window.cpu_us_per_request() / f64::from(mock::CHUNKS));
        Ok(())
    }

    fn memory(&mut self) -> anyhow::Result<()> {
        for system in &self.systems.all {
            let entry = self.figures.entry(system.name).or_default();
            entry.idle_mib = Samples(vec![system.idle_mib]);
            entry.peak_mib = Samples(vec![system.process.peak_resident_mib()?]);
        }
        Ok(())
    }
}
