//! Who answered, and how: the `model` and `service_tier` of an answer.
//!
//! Both stand in the books as they came, so only what can be a name or a word is believed.

use std::borrow::Cow;

use super::{json, response::believable_reason};

/// Longest name of a model that is believed, in bytes.
const MAX_MODEL_BYTES: usize = 256;
/// Words for tiers that are not copied, because nearly every answer has one of them.
const TIERS: [&str; 5] = ["default", "flex", "priority", "auto", "scale"];

/// What an answer says of who made it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// The model, often with its date: `gpt-4o-2024-08-06`.
    pub model: Option<String>,
    /// The tier in which the provider worked: `default`, `flex`, `priority`.
    pub service_tier: Option<Cow<'static, str>>,
}

impl Served {
    /// Takes over what the raw values of both members say. What is said again costs nothing.
    pub(super) fn note(&mut self, model: Option<&str>, service_tier: Option<&str>) {
        let name = model.and_then(json::string).filter(|name| is_name(name));
        if let Some(name) = name.filter(|name| self.model.as_deref() != Some(name)) {
            self.model = Some(name.into_owned());
        }
        let word = service_tier.and_then(json::string).filter(|word| believable_reason(word.as_bytes()).is_some());
        if let Some(word) = word.filter(|word| self.service_tier.as_deref() != Some(word)) {
            let known = TIERS.into_iter().find(|known| *known == word);
            self.service_tier = Some(known.map_or_else(|| Cow::Owned(word.into_owned()), Cow::Borrowed));
        }
    }

    /// What the raw values of both members say.
    pub(super) fn of(model: Option<&str>, service_tier: Option<&str>) -> Self {
        let mut served = Self::default();
        served.note(model, service_tier);
        served
    }

    /// Takes over what `later` says.
    pub(super) fn update(&mut self, later: Self) {
        self.model = later.model.or(self.model.take());
        self.service_tier = later.service_tier.or(self.service_tier.take());
    }
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= MAX_MODEL_BYTES && !name.chars().any(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_and_words_are_believed() {
        let read = |model: &str, tier: &str| Served::of(Some(model), Some(tier));
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
        served.note(Some("7"), Some(r#""lunar""#));
        assert_eq!((served.model.as_deref(), served.service_tier.as_deref()), (Some("gpt-4o"), Some("lunar")));
    }
}
