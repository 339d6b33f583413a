//! What tokens cost.
//!
//! Prices are held in pico-dollars per token, so that every published price (dollars per million tokens, with up to six
//! decimals) is a whole number and costs are sums of integers: no float ever touches the books.
//!
//! A provider sells the same model in several [tiers](Tier), each with its own [`Rates`]; beyond some length of the prompt the
//! whole request may cost more ([`LongContext`]). What of that applies is a function of the usage and the tier, and nothing
//! else: [`Price::cost_nano_usd`]. Prices over time, and which model has which, are in [`book`].

pub mod book;
pub mod written;

use serde::{Deserialize, Serialize};

use crate::usage::Usage;

/// How a provider works on a request, which decides on what it costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Tier {
    /// As usual.
    #[default]
    Standard,
    /// Within a day, in a batch.
    Batch,
    /// When there is time.
    Flex,
    /// Before others; `fast` in a request means the same.
    Priority,
    /// As fast as can be.
    Ultrafast,
}

impl Tier {
    /// Every tier that may have prices of its own.
    pub const PRICED: [Self; 4] = [Self::Batch, Self::Flex, Self::Priority, Self::Ultrafast];

    /// The tier that `service_tier` names, in a request or an answer; a word that is not known is the usual one.
    #[must_use]
    pub fn of(word: &str) -> Self {
        match word {
            "batch" => Self::Batch,
            "flex" => Self::Flex,
            "priority" | "fast" => Self::Priority,
            "ultrafast" => Self::Ultrafast,
            _ => Self::Standard,
        }
    }

    /// The word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::Batch => "batch",
            Self::Flex => "flex",
            Self::Priority => "priority",
            Self::Ultrafast => "ultrafast",
        }
    }
}

/// What each kind of token costs, in 10^-12 dollars per token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rates {
    /// Text of the input that was not cached.
    pub input: u64,
    /// Input from the provider's prompt cache, of whatever kind.
    pub cached_input: u64,
    /// Text of the input that was put into that cache.
    pub cache_write: u64,
    /// Text of the output, reasoning included.
    pub output: u64,
    /// Audio of the input.
    pub audio_input: u64,
    /// Audio of the output.
    pub audio_output: u64,
    /// Images of the input.
    pub image_input: u64,
    /// Images of the output.
    pub image_output: u64,
}

impl Rates {
    /// Rates where nothing has a price of its own but input and output.
    #[must_use]
    pub fn flat(input: u64, output: u64) -> Self {
        Self {
            input,
            cached_input: input,
            cache_write: input,
            output,
            audio_input: input,
            audio_output: output,
            image_input: input,
            image_output: output,
        }
    }

    /// Every rate with its name in price files, without the unit.
    #[must_use]
    pub fn named(&self) -> [(&'static str, u64); 8] {
        [
            ("input", self.input),
            ("cached_input", self.cached_input),
            ("cache_write", self.cache_write),
            ("output", self.output),
            ("audio_input", self.audio_input),
            ("audio_output", self.audio_output),
            ("image_input", self.image_input),
            ("image_output", self.image_output),
        ]
    }

    /// These rates, each at so many percent.
    #[must_use]
    pub fn percent(&self, percent: u32) -> Self {
        let of = |rate: u64| {
            let exact = u128::from(rate) * u128::from(percent);
            u64::try_from((exact + 50) / 100).unwrap_or(u64::MAX)
        };
        Self {
            input: of(self.input),
            cached_input: of(self.cached_input),
            cache_write: of(self.cache_write),
            output: of(self.output),
            audio_input: of(self.audio_input),
            audio_output: of(self.audio_output),
            image_input: of(self.image_input),
            image_output: of(self.image_output),
        }
    }

    /// Cached tokens are taken to be text as far as there is text, then images, then audio: providers rarely say.
    fn input_pico(&self, usage: &Usage) -> u128 {
        let prompt = usage.prompt_tokens;
        let audio = usage.audio_tokens.saturating_sub(usage.output_audio_tokens).min(prompt);
        let image = usage.image_tokens.saturating_sub(usage.output_image_tokens).min(prompt - audio);
        let text = prompt - audio - image;
        let cached = usage.cached_tokens.min(prompt);
        let cached_text = cached.min(text);
        let cached_image = (cached - cached_text).min(image);
        let cached_audio = cached - cached_text - cached_image;
        let fresh_text = text - cached_text;
        let written = usage.cache_write_tokens.min(fresh_text);
        sum([
            (cached, self.cached_input),
            (written, self.cache_write),
            (fresh_text - written, self.input),
            (image - cached_image, self.image_input),
            (audio - cached_audio, self.audio_input),
        ])
    }

    fn output_pico(&self, usage: &Usage) -> u128 {
        let completion = usage.completion_tokens;
        let audio = usage.output_audio_tokens.min(usage.audio_tokens).min(completion);
        let image = usage.output_image_tokens.min(usage.image_tokens).min(completion - audio);
        sum([(audio, self.audio_output), (image, self.image_output), (completion - audio - image, self.output)])
    }
}

fn sum<const N: usize>(parts: [(u64, u64); N]) -> u128 {
    parts.iter().fold(0, |sum: u128, (tokens, rate)| sum.saturating_add(u128::from(*tokens) * u128::from(*rate)))
}

/// What long prompts cost: the whole request, not only what is beyond.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LongContext {
    /// Prompts of more tokens than this are long.
    pub above_tokens: u64,
    /// Input of such a request costs so many percent of the usual.
    pub input_percent: u32,
    /// And its output.
    pub output_percent: u32,
}

