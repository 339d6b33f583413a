//! Numbers on their way in and out of the database, which knows signed integers only.
//!
//! A number too large for its column is stored as the largest that fits: wrong by being too small, but never a reason
//! to keep a request off the books.

/// A count for a 64-bit column.
pub(super) fn big(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// A count for a 32-bit column.
pub(super) fn small(n: u32) -> i32 {
    i32::try_from(n).unwrap_or(i32::MAX)
}

/// A count from a 64-bit column.
pub(super) fn count(n: i64) -> u64 {
    u64::try_from(n).unwrap_or(0)
}

/// A count from a 64-bit column that holds a 32-bit one.
pub(super) fn count32(n: i64) -> u32 {
    u32::try_from(n.max(0)).unwrap_or(u32::MAX)
}
