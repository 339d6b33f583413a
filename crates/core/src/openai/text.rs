//! The texts of prompts and outputs, for counting where a provider reports no usage.
//!
//! This runs off the hot path, on bodies that may be anything, so it takes what it can read and skips the rest. It walks
//! the JSON without building it: a prompt of thirty million token numbers costs thirty million steps, not a gigabyte.
//! Pieces of text are joined by a space, which byte-pair encodings mostly merge into the following word, so that joining
//! adds next to nothing to the count.

use super::json::{each_element, each_member, string};
use crate::route::Dialect;

/// How deep texts are looked for: `messages[].tool_calls[].function.arguments` is the deepest place that has any.
const MAX_DEPTH: usize = 6;
/// How much of a streamed output is kept.
const MAX_STREAMED_BYTES: usize = 1 << 20;

/// The countable part of a prompt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PromptText {
    /// Its texts, up to the cap.
    pub text: String,
    /// How many bytes of text were left out because of the cap.
    pub omitted_bytes: u64,
    /// Tokens that the client sent as numbers; they count one each and are not in `text`.
    pub tokens: u64,
    /// Number of messages. Each costs about 3 tokens more than its text, and the whole list 3.
    pub messages: u64,
}

/// The texts in the request `body`, at most `cap_bytes` of them: messages with their roles, names and tool calls, tools,
/// instructions. Images and audio are not text and not counted.
#[must_use]
pub fn prompt_text(dialect: Dialect, body: &[u8], cap_bytes: usize) -> PromptText {
    let mut sink = Sink::new(cap_bytes);
    let (mut tokens, mut messages) = (0, 0);
    each_member(std::str::from_utf8(body).unwrap_or_default(), |name, value| match (dialect, name) {
        (Dialect::Chat, "messages") | (Dialect::Responses, "input") if value.starts_with('[') => {
            each_element(value, |message| {
                messages += 1;
                sink.item(message, Side::Prompt, MAX_DEPTH);
            });
        }
        (Dialect::Responses, "input") => {
            messages += 1;
            sink.string(value);
        }
        (Dialect::Completions, "prompt" | "suffix") | (Dialect::Embeddings, "input") => {
            tokens += sink.strings_or_tokens(value, MAX_DEPTH);
        }
        (Dialect::Responses, "instructions") => sink.string(value),
        (Dialect::Chat | Dialect::Responses, "tools" | "functions" | "response_format") => sink.push(value),
        _ => {}
    });
    PromptText { text: sink.text, omitted_bytes: sink.omitted_bytes, tokens, messages }
}

/// The text that the model produced, in the complete JSON answer `body`: contents, refusals, reasoning, tool calls.
#[must_use]
pub fn output_text(dialect: Dialect, body: &[u8]) -> String {
    let mut sink = Sink::new(usize::MAX);
    each_member(std::str::from_utf8(body).unwrap_or_default(), |name, value| match (dialect, name) {
        (Dialect::Chat, "choices") => each_element(value, |choice| {
            each_member(choice, |name, value| {
                if name == "message" {
                    sink.item(value, Side::Output, MAX_DEPTH);
                }
            });
        }),
        (Dialect::Completions, "choices") | (Dialect::Responses, "output") => {
            each_element(value, |item| sink.item(item, Side::Output, MAX_DEPTH));
        }
        _ => {}
    });
    sink.text
}

/// What the model has produced so far in a stream: the raw deltas, to be turned into text when it is needed.
#[derive(Clone, Debug, Default)]
pub struct StreamedOutput {
    /// JSON values, each followed by a newline; none holds a raw one.
    deltas: Vec<u8>,
    total_bytes: u64,
}

impl StreamedOutput {
    /// Adds the JSON value of one delta. Beyond one MiB in all, its length is counted and nothing kept.
    pub(super) fn push(&mut self, delta: &[u8]) {
        self.total_bytes += delta.len() as u64;
        if self.deltas.len() + delta.len() < MAX_STREAMED_BYTES {
            self.deltas.extend_from_slice(delta);
            self.deltas.push(b'\n');
        }
    }

    /// Length of all deltas, kept or not, in bytes of JSON.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Length of those deltas that [`text`](Self::text) is made of, in bytes of JSON: a count of its tokens scales with
    /// [`total_bytes`](Self::total_bytes) over this.
    #[must_use]
    pub fn kept_bytes(&self) -> u64 {
        (self.deltas.len() - memchr::memchr_iter(b'\n', &self.deltas).count()) as u64
    }

