//! Where the prompt stands in the body of a request, and how to walk over JSON whose strings are what matters.

use std::{borrow::Cow, fmt};

use serde::{
    Deserialize,
    de::{Deserializer, Visitor},
};

use super::{json::each_member, scan};
use crate::route::Dialect;

/// The members of the request `body` that are its prompt, by name and raw value: always in the same order.
#[must_use]
pub fn prompt(dialect: Dialect, body: &str) -> Vec<(&'static str, &str)> {
    let names: &[&'static str] = match dialect {
        Dialect::Chat => &["messages"],
        Dialect::Completions => &["prompt", "suffix"],
        Dialect::Embeddings => &["input"],
        Dialect::Responses => &["input", "instructions"],
    };
    let mut found = Vec::with_capacity(names.len());
    each_member(body, |name, value| {
        found.extend(names.iter().find(|known| **known == name).map(|known| (*known, value)));
    });
    found.sort_by_key(|(name, _)| *name);
    found
}

/// `text` cut into JSON strings, which begin with their quote, and what is between them. Together they are `text`; a string
/// that does not end goes to its end.
pub fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let length = if rest.starts_with('"') {
            scan::string_end(rest.as_bytes(), 0).unwrap_or(rest.len())
        } else {
            rest.find('"').unwrap_or(rest.len())
        };
        let (piece, after) = rest.split_at(length);
        rest = after;
        (!piece.is_empty()).then_some(piece)
    })
}

/// The text of a JSON string, its quotes included; half of a surrogate pair shows as a replacement character. `None`: it is
/// no whole string.
#[must_use]
pub fn text_of(string: &str) -> Option<Cow<'_, str>> {
    let mut json = serde_json::Deserializer::from_str(string);
    let text = Lossy::deserialize(&mut json).ok()?;
    json.end().ok().map(|()| text.0)
}

/// Read as bytes, which may hold what no text can.
struct Lossy<'de>(Cow<'de, str>);

impl<'de> Deserialize<'de> for Lossy<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_bytes(LossyVisitor).map(Self)
    }
}

struct LossyVisitor;

impl<'de> Visitor<'de> for LossyVisitor {
    type Value = Cow<'de, str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_borrowed_bytes<E>(self, bytes: &'de [u8]) -> Result<Self::Value, E> {
        Ok(String::from_utf8_lossy(bytes))
    }

    fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Self::Value, E> {
        Ok(String::from_utf8_lossy(bytes).into_owned().into())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn strings_are_told_from_what_is_between_them() {
        let cut = |text| pieces(text).collect::<Vec<_>>();
        assert_eq!(cut(r#"{"a\"b" : ["c",1]}"#), ["{", r#""a\"b""#, " : [", "\"c\"", ",1]}"]);
        assert_eq!(cut(r#"x"open\"#), ["x", r#""open\"#]);
        assert_eq!(cut("\"\"\"\""), ["\"\"", "\"\""]);
        assert!(cut("").is_empty());
    }

    #[test]
    fn a_string_is_read_whatever_is_in_it() {
        for (string, text) in [
            (r#""plain é""#, Some("plain é")),
            (r#""\u0041\n\ud83d\ude00""#, Some("A\n😀")),
            (r#""half \ud83d pair""#, Some("half \u{fffd}\u{fffd}\u{fffd} pair")),
            (r#""open"#, None),
            (r#""bad \x""#, None),
            ("1", None),
            (r#""two" "strings""#, None),
        ] {
            assert_eq!(text_of(string).as_deref(), text, "{string}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn pieces_add_up(text in "[a\"\\\\{}:, é]{0,30}") {
            prop_assert_eq!(pieces(&text).collect::<String>(), text);
        }
    }
}
