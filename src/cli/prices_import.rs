//! `tollgate prices import`: a file of prices is read whole, compared with what holds, shown, and then taken over, or not at all.

use std::{
    collections::BTreeSet,
    io::{BufRead, Read},
    path::Path,
};

use anyhow::Context as _;
use chrono::{DateTime, SubsecRound, Utc};
use serde_json::{Map, Value, json};
use tollgate_core::price::{
    Price,
    book::{PriceBook, Since, Source},
};

use super::{
    Output, WrongUse,
    output::time,
    prices::{Context, book, price_view},
};
use crate::{config::prices, store::NewPrice};

/// Largest file of prices, in bytes.
const MAX_BYTES: u64 = 4 << 20;
const COLUMNS: [&str; 8] = [
    "model",
    "effective_from",
    "change",
    "input_usd_per_mtok",
    "output_usd_per_mtok",
    "was_input_usd_per_mtok",
    "was_output_usd_per_mtok",
    "differs",
];

/// Reads the file, or standard input. `from`: what the command line says, which goes before what the file does.
pub(super) fn read(
    file: Option<&Path>,
    input: &mut dyn BufRead,
    from: Option<DateTime<Utc>>,
    now: DateTime<Utc>,
) -> anyhow::Result<Vec<NewPrice>> {
    let (name, text) = match file.filter(|file| *file != Path::new("-")) {
        Some(file) => {
            let name = file.display().to_string();
            let opened = std::fs::File::open(file).with_context(|| format!("{name} cannot be opened"))?;
            let text = read_text(opened).with_context(|| format!("{name} cannot be read"))?;
            (name, text)
        }
        None => ("standard input".to_owned(), read_text(input).context("standard input cannot be read")?),
    };
    let listed = prices::parse(&name, &text)
        .map_err(|errors| WrongUse(format!("nothing is imported; what is to be mended:\n{errors}")))?;
    let new = |listed: prices::Listed| NewPrice {
        effective_from: from.or(listed.effective).unwrap_or(now).trunc_subsecs(6),
        model: listed.model,
        price: listed.price,
    };
    Ok(listed.into_iter().map(new).collect())
}

fn read_text(from: impl Read) -> anyhow::Result<String> {
    let mut text = String::new();
    from.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    anyhow::ensure!(text.len() as u64 <= MAX_BYTES, "there are more than {MAX_BYTES} bytes: is it the right file?");
    Ok(text)
}

/// Imports, unless it is a dry run, and shows what that changes.
pub(super) async fn run(
    ctx: &Context<'_>,
    new: Vec<NewPrice>,
    dry_run: bool,
    out: &mut Output<'_>,
) -> anyhow::Result<()> {
    let book = book(ctx).await?.without_config();
    let changes: Vec<Change> = new.into_iter().map(|new| Change::of(new, &book)).collect();
    let imported: Vec<NewPrice> =
        changes.iter().filter(|change| change.kind != Kind::Unchanged).map(|change| change.new.clone()).collect();
    if !dry_run && !imported.is_empty() {
        ctx.store.import_prices(&imported, ctx.actor).await?;
    }
    let in_config = |model: &&str| ctx.models.get(*model).is_some_and(|info| info.price.is_some());
    let hidden: Vec<&str> = changes.iter().map(|change| &*change.new.model).filter(in_config).collect();
    show(&changes, &hidden, dry_run, out)
}

fn show(changes: &[Change], hidden: &[&str], dry_run: bool, out: &mut Output<'_>) -> anyhow::Result<()> {
    let rows: Vec<Value> = changes.iter().map(Change::view).collect();
    let count = |kind: Kind| changes.iter().filter(|change| change.kind == kind).count();
    let (new, changed, confirmed, unchanged) =
        (count(Kind::New), count(Kind::Changed), count(Kind::Confirmed), count(Kind::Unchanged));
    let imported = new + changed + confirmed;
    if out.json {
        let done = json!({ "dry_run": dry_run, "imported": imported, "unchanged": unchanged,
                           "hidden_by_config": hidden, "prices": rows });
        return Ok(writeln!(out.to, "{done}")?);
    }
    out.list(&rows, &COLUMNS)?;
    let verb = if dry_run { "would be imported" } else { "imported" };
    writeln!(
        out.to,
        "{imported} prices {verb}: {new} new, {changed} changed, {confirmed} as before; {unchanged} are there already"
    )?;
    if !hidden.is_empty() {
        writeln!(out.to, "the config file has prices of its own, which go before these: {}", hidden.join(", "))?;
    }
    Ok(())
}

/// What an import does to one model.
struct Change {
    new: NewPrice,
    before: Option<Price>,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// No price was known.
    New,
    /// Another price held.
    Changed,
    /// The same price held, of the family or as shipped: from now on it is the model's own, whatever becomes of those.
    Confirmed,
    /// It was imported already.
    Unchanged,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Changed => "changed",
            Self::Confirmed => "as before",
            Self::Unchanged => "there already",
        }
    }
}

impl Change {
    fn of(new: NewPrice, book: &PriceBook) -> Self {
        let own = book.own(&new.model).since(new.effective_from).cloned();
        let is_imported = |since: &Since| since.source == Source::Database && *since.price == new.price;
        let is_there = own.as_ref().is_some_and(is_imported);
        let before = own.or_else(|| book.find([&*new.model]).since(new.effective_from).cloned());
        let kind = match &before {
            None => Kind::New,
            Some(_) if is_there => Kind::Unchanged,
            Some(before) if *before.price == new.price => Kind::Confirmed,
            Some(_) => Kind::Changed,
        };
        Self { new, before: before.map(|since| *since.price), kind }
    }

    fn view(&self) -> Value {
        let (now, was) = (price_view(&self.new.price), self.before.as_ref().map(price_view));
        let was_of = |name: &str| was.as_ref().and_then(|was| was.get(name).cloned());
        let mut row = Map::new();
        row.insert("model".to_owned(), self.new.model.as_str().into());
        row.insert("effective_from".to_owned(), time(self.new.effective_from));
        row.insert("change".to_owned(), self.kind.as_str().into());
        for name in ["input", "output"] {
            row.insert(format!("was_{name}_usd_per_mtok"), was_of(&format!("{name}_usd_per_mtok")).into());
        }
        row.insert("differs".to_owned(), was.as_ref().map(|was| differing(&now, was)).into());
        row.extend(now);
        row.into()
    }
}

/// The parts of a price in which two differ.
fn differing(now: &Map<String, Value>, was: &Map<String, Value>) -> Vec<Value> {
    // Those of batches stand there twice.
    let names: BTreeSet<&String> = now.keys().chain(was.keys()).filter(|name| !name.starts_with("batch_")).collect();
    let short = |name: &str| Value::from(name.trim_end_matches("_usd_per_mtok"));
    names.into_iter().filter(|name| now.get(*name) != was.get(*name)).map(|name| short(name)).collect()
}
