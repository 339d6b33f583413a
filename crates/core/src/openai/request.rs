//! The head of a request body: the few members that the gateway decides by.
//!
//! [`parse`] checks the whole document (UTF-8, JSON, no name twice), reads the head, and remembers where in the original
//! bytes the parts stand that [`rewrite`](super::rewrite) may have to change. What it does not know it leaves alone.
//!
//! **A body that names a member twice is refused.** JSON allows it and says nothing of which one counts, so the gateway
//! could check one model and the provider run another. Names are compared after their escapes are resolved
//! (`"mod\u0065l"` is `"model"`), for every member, because which of them will matter tomorrow is the provider's choice.
//!
//! Nesting costs nothing here: values are skipped by a loop, so neither depth nor size can exhaust the stack.

use std::{borrow::Cow, ops::Range};

use thiserror::Error;

use super::json::{self, Stopped};
use crate::price::Tier;

/// Longest model name that is accepted, in bytes.
pub const MAX_MODEL_BYTES: usize = 256;
/// How much of `user` and `prompt_cache_key` is kept, in bytes.
pub const MAX_HINT_BYTES: usize = 256;
/// Most members that the outermost object may have. It bounds the search for names that stand there twice.
pub const MAX_FIELDS: usize = 512;

/// How much of a client's own words an error message repeats, in bytes.
const MAX_QUOTED_BYTES: usize = 64;

/// What the gateway knows of a request body; kept next to the bytes it was read from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestHead {
    /// Model that is asked for.
    pub model: String,
    /// Is the answer to be streamed?
    pub stream: bool,
    /// Did the client ask for usage in the stream (`stream_options.include_usage`)?
    pub include_usage: bool,
    /// Upper limit for the output: `max_tokens`, `max_completion_tokens` or `max_output_tokens`, the largest if several
    /// are given. `None` also for what is not a number: to refuse it is up to the provider.
    pub max_output_tokens: Option<u64>,
    /// How many answers are to be written: `n` or `best_of`, the larger, at least 1.
    pub choices: u64,
    /// Is the answer to be made in the background (`background`)? Then each time it is asked for is work of its own.
    pub background: bool,
    /// In which tier the provider is to work (`service_tier`); what the answer says goes before it.
    pub tier: Tier,
    /// The client's `user`, at most [`MAX_HINT_BYTES`] of it.
    pub user: Option<String>,
    /// The client's `prompt_cache_key`, at most [`MAX_HINT_BYTES`] of it.
    pub prompt_cache_key: Option<String>,
    /// Where the value of `model` stands in the body, its quotes included.
    pub(super) model_at: Range<usize>,
    /// Where a new first member can be inserted (with a comma after it: `model` is there, so it is never the only one).
    pub(super) insert_at: usize,
    /// What `stream_options` is, and where.
    pub(super) stream_options: StreamOptions,
}

impl RequestHead {
    /// Would asking for usage change this body? If so, and if it is asked, the usage is not the client's to see.
    ///
    /// False if the client asks itself, if nothing is streamed, and if its `stream_options` are of a wrong type: then they
    /// are passed on as they are, for the provider to refuse.
    #[must_use]
    pub fn can_ask_usage(&self) -> bool {
        self.stream && !self.include_usage && self.stream_options != StreamOptions::Unusable
    }
}

/// `stream_options` in the body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum StreamOptions {
    /// Not there.
    Absent,
    /// `null`, which stands here.
    Null(Range<usize>),
    /// An object without `include_usage`; one can be inserted here.
    Without { insert_at: usize, empty: bool },
    /// An object with `include_usage`, whose value (`true`, `false` or `null`) stands here.
    With(Range<usize>),
    /// Neither object nor null, or with an `include_usage` that is not a boolean.
    Unusable,
}

/// Why a body is refused. The text is for the client.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum HeadError {
    /// No bytes, or nothing but white space.
    #[error("The request body is empty. Send a JSON object with at least a `model`.")]
    Empty,
    /// Not UTF-8.
    #[error("The request body is not valid UTF-8: byte {0} does not belong there. JSON must be sent as UTF-8.")]
    NotUtf8(usize),
    /// The document ends before it is complete.
    #[error("The request body is JSON that ends too early ({0}). Was it cut off on its way?")]
    Truncated(String),
    /// Not JSON.
    #[error("The request body is not valid JSON: {0}.")]
    NotJson(String),
    /// JSON, but not an object.
    #[error("The request body must be a JSON object, like {{\"model\": ...}}.")]
    NotAnObject,
    /// A member is named twice.
    #[error("The request body names the field `{0}` twice. Send it once.")]
    DuplicateField(String),
    /// Too many members.
    #[error("The request body has more than {MAX_FIELDS} fields.")]
    TooManyFields,
    /// No `model`.
    #[error("The request body has no `model`. Name the model to be used.")]
    ModelMissing,
    /// `model` is not a string.
    #[error("The field `model` must be a string.")]
    ModelNotString,
    /// `model` cannot be a name.
    #[error("The field `model` must hold 1 to {MAX_MODEL_BYTES} bytes and no control characters.")]
    ModelUnusable,
    /// `stream` is not a boolean.
    #[error("The field `stream` must be true or false.")]
    StreamNotBoolean,
}

