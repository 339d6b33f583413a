//! `tollgate upstream drain`: gives an upstream no new work and waits until what it is doing is done.
//!
//! The running gateway counts what is in flight, so it is asked, again and again. It must have seen the change, and find
//! nothing several times in a row: a request that took its view of the pool just before may still come to this upstream.
//! One gateway is asked, that of this configuration; other replicas count for themselves.

use std::time::Duration;

use anyhow::bail;
use serde_json::json;
use tokio::time::{Instant, sleep};
use tollgate_core::units::show_duration;

use super::{
    Output,
    progress::Progress,
    running::{Running, Standing},
    upstream::{Context, sentence, view},
};
use crate::args::DrainArgs;

/// How often the gateway is asked.
const PERIOD: Duration = Duration::from_millis(250);
/// How often in a row it must find nothing in flight: longer, all together, than a request waits for an upstream by default.
const CALM: u32 = 5;
/// How often in a row it may leave us without an answer: at first, when there may be none, and later, when it may be busy.
const SILENCE: [u32; 2] = [3, 20];

/// How the waiting ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// Nothing is in flight any more.
    Drained,
    /// No gateway ever answered.
    Unknown,
    /// It answered, and then did no more.
    Lost(Standing),
    /// The time is over.
    Late(Standing),
}

pub(super) async fn run(args: DrainArgs, ctx: Context<'_>, out: &mut Output<'_>) -> anyhow::Result<()> {
    let mut upstream = ctx.stored(&args.upstream.upstream).await?;
    if !upstream.spec.disabled {
        upstream = ctx.store.update_upstream(upstream.id, ctx.actor, |spec| spec.disabled = true).await?;
    }
    let name = &upstream.spec.name;
    let began = Instant::now();
    let end = match ctx.in_file(name) {
        // The gateway uses that one and knows nothing of ours.
        Some(_) => End::Drained,
        None => wait(ctx.running, name, began + args.timeout).await,
    };
    let (drained, in_flight) = match &end {
        End::Drained => (Some(true), Some(0)),
        End::Unknown => (None, None),
        End::Lost(standing) | End::Late(standing) => (Some(false), Some(standing.in_flight)),
    };
    let mut object = view(&upstream);
    object["drained"] = json!(drained);
    object["in_flight"] = json!(in_flight);
    object["waited_ms"] = json!(u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX));
    let text = match &end {
        End::Drained => format!("{}: nothing is in flight there", sentence("drained", &upstream)),
        _ => sentence("disabled", &upstream),
    };
    out.done(&object, &text)?;
    match end {
        End::Drained => Ok(()),
        End::Unknown => {
            let silence = ctx.running.silence();
            Ok(out.note(&format!("what is in flight there is not known: {silence}"))?)
        }
        End::Lost(standing) => bail!(
            "the gateway does not answer any more; the last of {name:?} was: {}; it stays disabled",
            in_words(&standing)
        ),
        End::Late(standing) => bail!(
            "{name:?} after {}: {}; it stays disabled, and `tollgate upstream drain` goes on waiting",
            show_duration(args.timeout),
            in_words(&standing)
        ),
    }
}

/// Asks the gateway until nothing is in flight at the upstream `name`, or it makes no sense any more.
async fn wait(running: Running, name: &str, until: Instant) -> End {
    let progress = Progress::waiting();
    let (mut last, mut calm, mut silent) = (None, 0, 0);
    loop {
        match running.look().await {
            Some(mut standings) => {
                // One that it does not know has nothing in flight there.
                let gone = Standing { state: Some("disabled".to_owned()), in_flight: 0 };
                let standing = standings.remove(name).unwrap_or(gone);
                let is_calm = standing.in_flight == 0 && standing.state.as_deref() == Some("disabled");
                (calm, silent) = (if is_calm { calm + 1 } else { 0 }, 0);
                if last.as_ref() != Some(&standing) {
                    progress.tell(&format!("{name}: {}", in_words(&standing)));
                }
                last = Some(standing);
            }
            None => silent += 1,
        }
        match last.take() {
            _ if calm >= CALM => return End::Drained,
            None if silent >= SILENCE[0] => return End::Unknown,
            Some(standing) if silent >= SILENCE[1] => return End::Lost(standing),
            Some(standing) if Instant::now() >= until => return End::Late(standing),
            standing => last = standing,
        }
        sleep(PERIOD).await;
    }
}

fn in_words(standing: &Standing) -> String {
    match (standing.in_flight, standing.state.as_deref()) {
        (0, Some("disabled")) => "nothing in flight".to_owned(),
        (0, _) => "the gateway has not seen yet that it is disabled".to_owned(),
        (1, _) => "1 attempt in flight".to_owned(),
        (n, _) => format!("{n} attempts in flight"),
    }
}
