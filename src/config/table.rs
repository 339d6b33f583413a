//! One section of the document, read setting by setting.
//!
//! Each look-up names what it expects; what does not fit is noted with its place and answered with `None`. The names that
//! were asked for are the settings that exist.

use std::{borrow::Cow, collections::BTreeSet, fmt::Display, ops::RangeInclusive};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    expand::expand,
    raw::{Place, Reader},
};

/// One section, read setting by setting. When it goes out of scope, whatever nobody asked for is noted as unknown.
pub(super) struct Table<'d> {
    reader: &'d Reader<'d>,
    table: Option<&'d DeTable<'d>>,
    section: String,
    place: Place,
    asked: BTreeSet<&'static str>,
}

impl<'d> Table<'d> {
    /// The section `section` of the document, which stands at `place`.
    pub(super) fn new(reader: &'d Reader<'d>, table: Option<&'d DeTable<'d>>, section: String, place: Place) -> Self {
        Self { reader, table, section, place, asked: BTreeSet::new() }
    }

    /// Where this section stands.
    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    /// Where the setting `name` of this section stands, or would stand.
    pub(super) fn place_of(&self, name: &str) -> Place {
        let key = self.table.and_then(|table| table.get_key_value(name)).map(|(key, _)| key.span().start);
        let line = key.map(|offset| self.reader.line_of(offset)).or(self.place.line);
        Place { line, setting: join(&self.place.setting, name) }
    }

    /// Is the setting written down?
    pub(super) fn has(&self, name: &str) -> bool {
        self.table.is_some_and(|table| table.contains_key(name))
    }

    /// Is the list left out, or written down as empty?
    pub(super) fn lists_nothing(&self, name: &str) -> bool {
        let value = self.table.and_then(|table| table.get(name)).map(Spanned::get_ref);
        value.is_none_or(|value| value.as_array().is_some_and(|items| items.is_empty()))
    }

    /// Notes what is wrong with the setting `name`.
    pub(super) fn problem(&self, name: &str, message: impl Into<String>) {
        self.reader.problem(&self.place_of(name), message.into());
    }

    /// Notes what is wrong at `place`.
    pub(super) fn problem_at(&self, place: &Place, message: String) {
        self.reader.problem(place, message);
    }

    /// Notes what is doubtful about the setting `name`.
    pub(super) fn warning(&self, name: &str, message: impl Into<String>) {
        self.reader.warning(&self.place_of(name), message.into());
    }

