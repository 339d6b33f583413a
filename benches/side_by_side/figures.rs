//! The figures of the comparison: samples by system, their medians, and the targets they are held against.

use crate::systems::{BARE, GATEWAY, WITH_REDIS};
use serde::Serialize;
use std::collections::BTreeMap;

/// One value per round.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(transparent)]
pub(crate) struct Samples(pub(crate) Vec<f64>);

impl Samples {
    fn sorted(&self) -> Vec<f64> {
        let mut values = self.0.clone();
        values.sort_by(f64::total_cmp);
        values
    }

    /// The middle value (of an even number, the mean of the two in the middle).
    pub(crate) fn median(&self) -> Option<f64> {
        let values = self.sorted();
        let middle = values.len() / 2;
        if values.len() % 2 == 1 {
            return values.get(middle).copied();
        }
        Some(f64::midpoint(*values.get(middle.checked_sub(1)?)?, *values.get(middle)?))
    }

    /// The least and the greatest value.
    pub(crate) fn range(&self) -> Option<(f64, f64)> {
        let values = self.sorted();
        Some((*values.first()?, *values.last()?))
    }

    /// Combines the values round by round: rounds are short, so both sides saw the same machine.
    fn paired(&self, other: &Self, combine: impl Fn(f64, f64) -> f64) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(mine, theirs)| combine(*mine, *theirs)).collect())
    }
}

/// The value at `quantile` (0 to 1) of ascending values.
pub(crate) fn quantile(ascending: &[f64], quantile: f64) -> Option<f64> {
    let rank = (ascending.len() as f64 * quantile).ceil();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rank is between 0 and the length")]
    ascending.get((rank as usize).saturating_sub(1)).copied()
}

/// What was measured of one system.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Figures {
    pub(crate) json_requests_per_second: Samples,
    pub(crate) json_cpu_us: Samples,
    pub(crate) half_load_p50_us: Samples,
    pub(crate) half_load_p99_us: Samples,
    pub(crate) half_load_cpu_us: Samples,
    pub(crate) streams_per_second: Samples,
    pub(crate) chunk_cpu_us: Samples,
    pub(crate) idle_mib: Samples,
    pub(crate) peak_mib: Samples,
}

/// The figures of every system, by name.
pub(crate) type AllFigures = BTreeMap<&'static str, Figures>;

/// Half of what bare Pingora and the gateway can both do in the closed loop, in requests per second.
///
/// The latencies of two systems compare only at one rate, and only while neither queues: at half of bare's own
/// throughput the gateway, with its writer on the same core, is near its knee, and a p99 shows the queue instead of
/// the work.
pub(crate) fn half_load(figures: &AllFigures) -> Option<f64> {
    let full = |name| figures.get(name)?.json_requests_per_second.median();
    let bare = full(BARE)?;
    Some(full(GATEWAY).map_or(bare, |gateway| gateway.min(bare)) / 2.0)
}

/// One promise of the gateway, and how it stands.
#[derive(Debug, Serialize)]
pub(crate) struct Target {
    pub(crate) name: &'static str,
    /// Median and range, in `unit`.
    pub(crate) measured: Samples,
    pub(crate) at_most: f64,
    pub(crate) unit: &'static str,
    pub(crate) met: bool,
}

/// Holds the gateway against its targets; empty if it did not take part.
pub(crate) fn targets(figures: &AllFigures) -> Vec<Target> {
    let (Some(gateway), Some(bare)) = (figures.get(GATEWAY), figures.get(BARE)) else { return Vec::new() };
    let ratio = |mine: &Samples, theirs: &Samples| mine.paired(theirs, |mine, theirs| mine / theirs);
    let added_ms = gateway.half_load_p99_us.paired(&bare.half_load_p99_us, |mine, theirs| (mine - theirs) / 1e3);
    let with_redis = figures.get(WITH_REDIS).map(|shared| {
        let added = shared.half_load_p99_us.paired(&gateway.half_load_p99_us, |mine, theirs| (mine - theirs) / 1e3);
        let lost = |mine: f64, theirs: f64| 100.0 * (1.0 - mine / theirs);
        let lost = shared.json_requests_per_second.paired(&gateway.json_requests_per_second, lost);
        [("p99 added by Redis at half load", added, 0.25, "ms"), ("throughput lost by Redis", lost, 25.0, "%")]
    });
    [
        ("CPU per JSON request / bare", ratio(&gateway.json_cpu_us, &bare.json_cpu_us), 1.35, "x"),
        ("CPU per streamed chunk / bare", ratio(&gateway.chunk_cpu_us, &bare.chunk_cpu_us), 1.25, "x"),
        ("p99 added at half load", added_ms, 0.3, "ms"),
        ("resident memory, idle", gateway.idle_mib.clone(), 30.0, "MiB"),
    ]
    .into_iter()
    .chain(with_redis.into_iter().flatten())
    .map(|(name, measured, at_most, unit)| {
        let met = measured.median().is_some_and(|median| median <= at_most);
        Target { name, measured, at_most, unit, met }
    })
    .collect()
}
