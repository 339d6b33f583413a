//! `/v1/completions`, the older dialect: texts for prompts, whole and streamed.
//!
//! As at OpenAI an answer is 16 tokens long unless `max_tokens` says otherwise, and then ends with `length`.

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::{
    azure::{content_filter, opening, prompt_filter},
    call::{Call, fresh_id, now},
    delivery::{Answer, Event},
    error::ApiError,
    faults::MAX_TOKENS,
    headers::Provider,
    text::Vocabulary,
};

const DEFAULT_LIMIT: u32 = 16;

/// Everything that an answer is built from.
struct Completion<'a> {
    call: &'a Call<'a>,
    pieces: Vec<&'static str>,
    finish: &'static str,
    choices: u32,
    usage: Value,
    id: String,
    created: u64,
}

/// Answers the request.
pub(super) fn answer(call: &Call<'_>) -> Result<Answer, ApiError> {
    let is_stream = call.is_stream()?;
    let includes_usage = call.includes_usage()?;
    let completion = Completion::parse(call)?;
    Ok(if is_stream { Answer::Stream(completion.events(includes_usage)) } else { Answer::Whole(completion.whole()) })
}

impl<'a> Completion<'a> {
    fn parse(call: &'a Call<'a>) -> Result<Self, ApiError> {
        let vocabulary = call.vocabulary();
        let prompts = token_counts("prompt", call.fields.required("prompt")?, vocabulary)?;
        let default = call.faults.tokens.map_or(DEFAULT_LIMIT, |_| MAX_TOKENS);
        let limit = call.fields.count("max_tokens", 1)?.unwrap_or(default);
        let (tokens, is_whole) = call.length(Some(limit));
        let prompt_count = u32::try_from(prompts.len()).unwrap_or(u32::MAX);
        let choices = call.fields.count("n", 1)?.unwrap_or(1).saturating_mul(prompt_count);
        let completion_tokens = u64::from(tokens) * u64::from(choices);
        if completion_tokens > u64::from(MAX_TOKENS) {
            return Err(ApiError::invalid("Invalid 'n': integer above maximum value.")
                .param("n")
                .code("integer_above_max_value"));
        }
        let prompt_tokens: u64 = prompts.iter().sum();
        let usage = json!({
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        });
        let finish = if is_whole { "stop" } else { "length" };
        let pieces = vocabulary.compose(tokens);
        Ok(Self { call, pieces, finish, choices, usage, id: fresh_id("cmpl-"), created: now() })
    }

    fn whole(&self) -> Bytes {
        let text = self.pieces.concat();
        let mut body = self.head((0..self.choices).map(|index| self.choice(index, &text, Some(self.finish))).collect());
        if !self.call.faults.no_usage {
            body.insert("usage".to_owned(), self.usage.clone());
        }
        if self.call.provider == Provider::Azure {
            body.insert("prompt_filter_results".to_owned(), prompt_filter());
        }
        Bytes::from(Value::Object(body).to_string())
    }

    fn events(&self, includes_usage: bool) -> Vec<Event> {
        let mut events = Vec::new();
        if self.call.provider == Provider::Azure {
            events.push(opening(includes_usage));
        }
        let ends = std::iter::once(("", Some(self.finish)));
        for (piece, finish) in self.pieces.iter().map(|piece| (*piece, None)).chain(ends) {
            for index in 0..self.choices {
                let mut chunk = self.head(vec![self.choice(index, piece, finish)]);
                if includes_usage {
                    chunk.insert("usage".to_owned(), Value::Null);
                }
                events.push(Event::data(&Value::Object(chunk)));
            }
        }
        if includes_usage {
            let mut last = self.head(Vec::new());
            last.insert("usage".to_owned(), self.usage.clone());
            events.push(Event::data(&Value::Object(last)));
        }
        events.push(Event::done());
        events
    }

    fn choice(&self, index: u32, text: &str, finish: Option<&str>) -> Value {
        let mut choice = json!({"text": text, "index": index, "logprobs": null, "finish_reason": finish});
        if self.call.provider == Provider::Azure {
            choice["content_filter_results"] = content_filter();
        }
        choice
    }

    fn head(&self, choices: Vec<Value>) -> Map<String, Value> {
        Map::from_iter([
            ("id".to_owned(), json!(self.id)),
            ("object".to_owned(), json!("text_completion")),
            ("created".to_owned(), json!(self.created)),
            ("model".to_owned(), json!(self.call.answering_model())),
            ("choices".to_owned(), Value::Array(choices)),
        ])
    }
}

/// Token counts of the texts or token lists in the field `name`, which may be one or several of them.
pub(super) fn token_counts(name: &str, value: &Value, vocabulary: Vocabulary) -> Result<Vec<u64>, ApiError> {
    const EXPECTED: &str = "a string, an array of strings, an array of integers, or an array of integer arrays";
    let wrong = || ApiError::wrong_type(name, EXPECTED, value);
    if let Some(text) = value.as_str() {
        return Ok(vec![vocabulary.count(text)]);
    }
    let list = value.as_array().ok_or_else(wrong)?;
    let is_tokens = |list: &[Value]| !list.is_empty() && list.iter().all(Value::is_u64);
    if is_tokens(list) {
        return Ok(vec![list.len() as u64]);
    }
    if list.is_empty() {
        return Err(ApiError::invalid(format!("Invalid '{name}': empty array.")).param(name).code("empty_array"));
    }
    let count = |item: &Value| match item {
        Value::String(text) => Ok(vocabulary.count(text)),
        Value::Array(tokens) if is_tokens(tokens) => Ok(tokens.len() as u64),
        _ => Err(wrong()),
    };
    list.iter().map(count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_four_forms_of_a_prompt_are_counted() {
        let count = |value: Value| token_counts("prompt", &value, Vocabulary::Cl100k);
        assert_eq!(count(json!("hello world")).unwrap(), [2]);
        assert_eq!(count(json!(["hello world", "hello"])).unwrap(), [2, 1]);
        assert_eq!(count(json!([1, 2, 3])).unwrap(), [3]);
        assert_eq!(count(json!([[1, 2, 3], [4]])).unwrap(), [3, 1]);
        for bad in [json!(7), json!([]), json!([[]]), json!([1, "a"]), json!({}), json!([-1])] {
            assert!(count(bad.clone()).is_err(), "{bad}");
        }
    }
}
