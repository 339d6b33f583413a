//! `tollgate prices`: what models cost, and since when.

use std::{collections::HashMap, io::BufRead, sync::Arc};

use chrono::{DateTime, SubsecRound, Utc};
use serde_json::{Map, Number, Value, json};
use tollgate_core::{
    price::{
        Price, Rates, Tier,
        book::{Histories, PriceBook, Prices, Since},
        written::show_usd_per_mtok,
    },
    snapshot::ModelInfo,
};

use super::{Output, listing::Listing, output::time, prices_import as import};
use crate::{args::PricesVerb, config::prices, store::Store};

/// What a table shows of a price.
const RATES: [&str; 5] = [
    "input_usd_per_mtok",
    "cached_input_usd_per_mtok",
    "output_usd_per_mtok",
    "batch_input_usd_per_mtok",
    "batch_output_usd_per_mtok",
];

/// What the verbs work with.
pub(super) struct Context<'a> {
    pub(super) store: &'a Store,
    pub(super) models: &'a HashMap<String, ModelInfo>,
    pub(super) actor: &'a str,
}

pub(super) async fn run(
    verb: PricesVerb,
    ctx: Context<'_>,
    input: &mut dyn BufRead,
    out: &mut Output<'_>,
) -> anyhow::Result<()> {
    match verb {
        PricesVerb::List { model, all } => list(&ctx, model.as_deref(), all, out).await,
        PricesVerb::Import { file, effective, dry_run } => {
            let now = Utc::now().trunc_subsecs(6);
            let from = effective.map(|when| when.after(now));
            let new = import::read(file.as_deref(), input, from, now)?;
            import::run(&ctx, new, dry_run, out).await
        }
    }
}

/// All prices there are.
pub(super) async fn book(ctx: &Context<'_>) -> anyhow::Result<PriceBook> {
    let mut stored: Histories = HashMap::new();
    for price in ctx.store.prices().await? {
        stored.entry(price.model).or_default().insert(price.effective_from, Arc::new(price.price));
    }
    let of_config = |(name, info): (&String, &ModelInfo)| Some((name.clone(), Arc::clone(info.price.as_ref()?)));
    Ok(PriceBook::new(ctx.models.iter().filter_map(of_config).collect(), stored, prices::shipped()))
}

async fn list(ctx: &Context<'_>, model: Option<&str>, all: bool, out: &mut Output<'_>) -> anyhow::Result<()> {
    let (book, now) = (book(ctx).await?, Utc::now());
    let form = out.form(false);
    let columns: Vec<&'static str> = ["model", "source", "effective_from"].into_iter().chain(RATES).collect();
    let mut listing = Listing::begin(out, form, &columns)?;
    let models = match model {
        None => book.models().into_iter().map(|model| (model, book.own(model))).collect(),
        Some(model) => vec![(model, book.find([model]))],
    };
    for (model, prices) in models {
        for row in views(model, &prices, all, now) {
            listing.push(&row)?;
        }
    }
    Ok(listing.finish()?)
}

/// What holds now and what is to come; and what held before, if that is asked for.
fn views(model: &str, prices: &Prices, all: bool, now: DateTime<Utc>) -> Vec<Value> {
    let ends = prices.0.iter().skip(1).map(|since| Some(since.from)).chain([None]);
    let shown = prices.0.iter().zip(ends).filter(|(_, until)| all || until.is_none_or(|until| until > now));
    let view = |(since, until): (&Since, Option<DateTime<Utc>>)| {
        let from = (since.from > DateTime::<Utc>::MIN_UTC).then_some(since.from);
        let mut row = Map::new();
        row.insert("model".to_owned(), model.into());
        row.insert("source".to_owned(), since.source.as_str().into());
        row.insert("effective_from".to_owned(), time(from));
        row.insert("effective_until".to_owned(), time(until));
        row.extend(price_view(&since.price));
        Value::from(row)
    };
    shown.map(view).collect()
}

/// A price in the words of a price file; the tiers that have rates of their own below it, and those of batches beside it.
pub(super) fn price_view(price: &Price) -> Map<String, Value> {
    let rates = |rates: &Rates| rates.named().map(|(name, pico)| (format!("{name}_usd_per_mtok"), usd(pico)));
    let mut view: Map<String, Value> = rates(&price.standard).into_iter().collect();
    if let Some(batch) = price.own_rates(Tier::Batch) {
        view.insert(RATES[3].to_owned(), usd(batch.input));
        view.insert(RATES[4].to_owned(), usd(batch.output));
    }
    for tier in Tier::PRICED {
        if let Some(own) = price.own_rates(tier) {
            view.insert(tier.as_str().to_owned(), rates(own).into_iter().collect());
        }
    }
    if let Some(long) = price.long_context {
        view.insert("long_context".to_owned(), json!(long));
    }
    view
}

/// A number as people write it. It is only shown, so it may be a float.
fn usd(pico: u64) -> Value {
    let text = show_usd_per_mtok(pico);
    text.parse::<u64>().map_or_else(|_| text.parse().ok().and_then(Number::from_f64).into(), Value::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prices_are_shown_as_they_are_written() {
        for (pico, shown) in [(2_500_000, "2.5"), (10_000_000, "10"), (5_000, "0.005"), (0, "0"), (1, "1e-6")] {
            assert_eq!(usd(pico).to_string(), shown);
        }
    }
}
