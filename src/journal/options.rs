//! How a journal is kept.

use std::{path::PathBuf, time::Duration};

use prometheus::IntCounter;

use crate::limiter::Limiter;

/// Least that a journal may be capped at.
pub const MIN_CAP: u64 = 1024 * 1024;

/// What happens when there is as much as there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFull {
    /// New requests are refused.
    Refuse,
    /// The oldest entries are lost.
    DropOldest,
}

/// When entries are synced to the disk, so that they outlive the machine too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fsync {
    /// When the system thinks best.
    Never,
    /// So often.
    Every(Duration),
    /// Each, before its answer ends. The thread of the request waits for the disk.
    Always,
}

/// How a journal is kept.
#[derive(Debug)]
pub struct Options {
    /// Where.
    pub directory: PathBuf,
    /// How much disk it may take, in bytes.
    pub max_bytes: u64,
    /// What happens then.
    pub on_full: OnFull,
    /// When it is synced to the disk.
    pub fsync: Fsync,
    /// After how many ends the job that books them is woken.
    pub batch: usize,
    /// Who is told when what is held will never be booked.
    pub limiter: Limiter,
    /// Counts records that are lost.
    pub lost: IntCounter,
    /// Counts damaged bytes.
    pub damaged: IntCounter,
}
