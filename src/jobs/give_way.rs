//! Threads that let requests go first where cores are scarce.

use thread_priority::NormalThreadSchedulePolicy::{self, Idle, Other};

/// Makes the calling thread, and those that it starts, run only while nobody else wants the core. There is no way back for a
/// process without privileges.
///
/// Niceness is not enough: whoever runs keeps the core for the rest of its slice, and that is what a p99 is made of. Of
/// an idle thread Linux takes the core away at once.
pub(super) fn give_way() {
    lower(Idle);
}

/// The same, but with a small share of the core even where somebody else always wants it (the highest niceness): for work that
/// must not fall behind without end.
pub(super) fn give_most_way() {
    lower(Other);
}

#[cfg(target_os = "linux")]
fn lower(policy: NormalThreadSchedulePolicy) {
    use thread_priority::{ThreadPriority, ThreadSchedulePolicy, set_thread_priority_and_policy, thread_native_id};
    let policy = ThreadSchedulePolicy::Normal(policy);
    if let Err(error) = set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, policy) {
        tracing::debug!(%error, "a background thread keeps its priority");
    }
}

#[cfg(not(target_os = "linux"))]
fn lower(_policy: NormalThreadSchedulePolicy) {}
