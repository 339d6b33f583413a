//! Prices: of one model in the configuration, and whole files of them.
//!
//! A price file says of any number of models what they cost, in the words in which the configuration does, and from when on. The
//! one that is [shipped] with the program is such a file; `tollgate prices import` reads others. They are read as the
//! configuration is, so every mistake is told at once, with its line and the mend.

use std::{
    collections::HashMap,
    sync::{Arc, LazyLock},
};

use chrono::{DateTime, Datelike, NaiveDate, NaiveTime, Utc};
use tollgate_core::price::{LongContext, Price, Rates, Tier, book::Histories, written::parse_usd_per_mtok};

use super::{ConfigErrors, raw::Reader, table::Table, upstreams::check_model_name};

/// What is shipped with the program.
const SHIPPED: &str = include_str!("../../conf/prices.toml");
/// Most models of one file.
const MAX_MODELS: usize = 10_000;
/// What a rate may be a multiple of.
const PERCENT: std::ops::RangeInclusive<u32> = 1..=10_000;

const INPUT: &str = "input_usd_per_mtok";
const OUTPUT: &str = "output_usd_per_mtok";
const RATES: [&str; 8] = [
    INPUT,
    "cached_input_usd_per_mtok",
    "cache_write_usd_per_mtok",
    OUTPUT,
    "audio_input_usd_per_mtok",
    "audio_output_usd_per_mtok",
    "image_input_usd_per_mtok",
    "image_output_usd_per_mtok",
];

/// One price of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Of which model.
    pub model: String,
    /// From when it holds, if the file says so.
    pub effective: Option<DateTime<Utc>>,
    /// How much.
    pub price: Price,
}

/// Reads a price file, which `name` names in messages.
///
/// # Errors
/// Every problem of the file.
pub fn parse(name: &str, text: &str) -> Result<Vec<Listed>, ConfigErrors> {
    let reader = Reader::new(name, text, &|_| None);
    let document = reader.parse();
    let listed = file(&reader, &mut reader.root(document.get_ref()));
    drop(document);
    let findings = reader.finish();
    if findings.problems.is_empty() {
        Ok(listed)
    } else {
        Err(ConfigErrors { problems: findings.problems, warnings: findings.warnings })
    }
}

fn file(reader: &Reader<'_>, root: &mut Table<'_>) -> Vec<Listed> {
    let effective = root.text("effective", parse_effective);
    // For its readers.
    let _ = root.text("source", |_| Ok(()));
    let tables = root.named("models");
    if tables.is_empty() {
        root.problem("models", "names no model: write [models.\"gpt-4o\"] and what it costs");
    } else if tables.len() > MAX_MODELS {
        root.problem("models", format!("names more than {MAX_MODELS} models"));
    }
    let entry = |(name, mut table): (&str, Table<'_>)| {
        if let Err(message) = check_model_name(name) {
            reader.problem(table.place(), message);
        }
        let effective = table.text("effective", parse_effective).or(effective);
        if !RATES.iter().any(|rate| table.has(rate)) {
            table.problem(INPUT, "is missing: give the prices of input and of output, 0 for what is free");
        }
        Some(Listed { model: name.to_owned(), effective, price: price(&mut table)? })
    };
    tables.into_iter().filter_map(entry).collect()
}

/// A day begins at midnight, UTC.
fn parse_effective(text: &str) -> Result<DateTime<Utc>, String> {
    let day = |text: &str| Some(text.parse::<NaiveDate>().ok()?.and_time(NaiveTime::MIN).and_utc());
    let time = day(text).or_else(|| Some(DateTime::parse_from_rfc3339(text).ok()?.to_utc()));
    // Later years would not sort as text.
    time.filter(|time| (1970..=9998).contains(&time.year()))
        .ok_or_else(|| format!("{text:?} is not a date: write \"2026-12-01\" or \"2026-12-01T09:00:00Z\""))
}

/// `None`: the section gives no price, or a wrong one.
pub(super) fn price(table: &mut Table<'_>) -> Option<Price> {
    let standard = rates(table, None);
    let tiers = Tier::PRICED.map(|tier| tier_rates(table, tier, standard.as_ref()));
    let long_context = long_context(&mut table.section("long_context"));
    let has_more = ["long_context"].into_iter().chain(Tier::PRICED.map(Tier::as_str)).any(|name| table.has(name));
    if has_more && !RATES.iter().any(|rate| table.has(rate)) {
        table.problem(INPUT, "is missing: a tier or a long context changes a price that is not there");
    }
    let [batch, flex, priority, ultrafast] = tiers;
    Some(Price { standard: standard?, batch, flex, priority, ultrafast, long_context })
}

