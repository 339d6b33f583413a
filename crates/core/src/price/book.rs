//! Which model costs what, and since when.
//!
//! Prices come from three places. What the configuration says of a model holds at all times and before everything else; what was
//! imported into the database holds from its date on; what is shipped with the program holds where neither says anything. A
//! request costs what holds when it begins. So a new price changes nothing that is booked, and one that is known early waits for
//! its day.
//!
//! A dated snapshot (`gpt-4o-2024-08-06`, `gpt-4-0613`) that has no price of its own costs what its [`family`] costs.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use chrono::{DateTime, Utc};

use super::Price;

/// Prices of one model by the time from which they hold.
pub type History = BTreeMap<DateTime<Utc>, Arc<Price>>;
/// Prices of many models.
pub type Histories = HashMap<String, History>;

/// Where a price comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// It is shipped with the program.
    Shipped,
    /// It was imported into the database.
    Database,
    /// It stands in the configuration.
    Config,
}

impl Source {
    /// The word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Shipped => "shipped",
            Self::Database => "database",
            Self::Config => "config",
        }
    }
}

/// A price, from when it holds until the next one does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Since {
    /// From when; [`DateTime::<Utc>::MIN_UTC`]: at all times before the next.
    pub from: DateTime<Utc>,
    /// How much.
    pub price: Arc<Price>,
    /// Who says so.
    pub source: Source,
}

/// What one model costs over time, oldest first; empty: nobody knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prices(pub Vec<Since>);

impl Prices {
    /// What holds at `time`.
    #[must_use]
    pub fn since(&self, time: DateTime<Utc>) -> Option<&Since> {
        self.0[..self.0.partition_point(|since| since.from <= time)].last()
    }

    /// The price at `time`.
    #[must_use]
    pub fn at(&self, time: DateTime<Utc>) -> Option<Arc<Price>> {
        self.since(time).map(|since| Arc::clone(&since.price))
    }
}

/// All prices.
#[derive(Clone, Debug, Default)]
pub struct PriceBook {
    config: HashMap<String, Arc<Price>>,
    stored: Histories,
    shipped: Arc<Histories>,
}

impl PriceBook {
    /// A book of what the configuration, the database and the program itself say.
    #[must_use]
    pub fn new(config: HashMap<String, Arc<Price>>, stored: Histories, shipped: Arc<Histories>) -> Self {
        Self { config, stored, shipped }
    }

    /// The same book with what the configuration says of more models.
    #[must_use]
    pub fn with_config(mut self, prices: impl IntoIterator<Item = (String, Arc<Price>)>) -> Self {
        self.config.extend(prices);
        self
    }

    /// The same book without what the configuration says.
    #[must_use]
    pub fn without_config(&self) -> Self {
        Self { config: HashMap::new(), ..self.clone() }
    }

    /// Every name that has a price of its own, sorted.
    #[must_use]
    pub fn models(&self) -> BTreeSet<&str> {
        let names = self.config.keys().chain(self.stored.keys()).chain(self.shipped.keys());
        names.map(String::as_str).collect()
    }

    /// What the first of `names` costs of which a price is known, by itself or by its family.
    #[must_use]
    pub fn find<'n>(&self, names: impl IntoIterator<Item = &'n str>) -> Prices {
        let own_then_family = |name: &'n str| [Some(name), family(name)].into_iter().flatten();
        let mut found = names.into_iter().flat_map(own_then_family).map(|name| self.own(name));
        found.find(|prices| !prices.0.is_empty()).unwrap_or_default()
    }

    /// What is written down of this very name.
    #[must_use]
    pub fn own(&self, name: &str) -> Prices {
        if let Some(price) = self.config.get(name) {
            let from = DateTime::<Utc>::MIN_UTC;
            return Prices(vec![Since { from, price: Arc::clone(price), source: Source::Config }]);
        }
        let (stored, shipped) = (self.stored.get(name), self.shipped.get(name));
        let first_stored = stored.and_then(|history| history.keys().next().copied());
        let before = first_stored.unwrap_or(DateTime::<Utc>::MAX_UTC);
        let mut all: Vec<Since> = shipped
            .into_iter()
            .flatten()
            .take_while(|(from, _)| **from < before)
            .map(|(from, price)| Since { from: *from, price: Arc::clone(price), source: Source::Shipped })
            .collect();
        // What is shipped knows no earlier price than its first.
        if let Some(first) = all.first_mut() {
            first.from = DateTime::<Utc>::MIN_UTC;
        }
        let stored = stored.into_iter().flatten();
        all.extend(stored.map(|(from, price)| Since {
            from: *from,
            price: Arc::clone(price),
            source: Source::Database,
        }));
        Prices(all)
    }
}

