//! Walking over JSON without building it.
//!
//! An object or array is visited member by member, each value as the slice of the original text that it is. Nothing is
//! copied except keys with escapes, and nothing recurses: a value is skipped by a loop, so a document of a million
//! brackets costs no stack. What is not descended into is still checked for its syntax.

use std::{borrow::Cow, convert::Infallible, fmt, ops::Range};

use serde::{
    Deserialize,
    de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

/// Why a walk ended early.
pub(super) enum Stopped<E> {
    /// The text is not what it should be.
    Json(serde_json::Error),
    /// The visitor refused a member.
    Refused(E),
}

/// Calls `visit` with the name and the raw value of each member of the object `text`, in order, until it refuses one.
///
/// `Ok` means that the whole of `text` is one well-formed object.
pub(super) fn members<'de, E>(
    text: &'de str,
    visit: impl FnMut(Cow<'de, str>, &'de str) -> Result<(), E>,
) -> Result<(), Stopped<E>> {
    let mut refusal = None;
    let mut json = serde_json::Deserializer::from_str(text);
    let walked = json.deserialize_map(Members { visit, refusal: &mut refusal }).and_then(|()| json.end());
    match refusal {
        Some(refusal) => Err(Stopped::Refused(refusal)),
        None => walked.map_err(Stopped::Json),
    }
}

/// [`members`] for texts where as much as can be read is good enough: ends quietly at the first error.
pub(super) fn each_member<'de>(text: &'de str, mut visit: impl FnMut(&str, &'de str)) {
    let _: Result<(), Stopped<Infallible>> = members(text, |name, value| {
        visit(&name, value);
        Ok(())
    });
}

/// Calls `visit` with each element of the array `text`; ends quietly at the first error.
pub(super) fn each_element<'de>(text: &'de str, visit: impl FnMut(&'de str)) {
    let _: Result<(), serde_json::Error> = serde_json::Deserializer::from_str(text).deserialize_seq(Elements { visit });
}

/// The text of a JSON string; `None`: `raw` is not a string, or holds half a surrogate pair.
pub(super) fn string(raw: &str) -> Option<Cow<'_, str>> {
    if !raw.starts_with('"') {
        return None;
    }
    serde_json::from_str::<Text<'_>>(raw).ok().map(|text| text.0)
}

/// Where `part`, a slice of `whole`, lies in it.
pub(super) fn range_in(whole: &str, part: &str) -> Range<usize> {
    let start = part.as_ptr().addr() - whole.as_ptr().addr();
    start..start + part.len()
}

struct Members<'r, F, E> {
    visit: F,
    refusal: &'r mut Option<E>,
}

impl<'de, E, F: FnMut(Cow<'de, str>, &'de str) -> Result<(), E>> Visitor<'de> for Members<'_, F, E> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        while let Some(Text(name)) = map.next_key()? {
            let value: &'de RawValue = map.next_value()?;
            if let Err(refusal) = (self.visit)(name, value.get()) {
                *self.refusal = Some(refusal);
                return Err(A::Error::custom("refused"));
            }
        }
        Ok(())
    }
}

struct Elements<F> {
    visit: F,
}

impl<'de, F: FnMut(&'de str)> Visitor<'de> for Elements<F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut seq: A) -> Result<(), A::Error> {
        while let Some(value) = seq.next_element::<&'de RawValue>()? {
            (self.visit)(value.get());
        }
        Ok(())
    }
}

/// A string that borrows unless it holds escapes; `Cow` itself always copies.
struct Text<'de>(Cow<'de, str>);

impl<'de> Deserialize<'de> for Text<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(TextVisitor).map(Self)
    }
}

struct TextVisitor;

impl<'de> Visitor<'de> for TextVisitor {
    type Value = Cow<'de, str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Cow::Borrowed(text))
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Cow::Owned(text.to_owned()))
    }
}
