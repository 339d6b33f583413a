//! Lists that are written while they are read: a million rows pass through, and a thousand are in memory.
//!
//! JSON is one array. CSV is that of RFC 4180; a text that a spreadsheet would take for a formula gets an apostrophe before it,
//! because some texts are chosen by clients (their user agent, say), and the reader of the file is somebody else. A table learns
//! the widths of its columns from its first rows; should a later one be wider, its line is.

use std::io::{Result, Write};

use serde_json::Value;

use super::output::{Output, cell, heading};

/// Rows that a table waits for.
const LOOK_AHEAD: usize = 1000;

/// The form of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// An aligned table, for people.
    Table,
    /// One array.
    Json,
    /// Comma-separated values, with a header.
    Csv,
}

/// A list that has begun.
pub(super) struct Listing<'o> {
    columns: Vec<&'static str>,
    to: To<'o>,
}

enum To<'o> {
    Table { to: &'o mut dyn Write, waiting: Vec<Vec<Cell>>, widths: Vec<usize>, numbers: Vec<bool> },
    Json { to: &'o mut dyn Write, has_rows: bool },
    Csv(Box<csv::Writer<&'o mut dyn Write>>),
}

struct Cell {
    text: String,
    is_number: bool,
}

impl<'o> Listing<'o> {
    /// Begins a list of rows with these columns; JSON shows all that the rows have.
    pub(super) fn begin(out: &'o mut Output<'_>, form: Form, columns: &[&'static str]) -> Result<Self> {
        let to: &mut dyn Write = &mut *out.to;
        let columns = columns.to_vec();
        let to = match form {
            Form::Table => To::Table { to, waiting: Vec::new(), widths: Vec::new(), numbers: Vec::new() },
            Form::Json => {
                write!(to, "[")?;
                To::Json { to, has_rows: false }
            }
            Form::Csv => {
                let mut csv = csv::WriterBuilder::new().terminator(csv::Terminator::CRLF).from_writer(to);
                csv.write_record(&columns).map_err(io)?;
                To::Csv(Box::new(csv))
            }
        };
        Ok(Self { columns, to })
    }

    /// Adds a row.
    pub(super) fn push(&mut self, row: &Value) -> Result<()> {
        match &mut self.to {
            To::Table { waiting, widths, to, numbers } => {
                let cells = self.columns.iter().map(|name| Cell::new(name, &row[name])).collect();
                waiting.push(cells);
                if widths.is_empty() && waiting.len() < LOOK_AHEAD {
                    return Ok(());
                }
                print(*to, &self.columns, waiting, widths, numbers)
            }
            To::Json { to, has_rows } => {
                if std::mem::replace(has_rows, true) {
                    write!(to, ",")?;
                }
                Ok(serde_json::to_writer(to, row)?)
            }
            To::Csv(csv) => csv.write_record(self.columns.iter().map(|name| csv_cell(&row[name]))).map_err(io),
        }
    }

    /// Hands everything on that was pushed so far.
    pub(super) fn flush(&mut self) -> Result<()> {
        match &mut self.to {
            To::Table { to, .. } | To::Json { to, .. } => to.flush(),
            To::Csv(csv) => csv.flush(),
        }
    }

    /// Ends the list.
    pub(super) fn finish(mut self) -> Result<()> {
        match &mut self.to {
            To::Table { to, waiting, widths, numbers } => print(*to, &self.columns, waiting, widths, numbers)?,
            To::Json { to, .. } => writeln!(to, "]")?,
            To::Csv(_) => {}
        }
        self.flush()
    }
}

impl Cell {
    fn new(name: &str, value: &Value) -> Self {
        Self { text: cell(name, value), is_number: value.is_number() }
    }
}

/// Prints rows, and before the first ones the header, once they have told how wide the columns are.
fn print(
    to: &mut dyn Write,
    columns: &[&str],
    rows: &mut Vec<Vec<Cell>>,
    widths: &mut Vec<usize>,
    numbers: &mut Vec<bool>,
) -> Result<()> {
    let chars = |text: &str| text.chars().count();
    if widths.is_empty() {
        for (at, name) in columns.iter().enumerate() {
            let widest = rows.iter().map(|row| chars(&row[at].text)).max().unwrap_or(0);
            widths.push(widest.max(chars(&heading(name))));
            numbers.push(rows.iter().any(|row| row[at].is_number));
        }
        let header = columns.iter().map(|name| Cell { text: heading(name), is_number: false }).collect();
        rows.insert(0, header);
    }
    for row in rows.drain(..) {
        let mut line = String::new();
        for ((cell, width), is_number) in row.iter().zip(&*widths).zip(&*numbers) {
            let padding = " ".repeat(width.saturating_sub(chars(&cell.text)));
            let (before, after) = if *is_number { (&*padding, "") } else { ("", &*padding) };
            line += &format!("{before}{}{after}  ", cell.text);
        }
        writeln!(to, "{}", line.trim_end())?;
    }
    Ok(())
}

/// A value as CSV has it, before it is quoted.
fn csv_cell(value: &Value) -> String {
    let text = match value {
        Value::Null => return String::new(),
        Value::Bool(_) | Value::Number(_) => return value.to_string(),
        Value::String(text) => text.clone(),
        Value::Array(_) | Value::Object(_) => value.to_string(),
    };
    // What spreadsheets calculate, by what it begins with.
    if text.starts_with(['=', '+', '-', '@', '\t', '\r', '\n']) { format!("'{text}") } else { text }
}

fn io(error: csv::Error) -> std::io::Error {
    match error.into_kind() {
        csv::ErrorKind::Io(error) => error,
        other => std::io::Error::other(format!("{other:?}")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const COLUMNS: [&str; 4] = ["name", "count", "cost_nano_usd", "agent"];

    fn listed(form: Form, rows: &[Value]) -> String {
        let mut to = Vec::new();
        let mut out = Output { json: false, to: &mut to };
        let mut listing = Listing::begin(&mut out, form, &COLUMNS).unwrap();
        rows.iter().for_each(|row| listing.push(row).unwrap());
        listing.finish().unwrap();
        String::from_utf8(to).unwrap()
    }

    fn rows() -> [Value; 2] {
        [
            json!({"name": "a,\"b\"", "count": 7, "cost_nano_usd": 1_500_000_000, "agent": "=cmd|' /C calc'!A0"}),
            json!({"name": "two\nlines", "count": 1000, "cost_nano_usd": 1, "agent": null, "more": [1, "x"]}),
        ]
    }

    #[test]
    fn csv_is_that_of_rfc_4180_and_holds_no_formula() {
        let text = listed(Form::Csv, &rows());
        let expected = "name,count,cost_nano_usd,agent\r\n\
            \"a,\"\"b\"\"\",7,1500000000,'=cmd|' /C calc'!A0\r\n\
            \"two\nlines\",1000,1,\r\n";
        assert_eq!(text, expected);
        for bad in ["=1", "+1", "-1", "@x", "\t=1", "\r=1", "\n=1"] {
            assert_eq!(csv_cell(&json!(bad)), format!("'{bad}"));
        }
        assert_eq!(csv_cell(&json!(["=1"])), "[\"=1\"]");
        assert_eq!(csv_cell(&json!(-1)), "-1", "a number is no text");
        assert_eq!(listed(Form::Csv, &[]), "name,count,cost_nano_usd,agent\r\n");
        let read: Vec<csv::StringRecord> =
            csv::Reader::from_reader(text.as_bytes()).records().collect::<std::result::Result<_, _>>().unwrap();
        assert_eq!((&read[0][0], &read[1][0]), ("a,\"b\"", "two\nlines"), "what was written is read");
    }

    #[test]
    fn json_is_one_array_of_whole_rows() {
        let parsed: Value = serde_json::from_str(&listed(Form::Json, &rows())).unwrap();
        assert_eq!(parsed, json!(rows()));
        assert_eq!(listed(Form::Json, &[]), "[]\n");
    }

    #[test]
    fn a_table_that_is_long_goes_by_its_first_rows() {
        let row = |n: usize| json!({"name": "x".repeat(1 + n / LOOK_AHEAD * 9), "count": n, "agent": "a"});
        let rows: Vec<_> = (0..=LOOK_AHEAD).map(row).collect();
        let text = listed(Form::Table, &rows);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), LOOK_AHEAD + 2);
        assert_eq!(lines[0], "name  count  cost_usd  agent");
        assert_eq!(lines[1], "x         0  -         a");
        assert_eq!(lines[LOOK_AHEAD + 1], "xxxxxxxxxx   1000  -         a");
        assert_eq!(listed(Form::Table, &[]), "name  count  cost_usd  agent\n");
    }

    #[test]
    fn a_reader_who_has_gone_shows_as_such() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> Result<usize> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> Result<()> {
                Ok(())
            }
        }
        for form in [Form::Json, Form::Csv, Form::Table] {
            let mut out = Output { json: false, to: &mut Closed };
            let done = Listing::begin(&mut out, form, &COLUMNS).and_then(|mut listing| {
                listing.push(&rows()[0])?;
                listing.finish()
            });
            assert_eq!(done.unwrap_err().kind(), std::io::ErrorKind::BrokenPipe, "{form:?}");
        }
    }
}
