//! Threads that let requests go first where cores are scarce.

/// Makes the calling thread, and those that it starts, run only while nobody else wants the core. There is no way back for a
/// process without privileges.
///
/// Niceness is not enough: whoever runs keeps the core for the rest of its slice, and that is what a p99 is made of. Of
/// an idle thread Linux takes the core away at once.
#[cfg(target_os = "linux")]
pub(super) fn give_way() {
    use thread_priority::{
        NormalThreadSchedulePolicy::Idle, ThreadPriority, ThreadSchedulePolicy, set_thread_priority_and_policy,
        thread_native_id,
    };
    let idle = ThreadSchedulePolicy::Normal(Idle);
    if let Err(error) = set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, idle) {
        tracing::debug!(%error, "a background thread keeps its priority");
    }
}

#[cfg(not(target_os = "linux"))]
pub(super) fn give_way() {}