/// The family of a dated snapshot: its name without `-2024-08-06` or `-0613`. `None`: the name is not dated.
#[must_use]
pub fn family(model: &str) -> Option<&str> {
    let number = |text: &str, range: std::ops::RangeInclusive<u32>| {
        text.len() == 2
            && text.bytes().all(|byte| byte.is_ascii_digit())
            && text.parse().is_ok_and(|n| range.contains(&n))
    };
    let (rest, last) = model.rsplit_once('-')?;
    if let Some((month, day)) = last.split_at_checked(2).filter(|_| last.len() == 4) {
        return (number(month, 1..=12) && number(day, 1..=31) && !rest.is_empty()).then_some(rest);
    }
    let (rest, month) = rest.rsplit_once('-')?;
    let (family, year) = rest.rsplit_once('-')?;
    let is_year = year.len() == 4 && year.starts_with("20") && number(&year[2..], 0..=99);
    (is_year && number(month, 1..=12) && number(last, 1..=31) && !family.is_empty()).then_some(family)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::price::Rates;

    fn at(day: &str) -> DateTime<Utc> {
        format!("{day}T00:00:00Z").parse().unwrap()
    }

    fn price(input: u64) -> Arc<Price> {
        Arc::new(Price::of(Rates::flat(input, 0)))
    }

    fn history(entries: &[(&str, u64)]) -> History {
        entries.iter().map(|(day, input)| (at(day), price(*input))).collect()
    }

    fn book() -> PriceBook {
        let shipped = HashMap::from([
            ("a".to_owned(), history(&[("2026-01-01", 1), ("2026-05-01", 2)])),
            ("b".to_owned(), history(&[("2026-01-01", 3)])),
            ("b-2025-01-31".to_owned(), history(&[("2026-01-01", 4)])),
        ]);
        let stored = HashMap::from([
            ("a".to_owned(), history(&[("2026-03-01", 10), ("2026-09-01", 11)])),
            ("c".to_owned(), history(&[("2026-06-01", 12)])),
        ]);
        PriceBook::new(HashMap::from([("c".to_owned(), price(100))]), stored, Arc::new(shipped))
    }

    fn input(names: &[&str], day: &str) -> Option<u64> {
        book().find(names.iter().copied()).at(at(day)).map(|price| price.standard.input)
    }

    #[test]
    fn a_price_holds_from_its_date_on() {
        let days = ["2000-01-01", "2026-02-28", "2026-03-01", "2026-08-31", "2026-09-01", "2030-01-01"];
        // What is shipped from May on gives way to what was imported for March.
        assert_eq!(days.map(|day| input(&["a"], day)), [1, 1, 10, 10, 11, 11].map(Some));
        let sources: Vec<_> = book().own("a").0.iter().map(|since| since.source.as_str()).collect();
        assert_eq!(sources, ["shipped", "database", "database"]);
    }

    #[test]
    fn the_configuration_goes_before_all_and_at_all_times() {
        assert_eq!(["2000-01-01", "2030-01-01"].map(|day| input(&["c"], day)), [Some(100); 2]);
        assert_eq!(book().models().into_iter().collect::<Vec<_>>(), ["a", "b", "b-2025-01-31", "c"]);
    }

    #[test]
    fn a_price_of_the_database_alone_begins_with_its_date() {
        let stored = HashMap::from([("d".to_owned(), history(&[("2026-06-01", 5)]))]);
        let book = PriceBook::new(HashMap::new(), stored, Arc::default());
        let at = |day| book.own("d").at(at(day)).map(|price| price.standard.input);
        assert_eq!(["2026-05-31", "2026-06-01"].map(at), [None, Some(5)]);
    }

    #[test]
    fn a_snapshot_has_its_own_price_or_that_of_its_family() {
        assert_eq!(input(&["b-2025-01-31"], "2026-06-01"), Some(4));
        assert_eq!(input(&["b-2025-02-28"], "2026-06-01"), Some(3));
        assert_eq!(input(&["unknown", "b-0613"], "2026-06-01"), Some(3));
        assert_eq!(input(&["unknown", "b2"], "2026-06-01"), None);
        assert_eq!(input(&[], "2026-06-01"), None);
    }

    #[test]
    fn only_dates_make_a_snapshot() {
        for (model, expected) in [
            ("gpt-4o-2024-08-06", Some("gpt-4o")),
            ("gpt-4o-audio-preview-2024-12-17", Some("gpt-4o-audio-preview")),
            ("gpt-4-0613", Some("gpt-4")),
            ("gpt-3.5-turbo-0125", Some("gpt-3.5-turbo")),
            ("gpt-4o", None),
            ("gpt-4o-mini", None),
            ("o3-2024-13-01", None),
            ("o3-2024-01-32", None),
            ("o3-1924-01-01", None),
            ("m-1332", None),
            ("m-8192", None),
            ("m-2024-8-6", None),
            ("-2024-08-06", None),
            ("2024-08-06", None),
            ("-0613", None),
            ("m-2024", None),
            ("x-+1+2", None),
            ("", None),
            ("m-\u{e9}\u{e9}", None),
        ] {
            assert_eq!(family(model), expected, "{model}");
        }
    }

    proptest! {
        #[test]
        fn no_name_is_too_strange_to_have_no_family(name in ".{0,40}|[a-z0-9-]{0,20}") {
            if let Some(family) = family(&name) {
                prop_assert!(name.len() - family.len() == 5 || name.len() - family.len() == 11);
            }
        }

        #[test]
        fn what_holds_is_the_last_that_began(days in prop::collection::btree_set(0..1000_i64, 0..8), day in 0..1000_i64) {
            let time = |day| DateTime::<Utc>::UNIX_EPOCH + chrono::TimeDelta::days(day);
            let prices = days.iter().map(|day| (time(*day), price(day.cast_unsigned()))).collect::<History>();
            let book = PriceBook::new(HashMap::new(), HashMap::from([("m".to_owned(), prices)]), Arc::default());
            let expected = days.range(..=day).next_back().map(|day| day.cast_unsigned());
            prop_assert_eq!(book.own("m").at(time(day)).map(|price| price.standard.input), expected);
        }
    }
}
