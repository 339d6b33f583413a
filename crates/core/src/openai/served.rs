//! Who answered, and how: the `model` and `service_tier` of an answer.
//!
//! Both stand in the books as they came, so only what can be a name or a word is believed.

use serde_json::value::RawValue;

use super::{json, response::believable_reason};

/// Longest name of a model that is believed, in bytes.
const MAX_MODEL_BYTES: usize = 256;

/// What an answer says of who made it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// The model, often with its date: `gpt-4o-2024-08-06`.
    pub model: Option<String>,
    /// The tier in which the provider worked: `default`, `flex`, `priority`.
    pub service_tier: Option<String>,
}

impl Served {
    /// Reads the values of both members.
    pub(super) fn read(model: Option<&str>, service_tier: Option<&str>) -> Self {
        let word = |raw: &str| {
            let text = json::string(raw)?;
            believable_reason(text.as_bytes()).map(str::to_owned)
        };
        Self { model: model.and_then(name), service_tier: service_tier.and_then(word) }
    }

    pub(super) fn read_raw(model: Option<&RawValue>, service_tier: Option<&RawValue>) -> Self {
        Self::read(model.map(RawValue::get), service_tier.map(RawValue::get))
    }

    /// Takes over what `later` says.
    pub(super) fn update(&mut self, later: Self) {
        self.model = later.model.or(self.model.take());
        self.service_tier = later.service_tier.or(self.service_tier.take());
    }
}

fn name(raw: &str) -> Option<String> {
    let name = json::string(raw)?;
    let fits = !name.is_empty() && name.len() <= MAX_MODEL_BYTES && !name.chars().any(char::is_control);
    fits.then(|| name.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_and_words_are_believed() {
        let read = |model: &str, tier: &str| Served::read(Some(model), Some(tier));
        let served = read(r#""gpt-4o""#, r#""flex""#);
        assert_eq!((served.model.as_deref(), served.service_tier.as_deref()), (Some("gpt-4o"), Some("flex")));
        let long = format!("\"{}\"", "x".repeat(257));
        for bad in [r#""""#, "null", "7", "{}", r#""a\u0000b""#, r#""\ud800""#, &long] {
            assert_eq!(read(bad, bad), Served::default(), "{bad}");
        }
        assert_eq!(read("1", r#""two words""#), Served::default());
        let mut served = served;
        served.update(read("null", r#""default""#));
        assert_eq!((served.model.as_deref(), served.service_tier.as_deref()), (Some("gpt-4o"), Some("default")));
    }
}