impl HeadError {
    /// The member that is to blame, for `param` of the error envelope.
    #[must_use]
    pub fn param(&self) -> Option<&str> {
        match self {
            Self::DuplicateField(name) => Some(name),
            Self::ModelMissing | Self::ModelNotString | Self::ModelUnusable => Some("model"),
            Self::StreamNotBoolean => Some("stream"),
            _ => None,
        }
    }
}

/// Reads the head of `body`.
///
/// # Errors
/// What is wrong with the body, in words for the client. A member of an unexpected type is an error only where the
/// gateway itself depends on it.
pub fn parse(body: &[u8]) -> Result<RequestHead, HeadError> {
    let text = std::str::from_utf8(body).map_err(|error| HeadError::NotUtf8(error.valid_up_to()))?;
    let Some(open) = text.bytes().position(|byte| !byte.is_ascii_whitespace()) else {
        return Err(HeadError::Empty);
    };
    let mut draft = Draft::new(text);
    json::members(text, |name, value| draft.read(name, value)).map_err(HeadError::from)?;
    draft.finish(open + 1)
}

impl From<Stopped<Self>> for HeadError {
    fn from(stopped: Stopped<Self>) -> Self {
        match stopped {
            Stopped::Refused(error) => error,
            Stopped::Json(error) if error.is_eof() => Self::Truncated(error.to_string()),
            Stopped::Json(error) if error.is_data() => Self::NotAnObject,
            Stopped::Json(error) => Self::NotJson(error.to_string()),
        }
    }
}

/// The head while the members go by.
struct Draft<'t> {
    text: &'t str,
    names: Vec<Cow<'t, str>>,
    model: Option<(String, Range<usize>)>,
    stream: bool,
    stream_options: StreamOptions,
    include_usage: bool,
    max_output_tokens: Option<u64>,
    choices: u64,
    background: bool,
    tier: Tier,
    user: Option<String>,
    prompt_cache_key: Option<String>,
}

impl<'t> Draft<'t> {
    fn new(text: &'t str) -> Self {
        Self {
            text,
            names: Vec::with_capacity(16),
            model: None,
            stream: false,
            stream_options: StreamOptions::Absent,
            include_usage: false,
            max_output_tokens: None,
            choices: 1,
            background: false,
            tier: Tier::Standard,
            user: None,
            prompt_cache_key: None,
        }
    }

    fn read(&mut self, name: Cow<'t, str>, value: &'t str) -> Result<(), HeadError> {
        if self.names.contains(&name) {
            return Err(HeadError::DuplicateField(prefix(&name, MAX_QUOTED_BYTES).to_owned()));
        }
        if self.names.len() == MAX_FIELDS {
            return Err(HeadError::TooManyFields);
        }
        match &*name {
            "model" => self.model = Some((model_name(value)?, json::range_in(self.text, value))),
            "stream" => self.stream = boolean(value).ok_or(HeadError::StreamNotBoolean)?,
            "stream_options" => self.read_stream_options(value)?,
            "max_tokens" | "max_completion_tokens" | "max_output_tokens" => {
                self.max_output_tokens = self.max_output_tokens.max(count(value));
            }
            "n" | "best_of" => self.choices = self.choices.max(count(value).unwrap_or(1)),
            "background" => self.background = value == "true",
            "service_tier" => self.tier = json::string(value).map(|word| Tier::of(&word)).unwrap_or_default(),
            "user" => self.user = hint(value),
            "prompt_cache_key" => self.prompt_cache_key = hint(value),
            _ => {}
        }
        self.names.push(name);
        Ok(())
    }

