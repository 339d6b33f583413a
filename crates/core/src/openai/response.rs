//! Usage out of JSON answers.
//!
//! Usage is money, so it is believed whole or not at all: a number that is negative, fractional, absurdly large or of the
//! wrong type makes the whole object worthless, and the request is estimated instead. Members that the gateway does not
//! know are ignored.
//!
//! [`JsonMeter`] watches a body go by. It keeps references to the chunks, not copies, and reads once, at the end: it walks over
//! the members of the outermost object, which takes a quarter of the time of parsing. Beyond [`MAX_WHOLE_BYTES`] it keeps only the last [`TAIL_BYTES`] and looks for the usage there, which is where providers put
//! it. What the model wrote cannot mislead that search: within a JSON string every quote is escaped, so a quoted `usage`
//! followed by a colon can only be a key, and it counts only if the rest of the body closes exactly one object around it.

use std::sync::LazyLock;

use bytes::Bytes;
use memchr::memmem::FinderRev;
use serde::Deserialize;

use super::{json, scan, served::Served};
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
static MODEL: LazyLock<FinderRev<'static>> = LazyLock::new(|| FinderRev::new("\"model\""));
static SERVICE_TIER: LazyLock<FinderRev<'static>> = LazyLock::new(|| FinderRev::new("\"service_tier\""));
static FINISH_REASON: LazyLock<FinderRev<'static>> = LazyLock::new(|| FinderRev::new("\"finish_reason\""));

/// What an answer says about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AnswerFacts {
    /// What it consumed; `None`: it does not say, or not believably.
    pub usage: Option<Usage>,
    /// Why the model stopped: `stop`, `length`, `tool_calls`; of a response its status, or why it is incomplete.
    pub finish_reason: Option<String>,
    /// Is it an error, whatever its status says?
    pub is_error: bool,
    /// Who made it.
    pub served: Served,
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
    let (input_image, output_image) = (input.image_tokens.unwrap_or(0), output.image_tokens.unwrap_or(0));
    let usage = Usage {
        prompt_tokens,
        completion_tokens,
        cached_tokens: input.cached_tokens.unwrap_or(0),
        cache_write_tokens: input.cache_write_tokens.unwrap_or(0),
        reasoning_tokens: output.reasoning_tokens.unwrap_or(0),
        audio_tokens: input_audio.saturating_add(output_audio),
        output_audio_tokens: output_audio,
        image_tokens: input_image.saturating_add(output_image),
        output_image_tokens: output_image,
    };
    let counts = [
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.cached_tokens,
        usage.cache_write_tokens,
        usage.reasoning_tokens,
        usage.audio_tokens,
        usage.image_tokens,
    ];
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
    cache_write_tokens: Option<u64>,
    audio_tokens: Option<u64>,
    image_tokens: Option<u64>,
    reasoning_tokens: Option<u64>,
}

/// What the complete JSON answer `body` says about itself; nothing, if it is no object, or not a whole one.
#[must_use]
pub fn parse_answer(dialect: Dialect, body: &[u8]) -> AnswerFacts {
    let Some(answer) = RawAnswer::find(body) else {
        return AnswerFacts::default();
    };
    let finish_reason = match dialect {
        Dialect::Chat | Dialect::Completions => answer.choices.and_then(last_reason),
        Dialect::Responses => answer.stop_reason(),
        Dialect::Embeddings => None,
    };
    let served = Served::of(answer.model.and_then(text), answer.service_tier.and_then(text));
    AnswerFacts { usage: answer.usage.and_then(parse_usage), finish_reason, is_error: answer.error.is_some(), served }
}

/// The members that matter, raw: a surprise in one must not cost the others. What is `null` is as good as not there.
#[derive(Default)]
struct RawAnswer<'a> {
    usage: Option<&'a [u8]>,
    choices: Option<&'a [u8]>,
    status: Option<&'a [u8]>,
    incomplete_details: Option<&'a [u8]>,
    error: Option<&'a [u8]>,
    model: Option<&'a [u8]>,
    service_tier: Option<&'a [u8]>,
}

impl<'a> RawAnswer<'a> {
    fn find(body: &'a [u8]) -> Option<Self> {
        let mut answer = Self::default();
        let mut members = scan::members(body);
        for (name, value) in &mut members {
            let place = match name {
                b"\"usage\"" => &mut answer.usage,
                b"\"choices\"" => &mut answer.choices,
                b"\"status\"" => &mut answer.status,
                b"\"incomplete_details\"" => &mut answer.incomplete_details,
                b"\"error\"" => &mut answer.error,
                b"\"model\"" => &mut answer.model,
                b"\"service_tier\"" => &mut answer.service_tier,
                _ => continue,
            };
            *place = (value != b"null").then_some(value);
        }
        members.is_complete().then_some(answer)
    }

