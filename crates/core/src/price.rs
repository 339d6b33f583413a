//! What tokens cost.
//!
//! Prices are held in pico-dollars per token, so that every published price (dollars per million tokens, with up to six
//! decimals) is a whole number and costs are sums of integers: no float ever touches the books.

use serde::{Deserialize, Serialize};

use crate::usage::Usage;

/// Price of one model, in 10^-12 dollars per token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Price {
    /// Input tokens that were not cached.
    pub input: u64,
    /// Input tokens from the provider's prompt cache.
    pub cached_input: u64,
    /// Output tokens.
    pub output: u64,
}

/// Converts dollars per million tokens to pico-dollars per token.
///
/// # Errors
/// A sentence, if the price is negative, not a number, or above 1,000,000 dollars per million tokens.
pub fn pico_usd_per_token(usd_per_mtok: f64) -> Result<u64, String> {
    if !(0.0..=1e6).contains(&usd_per_mtok) {
        return Err(format!("a price of {usd_per_mtok} dollars per million tokens is not between 0 and 1000000"));
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be within 0..=10^12")]
    Ok((usd_per_mtok * 1e6).round() as u64)
}

impl Price {
    /// Cost of `usage` in nano-dollars, rounded to the nearest.
    #[must_use]
    pub fn cost_nano_usd(&self, usage: &Usage) -> u64 {
        let cached = usage.cached_tokens.min(usage.prompt_tokens);
        let pico = u128::from(usage.prompt_tokens - cached) * u128::from(self.input)
            + u128::from(cached) * u128::from(self.cached_input)
            + u128::from(usage.completion_tokens) * u128::from(self.output);
        u64::try_from((pico + 500) / 1000).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cost_is_exact_in_integers() {
        let price = Price {
            input: pico_usd_per_token(2.5).unwrap(),
            cached_input: pico_usd_per_token(1.25).unwrap(),
            output: pico_usd_per_token(10.0).unwrap(),
        };
        let usage = Usage { prompt_tokens: 1000, cached_tokens: 400, completion_tokens: 100, ..Usage::default() };
        assert_eq!(price.cost_nano_usd(&usage), 600 * 2500 + 400 * 1250 + 100 * 10_000);
        let absurd = Usage { prompt_tokens: u64::MAX, completion_tokens: u64::MAX, ..Usage::default() };
        assert_eq!(price.cost_nano_usd(&absurd), u64::MAX);
    }

    #[test]
    fn prices_that_cannot_be_meant_are_refused() {
        for bad in [-1.0, f64::NAN, f64::INFINITY, 2e6] {
            assert!(pico_usd_per_token(bad).is_err(), "{bad}");
        }
    }
}
