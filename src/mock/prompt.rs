//! Tokens of a chat's prompt, as OpenAI's cookbook counts them.
//!
//! Three for each message, its texts, three for the answer to begin. Images count 85, tools count as their JSON; the
//! cookbook's formula for tools is a guess as well.

use serde_json::Value;

use super::text::Vocabulary;

const PER_MESSAGE: u64 = 3;
const PER_NAME: u64 = 1;
const PER_IMAGE: u64 = 85;

/// Tokens of `messages` and of the definitions of `tools`.
pub(super) fn prompt_tokens(vocabulary: Vocabulary, messages: &[Value], tools: Option<&Value>) -> u64 {
    let messages: u64 = messages.iter().map(|message| PER_MESSAGE + message_tokens(vocabulary, message)).sum();
    messages + PER_MESSAGE + tools.map_or(0, |tools| vocabulary.count(&tools.to_string()))
}

fn message_tokens(vocabulary: Vocabulary, message: &Value) -> u64 {
    let count = |value: &Value| value.as_str().map_or(0, |text| vocabulary.count(text));
    let parts = |parts: &Vec<Value>| {
        parts.iter().map(|part| if part["type"] == "image_url" { PER_IMAGE } else { count(&part["text"]) }).sum()
    };
    let calls = |calls: &Vec<Value>| {
        calls.iter().map(|call| count(&call["function"]["name"]) + count(&call["function"]["arguments"])).sum()
    };
    let name = message["name"].as_str().map_or(0, |name| PER_NAME + vocabulary.count(name));
    let content = &message["content"];
    let content: u64 = count(content) + content.as_array().map_or(0, parts);
    count(&message["role"]) + content + name + message["tool_calls"].as_array().map_or(0, calls)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_prompt_is_counted_as_the_cookbook_does() {
        // The cookbook's own example; it gives 129 for cl100k and 124 for o200k.
        let messages = json!([
            {"role": "system", "content": "You are a helpful, pattern-following assistant that translates corporate jargon into plain English."},
            {"role": "system", "name": "example_user", "content": "New synergies will help drive top-line growth."},
            {"role": "system", "name": "example_assistant", "content": "Things working well together will increase revenue."},
            {"role": "system", "name": "example_user", "content": "Let's circle back when we have more bandwidth to touch base on opportunities for increased leverage."},
            {"role": "system", "name": "example_assistant", "content": "Let's talk later when we're less busy about how to do better."},
            {"role": "user", "content": "This late pivot means we don't have time to boil the ocean for the client deliverable."},
        ]);
        let messages = messages.as_array().unwrap();
        assert_eq!(prompt_tokens(Vocabulary::Cl100k, messages, None), 129);
        assert_eq!(prompt_tokens(Vocabulary::O200k, messages, None), 124);
    }

    #[test]
    fn parts_are_counted_like_plain_text_and_images_flat() {
        let plain = json!([{"role": "user", "content": "hello there"}]);
        let parts = json!([{"role": "user", "content": [
            {"type": "text", "text": "hello there"}, {"type": "image_url", "image_url": {"url": "data:,"}},
        ]}]);
        let count = |messages: &Value| prompt_tokens(Vocabulary::O200k, messages.as_array().unwrap(), None);
        assert_eq!(count(&parts), count(&plain) + PER_IMAGE);
    }
}
