//! `/v1/chat/completions`, whole and streamed.

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::{
    azure::{content_filter, opening, prompt_filter},
    call::{Call, fresh_id, now},
    delivery::{Answer, Event},
    error::ApiError,
    faults::MAX_TOKENS,
    headers::Provider,
    prompt::prompt_tokens,
    text::Vocabulary,
    tools::{self, ToolCall},
};

const MOST_CHOICES: u32 = 128;
const FINGERPRINT: &str = "fp_mock000000";

/// What every choice says.
enum Reply<'a> {
    Text { pieces: Vec<&'static str>, finish: &'static str },
    Tool(ToolCall<'a>),
}

/// Everything that an answer is built from.
struct Chat<'a> {
    call: &'a Call<'a>,
    reply: Reply<'a>,
    choices: u32,
    usage: Value,
    id: String,
    created: u64,
}

/// Answers the request.
pub(super) fn answer(call: &Call<'_>) -> Result<Answer, ApiError> {
    let is_stream = call.is_stream()?;
    let includes_usage = call.includes_usage()?;
    let chat = Chat::parse(call)?;
    Ok(if is_stream { Answer::Stream(chat.events(includes_usage)) } else { Answer::Whole(chat.whole()) })
}

impl<'a> Chat<'a> {
    fn parse(call: &'a Call<'a>) -> Result<Self, ApiError> {
        call.fields.required("messages")?;
        let messages = call.fields.list("messages")?;
        check_messages(messages)?;
        let limit = limit(call)?;
        let choices = call.fields.count("n", 1)?.unwrap_or(1);
        let (tokens, is_whole) = call.length(limit);
        if choices > MOST_CHOICES || u64::from(tokens) * u64::from(choices) > u64::from(MAX_TOKENS) {
            return Err(ApiError::invalid("Invalid 'n': integer above maximum value.")
                .param("n")
                .code("integer_above_max_value"));
        }
        let vocabulary = call.vocabulary();
        let reply = match tools::pick(call.fields, messages)? {
            Some(tool) => Reply::Tool(tool),
            None => {
                Reply::Text { pieces: vocabulary.compose(tokens), finish: if is_whole { "stop" } else { "length" } }
            }
        };
        let usage = usage(
            prompt_tokens(vocabulary, messages, call.fields.get("tools")),
            reply.tokens(vocabulary, tokens) * u64::from(choices),
        );
        Ok(Self { call, reply, choices, usage, id: fresh_id("chatcmpl-"), created: now() })
    }

    fn whole(&self) -> Bytes {
        let finish = self.reply.finish();
        let message = self.reply.message();
        let choice = |index| {
            let mut choice = json!({
                "index": index, "message": message, "logprobs": null, "finish_reason": finish,
            });
            if self.call.provider == Provider::Azure {
                choice["content_filter_results"] = content_filter();
            }
            choice
        };
        let mut body = self.head("chat.completion", (0..self.choices).map(choice).collect());
        if !self.call.faults.no_usage {
            body.insert("usage".to_owned(), self.usage.clone());
        }
        if self.call.provider == Provider::Azure {
            body.insert("prompt_filter_results".to_owned(), prompt_filter());
        }
        Bytes::from(Value::Object(body).to_string())
    }

    /// The stream: Azure's filter chunk, the deltas of all choices side by side, the usage if it is wanted, the end.
    fn events(&self, includes_usage: bool) -> Vec<Event> {
        let mut events = Vec::new();
        if self.call.provider == Provider::Azure {
            events.push(opening(includes_usage));
        }
        let deltas = self.reply.deltas(self.call.vocabulary());
        for delta in &deltas {
            events.extend((0..self.choices).map(|index| self.chunk(index, delta, None, includes_usage)));
        }
        let finish = Some(self.reply.finish());
        events.extend((0..self.choices).map(|index| self.chunk(index, &json!({}), finish, includes_usage)));
        if includes_usage {
            let mut last = self.head("chat.completion.chunk", Vec::new());
            last.insert("usage".to_owned(), self.usage.clone());
            events.push(Event::data(&Value::Object(last)));
        }
        events.push(Event::done());
        events
    }

