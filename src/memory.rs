//! How the process asks the system for memory.
//!
//! The allocator asks for huge pages (2 MiB) where the system leaves the choice to programs. Each thread has its own few
//! kilobytes in them, and the whole page counts: an idle gateway took 32 MiB with them and takes 17 MiB without, at the
//! same CPU time per request.

/// Makes the process use small pages only. A system that cannot do that costs memory, and nothing else.
#[cfg(target_os = "linux")]
pub fn use_small_pages() {
    let _ = rustix::thread::disable_transparent_huge_pages(true);
}

/// Other systems are left as they are.
#[cfg(not(target_os = "linux"))]
pub fn use_small_pages() {}
