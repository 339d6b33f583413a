//! What the events of a stream add up to: the answer as it would have been without `stream`.
//!
//! An [`Assembler`] is fed the pieces of the body as the network cut them. What it keeps is bounded: beyond that it takes
//! nothing more and says so. It knows as little of the API as it can: deltas are merged as the SDKs merge them, text to text
//! and object to object, so that members that nobody has heard of yet are kept too. A response of the Responses API tells
//! itself at its end what it is; only one that broke off is put together from its deltas.

use std::collections::BTreeMap;

use memchr::memchr;
use serde_json::{Map, Value, json};

use crate::route::Dialect;

/// What a line may hold beyond the bound of the whole: its frame of JSON.
const LINE_FRAME: usize = 64 * 1024;
/// What any value is taken to need beyond its text.
const OVERHEAD: usize = 32;
/// Members of a delta that are told once, or told again whole.
const REPLACED: [&str; 7] = ["role", "id", "type", "name", "index", "object", "status"];

/// Puts one stream together.
#[derive(Debug)]
pub struct Assembler {
    dialect: Dialect,
    most: usize,
    /// Roughly what is kept, in bytes.
    kept: usize,
    /// Was something left out?
    is_cut: bool,
    /// The line that is not complete.
    line: Vec<u8>,
    skips_line: bool,
    /// The answer, but for its choices.
    top: Map<String, Value>,
    choices: BTreeMap<u64, Map<String, Value>>,
    /// Of a response: what each item has said so far, by its place and the kind of its deltas.
    items: BTreeMap<(u64, u64, String), String>,
    response: Option<Value>,
}

impl Assembler {
    /// One that keeps about `most` bytes.
    #[must_use]
    pub fn new(dialect: Dialect, most: usize) -> Self {
        Self {
            dialect,
            most,
            kept: 0,
            is_cut: false,
            line: Vec::new(),
            skips_line: false,
            top: Map::new(),
            choices: BTreeMap::new(),
            items: BTreeMap::new(),
            response: None,
        }
    }

    /// Takes the next piece of the body.
    pub fn feed(&mut self, mut piece: &[u8]) {
        while let Some(end) = memchr(b'\n', piece) {
            let (line, rest) = piece.split_at(end + 1);
            piece = rest;
            if self.skips_line {
                self.skips_line = false;
            } else if self.line.is_empty() {
                self.read(line);
            } else {
                let mut whole = std::mem::take(&mut self.line);
                whole.extend_from_slice(line);
                self.read(&whole);
                whole.clear();
                self.line = whole;
            }
        }
        self.hold(piece);
    }