    /// The text that the kept deltas add up to.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        for delta in self.deltas.split(|&byte| byte == b'\n').filter_map(|delta| std::str::from_utf8(delta).ok()) {
            let mut sink = Sink::new(usize::MAX);
            match delta.as_bytes().first() {
                Some(b'{') => sink.item(delta, Side::Output, MAX_DEPTH),
                _ => sink.string(delta),
            }
            text.push_str(&sink.text);
        }
        text
    }
}

/// Whose text it is. The role of a message is counted in a prompt only: the model does not write it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Prompt,
    Output,
}

struct Sink {
    text: String,
    cap_bytes: usize,
    omitted_bytes: u64,
}

impl Sink {
    fn new(cap_bytes: usize) -> Self {
        Self { text: String::new(), cap_bytes, omitted_bytes: 0 }
    }

    fn push(&mut self, piece: &str) {
        let separator = usize::from(!self.text.is_empty());
        let room = self.cap_bytes.saturating_sub(self.text.len() + separator);
        let kept = &piece[..piece.floor_char_boundary(room)];
        if !kept.is_empty() {
            self.text.push_str(&" "[..separator]);
            self.text.push_str(kept);
        }
        self.omitted_bytes += (piece.len() - kept.len()) as u64;
    }

    fn string(&mut self, value: &str) {
        match string(value) {
            Some(text) => self.push(&text),
            // A string with half a surrogate pair: its raw form is about as long.
            None if value.starts_with('"') => self.push(value),
            None => {}
        }
    }

    /// The texts of a message, a part of one, a tool call, an output item, a choice or a delta.
    fn item(&mut self, value: &str, side: Side, depth: usize) {
        if depth == 0 {
            return;
        }
        match value.as_bytes().first() {
            Some(b'"') => self.string(value),
            Some(b'[') => each_element(value, |element| self.item(element, side, depth - 1)),
            Some(b'{') => each_member(value, |name, value| {
                if holds_text(name, side) {
                    self.item(value, side, depth - 1);
                }
            }),
            _ => {}
        }
    }

    /// A prompt that is a string, an array of strings, of tokens, or of arrays of tokens. Returns the number of tokens.
    fn strings_or_tokens(&mut self, value: &str, depth: usize) -> u64 {
        let mut tokens = 0;
        match value.as_bytes().first() {
            Some(b'"') => self.string(value),
            Some(b'0'..=b'9') => tokens = 1,
            Some(b'[') if depth > 0 => each_element(value, |element| {
                tokens += self.strings_or_tokens(element, depth - 1);
            }),
            _ => {}
        }
        tokens
    }
}

