//! What one `data:` line of a stream says, and what of it a client that did not ask for usage must not see.
//!
//! This is the innermost loop of the gateway: it runs for every token of every stream. So a chunk is searched for a few
//! names rather than parsed (see [`scan`]); only an answer's last events, where the numbers are, are parsed.

use std::{borrow::Cow, ops::Range, sync::LazyLock};

use memchr::memmem::Finder;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    response::{believable_reason, parse_answer, parse_usage},
    scan::{self, Member},
    served::Served,
    text::StreamedOutput,
};
use crate::{route::Dialect, usage::Usage};

/// Searchers for quoted names, prepared once for the process.
struct Finders {
    usage: Finder<'static>,
    choices: Finder<'static>,
    finish_reason: Finder<'static>,
    error: Finder<'static>,
    delta: Finder<'static>,
    text: Finder<'static>,
}

static FINDERS: LazyLock<Finders> = LazyLock::new(|| Finders {
    usage: Finder::new("\"usage\""),
    choices: Finder::new("\"choices\""),
    finish_reason: Finder::new("\"finish_reason\""),
    error: Finder::new("\"error\""),
    delta: Finder::new("\"delta\""),
    text: Finder::new("\"text\""),
});

/// How many chunks are looked at for who answers: Azure's first one leaves it open.
const LOOKS: u8 = 3;

/// What becomes of a line when usage is to be hidden.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is passed on as it is.
    Keep,
    /// It is passed on without this part.
    Cut(Range<usize>),
    /// It exists only because usage was asked for.
    Drop,
}

/// What a stream has said so far.
#[derive(Debug)]
pub(super) struct Facts {
    dialect: Dialect,
    pub(super) usage: Option<Usage>,
    pub(super) finish_reason: Option<String>,
    pub(super) saw_end: bool,
    pub(super) saw_error: bool,
    pub(super) output: StreamedOutput,
    pub(super) served: Served,
    looks: u8,
}

impl Facts {
    pub(super) fn new(dialect: Dialect) -> Self {
        Self {
            dialect,
            usage: None,
            finish_reason: None,
            saw_end: false,
            saw_error: false,
            output: StreamedOutput::default(),
            served: Served::default(),
            looks: LOOKS,
        }
    }

    /// Reads the content of one `data:` line. The verdict's range is one of `data`.
    pub(super) fn read(&mut self, data: &[u8]) -> Verdict {
        if data.trim_ascii() == b"[DONE]" {
            self.saw_end = true;
            return Verdict::Keep;
        }
        match self.dialect {
            Dialect::Responses => {
                self.read_typed_event(data);
                Verdict::Keep
            }
            Dialect::Chat | Dialect::Completions | Dialect::Embeddings => self.read_chunk(data),
        }
    }

    fn read_chunk(&mut self, data: &[u8]) -> Verdict {
        let has_error = self.read_error(data);
        let usage = scan::top_level(data, &FINDERS.usage);
        let counts = usage.as_ref().and_then(|usage| parse_usage_member(data, usage));
        if counts.is_some() || self.looks > 0 {
            self.read_served(data);
        }
        self.believe(counts);
        self.read_finish_reason(data);
        let output = if self.dialect == Dialect::Completions { &FINDERS.text } else { &FINDERS.delta };
        self.collect_output(data, output);
        match usage {
            None => Verdict::Keep,
            Some(usage) if data[usage.value.start] == b'{' && !has_error && has_no_choices(data) => Verdict::Drop,
            Some(usage) => Verdict::Cut(scan::cut_of(data, &usage)),
        }
    }

    fn believe(&mut self, usage: Option<Usage>) {
        self.usage = usage.or(self.usage);
        if self.usage.is_some() {
            self.output = StreamedOutput::default();
        }
    }