    /// About how much it keeps, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.kept + self.line.capacity()
    }

    /// The answer, as JSON, and whether something was left out of it. Nothing, if there was no event.
    #[must_use]
    pub fn finish(mut self) -> (Vec<u8>, bool) {
        let line = std::mem::take(&mut self.line);
        self.read(&line);
        let answer = match (self.response, self.items.is_empty()) {
            (Some(response), _) => response,
            (None, false) => broken_off(self.top, self.items),
            (None, true) if self.top.is_empty() && self.choices.is_empty() => return (Vec::new(), self.is_cut),
            (None, true) => whole(self.top, self.choices),
        };
        (answer.to_string().into_bytes(), self.is_cut)
    }

    fn hold(&mut self, rest: &[u8]) {
        if self.skips_line || rest.is_empty() {
            return;
        }
        if self.line.len() + rest.len() > self.most + LINE_FRAME {
            (self.line, self.skips_line, self.is_cut) = (Vec::new(), true, true);
            return;
        }
        self.line.extend_from_slice(rest);
    }

    fn read(&mut self, line: &[u8]) {
        let Some(data) = line.strip_prefix(b"data:") else { return };
        let Ok(Value::Object(event)) = serde_json::from_slice(data) else { return };
        match self.dialect {
            Dialect::Responses => self.read_event(event),
            Dialect::Chat | Dialect::Completions | Dialect::Embeddings => self.read_chunk(event),
        }
    }

    fn read_chunk(&mut self, chunk: Map<String, Value>) {
        for (name, value) in chunk {
            match value {
                Value::Array(choices) if name == "choices" => {
                    choices.into_iter().for_each(|choice| self.read_choice(choice));
                }
                Value::Null => {}
                // What of the content filter comes in pieces is about the text, and not of it.
                value if self.has_room(size(&value) + name.len()) => drop(self.top.insert(name, value)),
                _ => {}
            }
        }
    }

    fn read_choice(&mut self, choice: Value) {
        let Value::Object(choice) = choice else { return };
        let index = choice.get("index").and_then(Value::as_u64).unwrap_or(0);
        if !self.choices.contains_key(&index) && !self.has_room(OVERHEAD) {
            return;
        }
        let mut room = Room { left: self.most.saturating_sub(self.kept), is_cut: self.is_cut };
        let had = room.left;
        let known = self.choices.entry(index).or_default();
        for (name, value) in choice {
            match &*name {
                // They repeat the text, token by token.
                "logprobs" => {}
                "delta" => merge_member(known, "message", value, &mut room),
                "text" => merge_member(known, "text", value, &mut room),
                _ if value.is_null() => {}
                _ => room.put(known, name, value),
            }
        }
        (self.kept, self.is_cut) = (self.kept + had - room.left, room.is_cut);
    }

    fn read_event(&mut self, mut event: Map<String, Value>) {
        let kind = event.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
        match &*kind {
            "response.completed" | "response.incomplete" | "response.failed" => {
                let response = event.remove("response").unwrap_or_default();
                // It takes the place of the deltas.
                if size(&response) <= self.most {
                    (self.kept, self.is_cut) = (size(&response), false);
                    self.items.clear();
                    self.response = Some(response);
                } else {
                    self.is_cut = true;
                }
            }
            "response.created" => {
                let response = event.remove("response").unwrap_or_default();
                for name in ["id", "model"] {
                    let value = response.get(name).filter(|value| value.is_string());
                    if let Some(value) = value.filter(|value| self.has_room(size(value))) {
                        self.top.insert(name.to_owned(), value.clone());
                    }
                }
            }
            "error" if self.has_room(size(&json!(event))) => drop(self.top.insert("error".to_owned(), event.into())),
            "response.audio.delta" | "response.output_audio.delta" => {}
            kind => {
                let delta = event.get("delta").and_then(Value::as_str);
                if let (Some(kind), Some(delta)) = (kind.strip_suffix(".delta"), delta) {
                    self.add_delta(&event, kind, delta);
                }
            }
        }
    }

    fn add_delta(&mut self, event: &Map<String, Value>, kind: &str, delta: &str) {
        let number = |name: &str| event.get(name).and_then(Value::as_u64).unwrap_or(0);
        let place = (number("output_index"), number("content_index"), kind.to_owned());
        if !self.items.contains_key(&place) && !self.has_room(OVERHEAD + kind.len()) {
            return;
        }
        let mut room = Room { left: self.most.saturating_sub(self.kept), is_cut: self.is_cut };
        let had = room.left;
        room.append(self.items.entry(place).or_default(), delta);
        (self.kept, self.is_cut) = (self.kept + had - room.left, room.is_cut);
    }

    /// Takes room for so much, if there is any.
    fn has_room(&mut self, bytes: usize) -> bool {
        let fits = !self.is_cut && self.kept + bytes <= self.most;
        if fits {
            self.kept += bytes;
        } else {
            self.is_cut = true;
        }
        fits
    }
}

/// What may still be kept.
struct Room {
    left: usize,
    is_cut: bool,
}

impl Room {
    /// Adds as much of `more` as there is room for; once something was left out, nothing.
    fn append(&mut self, text: &mut String, more: &str) {
        if self.is_cut {
            return;
        }
        let fits = more.floor_char_boundary(self.left);
        text.push_str(&more[..fits]);
        self.left -= fits;
        self.is_cut |= fits < more.len();
    }

    fn put(&mut self, object: &mut Map<String, Value>, name: String, value: Value) {
        if object.get(&name) != Some(&value) && self.take(size(&value) + name.len()) {
            object.insert(name, value);
        }
    }

    fn take(&mut self, bytes: usize) -> bool {
        self.is_cut |= bytes > self.left;
        if !self.is_cut {
            self.left -= bytes;
        }
        !self.is_cut
    }
}

/// Merges `more` into the member `name`, as one delta is merged into those before it.
fn merge_member(object: &mut Map<String, Value>, name: &str, more: Value, room: &mut Room) {
    match (object.get_mut(name), more) {
        (_, Value::Null) => {}
        (Some(Value::String(text)), Value::String(more)) if !REPLACED.contains(&name) => room.append(text, &more),
        (Some(Value::Object(known)), Value::Object(more)) => merge(known, more, room),
        (Some(Value::Array(known)), Value::Array(more)) => {
            more.into_iter().for_each(|item| merge_item(known, item, room));
        }
        (None, _) if !room.take(OVERHEAD + name.len()) => {}
        (None, Value::String(text)) => {
            let mut kept = String::new();
            room.append(&mut kept, &text);
            object.insert(name.to_owned(), kept.into());
        }
        (None, Value::Object(more)) => {
            let mut known = Map::new();
            merge(&mut known, more, room);
            object.insert(name.to_owned(), known.into());
        }
        (None, Value::Array(more)) => {
            let mut known = Vec::new();
            more.into_iter().for_each(|item| merge_item(&mut known, item, room));
            object.insert(name.to_owned(), known.into());
        }
        (_, more) => room.put(object, name.to_owned(), more),
    }
}

