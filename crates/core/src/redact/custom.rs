//! Patterns of the configuration: regular expressions whose matches are taken out.
//!
//! The engine takes linear time whatever the pattern is, so the only thing to bound is its size. A match that touches a
//! marker is left alone, or redacting twice would redact the markers.

use std::{ops::Range, sync::LazyLock};

use regex::{Regex, RegexBuilder};

use super::{Cutter, marker};

/// Most patterns that may be given: each is a pass over every text.
pub const MAX_PATTERNS: usize = 64;
/// Longest pattern, in bytes.
const MAX_PATTERN: usize = 1024;
/// What one pattern may take in memory when it is compiled, in bytes.
const MAX_COMPILED: usize = 1 << 20;

static MARKER: LazyLock<Option<Regex>> = LazyLock::new(|| {
    let kinds = "custom|secret|email|card|phone|logprobs|numbers [0-9]+|data [^\\]\\[]{1,140} bytes";
    Regex::new(&format!("\\[redacted:(?:{kinds})\\]")).ok()
});

/// Why a pattern cannot be used: the end of a sentence that begins with where it stands.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPattern {
    /// It is no regular expression of this engine.
    #[error("{0:?} is not a regular expression: {1}")]
    Syntax(String, String),
    /// Compiled, it is too large.
    #[error("{0:?} is too large when it is compiled: write smaller repetitions, or several patterns")]
    TooLarge(String),
    /// It is too long.
    #[error("a pattern has more than {MAX_PATTERN} bytes: write several shorter ones")]
    TooLong,
    /// It would match everywhere.
    #[error("{0:?} matches the empty text, and so everywhere: write + instead of *, or name at least one character")]
    MatchesNothing(String),
    /// There are too many.
    #[error("there are more than {MAX_PATTERNS} patterns: join some with |")]
    TooMany,
}

/// The patterns, compiled.
#[derive(Clone, Debug, Default)]
pub(super) struct Custom(Vec<Regex>);

impl Custom {
    pub(super) fn try_new<'p>(patterns: impl IntoIterator<Item = &'p str>) -> Result<Self, BadPattern> {
        let compiled = patterns.into_iter().map(compile).collect::<Result<Vec<_>, _>>()?;
        if compiled.len() > MAX_PATTERNS { Err(BadPattern::TooMany) } else { Ok(Self(compiled)) }
    }

    /// The text without what the patterns match; `None`: none does.
    pub(super) fn take_out(&self, text: &str) -> Option<String> {
        let mut left: Option<String> = None;
        for pattern in &self.0 {
            if let Some(changed) = take_out(pattern, left.as_deref().unwrap_or(text)) {
                left = Some(changed);
            }
        }
        left
    }
}

fn compile(pattern: &str) -> Result<Regex, BadPattern> {
    if pattern.len() > MAX_PATTERN {
        return Err(BadPattern::TooLong);
    }
    let compiled = RegexBuilder::new(pattern).size_limit(MAX_COMPILED).dfa_size_limit(2 * MAX_COMPILED).build();
    match compiled {
        Ok(regex) if regex.is_match("") => Err(BadPattern::MatchesNothing(pattern.to_owned())),
        Ok(regex) => Ok(regex),
        Err(regex::Error::CompiledTooBig(_)) => Err(BadPattern::TooLarge(pattern.to_owned())),
        Err(error) => Err(BadPattern::Syntax(pattern.to_owned(), reason(&error.to_string()))),
    }
}

/// The last line of the engine's message; the others draw the pattern with an arrow below it.
fn reason(message: &str) -> String {
    let last = message.lines().last().unwrap_or_default();
    last.strip_prefix("error: ").unwrap_or(last).to_owned()
}

fn take_out(pattern: &Regex, text: &str) -> Option<String> {
    let mut found = pattern.find_iter(text).filter(|found| !found.is_empty()).map(|found| found.range()).peekable();
    found.peek()?;
    let markers: Vec<Range<usize>> =
        MARKER.iter().flat_map(|marker| marker.find_iter(text)).map(|found| found.range()).collect();
    let mut cutter = Cutter::new(text);
    for part in found {
        let next = markers.partition_point(|marker| marker.end <= part.start);
        if markers.get(next).is_none_or(|marker| marker.start >= part.end) {
            cutter.replace(part, &marker("custom"));
        }
    }
    cutter.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(pattern: &str) -> String {
        Custom::try_new([pattern]).unwrap_err().to_string()
    }

    #[test]
    fn a_bad_pattern_is_told_with_its_mend() {
        for (pattern, says) in [
            ("EMP-(", "is not a regular expression: unclosed group"),
            (r"(?=x)", "look-around, including look-ahead and look-behind, is not supported"),
            (r"(a)\1", "backreferences are not supported"),
            ("[0-9]*", "matches the empty text, and so everywhere: write + instead of *"),
            (r"\w{1000}{100}", "is too large when it is compiled"),
            (&"a".repeat(1025), "more than 1024 bytes"),
        ] {
            assert!(message(pattern).contains(says), "{pattern}: {}", message(pattern));
        }
        let many = vec!["a"; MAX_PATTERNS + 1];
        assert_eq!(Custom::try_new(many).unwrap_err(), BadPattern::TooMany);
    }

    #[test]
    fn matches_are_taken_out_but_never_of_a_marker() {
        let custom = Custom::try_new([r"EMP-\d{3}", "[a-z]+"]).unwrap();
        assert_eq!(custom.take_out("EMP-123 AB").as_deref(), Some("[redacted:custom] AB"));
        assert_eq!(custom.take_out("x [redacted:email]").as_deref(), Some("[redacted:custom] [redacted:email]"));
        assert_eq!(custom.take_out("[redacted:custom] 1"), None);
        assert_eq!(custom.take_out("123"), None);
    }
}