    /// The first chunks tell, for a client that hangs up, and the one with the usage has the last word.
    fn read_served(&mut self, data: &[u8]) {
        let value = |name: &str| std::str::from_utf8(scan::early(data, name.as_bytes())?).ok();
        self.served.note(value("\"model\""), value("\"service_tier\""));
        self.looks = if self.served.model.is_some() { 0 } else { self.looks.saturating_sub(1) };
    }

    fn read_error(&mut self, data: &[u8]) -> bool {
        let error = scan::top_level(data, &FINDERS.error);
        let is_error = error.is_some_and(|error| &data[error.value] != b"null");
        self.saw_error |= is_error;
        is_error
    }

    fn read_finish_reason(&mut self, data: &[u8]) {
        let reason = scan::last_string(data, &FINDERS.finish_reason).and_then(believable_reason);
        if let Some(reason) = reason {
            self.finish_reason = Some(reason.to_owned());
        }
    }

    /// Keeps what the model wrote, as long as there is no better count of it.
    fn collect_output(&mut self, data: &[u8], name: &Finder<'_>) {
        if self.usage.is_some() {
            return;
        }
        let (mut from, name_len) = (0, name.needle().len());
        while let Some(hit) = name.find(&data[from..]).map(|hit| from + hit) {
            from = match scan::member_at(data, hit, name_len) {
                Some(member) => {
                    self.output.push(&data[member.value.clone()]);
                    member.value.end
                }
                None => hit + name_len,
            };
        }
    }

    fn read_typed_event(&mut self, data: &[u8]) {
        let Some(kind) = event_type(data) else {
            self.read_error(data);
            return;
        };
        match &*kind {
            "response.completed" | "response.incomplete" | "response.failed" => {
                self.saw_end = true;
                self.saw_error |= kind == "response.failed";
                self.read_response(data);
            }
            "response.created" => self.read_response(data),
            "error" => self.saw_error = true,
            // The sound itself is not text; its transcript is.
            "response.audio.delta" | "response.output_audio.delta" => {}
            kind if kind.ends_with(".delta") => self.collect_output(data, &FINDERS.delta),
            _ => {}
        }
    }

    fn read_response(&mut self, data: &[u8]) {
        #[derive(Deserialize)]
        struct Event<'a> {
            #[serde(borrow)]
            response: &'a RawValue,
        }
        if let Ok(event) = serde_json::from_slice::<Event<'_>>(data) {
            let facts = parse_answer(Dialect::Responses, event.response.get().as_bytes());
            self.served.update(facts.served);
            if self.saw_end {
                self.believe(facts.usage);
                self.finish_reason = facts.finish_reason.or(self.finish_reason.take());
            }
        }
    }
}

fn parse_usage_member(data: &[u8], usage: &Member) -> Option<Usage> {
    let value = &data[usage.value.clone()];
    if value.starts_with(b"{") { parse_usage(value) } else { None }
}

/// Are there no choices, so that the chunk carries nothing but its usage?
fn has_no_choices(data: &[u8]) -> bool {
    let Some(choices) = scan::top_level(data, &FINDERS.choices) else {
        return true;
    };
    let value = &data[choices.value];
    let inner = value.strip_prefix(b"[").and_then(|rest| rest.strip_suffix(b"]"));
    inner.is_some_and(|inner| inner.trim_ascii().is_empty())
}

