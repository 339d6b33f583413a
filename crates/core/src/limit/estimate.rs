//! What a request may consume, before it is known.
//!
//! The prompt is estimated from its size, the output from what the client allows, or else from what the model used to
//! write. An estimate that is too high costs room until the answer is there; one that is too low lets more through than
//! the limit. So both lean to the high side, and both are corrected to the truth when the request is settled.

use std::sync::LazyLock;

use memchr::{memchr, memmem::Finder};

use super::{Amount, Caps, MAX_LIMIT, state::Need};
use crate::{
    openai::request::RequestHead,
    price::{Price, Tier},
    route::Dialect,
    usage::Usage,
};

/// Bytes of JSON per token. English has four and a half and more; code, numbers and the JSON around them less.
const BYTES_PER_TOKEN: u64 = 4;
/// What each file within a body counts for, whatever its size: an image of average detail.
const TOKENS_PER_FILE: u64 = 1_500;
/// How a file within a body begins.
static FILE_MARK: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b";base64,"));

/// Tokens of the prompt in `body`.
#[must_use]
pub fn prompt_tokens(body: &[u8]) -> u64 {
    let (mut text, mut files, mut rest) = (0_u64, 0_u64, body);
    while let Some(at) = FILE_MARK.find(rest) {
        let data = &rest[at + FILE_MARK.needle().len()..];
        let end = memchr(b'"', data).unwrap_or(data.len());
        (text, files, rest) = (text + at as u64, files + 1, &data[end..]);
    }
    (text + rest.len() as u64).div_ceil(BYTES_PER_TOKEN) + files * TOKENS_PER_FILE
}

/// What a request needs. `learned` is how long answers of its model are; `tightest` is the least TPM that binds it: a guess
/// of the output does not exceed what that leaves, or the request could never be admitted.
#[must_use]
pub fn need(body: &[u8], head: &RequestHead, dialect: Dialect, price: &Price, learned: u64, tightest: u64) -> Need {
    let prompt = prompt_tokens(body);
    let amount = |output| amount(prompt, output, price, head.tier);
    if !dialect.has_output() {
        return amount(0).into();
    }
    if let Some(most) = head.max_output_tokens {
        let amount = amount(most.saturating_mul(head.choices));
        return Need { amount, least: amount, prompt_tokens: prompt };
    }
    let room = if tightest == 0 { u64::MAX } else { tightest.saturating_sub(prompt) };
    let guess = learned.saturating_mul(head.choices).min(room);
    Need { amount: amount(guess), least: amount(guess.min(1)), prompt_tokens: prompt }
}

fn amount(prompt: u64, output: u64, price: &Price, tier: Tier) -> Amount {
    let usage = Usage { prompt_tokens: prompt, completion_tokens: output, ..Usage::default() };
    // Twice the greatest limit is refused by every limit and added up without overflow.
    let most = 2 * MAX_LIMIT;
    Amount { tokens: usage.total_tokens().min(most), nano_usd: price.cost_nano_usd(&usage, tier).min(most) }
}

/// The least TPM among `caps`; 0: none.
#[must_use]
pub fn tightest_tpm<'c>(caps: impl Iterator<Item = &'c Caps>) -> u64 {
    caps.map(|caps| caps.tpm).filter(|tpm| *tpm > 0).min().unwrap_or(0)
}

/// Moves the learned length of a model's answers on by one answer of `sample` tokens.
///
/// A stochastic approximation of the 90th percentile (Robbins and Monro, 1951): a longer answer raises it by nine steps,
/// a shorter one lowers it by one, a step being a thousandth. It needs one number per model and follows a change of habits
/// within some hundred answers.
#[must_use]
pub fn learn(learned: u64, sample: u64) -> u64 {
    let step = (learned / 1000).max(1);
    if sample > learned { learned.saturating_add(9 * step).min(MAX_LIMIT) } else { learned.saturating_sub(step).max(1) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::request::parse;

    fn of(body: &str, learned: u64, tightest: u64) -> Need {
        need(body.as_bytes(), &parse(body.as_bytes()).unwrap(), Dialect::Chat, &Price::default(), learned, tightest)
    }

    #[test]
    fn files_count_for_what_they_show_not_for_their_size() {
        let image = "A".repeat(1_000_000);
        let body = format!(r#"{{"url":"data:image/png;base64,{image}","x":"{}"}}"#, "text ".repeat(80));
        assert!((1_600..1_700).contains(&prompt_tokens(body.as_bytes())), "{}", prompt_tokens(body.as_bytes()));
        assert_eq!(prompt_tokens(b"12345678"), 2);
        assert_eq!(prompt_tokens(b"x;base64,"), 1_501, "cut off");
    }

    #[test]
    fn the_output_is_what_the_client_allows_or_what_was_learned() {
        let total = |body: &str| of(body, 500, 0).amount.tokens;
        let prompt = prompt_tokens(br#"{"model":"m"}"#);
        assert_eq!(total(r#"{"model":"m"}"#), prompt + 500);
        for name in ["max_tokens", "max_completion_tokens", "max_output_tokens"] {
            let body = format!(r#"{{"model":"m","{name}":70,"n":2}}"#);
            assert_eq!(total(&body), prompt_tokens(body.as_bytes()) + 140);
        }
        let guess = of(r#"{"model":"m"}"#, 500, 100);
        assert_eq!((guess.amount.tokens, guess.least.tokens), (100, prompt + 1), "a guess fits the limit");
    }

    #[test]
    fn absurd_outputs_are_too_much_for_every_limit_and_overflow_nothing() {
        for most in ["9223372036854775808", "18446744073709551615", "18446744073709551616", "1e300"] {
            let need = of(&format!(r#"{{"model":"m","max_tokens":{most},"n":{most}}}"#), 1, 1000);
            assert_eq!(need.amount.tokens, 2 * MAX_LIMIT, "{most}");
        }
        for none in ["-1", "null", "\"5\"", "[]"] {
            let need = of(&format!(r#"{{"model":"m","max_tokens":{none},"n":{none}}}"#), 10, 0);
            assert!(need.amount.tokens < 30, "{none}");
        }
    }

    #[test]
    fn the_learned_length_is_one_that_nine_of_ten_answers_keep() {
        let mut learned = 1000;
        for round in 0..20_000_u64 {
            learned = learn(learned, (round * 7919) % 1000);
        }
        assert!((850..950).contains(&learned), "{learned}");
        for _ in 0..3000 {
            learned = learn(learned, 5000);
        }
        assert!((4900..5300).contains(&learned), "{learned}");
        assert_eq!(learn(1, 0), 1);
        assert!(learn(MAX_LIMIT, u64::MAX) <= MAX_LIMIT);
    }
}