    fn stop_reason(&self) -> Option<String> {
        let mut reason = None;
        if let Some(details) = self.incomplete_details.and_then(text) {
            json::each_member(details, |name, value| {
                if name == "reason" {
                    reason = json::string(value);
                }
            });
        }
        let reason = reason.or_else(|| json::string(text(self.status?)?))?;
        believable_reason(reason.as_bytes()).map(str::to_owned)
    }
}

fn text(raw: &[u8]) -> Option<&str> {
    std::str::from_utf8(raw).ok()
}

fn last_reason(choices: &[u8]) -> Option<String> {
    let raw = scan::last_string_from_end(choices, &FINISH_REASON)?;
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
    /// A meter for one answer.
    #[must_use]
    pub fn new(dialect: Dialect) -> Self {
        Self { dialect, kept: Kept::Chunks(Vec::new()), total_bytes: 0 }
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
        (parse_answer(self.dialect, &whole), Some(whole))
    }
}

/// What the last bytes of an answer say: the last members of the outermost object that can be believed.
fn facts_of_tail(tail: &[u8]) -> AnswerFacts {
    let [model, tier] = [&MODEL, &SERVICE_TIER].map(|name| last_member(tail, name, text));
    let served = Served::of(model, tier);
    AnswerFacts { usage: last_member(tail, &USAGE, parse_usage), served, ..AnswerFacts::default() }
}