/// The `type` of an event of the Responses API: at once where it is the first member, as it usually is.
fn event_type(data: &[u8]) -> Option<Cow<'_, str>> {
    const NAME: &[u8] = b"\"type\"";
    #[derive(Deserialize)]
    struct Typed<'a> {
        #[serde(borrow, rename = "type")]
        kind: Cow<'a, str>,
    }
    let start = data.trim_ascii_start().strip_prefix(b"{").map_or(data, <[u8]>::trim_ascii_start);
    if start.starts_with(NAME)
        && let Some(member) = scan::member_at(start, 0, NAME.len())
        && let Some(kind) = start[member.value].strip_prefix(b"\"").and_then(|rest| rest.strip_suffix(b"\""))
        && !kind.contains(&b'\\')
    {
        return std::str::from_utf8(kind).ok().map(Cow::Borrowed);
    }
    serde_json::from_slice::<Typed<'_>>(data).ok().map(|event| event.kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(dialect: Dialect, data: &str) -> (Facts, Option<String>) {
        let mut facts = Facts::new(dialect);
        let left = match facts.read(data.as_bytes()) {
            Verdict::Keep => Some(data.to_owned()),
            Verdict::Drop => None,
            Verdict::Cut(range) => Some(format!("{}{}", &data[..range.start], &data[range.end..])),
        };
        (facts, left)
    }

    #[test]
    fn a_client_sees_what_it_would_have_seen() {
        let usage = r#"{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}"#;
        let cases = [
            (r#"{"choices":[{"delta":{}}],"usage":null}"#.to_owned(), Some(r#"{"choices":[{"delta":{}}]}"#)),
            (r#"{"usage": null, "choices":[1]}"#.to_owned(), Some(r#"{"choices":[1]}"#)),
            (format!(r#"{{"id":"x","choices":[],"usage":{usage}}}"#), None),
            (format!(r#"{{"usage" : {usage}, "choices" : [ ] }}"#), None),
            (format!(r#"{{"id":"x","usage":{usage}}}"#), None),
            (format!(r#"{{"choices":[{{"index":0}}],"usage":{usage}}}"#), Some(r#"{"choices":[{"index":0}]}"#)),
            (format!(r#"{{"error":{{}},"choices":[],"usage":{usage}}}"#), Some(r#"{"error":{},"choices":[]}"#)),
            (
                r#"{"choices":[],"prompt_filter_results":[{}],"usage":null}"#.to_owned(),
                Some(r#"{"choices":[],"prompt_filter_results":[{}]}"#),
            ),
            (
                r#"{"choices":[],"prompt_filter_results":[{}]}"#.to_owned(),
                Some(r#"{"choices":[],"prompt_filter_results":[{}]}"#),
            ),
            (r#"{"choices":[{"usage":null}]}"#.to_owned(), Some(r#"{"choices":[{"usage":null}]}"#)),
            ("[DONE]".to_owned(), Some("[DONE]")),
            ("nonsense".to_owned(), Some("nonsense")),
        ];
        for (data, expected) in cases {
            assert_eq!(read(Dialect::Chat, &data).1.as_deref(), expected, "{data}");
        }
    }

    #[test]
    fn chunks_of_chat_say_what_they_say() {
        let data = r#"{"choices":[{"delta":{"content":"\"usage\":{\"prompt_tokens\":9}, \"error\":1"},"finish_reason":null},
            {"index":1,"delta":{"content":"b"},"finish_reason":"length"}],"error":null,"usage":null}"#;
        let (facts, _) = read(Dialect::Chat, data);
        assert_eq!((facts.usage, facts.finish_reason.as_deref()), (None, Some("length")));
        assert!(!facts.saw_error && !facts.saw_end);
        assert_eq!(facts.output.text(), "\"usage\":{\"prompt_tokens\":9}, \"error\":1b");
        assert!(read(Dialect::Chat, r#"{"error":{"message":"x"}}"#).0.saw_error);
        assert!(read(Dialect::Chat, " [DONE] ").0.saw_end);
        assert_eq!(read(Dialect::Completions, r#"{"choices":[{"text":"t","delta":1}]}"#).0.output.text(), "t");
    }

    #[test]
    fn the_last_believable_usage_counts_and_ends_the_collecting() {
        let mut facts = Facts::new(Dialect::Chat);
        for (count, expected) in [("1", 1), ("2", 2), ("-3", 2), ("4", 4)] {
            facts.read(
                format!(r#"{{"choices":[{{"delta":{{"content":"x"}}}}],"usage":{{"prompt_tokens":{count}}}}}"#)
                    .as_bytes(),
            );
            assert_eq!(facts.usage.map(|usage| usage.prompt_tokens), Some(expected));
        }
        facts.read(br#"{"choices":[{"delta":{"content":"x"}}],"usage":null}"#);
        assert_eq!((facts.usage.unwrap().prompt_tokens, facts.output.total_bytes()), (4, 0));
    }

    #[test]
    fn typed_events_say_what_they_say() {
        let response = r#"{"usage":{"input_tokens":3,"output_tokens":4},"status":"incomplete","incomplete_details":
            {"reason":"content_filter"},"tools":[{"type":"x","usage":1}]}"#;
        for data in [
            format!(r#"{{"type":"response.incomplete","response":{response}}}"#),
            format!(r#" {{ "response":{response} , "type" : "response.incomplete"}}"#),
            format!(r#"{{"type":"response\u002eincomplete","response":{response}}}"#),
        ] {
            let (facts, left) = read(Dialect::Responses, &data);
            assert_eq!(facts.usage.map(|usage| (usage.prompt_tokens, usage.completion_tokens)), Some((3, 4)), "{data}");
            assert_eq!(facts.finish_reason.as_deref(), Some("content_filter"));
            assert!(facts.saw_end && !facts.saw_error);
            assert_eq!(left, Some(data));
        }
        let (failed, _) = read(Dialect::Responses, r#"{"type":"response.failed","response":{"status":"failed"}}"#);
        assert!(failed.saw_end && failed.saw_error && failed.finish_reason.as_deref() == Some("failed"));
        for error in [r#"{"type":"error","message":"x"}"#, r#"{"error":{"type":"server_error"}}"#] {
            assert!(read(Dialect::Responses, error).0.saw_error, "{error}");
        }
        let created = r#"{"type":"response.created","response":{"error":null,"usage":{"input_tokens":1}}}"#;
        assert_eq!(read(Dialect::Responses, created).0.usage, None);
    }

    #[test]
    fn a_stream_says_who_answers_from_the_beginning() {
        let served = |facts: &Facts| (facts.served.model.clone(), facts.served.service_tier.clone().map(String::from));
        let (some, none) = (|text: &str| Some(text.to_owned()), None::<String>);
        let mut facts = Facts::new(Dialect::Chat);
        facts.read(br#"{"model":"","choices":[],"prompt_filter_results":[]}"#);
        assert_eq!(served(&facts), (none.clone(), none.clone()));
        facts.read(br#"{"model":"m-1","service_tier":"auto","choices":[{"delta":{"content":"\"model\":\"x\""}}]}"#);
        assert_eq!(served(&facts), (some("m-1"), some("auto")));
        facts.read(br#"{"model":"m-2","choices":[{"delta":{"content":"b"}}]}"#);
        assert_eq!(served(&facts), (some("m-1"), some("auto")), "nobody looks there any more");
        facts.read(br#"{"model":"m-3","service_tier":"flex","choices":[],"usage":{"prompt_tokens":1}}"#);
        assert_eq!(served(&facts), (some("m-3"), some("flex")), "the usage has the last word");

        let mut facts = Facts::new(Dialect::Responses);
        facts.read(br#"{"type":"response.created","response":{"model":"r-1","status":"in_progress","usage":null}}"#);
        assert_eq!((served(&facts), facts.finish_reason.clone()), ((some("r-1"), none), None));
        facts.read(br#"{"type":"response.completed","response":{"model":"r-2","service_tier":"priority"}}"#);
        assert_eq!(served(&facts), (some("r-2"), some("priority")));
    }

    #[test]
    fn texts_of_typed_events_are_collected_but_no_sound() {
        let mut facts = Facts::new(Dialect::Responses);
        for (kind, delta) in [("response.output_text", "Hi "), ("response.audio", "AAAA"), ("response.refusal", "no")] {
            facts.read(format!(r#"{{"type":"{kind}.delta","delta":"{delta}"}}"#).as_bytes());
        }
        facts.read(br#"{"type":"response.output_text.done","text":"Hi ","delta":"x"}"#);
        assert_eq!(facts.output.text(), "Hi no");
    }
}
