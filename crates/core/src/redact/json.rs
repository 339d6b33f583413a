//! Redacting JSON: within its strings, whatever escapes they are written with, so that what comes out is JSON again.
//!
//! A string is read as the text that it is, and written anew only if something was taken out of it. JSON within a string (the
//! arguments of a tool call) is redacted as JSON. Outside of strings there are only numbers to be looked at.
//!
//! What is not JSON, because it is text or was cut off, is walked over in the same way, and what is between its "strings" is
//! redacted as text.

use std::{borrow::Cow, sync::LazyLock};

use regex::Regex;
use serde::de::IgnoredAny;

use super::{Cutter, Redactor, digits, marker, patterns};
use crate::openai::{
    scan::{container_end, skip_space, string_end},
    text_of,
};

/// How deep JSON within strings of JSON is looked into.
const MAX_NESTING: usize = 4;
/// So many numbers in a row are a text as tokens or bytes, or an embedding.
const MANY_NUMBERS: usize = 8;
/// What a string may lose at its end so that what is before it can be read: an escape that was cut off.
const CUT_ESCAPE: usize = 12;

/// The `body` of a request or an answer, redacted.
pub(super) fn body<'t>(redactor: &Redactor, body: &'t str) -> Cow<'t, str> {
    walk(redactor, body, is_json(body), 0)
}

fn is_json(text: &str) -> bool {
    serde_json::from_str::<IgnoredAny>(text).is_ok()
}

/// `is_json`: else what is between strings is text.
fn walk<'t>(redactor: &Redactor, text: &'t str, is_json: bool, nesting: usize) -> Cow<'t, str> {
    let mut walk = Walk { redactor, text, is_json, nesting, key: None, cutter: Cutter::new(text) };
    let mut at = 0;
    while at < text.len() {
        at = if text.as_bytes()[at] == b'"' { walk.string(at) } else { walk.between(at) };
    }
    walk.cutter.finish().map_or(Cow::Borrowed(text), Cow::Owned)
}

struct Walk<'r, 't> {
    redactor: &'r Redactor,
    text: &'t str,
    is_json: bool,
    nesting: usize,
    /// The name of the member whose value comes next.
    key: Option<Cow<'t, str>>,
    cutter: Cutter<'t>,
}

impl<'t> Walk<'_, 't> {
    /// Redacts the string at `start`; returns where it ends.
    fn string(&mut self, start: usize) -> usize {
        let end = string_end(self.text.as_bytes(), start).unwrap_or(self.text.len());
        let raw = &self.text[start..end];
        let colon = skip_space(self.text.as_bytes(), end);
        if self.text.as_bytes().get(colon) == Some(&b':') {
            self.text(start, raw);
            self.key = text_of(raw);
            return self.logprobs(colon).unwrap_or(end);
        }
        match self.key.take() {
            Some(key) if patterns::names_secret(&key) && !is_bare(raw) => {
                self.replace(start, raw.len(), &marker("secret"));
            }
            _ => self.text(start, raw),
        }
        end
    }

    fn text(&mut self, start: usize, raw: &'t str) {
        let is_open = start + raw.len() == self.text.len();
        let Some(text) = text_of(raw).or_else(|| is_open.then(|| text_of_cut(raw))?) else {
            // Not a string that JSON knows: what is between the quotes is text.
            return self.plain(start + 1, &raw[1..]);
        };
        let redacted = match self.nesting < MAX_NESTING && text.starts_with(['{', '[']) && is_json(&text) {
            true => walk(self.redactor, &text, true, self.nesting + 1),
            false => self.redactor.text(&text),
        };
        if let Cow::Owned(redacted) = &redacted {
            self.replace(start, raw.len(), redacted);
        }
    }

    /// Puts the JSON string `text` in the place of what is at `start`.
    fn replace(&mut self, start: usize, length: usize, text: &str) {
        // A text can always be written as JSON.
        let string = serde_json::to_string(text).unwrap_or_else(|_| "\"\"".to_owned());
        self.cutter.replace(start..start + length, &string);
    }

    fn plain(&mut self, start: usize, text: &str) {
        if let Cow::Owned(redacted) = self.redactor.text(text) {
            self.cutter.replace(start..start + text.len(), &redacted);
        }
    }

    /// Replaces log probabilities whose colon this is; returns where they end.
    fn logprobs(&mut self, colon: usize) -> Option<usize> {
        let start = skip_space(self.text.as_bytes(), colon + 1);
        if self.key.as_deref() != Some("logprobs") || !self.text[start..].starts_with(['{', '[']) {
            return None;
        }
        let end = container_end(self.text.as_bytes(), start).unwrap_or(self.text.len());
        self.replace(start, end - start, &marker("logprobs"));
        self.key = None;
        Some(end)
    }

    /// Redacts what is between two strings, from `start` on; returns where it ends.
    fn between(&mut self, start: usize) -> usize {
        let text = self.text;
        let end = text[start..].find('"').map_or(text.len(), |length| start + length);
        let between = &text[start..end];
        let key = if between.trim_ascii() == ":" { return end } else { self.key.take() };
        if self.is_json {
            self.numbers(start, between, key.as_deref());
        } else {
            self.plain(start, between);
        }
        end
    }

    /// Arrays of numbers, and numbers that are cards.
    fn numbers(&mut self, start: usize, between: &str, key: Option<&str>) {
        static NUMBERS: LazyLock<Option<Regex>> =
            LazyLock::new(|| Regex::new(r"\[(?P<all>[0-9.eE+,\s-]+)\]|(?P<one>[0-9.eE+-]{13,})").ok());
        for found in NUMBERS.iter().flat_map(|numbers| numbers.captures_iter(between)) {
            let by = match (found.name("all"), found.name("one")) {
                (Some(all), _) => many(all.as_str(), key).map(|kind| format!("[\"{}\"]", marker(&kind))),
                (None, Some(one)) => digits::is_plain_card(one.as_str()).then(|| format!("\"{}\"", marker("card"))),
                (None, None) => None,
            };
            if let (Some(by), Some(part)) = (by, found.get(0)) {
                self.cutter.replace(start + part.start()..start + part.end(), &by);
            }
        }
    }
}

/// Is there nothing in a string that could be a secret, or not any more?
fn is_bare(raw: &str) -> bool {
    text_of(raw).is_some_and(|text| text.is_empty() || text.starts_with("[redacted:"))
}

/// What an array of numbers is, if it may be more than some numbers.
fn many(numbers: &str, key: Option<&str>) -> Option<String> {
    let count = numbers.split(',').count();
    let is_text = matches!(key, Some("prompt" | "input" | "tokens" | "bytes" | "embedding"));
    (is_text || count >= MANY_NUMBERS).then(|| format!("numbers {count}"))
}

/// The text of a string that was cut off, without the escape that it may end in.
fn text_of_cut(raw: &str) -> Option<Cow<'static, str>> {
    if string_end(raw.as_bytes(), 0).is_some() {
        return None;
    }
    let mut ends =
        (0..=CUT_ESCAPE).filter_map(|back| raw.get(..raw.len().checked_sub(back)?)).filter(|raw| raw.len() > 1);
    ends.find_map(|raw| text_of(&format!("{raw}\"")).map(|text| Cow::Owned(text.into_owned())))
}