/// Is the value of the member `name` text, or something that holds texts?
fn holds_text(name: &str, side: Side) -> bool {
    match name {
        "role" => side == Side::Prompt,
        "content" | "text" | "refusal" | "reasoning" | "reasoning_content" | "summary" | "transcript" | "audio"
        | "name" | "tool_calls" | "function_call" | "function" | "custom" | "arguments" | "input" | "output"
        | "code" => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(dialect: Dialect, body: &str) -> PromptText {
        prompt_text(dialect, body.as_bytes(), 1 << 20)
    }

    #[test]
    fn chat_prompts() {
        let prompt = prompt(
            Dialect::Chat,
            r#"{"model":"m","messages":[{"role":"system","content":"Be\nbrief."},
                {"role":"user","name":"ann","content":[{"type":"text","text":"What is this?"},
                    {"type":"image_url","image_url":{"url":"data:image/png;base64,AAAA"}}]},
                {"role":"assistant","content":null,"tool_calls":[{"id":"call_1","type":"function",
                    "function":{"name":"look","arguments":"{\"x\":1}"}}]},
                {"role":"tool","tool_call_id":"call_1","content":"seen \ud83d\ude00"}],
              "tools":[{"type":"function"}],"temperature":1}"#,
        );
        assert_eq!(
            prompt.text,
            "system Be\nbrief. user ann What is this? assistant look {\"x\":1} tool seen 😀 [{\"type\":\"function\"}]"
        );
        assert_eq!((prompt.messages, prompt.tokens, prompt.omitted_bytes), (4, 0, 0));
    }

    #[test]
    fn other_prompts() {
        let completion = prompt(Dialect::Completions, r#"{"prompt":["one","two"],"suffix":"end","model":"m"}"#);
        assert_eq!((completion.text.as_str(), completion.messages), ("one two end", 0));
        let tokens = prompt(Dialect::Embeddings, r#"{"input":[[1,2,3],[4]],"model":"m"}"#);
        assert_eq!((tokens.text.as_str(), tokens.tokens), ("", 4));
        assert_eq!(prompt(Dialect::Embeddings, r#"{"input":[7,8]}"#).tokens, 2);
        assert_eq!(prompt(Dialect::Embeddings, r#"{"input":"hello"}"#).text, "hello");
        let response = prompt(Dialect::Responses, r#"{"input":"hi","instructions":"Be kind."}"#);
        assert_eq!((response.text.as_str(), response.messages), ("hi Be kind.", 1));
        let items = r#"{"input":[{"role":"user","content":[{"type":"input_text","text":"a"}]},
            {"type":"function_call_output","call_id":"c","output":"b"}]}"#;
        assert_eq!(prompt(Dialect::Responses, items).text, "user a b");
        assert_eq!(prompt(Dialect::Responses, items).messages, 2);
    }

    #[test]
    fn the_cap_holds_and_what_it_omits_is_counted() {
        let prompt = prompt_text(Dialect::Embeddings, r#"{"input":["éé","éé","x"]}"#.as_bytes(), 6);
        assert_eq!((prompt.text.as_str(), prompt.omitted_bytes), ("éé x", 4));
        let prompt = prompt_text(Dialect::Embeddings, r#"{"input":["éé","éé","x"]}"#.as_bytes(), 8);
        assert_eq!((prompt.text.as_str(), prompt.omitted_bytes), ("éé é", 3));
    }

    #[test]
    fn anything_else_is_no_text() {
        for body in ["", "nonsense", "[]", r#"{"messages":7,"input":null,"prompt":{}}"#] {
            for dialect in [Dialect::Chat, Dialect::Completions, Dialect::Embeddings, Dialect::Responses] {
                assert_eq!(prompt(dialect, body).text, "", "{body}");
                assert_eq!(output_text(dialect, body.as_bytes()), "");
            }
        }
        let deep = format!(r#"{{"messages":[{{"content":{}{}}}]}}"#, "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(prompt(Dialect::Chat, &deep).text, "");
        assert_eq!(prompt(Dialect::Embeddings, r#"{"input":"half \ud800"}"#).text, r#""half \ud800""#);
    }

    #[test]
    fn outputs() {
        let chat = r#"{"choices":[{"message":{"role":"assistant","content":"a","refusal":null,"reasoning_content":"why",
            "tool_calls":[{"id":"x","type":"function","function":{"name":"f","arguments":"{}"}}]},
            "logprobs":{"content":[{"token":"a"}]},"finish_reason":"stop"},{"message":{"content":"b"}}]}"#;
        assert_eq!(output_text(Dialect::Chat, chat.as_bytes()), "a why f {} b");
        let completions = r#"{"choices":[{"text":"one","logprobs":null},{"text":"two"}]}"#;
        assert_eq!(output_text(Dialect::Completions, completions.as_bytes()), "one two");
        let responses = r#"{"output":[{"type":"reasoning","summary":[{"type":"summary_text","text":"s"}]},
            {"type":"message","role":"assistant","content":[{"type":"output_text","text":"t","annotations":[]}]},
            {"type":"function_call","call_id":"c","name":"f","arguments":"{}"}],"instructions":"no"}"#;
        assert_eq!(output_text(Dialect::Responses, responses.as_bytes()), "s t f {}");
    }

    #[test]
    fn streamed_output_is_capped_but_counted() {
        let mut output = StreamedOutput::default();
        output.push(br#"{"role":"assistant","content":""}"#);
        output.push(br#"{"content":"Hel"}"#);
        output.push(br#""lo \n""#);
        assert_eq!(output.text(), "Hello \n");
        assert_eq!(output.kept_bytes(), output.total_bytes());
        let delta = format!("\"{}\"", "x".repeat(998));
        (0..2000).for_each(|_| output.push(delta.as_bytes()));
        assert!(output.total_bytes() > 2_000_000);
        assert!((1_000_000..1 << 20).contains(&output.kept_bytes()), "{}", output.kept_bytes());
        assert!(output.text().len() < 1 << 20);
    }
}
