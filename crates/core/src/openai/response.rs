//! Usage out of JSON answers.
//!
//! Usage is money, so it is believed whole or not at all: a number that is negative, fractional, absurdly large or of the
//! wrong type makes the whole object worthless, and the request is estimated instead. Members that the gateway does not
//! know are ignored.
//!
//! [`JsonMeter`] watches a body go by. It keeps references to the chunks, not copies, and parses once, at the end. Beyond
//! [`MAX_WHOLE_BYTES`] it keeps only the last [`TAIL_BYTES`] and looks for the usage there, which is where providers put
//! it. What the model wrote cannot mislead that search: within a JSON string every quote is escaped, so a quoted `usage`
//! followed by a colon can only be a key, and it counts only if the rest of the body closes exactly one object around it.

use std::sync::LazyLock;

use bytes::Bytes;
use memchr::memmem::{Finder, FinderRev};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{json, scan};
use crate::{route::Dialect, usage::Usage};

/// Largest body that is kept whole.
pub const MAX_WHOLE_BYTES: usize = 1 << 20;
/// How much is kept of the end of a larger one.
pub const TAIL_BYTES: usize = 64 << 10;

/// Most chunks that are kept apart; a body in smaller pieces is joined, so that bookkeeping cannot outgrow content.
const MAX_CHUNKS: usize = 256;
/// Above this, a token count is taken for an error of the provider.
const MAX_TOKENS: u64 = 10_000_000_000;
/// Longest finish reason that is believed.
const MAX_REASON_BYTES: usize = 64;

static USAGE: LazyLock<FinderRev<'static>> = LazyLock::new(|| FinderRev::new("\"usage\""));
static ERROR: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("\"error\""));
static FINISH_REASON: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("\"finish_reason\""));

/// What an answer says about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AnswerFacts {
    /// What it consumed; `None`: it does not say, or not believably.
    pub usage: Option<Usage>,
    /// Why the model stopped: `stop`, `length`, `tool_calls`; of a response its status, or why it is incomplete.
    pub finish_reason: Option<String>,
    /// Is it an error, whatever its status says?
    pub is_error: bool,
}

/// Reads a `usage` object, in any dialect.
///
/// `None` unless it counts at least the input, and everything it counts is a plausible whole number. Where only input and
/// total are given, the output is the difference.
#[must_use]
pub fn parse_usage(raw: &[u8]) -> Option<Usage> {
    let raw: RawUsage = serde_json::from_slice(raw).ok()?;
    let prompt_tokens = raw.prompt_tokens.or(raw.input_tokens)?;
    let rest = raw.total_tokens.map_or(0, |total| total.saturating_sub(prompt_tokens));
    let completion_tokens = raw.completion_tokens.or(raw.output_tokens).unwrap_or(rest);
    let input = raw.prompt_tokens_details.or(raw.input_tokens_details).unwrap_or_default();
    let output = raw.completion_tokens_details.or(raw.output_tokens_details).unwrap_or_default();
    let (input_audio, output_audio) = (input.audio_tokens.unwrap_or(0), output.audio_tokens.unwrap_or(0));
    let usage = Usage {
        prompt_tokens,
        completion_tokens,
        cached_tokens: input.cached_tokens.unwrap_or(0),
        reasoning_tokens: output.reasoning_tokens.unwrap_or(0),
        audio_tokens: input_audio.saturating_add(output_audio),
    };
    let counts =
        [usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.reasoning_tokens, usage.audio_tokens];
    counts.iter().all(|&count| count <= MAX_TOKENS).then_some(usage)
}

#[derive(Deserialize)]
struct RawUsage {
    prompt_tokens: Option<u64>,
    input_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    output_tokens: Option<u64>,
    total_tokens: Option<u64>,
    prompt_tokens_details: Option<RawDetails>,
    input_tokens_details: Option<RawDetails>,
    completion_tokens_details: Option<RawDetails>,
    output_tokens_details: Option<RawDetails>,
}

#[derive(Default, Deserialize)]
struct RawDetails {
    cached_tokens: Option<u64>,
    audio_tokens: Option<u64>,
    reasoning_tokens: Option<u64>,
}

