//! The line that every request writes.
//!
//! It looks like any other line of the log, and the filter of the log decides on it (its target is `access`, its level
//! `info`). But it takes a way of its own to the others: what `tracing` and its layers do to carry one event costs more
//! than the line.

use std::{
    cell::RefCell,
    fmt::{self, Write},
    sync::OnceLock,
    time::SystemTime,
};

use serde::Serialize;
use tracing::Level;

use super::{
    Lines, LogFormat,
    line::{write_quoted, write_time},
};

const TARGET: &str = "access";

/// Where the lines go; nothing before logging was started.
static LOG: OnceLock<(LogFormat, Lines)> = OnceLock::new();

thread_local! {
    /// The line that is being written.
    static LINE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// A request, as its line tells of it. What is `None` is left out.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Access<'a> {
    /// The gateway's own id.
    pub request_id: &'a str,
    /// The name of its route.
    pub route: &'a str,
    /// The beginning of the key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<&'a str>,
    /// The model that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<&'a str>,
    /// The last upstream that was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upstream: Option<&'a str>,
    /// How many were.
    pub attempts: usize,
    /// Status that the client got; 0: none.
    pub status: u16,
    /// `ok`, or what went wrong.
    pub code: &'a str,
    /// As the upstream counted them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_tokens: Option<u64>,
    /// As the upstream counted them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_tokens: Option<u64>,
    /// From its arrival to its end.
    pub duration_ms: u32,
}

impl Access<'_> {
    /// Writes the line, unless the filter of the log is against it.
    pub fn log(&self) {
        if !tracing::enabled!(target: TARGET, Level::INFO) {
            return;
        }
        let Some((format, lines)) = LOG.get() else { return };
        LINE.with_borrow_mut(|line| {
            line.clear();
            let written = match format {
                LogFormat::Text => self.write_text(line, SystemTime::now()),
                LogFormat::Json => self.write_json(line, SystemTime::now()),
            };
            // Neither can fail.
            if written.is_ok() {
                lines.put(line.as_bytes());
            }
        });
    }

    fn write_text(&self, line: &mut String, now: SystemTime) -> fmt::Result {
        write_time(line, now)?;
        line.push_str("  INFO ");
        line.push_str(TARGET);
        line.push_str(": request_id=");
        line.push_str(self.request_id);
        write_text(line, "route", Some(self.route))?;
        write_text(line, "key", self.key)?;
        write_text(line, "model", self.model)?;
        write_text(line, "upstream", self.upstream)?;
        write_number(line, "attempts", Some(self.attempts));
        write_number(line, "status", Some(self.status));
        write_text(line, "code", Some(self.code))?;
        write_number(line, "prompt_tokens", self.prompt_tokens);
        write_number(line, "completion_tokens", self.completion_tokens);
        write_number(line, "duration_ms", Some(self.duration_ms));
        line.write_char('\n')
    }

    fn write_json(&self, line: &mut String, now: SystemTime) -> fmt::Result {
        #[derive(Serialize)]
        struct Event<'a> {
            timestamp: &'a str,
            level: &'static str,
            #[serde(flatten)]
            fields: &'a Access<'a>,
            target: &'static str,
        }
        let mut timestamp = String::with_capacity(32);
        write_time(&mut timestamp, now)?;
        let event = Event { timestamp: &timestamp, level: "INFO", fields: self, target: TARGET };
        line.push_str(&serde_json::to_string(&event).map_err(|_| fmt::Error)?);
        line.write_char('\n')
    }
}

/// Sends the lines to `lines`. The first call counts.
pub(super) fn start(format: LogFormat, lines: Lines) {
    let _ = LOG.set((format, lines));
}

fn write_name(line: &mut String, name: &str) {
    line.push(' ');
    line.push_str(name);
    line.push('=');
}

fn write_text(line: &mut String, name: &str, value: Option<&str>) -> fmt::Result {
    let Some(value) = value else { return Ok(()) };
    write_name(line, name);
    write_quoted(line, value)
}

fn write_number(line: &mut String, name: &str, value: Option<impl itoa::Integer>) {
    if let Some(value) = value {
        write_name(line, name);
        line.push_str(itoa::Buffer::new().format(value));
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    const REQUEST: Access<'_> = Access {
        request_id: "01a",
        route: "chat_completions",
        key: Some("tg-x"),
        model: Some("a\nb\""),
        upstream: None,
        attempts: 1,
        status: 200,
        code: "ok",
        prompt_tokens: Some(3),
        completion_tokens: None,
        duration_ms: 12,
    };

    fn at() -> SystemTime {
        UNIX_EPOCH + Duration::from_micros(1_000_042)
    }

    #[test]
    fn as_text_it_is_one_line_of_names_and_values() {
        let mut line = String::new();
        REQUEST.write_text(&mut line, at()).unwrap();
        let expected = r#"1970-01-01T00:00:01.000042Z  INFO access: request_id=01a route="chat_completions" key="tg-x" model="a\nb\"" attempts=1 status=200 code="ok" prompt_tokens=3 duration_ms=12"#;
        assert_eq!(line, format!("{expected}\n"));
    }

    #[test]
    fn as_json_it_is_an_object_of_its_own() {
        let mut line = String::new();
        REQUEST.write_json(&mut line, at()).unwrap();
        assert_eq!(line.matches('\n').count(), 1, "{line}");
        let expected = serde_json::json!({
            "timestamp": "1970-01-01T00:00:01.000042Z", "level": "INFO", "request_id": "01a", "route": "chat_completions",
            "key": "tg-x", "model": "a\nb\"", "attempts": 1, "status": 200, "code": "ok", "prompt_tokens": 3, "duration_ms": 12,
            "target": "access",
        });
        assert_eq!(serde_json::from_str::<serde_json::Value>(&line).unwrap(), expected);
    }
}
