//! `[audit]`: what is kept of requests, and for how long.

use std::str::FromStr;

use tollgate_core::{
    content::ContentMode,
    redact::{MAX_PATTERNS, Redactor},
};

use super::{Audit, table::Table, validate::size};

/// A hundred years: more is a slip of the keyboard.
const MAX_DAYS: u32 = 36_500;

/// Reads `[audit]`; compiles its patterns, to find out whether they can be used.
pub(super) fn audit(table: &mut Table<'_>) -> Audit {
    let max_content_bytes = size(table, "max_content", 256 << 10, 1 << 10..=16 << 20);
    let buffer_bytes = size(table, "buffer", 64 << 20, 1 << 20..=1 << 40);
    if buffer_bytes < 4 * max_content_bytes {
        table.problem("buffer", "is too small: four times max_content is the least, or hardly any content finds room");
    }
    let usable = |text: &str| Redactor::try_new([text]).map(|_| text.to_owned()).map_err(|error| error.to_string());
    let redact: Vec<_> = table.list("redact", usable).unwrap_or_default().into_iter().map(|(text, _)| text).collect();
    if redact.len() > MAX_PATTERNS {
        table.problem(
            "redact",
            format!("has {} patterns, and {MAX_PATTERNS} is the most: join some with |", redact.len()),
        );
    }
    Audit {
        retention_days: table.whole("retention_days", 0..=MAX_DAYS).unwrap_or(90),
        content: table.text("content", ContentMode::from_str).unwrap_or_default(),
        content_retention_days: table.whole("content_retention_days", 0..=MAX_DAYS).unwrap_or(30),
        max_content_bytes: usize::try_from(max_content_bytes).unwrap_or(usize::MAX),
        buffer_bytes: usize::try_from(buffer_bytes).unwrap_or(usize::MAX),
        redact,
    }
}