    fn chunk(&self, index: u32, delta: &Value, finish: Option<&str>, includes_usage: bool) -> Event {
        let mut choice = json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": finish});
        if self.call.provider == Provider::Azure {
            choice["content_filter_results"] = if finish.is_none() { content_filter() } else { json!({}) };
        }
        let mut chunk = self.head("chat.completion.chunk", vec![choice]);
        if includes_usage {
            chunk.insert("usage".to_owned(), Value::Null);
        }
        Event::data(&Value::Object(chunk))
    }

    fn head(&self, object: &str, choices: Vec<Value>) -> Map<String, Value> {
        Map::from_iter([
            ("id".to_owned(), json!(self.id)),
            ("object".to_owned(), json!(object)),
            ("created".to_owned(), json!(self.created)),
            ("model".to_owned(), json!(self.call.answering_model())),
            ("service_tier".to_owned(), json!("default")),
            ("system_fingerprint".to_owned(), json!(FINGERPRINT)),
            ("choices".to_owned(), Value::Array(choices)),
        ])
    }
}

impl Reply<'_> {
    fn finish(&self) -> &'static str {
        match self {
            Self::Text { finish, .. } => finish,
            Self::Tool(tool) if tool.is_demanded => "stop",
            Self::Tool(_) => "tool_calls",
        }
    }

    /// Tokens of one choice; `text` is the number that a text was composed of.
    fn tokens(&self, vocabulary: Vocabulary, text: u32) -> u64 {
        match self {
            Self::Text { .. } => u64::from(text),
            Self::Tool(tool) => vocabulary.count(tool.name) + vocabulary.count(&tool.arguments),
        }
    }

    fn message(&self) -> Value {
        match self {
            Self::Text { pieces, .. } => {
                json!({"role": "assistant", "content": pieces.concat(), "refusal": null, "annotations": []})
            }
            Self::Tool(tool) => json!({
                "role": "assistant", "content": null, "refusal": null, "annotations": [],
                "tool_calls": [{
                    "id": fresh_id("call_"), "type": "function",
                    "function": {"name": tool.name, "arguments": tool.arguments},
                }],
            }),
        }
    }

    /// The deltas of one choice, without the last, empty one.
    fn deltas(&self, vocabulary: Vocabulary) -> Vec<Value> {
        match self {
            Self::Text { pieces, .. } => {
                let opening = json!({"role": "assistant", "content": "", "refusal": null});
                std::iter::once(opening).chain(pieces.iter().map(|piece| json!({"content": piece}))).collect()
            }
            Self::Tool(tool) => {
                let opening = json!({
                    "role": "assistant", "content": null, "refusal": null,
                    "tool_calls": [{
                        "index": 0, "id": fresh_id("call_"), "type": "function",
                        "function": {"name": tool.name, "arguments": ""},
                    }],
                });
                let piece = |piece| json!({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]});
                let pieces = vocabulary.split(&tool.arguments).into_iter().map(piece);
                std::iter::once(opening).chain(pieces).collect()
            }
        }
    }
}

fn check_messages(messages: &[Value]) -> Result<(), ApiError> {
    if messages.is_empty() {
        return Err(ApiError::invalid(
            "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array instead.",
        )
        .param("messages")
        .code("empty_array"));
    }
    for (i, message) in messages.iter().enumerate() {
        let name = format!("messages[{i}]");
        let message = message.as_object().ok_or_else(|| ApiError::wrong_type(&name, "an object", message))?;
        let role = message.get("role").ok_or_else(|| ApiError::missing(&format!("{name}.role")))?;
        role.as_str().ok_or_else(|| ApiError::wrong_type(&format!("{name}.role"), "a string", role))?;
    }
    Ok(())
}

fn limit(call: &Call<'_>) -> Result<Option<u32>, ApiError> {
    let (old, new) = (call.fields.count("max_tokens", 1)?, call.fields.count("max_completion_tokens", 1)?);
    if old.is_some() && new.is_some() {
        return Err(ApiError::invalid(
            "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.",
        )
        .param("max_tokens")
        .code("invalid_parameter_combination"));
    }
    Ok(new.or(old))
}

fn usage(prompt: u64, completion: u64) -> Value {
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0, "audio_tokens": 0,
            "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0,
        },
    })
}
