//! Limits per minute, as they are written down for a key or a user.

use serde::{Deserialize, Serialize};

/// Per-minute limits and the number of requests at once. `None`: the default applies; `Some(0)`: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Requests per minute.
    pub rpm: Option<u32>,
    /// Tokens per minute.
    pub tpm: Option<u64>,
    /// Requests in flight at once.
    pub concurrency: Option<u32>,
}
