//! `tollgate audit`: the request log.

use std::{io::Write, time::Duration};

use anyhow::Context as _;
use chrono::Utc;

use super::{
    Output, WrongUse,
    listing::{Form, Listing},
    output::cell,
};
use crate::{
    args::AuditArgs,
    store::{AuditFilter, AuditRow, Bookmark, Store, StoreError},
};

/// What a table shows.
const SHOWN: [&str; 12] = [
    "started_at",
    "request_id",
    "user",
    "key",
    "model",
    "upstream",
    "status",
    "code",
    "prompt_tokens",
    "completion_tokens",
    "cost_nano_usd",
    "duration_ms",
];
/// What CSV has: everything.
const ALL: [&str; 36] = [
    "request_id",
    "started_at",
    "user_id",
    "user",
    "key_id",
    "key",
    "ip",
    "route",
    "model",
    "upstream_model",
    "served_model",
    "upstream",
    "attempts",
    "status",
    "stream",
    "code",
    "service_tier",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "cache_write_tokens",
    "reasoning_tokens",
    "audio_tokens",
    "output_audio_tokens",
    "image_tokens",
    "output_image_tokens",
    "estimated",
    "interrupted",
    "cost_nano_usd",
    "ttft_ms",
    "duration_ms",
    "overhead_us",
    "finish_reason",
    "user_agent",
    "client_request_id",
    "provider_request_id",
];
/// Rows that are in memory at once.
const PAGE: u32 = 1000;
/// The most rows that `--follow` begins with.
const MOST_AT_FIRST: u64 = 10_000;
/// How often the log is looked at by `--follow`.
const PERIOD: Duration = Duration::from_millis(500);

pub(super) async fn run(
    args: AuditArgs,
    store: &Store,
    out: &mut Output<'_>,
    reader_is_gone: &dyn Fn() -> bool,
) -> anyhow::Result<()> {
    let csv = super::one_form(args.csv, out.json)?;
    let (follows, limit) = (args.follow, args.limit);
    let filter = filter(args, store).await?;
    if follows {
        let most = limit.0.filter(|most| *most <= MOST_AT_FIRST).ok_or_else(|| {
            WrongUse(format!("--follow goes on after the newest rows: begin with --limit {MOST_AT_FIRST} at most"))
        })?;
        let mut lines = Lines::begin(out, csv)?;
        return follow(filter, most, store, &mut lines, reader_is_gone).await;
    }
    let form = out.form(csv);
    let mut listing = Listing::begin(out, form, if csv { &ALL } else { &SHOWN })?;
    let mut left = limit.0;
    each_page(filter, store, &mut left, |page| {
        for row in page {
            listing.push(&serde_json::to_value(row)?)?;
        }
        Ok(())
    })
    .await?;
    Ok(listing.finish()?)
}

async fn filter(args: AuditArgs, store: &Store) -> anyhow::Result<AuditFilter> {
    let now = Utc::now();
    Ok(AuditFilter {
        since: args.since.map(|since| since.since(now)),
        until: args.until.map(|until| until.until(now)),
        user: super::find_user(store, args.only.user.as_deref()).await?,
        key: super::find_key(store, args.only.key.as_deref()).await?,
        model: args.only.model,
        upstream: args.only.upstream,
        status: args.status,
        code: args.code,
        ..AuditFilter::default()
    })
}

