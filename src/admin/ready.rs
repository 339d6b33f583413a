//! `/readyz`: which parts are as they should be, and what to do about those that are not.
//!
//! What makes a gateway unready, and what only degraded, is decided in [`tollgate_core::readiness`]; here the parts are asked. All
//! of them know by themselves: nothing is asked over the network for this page, so it answers at once, also while a database
//! or Redis hangs.

use std::time::Duration;

use tollgate_core::{
    breaker::{Ready, State},
    readiness::{Part, Readiness},
};

use crate::{journal::Condition, shared::Shared};

/// How it stands with this gateway.
pub(super) fn readiness(shared: &Shared, is_draining: bool) -> Readiness {
    Readiness(vec![
        ("listeners", listeners(is_draining)),
        ("keys", keys(shared)),
        ("upstreams", upstreams(shared)),
        ("journal", journal(shared)),
        ("limiter", limiter(shared)),
        ("store", store(shared)),
    ])
}

fn listeners(is_draining: bool) -> Part {
    if is_draining {
        return Part::unavailable(
            "the gateway has been told to stop: it finishes what is under way and takes nothing new",
        );
    }
    Part::ok()
}

fn keys(shared: &Shared) -> Part {
    if shared.keys.is_empty() {
        return Part::unavailable("there is no key yet, so nobody can be served: tollgate key create");
    }
    Part::ok()
}

/// Each upstream that takes part says whether a request could go there now.
fn upstreams(shared: &Shared) -> Part {
    let (view, now_ms) = (shared.view.load(), shared.now_ms());
    let members = view.snapshot.members();
    let used: Vec<_> = members.iter().filter(|m| !m.upstream.disabled && m.upstream.weight > 0).collect();
    if used.is_empty() {
        return Part::unavailable(match members.len() {
            0 => "there is no upstream: tollgate upstream add",
            _ => "every upstream is disabled, or has no weight: tollgate upstream enable",
        });
    }
    // One whose rest is over takes the next request, which finds out.
    let is_usable = |ready: Ready, state: State| ready == Ready::Now || state == State::HalfOpen;
    let resting: Vec<String> = used
        .iter()
        .filter_map(|member| {
            let (ready, state) = (member.state.health.ready(now_ms), member.state.health.state(now_ms));
            (!is_usable(ready, state)).then(|| format!("{} ({})", member.upstream.name, rest(ready, state, now_ms)))
        })
        .collect();
    let list = resting.join(", ");
    match resting.len() {
        0 => Part::ok(),
        all if all == used.len() => Part::unavailable(format!("no upstream can be asked now: {list}")),
        _ => Part::degraded(format!("the others take the work of {list}")),
    }
}

fn rest(ready: Ready, state: State, now_ms: u64) -> String {
    let word = state.as_str();
    match ready {
        Ready::At(at_ms) => {
            format!("{word} for {} s", Duration::from_millis(at_ms.saturating_sub(now_ms)).as_secs() + 1)
        }
        _ if state == State::Quarantined => {
            format!("{word}: look at its credential and account, tollgate upstream test")
        }
        _ => word.to_owned(),
    }
}

fn journal(shared: &Shared) -> Part {
    let journal = &shared.journal;
    let (condition, pending) = (journal.condition(), journal.pending());
    let text = match &condition {
        Condition::Well => return Part::ok(),
        Condition::Full => format!(
            "it is full ([usage] journal_max), because {pending} records wait for the database; bring that back, or give it more"
        ),
        Condition::Failing(error) => format!(
            "it cannot be written ([usage] journal): {error}; usage is kept in memory until it can; free or mend its disk"
        ),
    };
    match (journal.is_taking(), condition) {
        (false, _) => Part::unavailable(format!("no requests are taken: {text}")),
        (true, Condition::Full) => Part::degraded(format!("the oldest usage is lost: {text}")),
        (true, _) => Part::degraded(text),
    }
}

fn limiter(shared: &Shared) -> Part {
    if shared.metrics.limiter_degraded.get() == 0 {
        return Part::ok();
    }
    if shared.limiter.refuses_without_redis() {
        return Part::unavailable(
            "Redis ([limiter] redis) does not answer, and on_redis_down = \"deny\": what has limits is refused until it does",
        );
    }
    Part::degraded(
        "Redis ([limiter] redis) does not answer: this gateway holds its share of every limit by itself until it does",
    )
}

fn store(shared: &Shared) -> Part {
    if shared.metrics.store_up.get() == 1 {
        return Part::ok();
    }
    let pending = shared.journal.pending();
    Part::degraded(format!(
        "the database ([store] url) does not answer: changes of users, keys and upstreams are not seen, and usage waits in the \
         journal ({pending} records), until it does; requests are served"
    ))
}