/// What the complete JSON answer `body` says about itself; nothing, if it is not JSON.
#[must_use]
pub fn parse_answer(dialect: Dialect, body: &[u8]) -> AnswerFacts {
    let Ok(answer) = serde_json::from_slice::<RawAnswer<'_>>(body) else {
        return AnswerFacts::default();
    };
    let finish_reason = match dialect {
        Dialect::Chat | Dialect::Completions => answer.choices.and_then(|raw| last_reason(raw.get().as_bytes())),
        Dialect::Responses => answer.stop_reason(),
        Dialect::Embeddings => None,
    };
    let usage = answer.usage.and_then(|raw| parse_usage(raw.get().as_bytes()));
    AnswerFacts { usage, finish_reason, is_error: answer.error.is_some() }
}

/// The facts of an answer that nowhere speaks of an error, and whose outermost object ends with the body and has one usage
/// that can be believed: of nearly all, at a quarter of the time of parsing. `body` must be complete; of one that was cut
/// off, a usage further inside could be taken for the one outside.
fn search(body: &[u8]) -> Option<AnswerFacts> {
    let is_object = body.trim_ascii_start().first() == Some(&b'{');
    if !is_object || ERROR.find(body).is_some() {
        return None;
    }
    let (only, others) = {
        let mut hits = USAGE.rfind_iter(body);
        (hits.next()?, hits.next())
    };
    let member = scan::member_at(body, only, USAGE.needle().len()).filter(|_| others.is_none())?;
    if !scan::closes_the_document(body, member.value.end, 1) {
        return None;
    }
    let usage = parse_usage(&body[member.value])?;
    Some(AnswerFacts { usage: Some(usage), finish_reason: last_reason(body), is_error: false })
}

/// Everything raw: a surprise in one member must not cost the others.
#[derive(Deserialize)]
struct RawAnswer<'a> {
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
    #[serde(borrow)]
    choices: Option<&'a RawValue>,
    #[serde(borrow)]
    status: Option<&'a RawValue>,
    #[serde(borrow)]
    incomplete_details: Option<&'a RawValue>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
}

impl RawAnswer<'_> {
    fn stop_reason(&self) -> Option<String> {
        let mut reason = None;
        if let Some(details) = self.incomplete_details {
            json::each_member(details.get(), |name, value| {
                if name == "reason" {
                    reason = json::string(value);
                }
            });
        }
        let reason = reason.or_else(|| json::string(self.status?.get()))?;
        believable_reason(reason.as_bytes()).map(str::to_owned)
    }
}

fn last_reason(json: &[u8]) -> Option<String> {
    let raw = scan::last_string(json, &FINISH_REASON)?;
    believable_reason(raw).map(str::to_owned)
}

/// A word that can be put on the books as it is: short, printable, without escapes.
pub(super) fn believable_reason(raw: &[u8]) -> Option<&str> {
    let plain = |byte: &u8| byte.is_ascii_graphic() && *byte != b'\\';
    let fits = !raw.is_empty() && raw.len() <= MAX_REASON_BYTES && raw.iter().all(plain);
    std::str::from_utf8(raw).ok().filter(|_| fits)
}

/// Watches the body of a JSON answer go by.
#[derive(Debug)]
pub struct JsonMeter {
    dialect: Dialect,
    is_framed: bool,
    kept: Kept,
    total_bytes: u64,
}

#[derive(Debug)]
enum Kept {
    /// The whole body so far, as it came.
    Chunks(Vec<Bytes>),
    /// The whole body so far, joined.
    Joined(Vec<u8>),
    /// The end of a body that is too large.
    Tail(Vec<u8>),
}

impl JsonMeter {
    /// A meter for one answer. `is_framed`: does HTTP say where its body ends?
    #[must_use]
    pub fn new(dialect: Dialect, is_framed: bool) -> Self {
        Self { dialect, is_framed, kept: Kept::Chunks(Vec::new()), total_bytes: 0 }
    }