    /// A section of this one; empty if it is not written down.
    pub(super) fn section(&mut self, name: &'static str) -> Table<'d> {
        let place = self.place_of(name);
        let table = self.get(name).and_then(|value| match value.get_ref() {
            DeValue::Table(table) => Some(table),
            other => {
                self.problem(name, format!("must be a section, [{name}], not {}", kind(other)));
                None
            }
        });
        Table::new(self.reader, table, join(&self.section, name), place)
    }

    /// A section of this one beside which there are others with the same settings: they are known together, as `*`.
    pub(super) fn variant(&mut self, name: &'static str) -> Table<'d> {
        let section = format!("{}.*", self.section);
        let mut table = self.section(name);
        table.section = section;
        table
    }

    /// Every `[[name]]`.
    pub(super) fn repeated(&mut self, name: &'static str) -> Vec<Table<'d>> {
        let (place, section) = (self.place_of(name), format!("{}[]", join(&self.section, name)));
        let Some(value) = self.get(name) else { return Vec::new() };
        let DeValue::Array(items) = value.get_ref() else {
            self.problem(name, format!("must be written [[{name}]], with double brackets, once per entry"));
            return Vec::new();
        };
        let entry = |(index, item): (usize, &'d Spanned<DeValue<'d>>)| {
            let place = self.item_place(&place, index, item);
            let table = item.get_ref().as_table();
            if table.is_none() {
                self.reader.problem(&place, format!("must be a section, not {}", kind(item.get_ref())));
            }
            table.map(|table| Table::new(self.reader, Some(table), section.clone(), place))
        };
        items.iter().enumerate().filter_map(entry).collect()
    }

    /// Every `[name.anything]`, with the name that the file gave it.
    pub(super) fn named(&mut self, name: &'static str) -> Vec<(&'d str, Table<'d>)> {
        let (place, section) = (self.place_of(name), format!("{}.*", join(&self.section, name)));
        let Some(value) = self.get(name) else { return Vec::new() };
        let DeValue::Table(entries) = value.get_ref() else {
            self.problem(name, format!("must be sections, [{name}.\"a-name\"], not {}", kind(value.get_ref())));
            return Vec::new();
        };
        let entry = |(key, item): (&'d Spanned<Cow<'d, str>>, &'d Spanned<DeValue<'d>>)| {
            let line = Some(self.reader.line_of(key.span().start));
            let place = Place { line, setting: format!("{}.{:?}", place.setting, key.get_ref()) };
            let table = item.get_ref().as_table();
            if table.is_none() {
                self.reader.problem(&place, format!("must be a section, not {}", kind(item.get_ref())));
            }
            table.map(|table| (key.get_ref().as_ref(), Table::new(self.reader, Some(table), section.clone(), place)))
        };
        entries.iter().filter_map(entry).collect()
    }

    /// A string setting, as `parse` understands it.
    pub(super) fn text<T>(&mut self, name: &'static str, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        let value = self.get(name)?;
        self.parse_text(&self.place_of(name), value, parse)
    }

    /// A list of strings, each as `parse` understands it, with the place of each. Bad ones are left out.
    pub(super) fn list<T>(
        &mut self,
        name: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<Vec<(T, Place)>> {
        let value = self.get(name)?;
        let DeValue::Array(items) = value.get_ref() else {
            self.problem(name, format!("must be a list, such as [\"...\"], not {}", kind(value.get_ref())));
            return None;
        };
        let place = self.place_of(name);
        let item = |(index, item): (usize, &Spanned<DeValue<'_>>)| {
            let place = self.item_place(&place, index, item);
            self.parse_text(&place, item, &parse).map(|value| (value, place))
        };
        Some(items.iter().enumerate().filter_map(item).collect())
    }

    /// A whole number within `range`.
    pub(super) fn whole<T>(&mut self, name: &'static str, range: RangeInclusive<T>) -> Option<T>
    where
        T: TryFrom<u64> + PartialOrd + Display,
    {
        let value = self.get(name)?;
        let DeValue::Integer(integer) = value.get_ref() else {
            self.problem(name, format!("must be a whole number without quotes, not {}", kind(value.get_ref())));
            return None;
        };
        let number = u64::from_str_radix(integer.as_str(), integer.radix()).ok().and_then(|n| T::try_from(n).ok());
        let number = number.filter(|n| range.contains(n));
        if number.is_none() {
            self.problem(name, format!("{integer} is not between {} and {}", range.start(), range.end()));
        }
        number
    }

    /// A number, with or without a fraction, as `parse` understands its digits.
    pub(super) fn decimal<T>(
        &mut self,
        name: &'static str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let value = self.get(name)?;
        let text = match value.get_ref() {
            DeValue::Float(float) => float.as_str(),
            DeValue::Integer(integer) if integer.radix() == 10 => integer.as_str(),
            other => {
                self.problem(name, format!("must be a number without quotes, such as 2.5, not {}", kind(other)));
                return None;
            }
        };
        parse(text).map_err(|message| self.problem(name, format!("{text} {message}"))).ok()
    }

    /// `true` or `false`.
    pub(super) fn boolean(&mut self, name: &'static str) -> Option<bool> {
        let value = self.get(name)?;
        if !value.get_ref().is_bool() {
            self.problem(name, format!("must be true or false without quotes, not {}", kind(value.get_ref())));
        }
        value.get_ref().as_bool()
    }

    /// Does the file itself spell out the whole string, without taking it from the environment?
    pub(super) fn is_literal(&self, name: &str) -> bool {
        let text = self.table.and_then(|table| table.get(name)).and_then(|value| value.get_ref().as_str());
        text.is_some_and(|text| !text.contains("${"))
    }

    fn get(&mut self, name: &'static str) -> Option<&'d Spanned<DeValue<'d>>> {
        self.asked.insert(name);
        self.table?.get(name)
    }

    fn parse_text<T>(
        &self,
        place: &Place,
        value: &Spanned<DeValue<'_>>,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let DeValue::String(raw) = value.get_ref() else {
            let message = format!("must be a text in double quotes, not {}", kind(value.get_ref()));
            self.reader.problem(place, message);
            return None;
        };
        let parsed = expand(raw, self.reader.env)
            .and_then(|text| parse(&text).map_err(|message| as_written(&message, raw, &text)));
        parsed.map_err(|message| self.reader.problem(place, message)).ok()
    }

    fn item_place(&self, list: &Place, index: usize, item: &Spanned<DeValue<'_>>) -> Place {
        let line = Some(self.reader.line_of(item.span().start));
        Place { line, setting: format!("{}[{index}]", list.setting) }
    }
}

impl Drop for Table<'_> {
    fn drop(&mut self) {
        let names = self.table.into_iter().flat_map(DeTable::keys).map(|key| key.get_ref().as_ref());
        let unknown = names.filter(|name| !self.asked.contains(name));
        let unknown = unknown.map(|name| (name.to_owned(), self.place_of(name))).collect();
        self.reader.close(&self.section, &self.asked, unknown);
    }
}

/// A message that shows what the file says where it would show what a variable holds: that may be a secret.
fn as_written(message: &str, raw: &str, text: &str) -> String {
    if raw == text {
        return message.to_owned();
    }
    let quoted = message.replace(&format!("{text:?}"), &format!("{raw:?}"));
    // A few letters are no secret, and may stand in the message's own words.
    if text.len() < 8 { quoted } else { quoted.replace(text, raw) }
}

fn join(path: &str, name: &str) -> String {
    let bare = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    let dot = if path.is_empty() { "" } else { "." };
    if bare { format!("{path}{dot}{name}") } else { format!("{path}{dot}{name:?}") }
}

fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a number with a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a section",
    }
}