/// The last member of the outermost object with this quoted name whose value `parse` believes.
fn last_member<'t, T>(tail: &'t [u8], name: &FinderRev<'_>, parse: impl Fn(&'t [u8]) -> Option<T>) -> Option<T> {
    name.rfind_iter(tail).take(scan::MAX_HITS).find_map(|hit| {
        let member = scan::member_at(tail, hit, name.needle().len())?;
        let is_outermost = scan::closes_the_document(tail, member.value.end, 1);
        is_outermost.then(|| parse(&tail[member.value]))?
    })
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
        let mut meter = JsonMeter::new(dialect);
        body.chunks(chunk_len).for_each(|chunk| meter.feed(&Bytes::copy_from_slice(chunk)));
        assert_eq!(meter.total_bytes(), body.len() as u64);
        meter.finish()
    }

    #[test]
    fn usage_is_read_in_every_dialect() {
        let chat = facts(Dialect::Chat, CHAT);
        let expected = Usage {
            prompt_tokens: 11,
            completion_tokens: 7,
            cached_tokens: 4,
            reasoning_tokens: 3,
            audio_tokens: 3,
            output_audio_tokens: 2,
            ..Usage::default()
        };
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
    fn every_kind_of_token_is_read() {
        let usage = r#"{"prompt_tokens":100,"completion_tokens":50,"prompt_tokens_details":{"cached_tokens":10,
            "cache_write_tokens":20,"audio_tokens":30,"image_tokens":15,"text_tokens":55},"completion_tokens_details":
            {"reasoning_tokens":5,"audio_tokens":6,"image_tokens":7,"text_tokens":32}}"#;
        let expected = Usage {
            prompt_tokens: 100,
            completion_tokens: 50,
            cached_tokens: 10,
            cache_write_tokens: 20,
            reasoning_tokens: 5,
            audio_tokens: 36,
            output_audio_tokens: 6,
            image_tokens: 22,
            output_image_tokens: 7,
        };
        assert_eq!(parse_usage(usage.as_bytes()), Some(expected));
        let responses = usage.replace("prompt_", "input_").replace("completion_", "output_");
        assert_eq!(parse_usage(responses.as_bytes()), Some(expected));
    }

    #[test]
    fn an_answer_says_who_made_it() {
        let served = |body: &str| {
            let Served { model, service_tier } = facts(Dialect::Chat, body).served;
            (model, service_tier.map(String::from))
        };
        let named = |model: &str, tier: &str| (Some(model.to_owned()), Some(tier.to_owned()));
        let body = r#"{"model":"gpt-4o-2024-08-06","service_tier":"flex","usage":{"prompt_tokens":1}}"#;
        assert_eq!(served(body), named("gpt-4o-2024-08-06", "flex"));
        assert_eq!(served(r#"{"model":7,"service_tier":null,"choices":[]}"#), (None, None));
        let large = format!(r#"{{"data":"{}","model":"m","service_tier":"priority"}}"#, "x".repeat(MAX_WHOLE_BYTES));
        assert_eq!(served(&large), named("m", "priority"), "at the end of a large one");
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
            r#"{"prompt_tokens":9223372036854775808,"completion_tokens":1}"#,
            r#"{"prompt_tokens":1e300,"completion_tokens":1}"#,
            r#"{"prompt_tokens":1,"completion_tokens":true}"#,
            r#"{"prompt_tokens":[1],"completion_tokens":1}"#,
            r#"{"prompt_tokens":1,"completion_tokens":1,"prompt_tokens_details":{"cache_write_tokens":1e300}}"#,
            r#"{"prompt_tokens":1,"completion_tokens":1,"prompt_tokens_details":{"image_tokens":"7"}}"#,
            r#"{"prompt_tokens":1,"completion_tokens":1,"completion_tokens_details":{"audio_tokens":-7}}"#,
            r#"{"prompt_tokens":1,"prompt_tokens_details":{"image_tokens":18446744073709551615},
                "completion_tokens_details":{"image_tokens":18446744073709551615}}"#,
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
        let mut meter = JsonMeter::new(Dialect::Chat);
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
            "[-0.0123456789,0.0123456789,0.0123456789]",
            "{}",
        ]);
        (name, any::<u8>(), value).prop_map(|(name, number, value)| format!("\"{name}{number}\":{value}"))
    }

    /// What a parser of JSON finds.
    fn parsed(body: &str) -> AnswerFacts {
        let answer: serde_json::Value = serde_json::from_str(body).unwrap();
        let raw = |name: &str| answer.get(name).map(ToString::to_string);
        let choices = answer["choices"].as_array().into_iter().flatten();
        AnswerFacts {
            usage: raw("usage").and_then(|usage| parse_usage(usage.as_bytes())),
            finish_reason: choices.filter_map(|choice| choice["finish_reason"].as_str()).next_back().map(str::to_owned),
            is_error: answer.get("error").is_some_and(|error| !error.is_null()),
            served: Served::of(raw("model").as_deref(), raw("service_tier").as_deref()),
        }
    }

    #[test]
    fn half_an_answer_says_nothing() {
        let whole = r#"{"x":{"usage":{"prompt_tokens":1}},"usage":{"prompt_tokens":2}}"#;
        assert_eq!(facts(Dialect::Chat, whole).usage.unwrap().prompt_tokens, 2);
        for end in 0..whole.len() {
            assert_eq!(facts(Dialect::Chat, &whole[..end]), AnswerFacts::default(), "{}", &whole[..end]);
        }
        for more in ["}", ",", "{}", "x"] {
            assert_eq!(facts(Dialect::Chat, &format!("{whole}{more}")), AnswerFacts::default(), "{more}");
        }
        assert_eq!(facts(Dialect::Chat, " {} "), AnswerFacts::default());
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn chunking_does_not_matter(chunk_len in 1..900_usize) {
            prop_assert_eq!(metered(Dialect::Chat, CHAT.as_bytes(), chunk_len).0, facts(Dialect::Chat, CHAT));
        }

        #[test]
        fn a_walk_finds_what_parsing_finds(
            before in prop::collection::vec(member(), 0..4),
            usage in prop::option::of(0..100_u32),
            choices in prop::option::of(Just(
                r#""choices":[{"finish_reason":"stop","message":{"content":"\\"}},{"finish_reason":"length"}]"#.to_owned(),
            )),
            after in prop::collection::vec(member(), 0..3),
            (model, tier) in (prop::option::of("\"([a-z0]|\\\\u00e9){0,9}\"|7"), prop::option::of("\"[a-z ]{0,9}\"|null")),
            is_model_first in any::<bool>(),
        ) {
            let model = model.map(|name| format!("\"model\":{name}"));
            let tier = tier.map(|word| format!("\"service_tier\":{word}"));
            let (first, last) = if is_model_first { (model, tier) } else { (tier, model) };
            let usage = usage.map(|n| format!("\"usage\":{{\"prompt_tokens\":{n},\"total_tokens\":{n}}}"));
            let members: Vec<String> =
                first.into_iter().chain(before).chain(usage).chain(choices).chain(after).chain(last).collect();
            let body = format!("{{{}}}", members.join(","));
            prop_assert_eq!(parse_answer(Dialect::Chat, body.as_bytes()), parsed(&body));
        }

        #[test]
        fn garbage_does_no_harm(body in prop::collection::vec(any::<u8>(), 0..64)) {
            prop_assert_eq!(parse_answer(Dialect::Chat, &body), AnswerFacts::default());
            prop_assert_eq!(facts_of_tail(&body), AnswerFacts::default());
        }
    }
}