    /// Takes note of the next `chunk` of the body.
    pub fn feed(&mut self, chunk: &Bytes) {
        self.total_bytes += chunk.len() as u64;
        if self.total_bytes > MAX_WHOLE_BYTES as u64 {
            self.keep_tail(chunk);
            return;
        }
        match &mut self.kept {
            Kept::Chunks(chunks) if chunks.len() < MAX_CHUNKS => chunks.push(chunk.clone()),
            Kept::Chunks(chunks) => {
                let mut joined = chunks.concat();
                joined.extend_from_slice(chunk);
                self.kept = Kept::Joined(joined);
            }
            Kept::Joined(joined) | Kept::Tail(joined) => joined.extend_from_slice(chunk),
        }
    }

    fn keep_tail(&mut self, chunk: &[u8]) {
        let mut tail = match &mut self.kept {
            Kept::Chunks(chunks) => chunks.concat(),
            Kept::Joined(bytes) | Kept::Tail(bytes) => std::mem::take(bytes),
        };
        tail.extend_from_slice(&chunk[chunk.len().saturating_sub(TAIL_BYTES)..]);
        if tail.len() > 2 * TAIL_BYTES {
            tail.drain(..tail.len() - TAIL_BYTES);
            tail.shrink_to(2 * TAIL_BYTES);
        }
        self.kept = Kept::Tail(tail);
    }

    /// Length of the body so far.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Ends the body: what it says about itself, and the body if it was small enough to be kept whole
    /// ([`MAX_WHOLE_BYTES`]), for an estimate where the usage is missing.
    #[must_use]
    pub fn finish(self) -> (AnswerFacts, Option<Bytes>) {
        let whole = match self.kept {
            Kept::Tail(tail) => return (facts_of_tail(&tail), None),
            Kept::Joined(bytes) => Bytes::from(bytes),
            Kept::Chunks(mut chunks) if chunks.len() == 1 => chunks.remove(0),
            Kept::Chunks(chunks) => Bytes::from(chunks.concat()),
        };
        let is_searched = self.is_framed && self.dialect != Dialect::Responses;
        let found = is_searched.then(|| search(&whole)).flatten();
        let facts = found.unwrap_or_else(|| parse_answer(self.dialect, &whole));
        (facts, Some(whole))
    }
}