/// Reads what `filter` asks for, newest first, up to `left` rows.
async fn each_page(
    mut filter: AuditFilter,
    store: &Store,
    left: &mut Option<u64>,
    mut take: impl FnMut(Vec<AuditRow>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    loop {
        filter.limit = left.map_or(PAGE, |left| u32::try_from(left).map_or(PAGE, |left| left.min(PAGE)));
        if filter.limit == 0 {
            return Ok(());
        }
        let page = store.audit(&filter).await?;
        if let Some(left) = left {
            *left = left.saturating_sub(page.len() as u64);
        }
        let Some(last) = page.last() else { return Ok(()) };
        filter.before = Some(last.cursor());
        let is_last = page.len() < filter.limit as usize;
        take(page)?;
        if is_last {
            return Ok(());
        }
    }
}

/// Prints the newest rows, oldest first, and then what is booked, until it is interrupted or nobody reads any more.
async fn follow(
    filter: AuditFilter,
    most: u64,
    store: &Store,
    lines: &mut Lines<'_>,
    reader_is_gone: &dyn Fn() -> bool,
) -> anyhow::Result<()> {
    let following = async {
        let place = store.bookmark().await?;
        let first = AuditFilter { booked_until: Some(place.clone()), ..filter.clone() };
        let mut newest = Vec::new();
        each_page(first, store, &mut Some(most), |page| {
            newest.extend(page);
            Ok(())
        })
        .await?;
        newest.reverse();
        lines.print(&newest)?;
        go_on(AuditFilter { limit: PAGE, ..filter }, place, store, lines, reader_is_gone).await
    };
    tokio::select! {
        done = following => done,
        interrupted = tokio::signal::ctrl_c() => interrupted.context("Ctrl-C cannot be waited for"),
    }
}

/// Prints what is booked after `place`. A database that is away is waited for: nothing is missed, because the place stays.
async fn go_on(
    filter: AuditFilter,
    mut place: Bookmark,
    store: &Store,
    lines: &mut Lines<'_>,
    reader_is_gone: &dyn Fn() -> bool,
) -> anyhow::Result<()> {
    let mut is_away = false;
    while !reader_is_gone() {
        let rows = store.booked_after(&filter, &place).await;
        if rows.is_err() != is_away {
            is_away = !is_away;
            note(rows.as_ref().err())?;
        }
        let rows = rows.unwrap_or_default();
        lines.print(&rows)?;
        if let Some(last) = rows.last() {
            place = last.bookmark();
        }
        if rows.len() < PAGE as usize {
            tokio::time::sleep(PERIOD).await;
        }
    }
    Ok(())
}

/// Tells whoever watches that the database has gone, or is back.
fn note(error: Option<&StoreError>) -> std::io::Result<()> {
    let mut to = std::io::stderr();
    match error {
        Some(error) => writeln!(to, "tollgate: {error}; the log is followed on as soon as it can be read again"),
        None => writeln!(to, "tollgate: the log can be read again"),
    }
}

/// Rows as they come: a line each.
enum Lines<'o> {
    Csv(Listing<'o>),
    Json(&'o mut dyn Write),
    Text(&'o mut dyn Write),
}

impl<'o> Lines<'o> {
    fn begin(out: &'o mut Output<'_>, csv: bool) -> std::io::Result<Self> {
        Ok(match out.form(csv) {
            Form::Csv => Self::Csv(Listing::begin(out, Form::Csv, &ALL)?),
            Form::Json => Self::Json(&mut *out.to),
            Form::Table => Self::Text(&mut *out.to),
        })
    }

    fn print(&mut self, rows: &[AuditRow]) -> anyhow::Result<()> {
        for row in rows {
            match self {
                Self::Csv(listing) => listing.push(&serde_json::to_value(row)?)?,
                Self::Json(to) => writeln!(to, "{}", serde_json::to_string(row)?)?,
                Self::Text(to) => {
                    let value = serde_json::to_value(row)?;
                    writeln!(to, "{}", SHOWN.map(|name| cell(name, &value[name])).join("  "))?;
                }
            }
        }
        match self {
            Self::Csv(listing) => Ok(listing.flush()?),
            Self::Json(to) | Self::Text(to) => Ok(to.flush()?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_among_what_there_is() {
        assert!(SHOWN.iter().all(|name| ALL.contains(name)));
        let distinct: std::collections::BTreeSet<_> = ALL.iter().collect();
        assert_eq!(distinct.len(), ALL.len());
    }
}
