//! Counts tokens that no provider reported, with the tokenizer that OpenAI's models use.
//!
//! Expensive (some 10 MB/s), so it runs away from the requests, and only on so much text: beyond [`TEXT_CAP`] the count is
//! carried on in proportion.

use tollgate_core::{
    openai::text::{output_text, prompt_text},
    usage::Usage,
};

use crate::journal::{Output, Uncounted};

/// How much text is tokenized at the most, in bytes.
const TEXT_CAP: usize = 1024 * 1024;
/// What a chat message costs beyond its text, and what an answer's opening costs (OpenAI's cookbook, "How to count tokens
/// with tiktoken").
const PER_MESSAGE: u64 = 3;

/// Estimates the usage of an answer that came without.
#[must_use]
pub fn count(model: &str, uncounted: &Uncounted) -> Usage {
    let prompt = prompt_text(uncounted.dialect, &uncounted.prompt, TEXT_CAP);
    let frame = if prompt.messages > 0 { (prompt.messages + 1) * PER_MESSAGE } else { 0 };
    let kept = prompt.text.len() as u64;
    let text_tokens = extrapolate(tokens(model, &prompt.text), kept, kept + prompt.omitted_bytes);
    let completion_tokens = match &uncounted.output {
        Output::None => 0,
        Output::Json(body) => tokens(model, &output_text(uncounted.dialect, body)),
        Output::Stream(deltas) => {
            let counted = tokens(model, &deltas.text());
            extrapolate(counted, deltas.kept_bytes(), deltas.total_bytes())
        }
    };
    Usage { prompt_tokens: text_tokens + prompt.tokens + frame, completion_tokens, ..Usage::default() }
}

fn extrapolate(counted: u64, kept: u64, total: u64) -> u64 {
    if kept == 0 || total <= kept {
        return counted;
    }
    u64::try_from(u128::from(counted) * u128::from(total) / u128::from(kept)).unwrap_or(u64::MAX)
}

/// Tokens of `text`, as `model` would count them.
#[must_use]
pub fn tokens(model: &str, text: &str) -> u64 {
    let old = ["gpt-4-", "gpt-3.5", "text-embedding", "davinci", "babbage"];
    let tokenizer = if model == "gpt-4" || old.iter().any(|prefix| model.starts_with(prefix)) {
        bpe_openai::cl100k_base()
    } else {
        bpe_openai::o200k_base()
    };
    let mut end = text.len().min(TEXT_CAP);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    extrapolate(tokenizer.count(&text[..end]) as u64, end as u64, text.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_counted_as_tiktoken_does() {
        assert_eq!(tokens("gpt-4o", "hello world"), 2);
        assert_eq!(tokens("gpt-4", "hello world"), 2);
        assert_eq!(tokens("gpt-4o", ""), 0);
    }

    #[test]
    fn what_is_too_long_is_counted_in_proportion() {
        let text = "word ".repeat(TEXT_CAP / 5 * 2);
        let whole = tokens("gpt-4o", &text);
        let expected = (TEXT_CAP / 5 * 2) as u64;
        assert!(whole.abs_diff(expected) < expected / 50, "{whole} of {expected}");
    }
}