/// Price of one model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Price {
    /// As usual.
    pub standard: Rates,
    /// In a batch, if that costs something else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch: Option<Rates>,
    /// When there is time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flex: Option<Rates>,
    /// Before others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<Rates>,
    /// As fast as can be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ultrafast: Option<Rates>,
    /// If long prompts cost something else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub long_context: Option<LongContext>,
}

impl Price {
    /// A price with these rates, whatever the tier.
    #[must_use]
    pub fn of(standard: Rates) -> Self {
        Self { standard, ..Self::default() }
    }

    /// The rates that are written down for `tier`.
    #[must_use]
    pub fn own_rates(&self, tier: Tier) -> Option<&Rates> {
        match tier {
            Tier::Standard => Some(&self.standard),
            Tier::Batch => self.batch.as_ref(),
            Tier::Flex => self.flex.as_ref(),
            Tier::Priority => self.priority.as_ref(),
            Tier::Ultrafast => self.ultrafast.as_ref(),
        }
    }

    /// The rates of `tier`. Where none are written down those of the nearest tier hold: batch and flex stand for each other,
    /// the fastest is at least what comes before others, and all else is as usual.
    #[must_use]
    pub fn rates(&self, tier: Tier) -> &Rates {
        let nearest = match tier {
            Tier::Standard | Tier::Priority => None,
            Tier::Batch => self.flex.as_ref(),
            Tier::Flex => self.batch.as_ref(),
            Tier::Ultrafast => self.priority.as_ref(),
        };
        self.own_rates(tier).or(nearest).unwrap_or(&self.standard)
    }

