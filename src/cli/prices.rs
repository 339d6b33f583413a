//! `tollgate prices`: what models cost, and since when.

use std::{
    collections::HashMap,
    io::{BufRead, Read},
    path::Path,
    sync::Arc,
};

use anyhow::Context as _;
use chrono::{DateTime, SubsecRound, Utc};
use serde_json::{Map, Number, Value, json};
use tollgate_core::{
    price::{
        Price, Rates, Tier,
        book::{Histories, PriceBook, Prices, Source},
        written::show_usd_per_mtok,
    },
    snapshot::ModelInfo,
};

use super::{Output, WrongUse, listing::Listing, output::time};
use crate::{
    args::PricesVerb,
    config::prices::{self, Listed},
    store::{NewPrice, Store},
};

/// Largest file of prices, in bytes.
const MAX_BYTES: u64 = 4 << 20;
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
            let listed = read(file.as_deref(), input)?;
            let from = |listed: &Listed| effective.map(|when| when.after(now)).or(listed.effective).unwrap_or(now);
            let new = |listed: Listed| NewPrice {
                effective_from: from(&listed).trunc_subsecs(6),
                model: listed.model,
                price: listed.price,
            };
            import(&ctx, listed.into_iter().map(new).collect(), dry_run, out).await
        }
    }
}

/// Reads the file, or standard input.
fn read(file: Option<&Path>, input: &mut dyn BufRead) -> anyhow::Result<Vec<Listed>> {
    let (name, text) = match file.filter(|file| *file != Path::new("-")) {
        Some(file) => {
            let name = file.display().to_string();
            let opened = std::fs::File::open(file).with_context(|| format!("{name} cannot be opened"))?;
            let text = read_text(opened).with_context(|| format!("{name} cannot be read"))?;
            (name, text)
        }
        None => ("standard input".to_owned(), read_text(input).context("standard input cannot be read")?),
    };
    prices::parse(&name, &text)
        .map_err(|errors| WrongUse(format!("nothing is imported; what is to be mended:\n{errors}")).into())
}

fn read_text(from: impl Read) -> anyhow::Result<String> {
    let mut text = String::new();
    from.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    anyhow::ensure!(text.len() as u64 <= MAX_BYTES, "there are more than {MAX_BYTES} bytes: is it the right file?");
    Ok(text)
}

/// All prices there are.
async fn book(ctx: &Context<'_>) -> anyhow::Result<PriceBook> {
    let mut stored: Histories = HashMap::new();
    for price in ctx.store.prices().await? {
        stored.entry(price.model).or_default().insert(price.effective_from, Arc::new(price.price));
    }
    let of_config = |(name, info): (&String, &ModelInfo)| Some((name.clone(), Arc::clone(info.price.as_ref()?)));
    Ok(PriceBook::new(ctx.models.iter().filter_map(of_config).collect(), stored, prices::shipped()))
}

/// What an import does to one model.
struct Change {
    new: NewPrice,
    before: Option<Arc<Price>>,
    what: &'static str,
}

impl Change {
    fn of(new: NewPrice, book: &PriceBook) -> Self {
        let before = book.without_config().find([&*new.model]).since(new.effective_from).cloned();
        let is_same = before.as_ref().is_some_and(|since| *since.price == new.price);
        let what = match &before {
            Some(since) if is_same && since.source == Source::Database => "unchanged",
            Some(_) if is_same => "confirmed",
            Some(_) => "changed",
            None => "new",
        };
        Self { new, before: before.map(|since| since.price), what }
    }

    fn view(&self) -> Value {
        let mut row = Map::new();
        row.insert("model".to_owned(), self.new.model.as_str().into());
        row.insert("effective_from".to_owned(), time(self.new.effective_from));
        row.insert("change".to_owned(), self.what.into());
        row.extend(price_view(&self.new.price));
        let before = self.before.as_ref().map(|price| price_view(price));
        for (name, short) in [("input", RATES[0]), ("output", RATES[2])] {
            let was = before.as_ref().and_then(|before| before.get(short).cloned());
            row.insert(format!("was_{name}_usd_per_mtok"), was.into());
        }
        row.into()
    }
}

async fn import(ctx: &Context<'_>, new: Vec<NewPrice>, dry_run: bool, out: &mut Output<'_>) -> anyhow::Result<()> {
    let book = book(ctx).await?;
    let changes: Vec<Change> = new.into_iter().map(|new| Change::of(new, &book)).collect();
    let count = |what: &str| changes.iter().filter(|change| change.what == what).count();
    let written: Vec<NewPrice> =
        changes.iter().filter(|change| change.what != "unchanged").map(|change| change.new.clone()).collect();
    if !dry_run && !written.is_empty() {
        ctx.store.import_prices(&written, ctx.actor).await?;
    }
    let hidden: Vec<&str> = changes
        .iter()
        .map(|change| &*change.new.model)
        .filter(|model| ctx.models.get(*model).is_some_and(|info| info.price.is_some()))
        .collect();
    let rows: Vec<Value> = changes.iter().map(Change::view).collect();
    if out.json {
        let done = json!({ "dry_run": dry_run, "imported": written.len(), "unchanged": count("unchanged"),
                           "hidden_by_config": hidden, "prices": rows });
        return Ok(writeln!(out.to, "{done}")?);
    }
    let columns =
        ["model", "effective_from", "change", RATES[0], RATES[2], "was_input_usd_per_mtok", "was_output_usd_per_mtok"];
    out.list(&rows, &columns)?;
    let verb = if dry_run { "would be imported" } else { "imported" };
    writeln!(
        out.to,
        "{} prices {verb}: {} new, {} changed, {} as shipped; {} unchanged",
        written.len(),
        count("new"),
        count("changed"),
        count("confirmed"),
        count("unchanged")
    )?;
    if !hidden.is_empty() {
        writeln!(out.to, "the config file has prices of its own, which go before these: {}", hidden.join(", "))?;
    }
    Ok(())
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
    let view = |(since, until): (&tollgate_core::price::book::Since, Option<DateTime<Utc>>)| {
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
fn price_view(price: &Price) -> Map<String, Value> {
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
