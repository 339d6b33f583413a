//! Requests and answers as the provider's API has them, for scripted upstreams.

use serde_json::{Value, json};

use super::upstream::Answer;

/// A small chat request; `messages` before `model`, as openai-python sends it.
pub fn chat() -> Value {
    json!({ "messages": [{ "role": "user", "content": "hello world" }], "model": "gpt-4o" })
}

/// The same, streamed.
pub fn chat_stream() -> Value {
    json!({ "messages": [{ "role": "user", "content": "hello world" }], "model": "gpt-4o", "stream": true })
}

/// A chat request whose JSON has exactly `bytes` bytes.
pub fn chat_of(bytes: usize) -> String {
    let frame = json!({ "messages": [{ "role": "user", "content": "" }], "model": "gpt-4o" }).to_string();
    let filler: String = "abcdefghij klmnopqrst".chars().cycle().take(bytes - frame.len()).collect();
    frame.replacen("\"content\":\"\"", &format!("\"content\":\"{filler}\""), 1)
}

/// An answer that used 7 + 5 tokens.
pub fn completion() -> Answer {
    Answer::json(
        200,
        &json!({
            "id": "chatcmpl-1", "object": "chat.completion", "model": "gpt-4o-2024-08-06",
            "choices": [{ "index": 0, "finish_reason": "stop", "message": { "role": "assistant", "content": "hi" } }],
            "usage": { "prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12,
                "prompt_tokens_details": { "cached_tokens": 4 },
                "completion_tokens_details": { "reasoning_tokens": 2 } },
        }),
    )
}

/// One event of a chat stream; `usage` is `Some("null")` in streams that report usage.
pub fn event(content: &str, usage: Option<&str>) -> String {
    let usage = usage.map(|usage| format!(",\"usage\":{usage}")).unwrap_or_default();
    format!(
        "data: {{\"id\":\"c1\",\"object\":\"chat.completion.chunk\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":{}}},\
         \"finish_reason\":null}}]{usage}}}\n\n",
        Value::from(content)
    )
}

/// The event that carries usage and nothing else.
pub fn usage_event(prompt: u64, completion: u64) -> String {
    format!(
        "data: {{\"id\":\"c1\",\"object\":\"chat.completion.chunk\",\"choices\":[],\"usage\":{{\"prompt_tokens\":{prompt},\
         \"completion_tokens\":{completion},\"total_tokens\":{}}}}}\n\n",
        prompt + completion
    )
}

/// The end of a stream.
pub const DONE: &str = "data: [DONE]\n\n";

/// The events of a stream of `words`, as they are when usage is asked for, or when it is not.
pub fn events(words: &[&str], with_usage: bool) -> Vec<String> {
    let mut events: Vec<_> = words.iter().map(|word| event(word, with_usage.then_some("null"))).collect();
    if with_usage {
        events.push(usage_event(7, words.len() as u64));
    }
    events.push(DONE.to_owned());
    events
}
