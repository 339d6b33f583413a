//! `tollgate usage`

use chrono::{Days, Utc};
use serde_json::{Map, Value, json};

use super::Output;
use crate::{
    args::UsageArgs,
    store::{GroupBy, Store, UsageQuery, UsageSum},
};

const SUMS: [&str; 6] =
    ["requests", "prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens", "cost_nano_usd"];

pub(super) async fn run(args: &UsageArgs, store: &Store, out: &mut Output<'_>) -> anyhow::Result<()> {
    let (by, now) = (GroupBy::from(args.by), Utc::now());
    let query = UsageQuery {
        by,
        since: args.since.map(|since| since.since(now).date_naive()),
        // The last day is included, the store's bound is not.
        until: args.until.and_then(|until| until.since(now).date_naive().checked_add_days(Days::new(1))),
    };
    let rows: Vec<Value> = store.usage(query).await?.iter().map(|sum| view(by, sum)).collect();
    let mut columns = vec![by.as_str()];
    if by == GroupBy::Key {
        columns.push("user");
    }
    columns.extend(SUMS);
    Ok(out.list(&rows, &columns)?)
}

fn view(by: GroupBy, sum: &UsageSum) -> Value {
    let mut row = Map::new();
    row.insert(by.as_str().to_owned(), sum.name.as_str().into());
    if let Some(id) = sum.id {
        row.insert(format!("{}_id", by.as_str()), id.into());
    }
    if by == GroupBy::Key {
        row.insert("user".to_owned(), sum.owner.as_deref().into());
    }
    let numbers = [
        sum.requests,
        sum.prompt_tokens,
        sum.completion_tokens,
        sum.total_tokens,
        sum.cached_tokens,
        sum.cost_nano_usd,
    ];
    row.extend(SUMS.iter().zip(numbers).map(|(name, number)| ((*name).to_owned(), json!(number))));
    row.into()
}