/// Rates of their own, or a share of the usual ones, or of the usual ones what is not said.
fn tier_rates(table: &mut Table<'_>, tier: Tier, standard: Option<&Rates>) -> Option<Rates> {
    let is_there = table.has(tier.as_str());
    let mut section = table.variant(tier.as_str());
    let percent = section.whole("percent", PERCENT);
    let base = percent.and_then(|percent| Some(standard?.percent(percent)));
    let rates = rates(&mut section, base);
    if is_there && rates.is_none() && !section.has("percent") && !RATES.iter().any(|rate| section.has(rate)) {
        section.problem("percent", "is missing: give it, or prices");
    }
    rates
}

/// The rates of a section. What it leaves out is as in `base`, or else as input or output in general.
fn rates(table: &mut Table<'_>, base: Option<Rates>) -> Option<Rates> {
    let given = RATES.map(|name| table.decimal(name, parse_usd_per_mtok));
    let says_anything = RATES.iter().any(|name| table.has(name));
    if base.is_none() && says_anything && !table.has("percent") {
        for name in [INPUT, OUTPUT].into_iter().filter(|name| !table.has(name)) {
            table.problem(name, "is missing: give both the price of input and of output, 0 for what is free");
        }
    }
    let [input, cached, write, output, audio_input, audio_output, image_input, image_output] = given;
    let base = match base {
        Some(base) => base,
        None => Rates::flat(input?, output?),
    };
    Some(Rates {
        input: input.unwrap_or(base.input),
        cached_input: cached.unwrap_or(base.cached_input),
        cache_write: write.unwrap_or(base.cache_write),
        output: output.unwrap_or(base.output),
        audio_input: audio_input.unwrap_or(base.audio_input),
        audio_output: audio_output.unwrap_or(base.audio_output),
        image_input: image_input.unwrap_or(base.image_input),
        image_output: image_output.unwrap_or(base.image_output),
    })
}

fn long_context(table: &mut Table<'_>) -> Option<LongContext> {
    let names = ["above_tokens", "input_percent", "output_percent"];
    let above_tokens = table.whole(names[0], 1..=10_000_000_000);
    let percents = [table.whole(names[1], PERCENT), table.whole(names[2], PERCENT)];
    if names.iter().any(|name| table.has(name)) {
        for name in names.into_iter().filter(|name| !table.has(name)) {
            table.problem(name, "is missing: a long context has above_tokens, input_percent and output_percent");
        }
    }
    let [input_percent, output_percent] = percents;
    Some(LongContext { above_tokens: above_tokens?, input_percent: input_percent?, output_percent: output_percent? })
}

