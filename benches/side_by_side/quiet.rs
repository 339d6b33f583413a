//! Keeps the rest of the machine out of the figures: a window that other processes disturbed is measured again.
//!
//! A compiler on the same core doubles a p99 and halves a throughput, and it does not do so to all systems alike. So
//! the busy time of each of the two cores (`/proc/stat`, with what a hypervisor stole) is compared with what the
//! processes of the comparison used of it; the rest was somebody else's.

use crate::process::{CORE_OF_LOAD, CORE_UNDER_TEST, core_busy, own_cpu};
use crate::systems::{DIRECT, Systems};
use std::cell::Cell;
use std::time::{Duration, Instant};
use tokio::time::sleep;

/// Share of a core that others may use. The kernel's ticks alone can make up eight hundredths.
const TOLERATED: f64 = 0.10;
/// How often a window is measured before it is taken as it is.
const TRIES: u32 = 6;

/// How long the systems may take to come to rest, how often it is looked whether they have, and what they may use in between:
/// a tick of the kernel's clock or two.
const SETTLING: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(500);
const IDLE: Duration = Duration::from_millis(30);

/// Counts the windows that stayed disturbed however often they were measured.
#[derive(Default)]
pub(crate) struct Quiet {
    disturbed: Cell<u32>,
}

impl Quiet {
    /// Runs `window` until nobody disturbs it, a limited number of times.
    pub(crate) async fn measure<T>(
        &self,
        systems: &Systems,
        window: impl AsyncFn() -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        for _ in 1..TRIES {
            settle(systems).await?;
            let (result, others) = observe(systems, &window).await?;
            if others <= TOLERATED {
                return Ok(result);
            }
            println!("  others used {:.0} % of a core: once more", others * 100.0);
        }
        settle(systems).await?;
        let (result, others) = observe(systems, &window).await?;
        if others > TOLERATED {
            self.disturbed.set(self.disturbed.get() + 1);
        }
        Ok(result)
    }

    /// Windows in the figures that were disturbed.
    pub(crate) fn disturbed(&self) -> u32 {
        self.disturbed.get()
    }
}

/// Waits until no system has anything to do: what a gateway put off under full load belongs to no later window, least of all
/// to one of another system.
async fn settle(systems: &Systems) -> anyhow::Result<()> {
    let used = || systems.all.iter().try_fold(Duration::ZERO, |sum, system| anyhow::Ok(sum + system.process.cpu()?));
    let started = Instant::now();
    let mut before = used()?;
    while started.elapsed() < SETTLING {
        sleep(LOOK).await;
        let now = used()?;
        if now.saturating_sub(before) <= IDLE {
            break;
        }
        before = now;
    }
    Ok(())
}

/// Runs `window`; returns its result and the share of the more disturbed core that others used meanwhile.
async fn observe<T>(systems: &Systems, window: impl AsyncFn() -> anyhow::Result<T>) -> anyhow::Result<(T, f64)> {
    let (started, before) = (Instant::now(), foreign(systems)?);
    let result = window().await?;
    let (elapsed, after) = (started.elapsed().as_secs_f64(), foreign(systems)?);
    let share = |core: usize| (after[core] - before[core]) / elapsed;
    Ok((result, share(0).max(share(1)).max(0.0)))
}

/// Seconds for which the core of the load and the core under test were busy with what is not ours, since some moment
/// that stays the same.
fn foreign(systems: &Systems) -> anyhow::Result<[f64; 2]> {
    let (mut load, mut under_test) = (own_cpu()?, Duration::ZERO);
    for system in &systems.all {
        let core = if system.name == DIRECT { &mut load } else { &mut under_test };
        *core += system.process.cpu()?;
    }
    if let Some(redis) = &systems.redis {
        load += redis.cpu()?;
    }
    let others = |core, ours: Duration| anyhow::Ok(core_busy(core)?.as_secs_f64() - ours.as_secs_f64());
    Ok([others(CORE_OF_LOAD, load)?, others(CORE_UNDER_TEST, under_test)?])
}