    fn read_stream_options(&mut self, value: &'t str) -> Result<(), HeadError> {
        let here = json::range_in(self.text, value);
        if value == "null" {
            self.stream_options = StreamOptions::Null(here);
            return Ok(());
        }
        if !value.starts_with('{') {
            self.stream_options = StreamOptions::Unusable;
            return Ok(());
        }
        let (mut include_usage, mut empty) = (None, true);
        json::members(value, |name, value| {
            empty = false;
            if name != "include_usage" {
                return Ok(());
            }
            match include_usage.replace(value) {
                None => Ok(()),
                Some(_) => Err(HeadError::DuplicateField("stream_options.include_usage".to_owned())),
            }
        })?;
        self.stream_options = match include_usage.map(|value| (boolean(value), value)) {
            None => StreamOptions::Without { insert_at: here.start + 1, empty },
            Some((None, _)) => StreamOptions::Unusable,
            Some((Some(asked), value)) => {
                self.include_usage = asked;
                StreamOptions::With(json::range_in(self.text, value))
            }
        };
        Ok(())
    }

    fn finish(self, insert_at: usize) -> Result<RequestHead, HeadError> {
        let (model, model_at) = self.model.ok_or(HeadError::ModelMissing)?;
        Ok(RequestHead {
            model,
            stream: self.stream,
            include_usage: self.include_usage,
            max_output_tokens: self.max_output_tokens,
            choices: self.choices,
            background: self.background,
            tier: self.tier,
            user: self.user,
            prompt_cache_key: self.prompt_cache_key,
            model_at,
            insert_at,
            stream_options: self.stream_options,
        })
    }
}

/// A count, however it is written. What is greater than a count can be is the greatest.
fn count(value: &str) -> Option<u64> {
    if let Ok(count) = value.parse() {
        return Some(count);
    }
    let number: f64 = value.parse().ok().filter(|number| *number > 0.0)?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "positive, and `as` saturates")]
    Some(number.ceil() as u64)
}

fn model_name(value: &str) -> Result<String, HeadError> {
    let name = json::string(value).ok_or(HeadError::ModelNotString)?;
    if name.is_empty() || name.len() > MAX_MODEL_BYTES || name.chars().any(char::is_control) {
        return Err(HeadError::ModelUnusable);
    }
    Ok(name.into_owned())
}

/// `null` counts as false, as it does at the provider.
fn boolean(value: &str) -> Option<bool> {
    match value {
        "true" => Some(true),
        "false" | "null" => Some(false),
        _ => None,
    }
}

fn hint(value: &str) -> Option<String> {
    json::string(value).map(|text| prefix(&text, MAX_HINT_BYTES).to_owned())
}

