//! `tollgate audit`: the request log.

use std::{collections::HashMap, time::Duration};

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::Value;

use super::Output;
use crate::{
    args::AuditArgs,
    store::{AuditFilter, AuditRow, Store},
};

const COLUMNS: [&str; 12] = [
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
/// How often the log is looked at by `--follow`.
const PERIOD: Duration = Duration::from_secs(1);
/// Rows are written when a request has ended but sorted by its start: one that took up to so long is still seen.
const LONGEST: TimeDelta = TimeDelta::minutes(15);

pub(super) async fn run(args: AuditArgs, store: &Store, out: &mut Output<'_>) -> anyhow::Result<()> {
    let now = Utc::now();
    let mut filter = AuditFilter {
        since: args.since.map(|since| since.since(now)),
        until: args.until.map(|until| until.until(now)),
        model: args.model,
        status: args.status,
        limit: args.limit,
        ..AuditFilter::default()
    };
    if let Some(user) = args.user {
        filter.user = Some(store.find_user(&user).await?.id);
    }
    if let Some(key) = args.key {
        filter.key = Some(store.find_key(&key).await?.id);
    }
    let rows = store.audit(&filter).await?;
    if args.follow {
        return follow(rows, filter, store, out).await;
    }
    let rows = rows.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>()?;
    Ok(out.list(&rows, &COLUMNS)?)
}

/// Prints rows as they come, until the process is ended or nobody reads any more.
async fn follow(
    mut rows: Vec<AuditRow>,
    mut filter: AuditFilter,
    store: &Store,
    out: &mut Output<'_>,
) -> anyhow::Result<()> {
    // What was printed and may be read again.
    let mut printed: HashMap<String, DateTime<Utc>> = HashMap::new();
    loop {
        for row in rows.iter().rev().filter(|row| !printed.contains_key(&row.request_id)) {
            print(row, out)?;
        }
        out.to.flush()?;
        printed.extend(rows.into_iter().map(|row| (row.request_id, row.started_at)));
        tokio::time::sleep(PERIOD).await;
        let horizon = Utc::now() - LONGEST;
        printed.retain(|_, started_at| *started_at >= horizon);
        filter.since = filter.since.max(Some(horizon));
        filter.limit = u32::MAX;
        rows = store.audit(&filter).await?;
    }
}

fn print(row: &AuditRow, out: &mut Output<'_>) -> anyhow::Result<()> {
    if out.json {
        return Ok(writeln!(out.to, "{}", serde_json::to_string(row)?)?);
    }
    let value = serde_json::to_value(row)?;
    let field = |name: &str| match &value[name] {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.escape_debug().to_string(),
        other => other.to_string(),
    };
    Ok(writeln!(out.to, "{}", COLUMNS.map(field).join("  "))?)
}
