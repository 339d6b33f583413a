//! `/v1/responses`, whole and as the sequence of typed events.
//!
//! Usage is in the object itself, so a stream always ends with it, in `response.completed` (or `response.incomplete`
//! when `max_output_tokens` cut the text short).

use bytes::Bytes;
use serde_json::{Value, json};

use super::{
    call::{Call, fresh_id, now},
    delivery::{Answer, Event},
    error::ApiError,
    text::Vocabulary,
};

/// Least `max_output_tokens` that OpenAI takes.
const LEAST_OUTPUT: u32 = 16;
const PER_ITEM: u64 = 3;

/// Everything that an answer is built from.
struct Reply<'a> {
    call: &'a Call<'a>,
    pieces: Vec<&'static str>,
    is_whole: bool,
    limit: Option<u32>,
    usage: Value,
    id: String,
    item_id: String,
    created: u64,
}

/// Answers the request.
pub(super) fn answer(call: &Call<'_>) -> Result<Answer, ApiError> {
    let is_stream = call.is_stream()?;
    let reply = Reply::parse(call)?;
    Ok(if is_stream {
        Answer::Stream(reply.events())
    } else {
        Answer::Whole(Bytes::from(reply.finished().to_string()))
    })
}

impl<'a> Reply<'a> {
    fn parse(call: &'a Call<'a>) -> Result<Self, ApiError> {
        let input = input_tokens(call.vocabulary(), call.fields.required("input")?)?;
        let instructions = call.fields.text("instructions")?.map_or(0, |text| PER_ITEM + call.vocabulary().count(text));
        let limit = call.fields.count("max_output_tokens", LEAST_OUTPUT)?;
        let (output, is_whole) = call.length(limit);
        let input = input + instructions + PER_ITEM;
        let usage = json!({
            "input_tokens": input,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": input + u64::from(output),
        });
        Ok(Self {
            call,
            pieces: call.vocabulary().compose(output),
            is_whole,
            limit,
            usage: if call.faults.no_usage { Value::Null } else { usage },
            id: fresh_id("resp_"),
            item_id: fresh_id("msg_"),
            created: now(),
        })
    }

    /// Why the response is not complete, if it is not.
    fn incomplete(&self) -> Option<Value> {
        (!self.is_whole).then(|| json!({"reason": "max_output_tokens"}))
    }

    fn status(&self) -> &'static str {
        if self.is_whole { "completed" } else { "incomplete" }
    }

    fn finished(&self) -> Value {
        let item = self.item(self.status(), json!([part(&self.pieces.concat())]));
        let mut response = self.object(self.status(), &json!([item]), &self.usage);
        response["incomplete_details"] = json!(self.incomplete());
        response
    }

    /// The stream: created, in progress, one message with one text part, the finished object.
    fn events(&self) -> Vec<Event> {
        let mut events = Typed::default();
        let begun = self.object("in_progress", &json!([]), &Value::Null);
        events.push("response.created", json!({"response": begun}));
        events.push("response.in_progress", json!({"response": begun}));
        let item = self.item("in_progress", json!([]));
        events.push("response.output_item.added", json!({"output_index": 0, "item": item}));
        events.push("response.content_part.added", self.place(json!({"part": part("")})));
        for piece in &self.pieces {
            events.push("response.output_text.delta", self.place(json!({"delta": piece, "logprobs": []})));
        }
        let text = self.pieces.concat();
        events.push("response.output_text.done", self.place(json!({"text": text, "logprobs": []})));
        events.push("response.content_part.done", self.place(json!({"part": part(&text)})));
        let item = self.item(self.status(), json!([part(&text)]));
        events.push("response.output_item.done", json!({"output_index": 0, "item": item}));
        let last = if self.is_whole { "response.completed" } else { "response.incomplete" };
        events.push(last, json!({"response": self.finished()}));
        events.0
    }

    /// Adds to the fields of an event which text it is about.
    fn place(&self, mut fields: Value) -> Value {
        fields["item_id"] = json!(self.item_id);
        fields["output_index"] = json!(0);
        fields["content_index"] = json!(0);
        fields
    }

    fn item(&self, status: &str, content: Value) -> Value {
        json!({"id": self.item_id, "type": "message", "status": status, "role": "assistant", "content": content})
    }

    fn object(&self, status: &str, output: &Value, usage: &Value) -> Value {
        let fields = self.call.fields;
        let or = |name: &str, default: Value| fields.get(name).cloned().unwrap_or(default);
        json!({
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": false,
            "error": null,
            "incomplete_details": null,
            "instructions": fields.get("instructions"),
            "max_output_tokens": self.limit,
            "model": self.call.answering_model(),
            "output": output,
            "parallel_tool_calls": or("parallel_tool_calls", json!(true)),
            "previous_response_id": fields.get("previous_response_id"),
            "reasoning": {"effort": null, "summary": null},
            "service_tier": "default",
            "store": or("store", json!(true)),
            "temperature": or("temperature", json!(1.0)),
            "text": {"format": {"type": "text"}},
            "tool_choice": or("tool_choice", json!("auto")),
            "tools": or("tools", json!([])),
            "top_p": or("top_p", json!(1.0)),
            "truncation": "disabled",
            "usage": usage,
            "user": fields.get("user"),
            "metadata": or("metadata", json!({})),
        })
    }
}

/// Events with their type and running number inside.
#[derive(Default)]
struct Typed(Vec<Event>);

impl Typed {
    fn push(&mut self, name: &'static str, mut fields: Value) {
        fields["type"] = json!(name);
        fields["sequence_number"] = json!(self.0.len());
        self.0.push(Event::named(name, &fields));
    }
}

fn part(text: &str) -> Value {
    json!({"type": "output_text", "annotations": [], "logprobs": [], "text": text})
}

/// Tokens of the input: a text, or a list of messages and other items.
fn input_tokens(vocabulary: Vocabulary, input: &Value) -> Result<u64, ApiError> {
    let count = |value: &Value| value.as_str().map_or(0, |text| vocabulary.count(text));
    let item = |item: &Value| {
        let content = &item["content"];
        let parts: u64 = content.as_array().map_or(0, |parts| parts.iter().map(|part| count(&part["text"])).sum());
        PER_ITEM + count(&item["role"]) + count(content) + parts + count(&item["arguments"]) + count(&item["output"])
    };
    match input {
        Value::String(text) => Ok(PER_ITEM + vocabulary.count("user") + vocabulary.count(text)),
        Value::Array(items) => Ok(items.iter().map(item).sum()),
        other => Err(ApiError::wrong_type("input", "a string or an array", other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_and_the_same_text_as_a_message_count_alike() {
        let plain = input_tokens(Vocabulary::O200k, &json!("hello there")).unwrap();
        let message = json!([{"role": "user", "content": [{"type": "input_text", "text": "hello there"}]}]);
        assert_eq!(plain, input_tokens(Vocabulary::O200k, &message).unwrap());
        assert!(input_tokens(Vocabulary::O200k, &json!(7)).is_err());
    }
}
