//! Results on their way out: JSON for programs, aligned text for people, both from the same values.

use std::io::{Result, Write};

use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::Value;
use tollgate_core::units::show_duration;

use super::listing::{Form, Listing};

/// Where results go, and in which form.
pub(super) struct Output<'a> {
    pub(super) json: bool,
    pub(super) to: &'a mut dyn Write,
}

impl Output<'_> {
    /// One thing that was made or changed: the object, or a sentence about it.
    pub(super) fn done(&mut self, object: &Value, sentence: &str) -> Result<()> {
        if self.json { writeln!(self.to, "{object}") } else { writeln!(self.to, "{sentence}") }
    }

    /// Something that is worth saying beside the result, to people.
    pub(super) fn note(&mut self, text: &str) -> Result<()> {
        if self.json { Ok(()) } else { writeln!(self.to, "{text}") }
    }

    /// One thing: the object, or its fields below each other.
    pub(super) fn show(&mut self, object: &Value) -> Result<()> {
        if self.json {
            return writeln!(self.to, "{object}");
        }
        let fields = object.as_object().into_iter().flatten();
        let rows: Vec<_> = fields.map(|(name, value)| [heading(name), cell(name, value)]).collect();
        let width = rows.iter().map(|[name, _]| name.chars().count()).max().unwrap_or(0);
        rows.iter().try_for_each(|[name, value]| writeln!(self.to, "{name:width$}  {value}"))
    }

    /// A list: an array of the rows, or a table of some of their columns.
    pub(super) fn list(&mut self, rows: &[Value], columns: &[&'static str]) -> Result<()> {
        let form = self.form(false);
        let mut listing = Listing::begin(self, form, columns)?;
        rows.iter().try_for_each(|row| listing.push(row))?;
        listing.finish()
    }

    /// The form of a list, if it may be CSV.
    pub(super) fn form(&self, csv: bool) -> Form {
        match (csv, self.json) {
            (true, _) => Form::Csv,
            (false, true) => Form::Json,
            (false, false) => Form::Table,
        }
    }
}

/// A point in time, as JSON shows it; nothing, if there is none.
pub(super) fn time(time: impl Into<Option<DateTime<Utc>>>) -> Value {
    time.into().map_or(Value::Null, |time| time.to_rfc3339_opts(SecondsFormat::AutoSi, true).into())
}

pub(super) fn heading(name: &str) -> String {
    name.replace("_nano_usd", "_usd")
}

pub(super) fn cell(name: &str, value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::Bool(yes) => if *yes { "yes" } else { "no" }.to_owned(),
        Value::Number(n) => match n.as_u64().filter(|_| name.ends_with("_nano_usd")) {
            Some(nano) => dollars(nano),
            None => n.to_string(),
        },
        // Seconds are enough for people.
        Value::String(text) if ["_at", "_from", "_until"].iter().any(|end| name.ends_with(end)) => {
            text.split('.').next().unwrap_or(text).trim_end_matches('Z').replace('T', " ")
        }
        Value::String(text) => {
            text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
        }
        Value::Array(items) if name == "model_limits" => {
            if items.is_empty() {
                "-".to_owned()
            } else {
                items.iter().map(model_limits).collect::<Vec<_>>().join(" ")
            }
        }
        Value::Array(items) if items.is_empty() => "any".to_owned(),
        Value::Array(items) => items.iter().map(|item| cell(name, item)).collect::<Vec<_>>().join(","),
        Value::Object(set) if name == "handling" => {
            let set: Vec<_> = set.iter().map(|(name, value)| handling(name, value)).collect();
            if set.is_empty() { "-".to_owned() } else { set.join(" ") }
        }
        Value::Object(_) => value.to_string(),
    }
}

/// One setting of how an upstream is handled, as it is written.
fn handling(name: &str, value: &Value) -> String {
    match (name.strip_suffix("_ms"), value.as_u64()) {
        (Some(name), Some(ms)) => format!("{name}={}", show_duration(std::time::Duration::from_millis(ms))),
        _ => format!("{name}={value}"),
    }
}

/// The limits of one model in the form in which `--model-limits` takes them.
fn model_limits(entry: &Value) -> String {
    let set = entry.as_object().into_iter().flatten().filter(|(name, value)| *name != "model" && !value.is_null());
    let limits: Vec<_> =
        set.map(|(name, value)| format!("{}:{}", heading(name).replace('_', "-"), cell(name, value))).collect();
    format!("{}={}", cell("model", &entry["model"]), limits.join(","))
}

/// Dollars with two decimals, and as many more as there are.
fn dollars(nano: u64) -> String {
    let fraction = format!("{:09}", nano % 1_000_000_000);
    let shown = fraction.trim_end_matches('0').len().max(2);
    format!("{}.{}", nano / 1_000_000_000, &fraction[..shown])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn printed(json: bool, print: impl FnOnce(&mut Output<'_>) -> Result<()>) -> String {
        let mut to = Vec::new();
        print(&mut Output { json, to: &mut to }).unwrap();
        String::from_utf8(to).unwrap()
    }

    #[test]
    fn lists_are_arrays_or_aligned_tables() {
        let rows = [
            json!({"id": 1, "name": "a", "models": [], "cost_nano_usd": 1_500_000_000, "made_at": "2026-01-02T03:04:05.6Z"}),
            json!({"id": 20, "name": "bob\u{1b}", "models": ["x", "y"], "cost_nano_usd": 1, "made_at": null}),
        ];
        let columns = ["id", "name", "models", "cost_nano_usd", "made_at"];
        let text = printed(false, |out| out.list(&rows, &columns));
        assert_eq!(
            text,
            "id  name  models     cost_usd  made_at\n 1  a     any            1.50  2026-01-02 03:04:05\n20  bob\u{fffd}  x,y     0.000000001  -\n"
        );
        let parsed: Value = serde_json::from_str(&printed(true, |out| out.list(&rows, &columns))).unwrap();
        assert_eq!(parsed, json!(rows));
        assert_eq!(printed(true, |out| out.list(&[], &columns)), "[]\n");
        assert_eq!(printed(false, |out| out.list(&[], &["id"])), "id\n");
    }

    #[test]
    fn one_thing_is_an_object_or_fields() {
        let thing = json!({"id": 1, "disabled": false, "rpm": null});
        assert_eq!(printed(false, |out| out.show(&thing)), "id        1\ndisabled  no\nrpm       -\n");
        assert_eq!(printed(true, |out| out.show(&thing)), "{\"id\":1,\"disabled\":false,\"rpm\":null}\n");
    }
}