/// What the last bytes of an answer say: the last `usage` of the outermost object that can be believed.
fn facts_of_tail(tail: &[u8]) -> AnswerFacts {
    let usage = USAGE.rfind_iter(tail).take(scan::MAX_HITS).find_map(|hit| {
        let member = scan::member_at(tail, hit, USAGE.needle().len())?;
        let is_outermost = scan::closes_the_document(tail, member.value.end, 1);
        is_outermost.then(|| parse_usage(&tail[member.value]))?
    });
    AnswerFacts { usage, ..AnswerFacts::default() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CHAT: &str = r#"{"id":"chatcmpl-1","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant",
        "content":"\"usage\":{\"prompt_tokens\":1}"},"logprobs":null,"finish_reason":"length"}],"usage":{"prompt_tokens":11,
        "completion_tokens":7,"total_tokens":18,"prompt_tokens_details":{"cached_tokens":4,"audio_tokens":1},
        "completion_tokens_details":{"reasoning_tokens":3,"audio_tokens":2,"accepted_prediction_tokens":0}},"x":null}"#;

    fn facts(dialect: Dialect, body: &str) -> AnswerFacts {
        metered(dialect, body.as_bytes(), body.len().max(1)).0
    }

    fn metered(dialect: Dialect, body: &[u8], chunk_len: usize) -> (AnswerFacts, Option<Bytes>) {
        let mut meter = JsonMeter::new(dialect, true);
        body.chunks(chunk_len).for_each(|chunk| meter.feed(&Bytes::copy_from_slice(chunk)));
        assert_eq!(meter.total_bytes(), body.len() as u64);
        meter.finish()
    }

    #[test]
    fn usage_is_read_in_every_dialect() {
        let chat = facts(Dialect::Chat, CHAT);
        let expected =
            Usage { prompt_tokens: 11, completion_tokens: 7, cached_tokens: 4, reasoning_tokens: 3, audio_tokens: 3 };
        assert_eq!((chat.usage, chat.finish_reason.as_deref()), (Some(expected), Some("length")));

        let embeddings = facts(Dialect::Embeddings, r#"{"data":[],"usage":{"prompt_tokens":8,"total_tokens":8}}"#);
        assert_eq!(embeddings.usage, Some(Usage { prompt_tokens: 8, ..Usage::default() }));

        let responses = facts(
            Dialect::Responses,
            r#"{"status":"incomplete","incomplete_details":{"reason":"max_output_tokens"},"output":[],"usage":{"input_tokens":5,
                "input_tokens_details":{"cached_tokens":2},"output_tokens":9,"output_tokens_details":{"reasoning_tokens":6}}}"#,
        );
        let expected =
            Usage { prompt_tokens: 5, completion_tokens: 9, cached_tokens: 2, reasoning_tokens: 6, ..Usage::default() };
        assert_eq!(responses.usage, Some(expected));
        assert_eq!(responses.finish_reason.as_deref(), Some("max_output_tokens"));
        let completed = facts(Dialect::Responses, r#"{"status":"completed","incomplete_details":null}"#);
        assert_eq!(completed.finish_reason.as_deref(), Some("completed"));
    }

    #[test]
    fn an_error_is_one_whatever_its_status_said() {
        for (body, is_error) in [
            (r#"{"error":{"message":"overloaded"}}"#, true),
            (r#"{"status":"failed","error":{"code":"server_error"}}"#, true),
            (r#"{"status":"completed","error":null}"#, false),
            (r#"{"choices":[{"message":{"content":"\"error\":{}"}}]}"#, false),
            ("no JSON", false),
        ] {
            assert_eq!(facts(Dialect::Responses, body).is_error, is_error, "{body}");
        }
    }

    #[test]
    fn usage_is_believed_whole_or_not_at_all() {
        for bad in [
            "null",
            "{}",
            "[]",
            "7",
            r#"{"completion_tokens":1}"#,
            r#"{"total_tokens":1}"#,
            r#"{"prompt_tokens":-1,"completion_tokens":1}"#,
            r#"{"prompt_tokens":1.5,"completion_tokens":1}"#,
            r#"{"prompt_tokens":"1","completion_tokens":1}"#,
            r#"{"prompt_tokens":1,"completion_tokens":10000000001}"#,
            r#"{"prompt_tokens":1,"completion_tokens":99999999999999999999}"#,
            r#"{"prompt_tokens":1,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":-1}}"#,
            r#"{"prompt_tokens":1,"completion_tokens":1,"completion_tokens_details":3}"#,
            r#"{"prompt_tokens":1,"prompt_tokens":2}"#,
            r#"{"prompt_tokens":1"#,
        ] {
            assert_eq!(parse_usage(bad.as_bytes()), None, "{bad}");
        }
        let lenient = r#"{"prompt_tokens":3,"total_tokens":5,"prompt_tokens_details":null,"cost":{"a":0.1}}"#;
        let expected = Usage { prompt_tokens: 3, completion_tokens: 2, ..Usage::default() };
        assert_eq!(parse_usage(lenient.as_bytes()), Some(expected));
    }

    #[test]
    fn a_surprise_in_one_member_does_not_cost_the_others() {
        let facts =
            facts(Dialect::Chat, r#"{"choices":7,"status":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}"#);
        assert!(facts.usage.is_some());
        assert_eq!(facts.finish_reason, None);
        let long = format!(r#"{{"choices":[{{"finish_reason":"{}"}}]}}"#, "x".repeat(65));
        assert_eq!(parse_answer(Dialect::Chat, long.as_bytes()).finish_reason, None);
    }

    #[test]
    fn a_body_of_one_chunk_is_not_copied() {
        let body = Bytes::from_static(CHAT.as_bytes());
        let mut meter = JsonMeter::new(Dialect::Chat, true);
        meter.feed(&body);
        assert_eq!(meter.finish().1.unwrap().as_ptr(), body.as_ptr());
    }

    #[test]
    fn a_body_in_crumbs_is_joined() {
        let (facts, whole) = metered(Dialect::Chat, CHAT.as_bytes(), 1);
        assert_eq!(facts.usage.unwrap().prompt_tokens, 11);
        assert_eq!(whole.unwrap(), CHAT.as_bytes());
    }

    #[test]
    fn the_usage_of_a_large_body_is_found_at_its_end() {
        let filler = "x".repeat(MAX_WHOLE_BYTES);
        let usage = r#""usage":{"prompt_tokens":2,"total_tokens":2}"#;
        let cases = [
            (format!(r#"{{"data":"{filler}",{usage}}}"#), true),
            (format!(r#"{{"data":"{filler}",{usage},"tools":[{{"usage":{{"prompt_tokens":1}}}}]}}"#), true),
            (format!(r#"{{"data":"{filler}","tools":[{{{usage}}}]}}"#), false),
            (format!(r#"{{"data":"{filler}",{usage}"#), false),
            (format!(r#"{{{usage},"data":"{filler}"}}"#), false),
        ];
        for (body, found) in cases {
            for chunk_len in [1000, 65_536, 300_000, body.len()] {
                let (facts, whole) = metered(Dialect::Embeddings, body.as_bytes(), chunk_len);
                assert_eq!(facts.usage.map(|usage| usage.prompt_tokens), found.then_some(2), "{}", body.len());
                assert_eq!(whole, None);
            }
        }
    }

    /// A member of an answer, with what could mislead a search in it.
    fn member() -> impl Strategy<Value = String> {
        let name = prop::sample::select(vec!["id", "x", "usage", "error", "\\\"usage"]);
        let value = prop::sample::select(vec![
            "1",
            "null",
            r#""\"usage\":{\"prompt_tokens\":1}""#,
            r#"{"usage":{"prompt_tokens":1}}"#,
            r#""}]""#,
            "{}",
        ]);
        (name, any::<u8>(), value).prop_map(|(name, number, value)| format!("\"{name}{number}\":{value}"))
    }

    #[test]
    fn the_usual_answer_is_searched() {
        assert_eq!(search(CHAT.as_bytes()), Some(parse_answer(Dialect::Chat, CHAT.as_bytes())));
    }

    #[test]
    fn what_may_be_cut_off_is_parsed() {
        let mut meter = JsonMeter::new(Dialect::Chat, false);
        meter.feed(&Bytes::from_static(br#"{"x":{"usage":{"prompt_tokens":1}}"#));
        assert_eq!(meter.finish().0, AnswerFacts::default());
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn chunking_does_not_matter(chunk_len in 1..900_usize) {
            prop_assert_eq!(metered(Dialect::Chat, CHAT.as_bytes(), chunk_len).0, facts(Dialect::Chat, CHAT));
        }

        #[test]
        fn searching_finds_what_parsing_finds(
            before in prop::collection::vec(member(), 0..4),
            usage in prop::option::of(0..100_u32),
            choices in prop::option::of(Just(
                r#""choices":[{"finish_reason":"stop","message":{"content":"\\"}},{"finish_reason":"length"}]"#.to_owned(),
            )),
            after in prop::collection::vec(member(), 0..3),
        ) {
            let usage = usage.map(|n| format!("\"usage\":{{\"prompt_tokens\":{n},\"total_tokens\":{n}}}"));
            let members: Vec<String> = before.into_iter().chain(usage).chain(choices).chain(after).collect();
            let body = format!("{{{}}}", members.join(","));
            if let Some(found) = search(body.as_bytes()) {
                prop_assert_eq!(found, parse_answer(Dialect::Chat, body.as_bytes()));
            }
        }

        #[test]
        fn garbage_does_no_harm(body in prop::collection::vec(any::<u8>(), 0..64)) {
            prop_assert_eq!(parse_answer(Dialect::Chat, &body), AnswerFacts::default());
            prop_assert_eq!(facts_of_tail(&body), AnswerFacts::default());
        }
    }
}