    /// Cost of `usage` in nano-dollars, rounded to the nearest.
    #[must_use]
    pub fn cost_nano_usd(&self, usage: &Usage, tier: Tier) -> u64 {
        let rates = self.rates(tier);
        let (input, output) = (rates.input_pico(usage), rates.output_pico(usage));
        let long = self.long_context.filter(|long| usage.prompt_tokens > long.above_tokens);
        let pico = match long {
            None => input.saturating_add(output),
            Some(long) => {
                let part = |pico: u128, percent: u32| pico.saturating_mul(u128::from(percent));
                part(input, long.input_percent).saturating_add(part(output, long.output_percent)) / 100
            }
        };
        u64::try_from(pico.saturating_add(500) / 1000).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All rates differ, so that a token at the wrong rate shows.
    fn rates() -> Rates {
        Rates {
            input: 2_000_000,
            cached_input: 100_000,
            cache_write: 2_500_000,
            output: 10_000_000,
            audio_input: 32_000_000,
            audio_output: 64_000_000,
            image_input: 5_000_000,
            image_output: 40_000_000,
        }
    }

    fn cost(usage: Usage) -> u64 {
        Price::of(rates()).cost_nano_usd(&usage, Tier::Standard)
    }

    #[test]
    fn cost_is_exact_in_integers() {
        let price = Price::of(Rates { cached_input: 1_250_000, ..Rates::flat(2_500_000, 10_000_000) });
        let usage = Usage { prompt_tokens: 1000, cached_tokens: 400, completion_tokens: 100, ..Usage::default() };
        assert_eq!(price.cost_nano_usd(&usage, Tier::Standard), 600 * 2500 + 400 * 1250 + 100 * 10_000);
        let absurd = Usage { prompt_tokens: u64::MAX, completion_tokens: u64::MAX, ..Usage::default() };
        assert_eq!(price.cost_nano_usd(&absurd, Tier::Standard), u64::MAX);
        assert_eq!(Price::default().cost_nano_usd(&absurd, Tier::Batch), 0, "without a price nothing costs anything");
    }

    #[test]
    fn every_kind_of_token_has_its_rate() {
        let usage = Usage {
            prompt_tokens: 1000,
            cached_tokens: 300,
            cache_write_tokens: 200,
            audio_tokens: 100 + 20,
            output_audio_tokens: 20,
            image_tokens: 50 + 7,
            output_image_tokens: 7,
            completion_tokens: 90,
            reasoning_tokens: 30,
        };
        // Of 850 tokens of text 300 are cached and 200 written; of 90 of the answer 63 are text.
        let input = 300 * 100 + 200 * 2500 + 350 * 2000 + 100 * 32_000 + 50 * 5000;
        assert_eq!(cost(usage), input + 20 * 64_000 + 7 * 40_000 + 63 * 10_000);
    }

    #[test]
    fn what_is_cached_is_text_first_then_images_then_audio() {
        let usage = |cached_tokens| Usage {
            prompt_tokens: 100,
            audio_tokens: 30,
            image_tokens: 20,
            cached_tokens,
            ..Usage::default()
        };
        assert_eq!(cost(usage(50)), 50 * 100 + 20 * 5000 + 30 * 32_000);
        assert_eq!(cost(usage(60)), 60 * 100 + 10 * 5000 + 30 * 32_000);
        assert_eq!(cost(usage(75)), 75 * 100 + 25 * 32_000);
        assert_eq!(cost(usage(1000)), 100 * 100, "no more is cached than there was");
    }

    #[test]
    fn a_tier_has_its_own_rates_or_those_of_the_nearest() {
        let (half, double) = (rates().percent(50), rates().percent(200));
        let price = Price { batch: Some(half), priority: Some(double), ..Price::of(rates()) };
        let of = |tier| *price.rates(tier);
        assert_eq!([of(Tier::Standard), of(Tier::Batch), of(Tier::Flex)], [rates(), half, half]);
        assert_eq!([of(Tier::Priority), of(Tier::Ultrafast)], [double, double]);
        let flex = Price { flex: Some(half), ..Price::of(rates()) };
        assert_eq!((flex.rates(Tier::Batch), flex.rates(Tier::Priority)), (&half, &rates()));
        let words = ["default", "auto", "scale", "batch", "flex", "priority", "fast", "ultrafast", "", "nonsense"];
        let tiers = words.map(|word| Tier::of(word).as_str());
        let expected = ["standard", "standard", "standard", "batch", "flex", "priority", "priority", "ultrafast"];
        assert_eq!(tiers[..8], expected);
        assert_eq!(tiers[8..], ["standard"; 2]);
    }

    #[test]
    fn a_long_prompt_makes_the_whole_request_dearer() {
        let long = LongContext { above_tokens: 1000, input_percent: 200, output_percent: 150 };
        let price = Price { long_context: Some(long), batch: Some(rates().percent(50)), ..Price::of(rates()) };
        let of = |prompt_tokens, tier| {
            price.cost_nano_usd(&Usage { prompt_tokens, completion_tokens: 10, ..Usage::default() }, tier)
        };
        assert_eq!(of(1000, Tier::Standard), 1000 * 2000 + 10 * 10_000);
        assert_eq!(of(1001, Tier::Standard), 1001 * 4000 + 10 * 15_000);
        assert_eq!(of(1001, Tier::Batch), 1001 * 2000 + 10 * 7500);
    }

    #[test]
    fn prices_are_kept_as_json_and_may_have_members_that_are_not_known_yet() {
        let price = Price { flex: Some(rates().percent(50)), ..Price::of(rates()) };
        let json = serde_json::to_string(&price).unwrap();
        assert!(!json.contains("batch"), "{json}");
        assert_eq!(serde_json::from_str::<Price>(&json).unwrap(), price);
        let later = json.replacen('{', r#"{"lunar":{"input":1},"#, 1);
        assert_eq!(serde_json::from_str::<Price>(&later).unwrap(), price);
    }

    prop_compose! {
        fn usage(most: u64)(numbers in prop::array::uniform9(0..=most)) -> Usage {
            let [prompt_tokens, completion_tokens, cached_tokens, cache_write_tokens, reasoning_tokens, audio_tokens,
                output_audio_tokens, image_tokens, output_image_tokens] = numbers;
            Usage {
                prompt_tokens, completion_tokens, cached_tokens, cache_write_tokens, reasoning_tokens, audio_tokens,
                output_audio_tokens, image_tokens, output_image_tokens,
            }
        }
    }

    proptest! {
        #[test]
        fn every_token_is_charged_once_whatever_its_kind(usage in usage(1_000_000)) {
            // With one rate for all, kinds make no difference: none is left out, none counted twice.
            let price = Price::of(Rates::flat(7_000, 7_000));
            prop_assert_eq!(price.cost_nano_usd(&usage, Tier::Standard), usage.total_tokens() * 7);
        }

        #[test]
        fn cost_lies_between_the_cheapest_and_the_dearest_rate(usage in usage(1_000_000)) {
            let (least, most) = (100_000 / 1000, 64_000_000 / 1000);
            let cost = cost(usage);
            prop_assert!(cost >= usage.total_tokens() * least && cost <= usage.total_tokens() * most, "{cost}");
        }

        #[test]
        fn absurd_numbers_overflow_nothing(usage in usage(u64::MAX), rate in any::<u64>(), percent in any::<u32>()) {
            let long = LongContext { above_tokens: 0, input_percent: percent, output_percent: percent };
            let rates = Rates::flat(rate, rate).percent(percent);
            let price = Price { long_context: Some(long), ..Price::of(rates) };
            let _ = price.cost_nano_usd(&usage, Tier::Priority);
        }
    }
}