/// At most `max_bytes` of `text`, in whole characters.
fn prefix(text: &str, max_bytes: usize) -> &str {
    &text[..text.floor_char_boundary(max_bytes)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(body: &str) -> RequestHead {
        parse(body.as_bytes()).unwrap()
    }

    fn error(body: &str) -> HeadError {
        parse(body.as_bytes()).unwrap_err()
    }

    #[test]
    fn the_head_is_read_wherever_it_stands() {
        let body = r#" {"messages":[{"role":"user","content":"hi \"model\":\"x\""}], "model" : "gpt-4o",
            "stream":true,"stream_options":{"include_usage":true},"max_tokens":5,"max_completion_tokens":70,
            "user":"u1","prompt_cache_key":"k","client_metadata":{"model":"no"},"temperature":1e400} "#;
        let head = head(body);
        assert_eq!(head.model, "gpt-4o");
        assert_eq!(&body[head.model_at.clone()], "\"gpt-4o\"");
        assert!(head.stream && head.include_usage && !head.can_ask_usage());
        assert_eq!(head.max_output_tokens, Some(70));
        assert_eq!((head.user.as_deref(), head.prompt_cache_key.as_deref()), (Some("u1"), Some("k")));
        assert_eq!(&body[..head.insert_at], " {");
    }

    #[test]
    fn what_is_absent_or_null_has_its_default() {
        let head = head(r#"{"model":"m","stream":null,"stream_options":null,"max_tokens":null,"user":null}"#);
        assert!(!head.stream && !head.include_usage && !head.can_ask_usage());
        assert_eq!((head.max_output_tokens, head.user), (None, None));
    }

    #[test]
    fn odd_token_limits_are_left_to_the_provider() {
        for odd in ["-1", "-1.5", "\"7\"", "[]", "true"] {
            assert_eq!(head(&format!(r#"{{"model":"m","max_tokens":{odd}}}"#)).max_output_tokens, None, "{odd}");
        }
        for (large, most) in
            [("1.5", 2), ("1e3", 1000), ("1.0", 1), ("99999999999999999999999", u64::MAX), ("1e400", u64::MAX)]
        {
            let body = format!(r#"{{"model":"m","max_tokens":{large}}}"#);
            assert_eq!(head(&body).max_output_tokens, Some(most), "{large} must not pass for no limit");
        }
        assert_eq!(head(r#"{"model":"m","max_output_tokens":0}"#).max_output_tokens, Some(0));
        let both = r#"{"model":"m","max_completion_tokens":70,"max_tokens":5,"max_output_tokens":null}"#;
        assert_eq!(head(both).max_output_tokens, Some(70));
    }

    #[test]
    fn every_field_may_stand_there_once() {
        assert_eq!(error(r#"{"model":"a","mod\u0065l":"b"}"#), HeadError::DuplicateField("model".into()));
        assert_eq!(error(r#"{"x":1,"model":"a","x":1}"#).param(), Some("x"));
        assert_eq!(
            error(r#"{"model":"a","stream_options":{"include_usage":true,"include_usage":false}}"#).param(),
            Some("stream_options.include_usage")
        );
        let long = "é".repeat(100);
        assert_eq!(error(&format!(r#"{{"{long}":1,"{long}":1}}"#)).param(), Some(&*"é".repeat(32)));
        let members = |n: usize| (1..n).map(|i| format!("\"f{i}\":0,")).collect::<String>();
        assert!(parse(format!("{{{}\"model\":\"m\"}}", members(MAX_FIELDS)).as_bytes()).is_ok());
        assert_eq!(error(&format!("{{{}\"model\":\"m\"}}", members(MAX_FIELDS + 1))), HeadError::TooManyFields);
    }

    #[test]
    fn what_is_not_a_json_object_is_told_apart() {
        assert_eq!(error(""), HeadError::Empty);
        assert_eq!(error(" \r\n\t"), HeadError::Empty);
        for text in ["[]", "1", "\"model\"", "null", "[{\"model\":\"m\"}]"] {
            assert_eq!(error(text), HeadError::NotAnObject, "{text}");
        }
        for text in ["{", "{\"model\"", "{\"model\":\"m", "{\"model\":\"m\"", "{\"model\":\"m\",\"a\":[1", "nul"] {
            assert!(matches!(error(text), HeadError::Truncated(_)), "{text}: {:?}", error(text));
        }
        for text in ["hello", "{model:1}", "{\"model\":\"m\"}x", "{\"model\":\"m\",}", "{'model':1}", "\u{feff}{}"] {
            assert!(matches!(error(text), HeadError::NotJson(_)), "{text}: {:?}", error(text));
        }
        assert_eq!(
            error("{\"model\":\"m\",\n\"a\":01}").to_string(),
            "The request body is not valid JSON: invalid number at line 2 column 6."
        );
        assert_eq!(parse(b"{\"model\":\"\xff\"}").unwrap_err(), HeadError::NotUtf8(10));
    }

    #[test]
    fn the_model_must_be_usable_as_a_name() {
        assert_eq!(error("{}"), HeadError::ModelMissing);
        for odd in ["1", "null", "{}", "[\"m\"]", "true", r#""\ud800""#] {
            assert_eq!(error(&format!(r#"{{"model":{odd}}}"#)), HeadError::ModelNotString, "{odd}");
        }
        for odd in ["", "a\\u0000b", "a\\n", &"m".repeat(257)] {
            assert_eq!(error(&format!(r#"{{"model":"{odd}"}}"#)), HeadError::ModelUnusable, "{odd}");
        }
        assert_eq!(head(&format!(r#"{{"model":"{}"}}"#, "m".repeat(256))).model.len(), 256);
        assert_eq!(head(r#"{"model":"\u0067pt"}"#).model, "gpt");
    }

    #[test]
    fn stream_must_be_a_boolean() {
        for odd in ["1", "\"true\"", "[]", "{}"] {
            assert_eq!(error(&format!(r#"{{"model":"m","stream":{odd}}}"#)), HeadError::StreamNotBoolean, "{odd}");
        }
    }

    #[test]
    fn hints_are_cut_between_characters() {
        let head = head(&format!(r#"{{"model":"m","user":"x{}","prompt_cache_key":7}}"#, "é".repeat(200)));
        assert_eq!(head.user.unwrap(), format!("x{}", "é".repeat(127)));
        assert_eq!(head.prompt_cache_key, None);
    }

    #[test]
    fn nesting_cannot_exhaust_the_stack() {
        let (open, close) = ("[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(error(&open), HeadError::NotAnObject);
        assert!(matches!(error(&format!(r#"{{"model":"m","a":{open}"#)), HeadError::Truncated(_)));
        assert_eq!(error(&format!(r#"{{"model":{open}{close}}}"#)), HeadError::ModelNotString);
        assert_eq!(head(&format!(r#"{{"a":{open}{close},"model":"m"}}"#)).model, "m");
        let objects = r#"{"a":"#.repeat(100_000);
        assert!(matches!(error(&objects), HeadError::Truncated(_)));
    }
}