fn merge(object: &mut Map<String, Value>, more: Map<String, Value>, room: &mut Room) {
    more.into_iter().for_each(|(name, value)| merge_member(object, &name, value, room));
}

/// Merges an item into the one of the same index; without one it is new.
fn merge_item(items: &mut Vec<Value>, item: Value, room: &mut Room) {
    let index = item.get("index").and_then(Value::as_u64);
    let known = items.iter_mut().find(|known| index.is_some() && known.get("index").and_then(Value::as_u64) == index);
    match (known, item) {
        (Some(Value::Object(known)), Value::Object(item)) => merge(known, item, room),
        (_, item) => {
            let mut holder = Map::new();
            merge_member(&mut holder, "item", item, room);
            items.extend(holder.remove("item"));
        }
    }
}

/// About how much a value keeps, in bytes.
fn size(value: &Value) -> usize {
    OVERHEAD
        + match value {
            Value::String(text) => text.len(),
            Value::Array(items) => items.iter().map(size).sum(),
            Value::Object(members) => members.iter().map(|(name, value)| name.len() + size(value)).sum(),
            _ => 0,
        }
}

fn whole(mut top: Map<String, Value>, choices: BTreeMap<u64, Map<String, Value>>) -> Value {
    if let Some(Value::String(object)) = top.get_mut("object") {
        *object = object.trim_end_matches(".chunk").to_owned();
    }
    top.insert("choices".to_owned(), choices.into_values().map(Value::from).collect());
    top.into()
}

