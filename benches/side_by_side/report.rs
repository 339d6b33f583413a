//! Prints the figures as tables and writes them as JSON.

use crate::figures::{AllFigures, Figures, Samples, Target};
use anyhow::Context;
use std::fs;
use std::path::Path;

/// One column of a table: its title, how many decimals, and where its samples are.
type Column = (&'static str, usize, fn(&Figures) -> &Samples);

const JSON: &[Column] = &[
    ("requests/s", 0, |figures| &figures.json_requests_per_second),
    ("CPU us/request", 1, |figures| &figures.json_cpu_us),
];
const HALF_LOAD: &[Column] = &[
    ("p50 us", 0, |figures| &figures.half_load_p50_us),
    ("p99 us", 0, |figures| &figures.half_load_p99_us),
    ("CPU us/request", 1, |figures| &figures.half_load_cpu_us),
];
const STREAMS: &[Column] =
    &[("streams/s", 0, |figures| &figures.streams_per_second), ("CPU us/chunk", 2, |figures| &figures.chunk_cpu_us)];
const MEMORY: &[Column] = &[("idle MiB", 1, |figures| &figures.idle_mib), ("peak MiB", 1, |figures| &figures.peak_mib)];

/// Prints everything. `rate` is the open loop's, in requests per second.
pub(crate) fn print(order: &[&'static str], figures: &AllFigures, targets: &[Target], rate: f64) {
    table("1 KB JSON, 64 connections, closed loop", order, figures, JSON);
    table(&format!("1 KB JSON, {rate:.0} requests/s, open loop (half load)"), order, figures, HALF_LOAD);
    table("200-chunk streams, 16 connections, closed loop", order, figures, STREAMS);
    table("Resident memory", order, figures, MEMORY);
    if targets.is_empty() {
        println!("\nThe gateway did not take part, so no target was checked.");
        return;
    }
    println!("\n{:<34}{:>28}{:>12}", "Targets", "measured [range]", "at most");
    for target in targets {
        let verdict = if target.met { "met" } else { "MISSED" };
        let limit = format!("{} {}", target.at_most, target.unit);
        println!("{:<34}{:>28}{limit:>12}  {verdict}", target.name, cell(&target.measured, 2));
    }
}

fn table(title: &str, order: &[&'static str], figures: &AllFigures, columns: &[Column]) {
    print!("\n{title}\n{:<14}", "");
    for (heading, ..) in columns {
        print!("{heading:>28}");
    }
    println!();
    for name in order {
        let Some(row) = figures.get(name) else { continue };
        print!("{name:<14}");
        for (_, decimals, samples) in columns {
            print!("{:>28}", cell(samples(row), *decimals));
        }
        println!();
    }
}

/// `median [least-greatest]`, or the value alone where there is only one.
fn cell(samples: &Samples, decimals: usize) -> String {
    match (samples.median(), samples.range()) {
        (Some(median), Some((least, greatest))) if samples.0.len() > 1 => {
            format!("{median:.decimals$} [{least:.decimals$}..{greatest:.decimals$}]")
        }
        (Some(only), _) => format!("{only:.decimals$}"),
        _ => "-".to_owned(),
    }
}

/// Writes each sample of each round, and the targets, to `path`.
pub(crate) fn write_json(path: &Path, figures: &AllFigures, targets: &[Target], rate: f64) -> anyhow::Result<()> {
    let all = serde_json::json!({ "systems": figures, "half_load_requests_per_second": rate, "targets": targets });
    fs::write(path, format!("{all:#}\n")).with_context(|| format!("write {}", path.display()))
}
