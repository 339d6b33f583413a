//! `tollgate usage`

use chrono::{Days, Utc};
use futures::TryStreamExt;
use serde_json::{Map, Value, json};

use super::{Output, listing::Listing};
use crate::{
    args::UsageArgs,
    store::{GroupBy, Store, UsageQuery, UsageSum},
};

const SUMS: [&str; 6] =
    ["requests", "prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens", "cost_nano_usd"];

pub(super) async fn run(args: &UsageArgs, store: &Store, out: &mut Output<'_>) -> anyhow::Result<()> {
    let form = out.form(super::one_form(args.csv, out.json)?);
    let query = query(args, store).await?;
    let mut listing = Listing::begin(out, form, &columns(&query.by))?;
    let mut rows = store.usage_rows(&query);
    while let Some(sum) = rows.try_next().await? {
        listing.push(&view(&query.by, &sum))?;
    }
    Ok(listing.finish()?)
}

async fn query(args: &UsageArgs, store: &Store) -> anyhow::Result<UsageQuery> {
    let now = Utc::now();
    let mut by: Vec<GroupBy> = Vec::new();
    for next in args.by.iter().copied().map(GroupBy::from) {
        if !by.contains(&next) {
            by.push(next);
        }
    }
    Ok(UsageQuery {
        by,
        since: args.since.map(|since| since.since(now).date_naive()),
        // The last day is included, the store's bound is not.
        until: args.until.and_then(|until| until.since(now).date_naive().checked_add_days(Days::new(1))),
        user: super::find_user(store, args.only.user.as_deref()).await?,
        key: super::find_key(store, args.only.key.as_deref()).await?,
        model: args.only.model.clone(),
        upstream: args.only.upstream.clone(),
    })
}

fn columns(by: &[GroupBy]) -> Vec<&'static str> {
    let mut columns: Vec<_> = by.iter().map(|by| by.as_str()).collect();
    if by.contains(&GroupBy::Key) && !by.contains(&GroupBy::User) {
        columns.push("user");
    }
    columns.extend(SUMS);
    columns
}

fn view(by: &[GroupBy], sum: &UsageSum) -> Value {
    let mut row = Map::new();
    for by in by {
        row.insert(by.as_str().to_owned(), sum.name(*by).into());
        let id = match by {
            GroupBy::User => sum.user_id,
            GroupBy::Key => sum.key_id,
            _ => None,
        };
        row.extend(id.map(|id| (format!("{}_id", by.as_str()), id.into())));
    }
    if by.contains(&GroupBy::Key) && !by.contains(&GroupBy::User) {
        row.insert("user".to_owned(), sum.user.as_deref().into());
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