fn broken_off(mut top: Map<String, Value>, items: BTreeMap<(u64, u64, String), String>) -> Value {
    top.insert("object".to_owned(), "response".into());
    top.insert("status".to_owned(), "incomplete".into());
    let item = |((index, _, kind), text): ((u64, u64, String), String)| json!({ "output_index": index, "type": kind.trim_start_matches("response."), "text": text });
    top.insert("output".to_owned(), items.into_iter().map(item).collect());
    top.into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn assembled(dialect: Dialect, most: usize, stream: &str, step: usize) -> (Value, bool) {
        let mut assembler = Assembler::new(dialect, most);
        stream.as_bytes().chunks(step).for_each(|piece| assembler.feed(piece));
        let (answer, is_cut) = assembler.finish();
        (serde_json::from_slice(&answer).unwrap_or_default(), is_cut)
    }

    fn events<'e>(events: impl IntoIterator<Item = &'e Value>) -> String {
        events.into_iter().map(|event| format!("data: {event}\n\n")).collect::<String>() + "data: [DONE]\n\n"
    }

    fn delta(index: u64, delta: Value) -> Value {
        json!({ "id": "c1", "object": "chat.completion.chunk", "model": "m", "usage": null,
                "choices": [{ "index": index, "delta": delta, "logprobs": { "content": [] }, "finish_reason": null }] })
    }

    fn tool_calls() -> (Vec<Value>, Value) {
        let call = |index: u64, id: Value, name: Value, arguments: &str| {
            json!({ "tool_calls": [{ "index": index, "id": id, "type": "function",
                    "function": { "name": name, "arguments": arguments } }] })
        };
        let events = vec![
            delta(0, json!({ "role": "assistant", "content": null })),
            delta(0, call(0, json!("call_1"), json!("f"), "")),
            delta(0, call(0, json!(null), json!(null), "{\"a")),
            delta(0, call(1, json!("call_2"), json!("g"), "{}")),
            delta(0, call(0, json!("call_1"), json!("f"), "\":1}")),
            json!({ "choices": [{ "index": 0, "delta": {}, "finish_reason": "tool_calls" }] }),
            json!({ "choices": [], "usage": { "total_tokens": 3 } }),
        ];
        let function = |name: &str, arguments: &str| json!({ "name": name, "arguments": arguments });
        let answer = json!({
            "id": "c1", "object": "chat.completion", "model": "m", "usage": { "total_tokens": 3 },
            "choices": [{ "index": 0, "finish_reason": "tool_calls", "message": { "role": "assistant", "tool_calls": [
                { "index": 0, "id": "call_1", "type": "function", "function": function("f", "{\"a\":1}") },
                { "index": 1, "id": "call_2", "type": "function", "function": function("g", "{}") },
            ] } }],
        });
        (events, answer)
    }

    #[test]
    fn texts_of_several_choices_are_put_together() {
        let stream = events(&[
            delta(0, json!({ "role": "assistant", "content": "Hel" })),
            delta(1, json!({ "role": "assistant", "content": "é" })),
            delta(0, json!({ "content": "lo 😀", "reasoning_content": "h" })),
            delta(0, json!({ "content": "", "reasoning_content": "mm" })),
        ]);
        for step in [1, 7, 10_000] {
            let (answer, is_cut) = assembled(Dialect::Chat, 10_000, &stream, step);
            let message = &answer["choices"][0]["message"];
            assert_eq!(message, &json!({ "role": "assistant", "content": "Hello 😀", "reasoning_content": "hmm" }));
            assert_eq!((&answer["choices"][1]["message"]["content"], is_cut), (&json!("é"), false));
        }
        let completions = events(&[json!({ "choices": [{ "text": "a" }] }), json!({ "choices": [{ "text": "b" }] })]);
        assert_eq!(assembled(Dialect::Completions, 10_000, &completions, 9).0["choices"][0]["text"], "ab");
    }

    #[test]
    fn tool_calls_are_put_together_by_their_index() {
        let (all, answer) = tool_calls();
        for step in [1, 50, 10_000] {
            assert_eq!(assembled(Dialect::Chat, 10_000, &events(&all), step), (answer.clone(), false));
        }
    }

    #[test]
    fn a_response_is_what_its_last_event_says() {
        let text = |index: u64, delta: &str| json!({ "type": "response.output_text.delta", "output_index": index, "delta": delta });
        let arguments = json!({ "type": "response.function_call_arguments.delta", "output_index": 2, "delta": "{}" });
        let created = json!({ "type": "response.created", "response": { "id": "resp_1", "model": "m" } });
        let mut all = vec![created, text(0, "Hel"), text(0, "lo"), text(1, "x"), arguments];
        let (answer, is_cut) = assembled(Dialect::Responses, 10_000, &events(&all), 11);
        assert_eq!((&answer["id"], &answer["status"], is_cut), (&json!("resp_1"), &json!("incomplete"), false));
        assert_eq!(answer["output"][0], json!({ "output_index": 0, "type": "output_text", "text": "Hello" }));
        assert_eq!(answer["output"][2]["type"], "function_call_arguments");
        let response = json!({ "id": "resp_1", "output": [{ "content": "Hello" }] });
        all.push(json!({ "type": "response.completed", "response": response }));
        assert_eq!(assembled(Dialect::Responses, 10_000, &events(&all), 11), (response, false));
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let all: Vec<Value> = (0..1000).map(|n| delta(n % 3, json!({ "content": "0123456789", "x": [n] }))).collect();
        for most in [0, 100, 1000] {
            let mut assembler = Assembler::new(Dialect::Chat, most);
            for piece in events(&all).as_bytes().chunks(100) {
                assembler.feed(piece);
                assert!(assembler.kept <= most && assembler.bytes() < most + 2048, "{most}: {}", assembler.bytes());
            }
            let (answer, is_cut) = assembler.finish();
            assert!(is_cut && answer.len() < 3 * most + 100, "{most}: {}", answer.len());
        }
        let endless = format!("data: {}", "x".repeat(300_000));
        let mut assembler = Assembler::new(Dialect::Chat, 1000);
        endless.as_bytes().chunks(1000).for_each(|piece| assembler.feed(piece));
        assert!(assembler.bytes() < 1000 + 2 * LINE_FRAME);
        assembler.feed(b"\ndata: {\"id\":\"after\"}\n");
        assert!(assembler.finish().1);
    }

    #[test]
    fn nothing_comes_of_nothing() {
        assert_eq!(Assembler::new(Dialect::Chat, 100).finish(), (Vec::new(), false));
        assert_eq!(
            assembled(Dialect::Chat, 100, ": ping\n\ndata: [DONE]\n\ndata: 7\n\nevent: x\n", 3),
            (Value::Null, false)
        );
        let error = events(&[json!({ "error": { "message": "broke" } })]);
        assert_eq!(assembled(Dialect::Chat, 1000, &error, 3).0["error"]["message"], "broke");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn how_the_network_cuts_changes_nothing(words in prop::collection::vec(".{0,6}", 0..8), step in 1_usize..40, most in 0_usize..2000) {
            let all: Vec<Value> = words.iter().map(|word| delta(0, json!({ "content": word }))).collect();
            let stream = events(&all);
            prop_assert_eq!(assembled(Dialect::Chat, most, &stream, step), assembled(Dialect::Chat, most, &stream, stream.len()));
            let (answer, is_cut) = assembled(Dialect::Chat, 100_000, &stream, step);
            prop_assert!(!is_cut);
            if !words.is_empty() {
                prop_assert_eq!(answer["choices"][0]["message"]["content"].as_str(), Some(&*words.concat()));
            }
        }

        #[test]
        fn garbage_does_no_harm(garbage in "(data:|[{}\\[\\]\",:\n a-c0-9]|\"delta\":|\"choices\":\\[|\"index\":){0,60}") {
            assembled(Dialect::Chat, 200, &garbage, 3);
            assembled(Dialect::Responses, 200, &garbage, 3);
        }
    }
}