/// The prices that are shipped with the program.
#[must_use]
pub fn shipped() -> Arc<Histories> {
    static HISTORIES: LazyLock<Arc<Histories>> = LazyLock::new(|| {
        let listed = parse("conf/prices.toml", SHIPPED).unwrap_or_else(|errors| {
            tracing::error!(%errors, "the prices of this program cannot be read: what is not imported costs nothing");
            Vec::new()
        });
        let mut histories: Histories = HashMap::with_capacity(listed.len());
        for Listed { model, effective, price } in listed {
            let from = effective.unwrap_or(DateTime::<Utc>::MIN_UTC);
            histories.entry(model).or_default().insert(from, Arc::new(price));
        }
        Arc::new(histories)
    });
    Arc::clone(&HISTORIES)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str) -> String {
        parse("p.toml", text).expect_err(text).to_string()
    }

    #[test]
    fn what_is_shipped_can_be_read_and_says_since_when() {
        let listed = parse("conf/prices.toml", SHIPPED).unwrap_or_else(|errors| panic!("{errors}"));
        assert!(listed.len() > 50, "{}", listed.len());
        for Listed { model, effective, price } in &listed {
            assert!(effective.is_some(), "{model}");
            let Rates { input, cached_input, .. } = price.standard;
            assert!(cached_input <= input, "{model}: what is cached is not dearer");
            let half = price.batch.is_none_or(|batch| batch == price.standard.percent(50));
            assert!(half || model.starts_with("gpt-image"), "{model}: a batch costs half");
            assert!(price.priority.is_none_or(|priority| priority.input > input), "{model}");
        }
        let shipped = shipped();
        let of = |model: &str| Arc::clone(shipped[model].values().next().unwrap());
        let (mini, sol) = (of("gpt-4o-mini"), of("gpt-6.2-sol"));
        assert_eq!((mini.standard.input, mini.standard.cached_input, mini.standard.output), (150_000, 75_000, 600_000));
        assert_eq!(sol.standard.cache_write, 2_500_000);
        assert_eq!(sol.long_context.map(|long| long.above_tokens), Some(272_000));
    }

    #[test]
    fn a_file_of_prices_becomes_prices() {
        let text = "effective = '2026-12-01'\nsource = 'a letter'\n\
            [models.'m']\ninput_usd_per_mtok = 2\ncached_input_usd_per_mtok = 0.5\noutput_usd_per_mtok = 10.25\n\
            audio_input_usd_per_mtok = 40\nbatch = { percent = 50, cached_input_usd_per_mtok = 0.1 }\n\
            [models.'m'.priority]\ninput_usd_per_mtok = 3.5\noutput_usd_per_mtok = 14\n\
            [models.'m'.long_context]\nabove_tokens = 1000\ninput_percent = 200\noutput_percent = 150\n\
            [models.'n']\neffective = '2027-01-01T12:00:00+02:00'\ninput_usd_per_mtok = 0.02\noutput_usd_per_mtok = 0\n";
        let listed = parse("p.toml", text).unwrap_or_else(|errors| panic!("{errors}"));
        let (m, n) = (&listed[0], &listed[1]);
        let time = |text: &str| Some(text.parse::<DateTime<Utc>>().unwrap());
        assert_eq!((m.effective, n.effective), (time("2026-12-01T00:00:00Z"), time("2027-01-01T10:00:00Z")));
        let standard = Rates { cached_input: 500_000, audio_input: 40_000_000, ..Rates::flat(2_000_000, 10_250_000) };
        assert_eq!(m.price.standard, standard);
        assert_eq!(m.price.batch, Some(Rates { cached_input: 100_000, ..standard.percent(50) }));
        assert_eq!((m.price.priority, m.price.flex), (Some(Rates::flat(3_500_000, 14_000_000)), None));
        let long = LongContext { above_tokens: 1000, input_percent: 200, output_percent: 150 };
        assert_eq!(m.price.long_context, Some(long));
        assert_eq!(n.price, Price::of(Rates::flat(20_000, 0)));
    }

    #[test]
    fn every_mistake_is_told_with_its_line() {
        let text = "effective = 'soon'\n[models.'m']\ninput_usd_per_mtok = -1\noutput_usd_per_mtok = 0.0000001\n\
            [models.'a b']\ninput_usd_per_mtok = 1\n[models.'n']\ninput_usd_per_tok = 1\n\
            [models.'o']\ninput_usd_per_mtok = 1\noutput_usd_per_mtok = 1\nbatch = { percent = 0 }\nflex = {}\n\
            long_context = { above_tokens = 1 }\n";
        let found = problems(text);
        for expected in [
            "p.toml:1: effective: \"soon\" is not a date: write \"2026-12-01\"",
            "p.toml:3: models.\"m\".input_usd_per_mtok: -1 is not between 0 and 1000000",
            "p.toml:4: models.\"m\".output_usd_per_mtok: 0.0000001 is not a price",
            "p.toml:5: models.\"a b\": \"a b\" is not the name of one model",
            "p.toml:5: models.\"a b\".output_usd_per_mtok: is missing",
            "p.toml:7: models.\"n\".input_usd_per_mtok: is missing",
            "p.toml:8: models.\"n\".input_usd_per_tok: unknown setting; did you mean `input_usd_per_mtok`?",
            "models.\"o\".batch.percent: 0 is not between 1 and 10000",
            "models.\"o\".flex.percent: is missing: give it, or prices",
            "models.\"o\".long_context.input_percent: is missing",
            "models.\"o\".long_context.output_percent: is missing",
        ] {
            assert!(found.contains(expected), "{expected}\n{found}");
        }
        assert_eq!(found.lines().count(), 11, "{found}");
        assert!(problems("").contains("names no model"));
        assert!(problems("[models.m]\nbatch = { percent = 50 }").contains("input_usd_per_mtok: is missing"));
        assert!(problems("[models.m").contains("not valid TOML"));
        assert!(
            problems("effective = 2026-12-01\n[models.m]\ninput_usd_per_mtok = 1\noutput_usd_per_mtok = 1")
                .contains("must be a text in double quotes, not a date")
        );
    }
}
