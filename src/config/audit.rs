//! `[audit]`: for how long what is known of single requests is kept.

use super::{Audit, table::Table};

/// A century; longer is for ever.
const MOST_DAYS: u32 = 36_500;

pub(super) fn audit(table: &mut Table<'_>) -> Audit {
    let mut days = |name, default| table.whole(name, 0..=MOST_DAYS).unwrap_or(default);
    Audit { retention_days: days("retention_days", 90), content_retention_days: days("content_retention_days", 30) }
}
