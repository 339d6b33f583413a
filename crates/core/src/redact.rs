//! Taking out of a text what is personal or secret, before it is written anywhere.
//!
//! What goes, and what is put in its place:
//!
//! | what | becomes |
//! |---|---|
//! | what a pattern of the configuration matches | `[redacted:custom]` |
//! | `data:` URLs and other long runs of base64: pictures, sound, files | `[redacted:data image/png 1234 bytes]` |
//! | private keys, JWTs, API keys and tokens by their marks, passwords in URLs and beside their name | `[redacted:secret]` |
//! | e-mail addresses | `[redacted:email]` |
//! | card numbers: the digits of a card's scheme that pass the Luhn check | `[redacted:card]` |
//! | phone numbers | `[redacted:phone]` |
//! | arrays of numbers: texts as tokens or bytes, embeddings | `["[redacted:numbers 1536]"]` |
//! | `logprobs`, which repeat an answer token by token | `"[redacted:logprobs]"` |
//!
//! Guarantees, each a property test: redacting twice is redacting once; what was JSON is JSON afterwards, whatever escapes
//! its strings are written with; no input makes it panic, and its time is linear in its size.
//!
//! **What is not taken for something that it is not**: UUIDs, ids of the API (`chatcmpl-...`), dates, Unix times in seconds
//! to nanoseconds, versions, IP addresses. Where a number could be one thing or the other (a US phone number without
//! separators is ten digits, as a Unix time is), it stays unless the word before it says what it is. A card number in an
//! order number that passes Luhn by chance goes: one in ten of those that begin like a card.
//!
//! **What is not found**: names, addresses, what is spelled out or split over two strings. No pattern finds those.

mod custom;
mod digits;
mod json;
mod patterns;

use std::borrow::Cow;

use self::custom::Custom;
pub use self::custom::{BadPattern, MAX_PATTERNS};

/// Rounds until nothing is found any more. Each takes something out, and what the first did not see is rare.
const MAX_ROUNDS: usize = 8;

/// What stands where something was taken out.
fn marker(kind: &str) -> String {
    format!("[redacted:{kind}]")
}

/// Takes out what is built in, and what the patterns of the configuration match.
#[derive(Clone, Debug, Default)]
pub struct Redactor {
    custom: Custom,
}

impl Redactor {
    /// One that knows the patterns `custom` besides what is built in.
    ///
    /// # Errors
    /// What is wrong with the first pattern that cannot be used.
    pub fn try_new<'p>(custom: impl IntoIterator<Item = &'p str>) -> Result<Self, BadPattern> {
        Ok(Self { custom: Custom::try_new(custom)? })
    }

    /// The `body` without what goes. It is read as JSON if it is JSON; else as text, in which strings of JSON that was cut off
    /// are still seen. What is no UTF-8 becomes replacement characters.
    #[must_use]
    pub fn body(&self, body: &[u8]) -> Vec<u8> {
        let text = String::from_utf8_lossy(body);
        json::body(self, &text).into_owned().into_bytes()
    }

    /// The `text`, which is no JSON, without what goes.
    #[must_use]
    pub fn text<'t>(&self, text: &'t str) -> Cow<'t, str> {
        let mut left = Cow::Borrowed(text);
        for _ in 0..MAX_ROUNDS {
            match self.round(&left) {
                Some(changed) => left = Cow::Owned(changed),
                None => break,
            }
        }
        left
    }

    /// Takes out what is found at once; `None`: nothing is.
    fn round(&self, text: &str) -> Option<String> {
        let mut left: Option<String> = None;
        let mut step = |taken: &dyn Fn(&str) -> Option<String>| {
            if let Some(changed) = taken(left.as_deref().unwrap_or(text)) {
                left = Some(changed);
            }
        };
        step(&|text| self.custom.take_out(text));
        step(&patterns::take_out);
        step(&digits::take_out);
        left
    }
}

/// Puts markers in the place of parts of a text, from its beginning to its end.
struct Cutter<'t> {
    text: &'t str,
    out: String,
    copied: usize,
}

impl<'t> Cutter<'t> {
    fn new(text: &'t str) -> Self {
        Self { text, out: String::new(), copied: 0 }
    }

    /// Replaces `part`, which begins no earlier than the last one ended.
    fn replace(&mut self, part: std::ops::Range<usize>, by: &str) {
        self.out.push_str(&self.text[self.copied..part.start]);
        self.out.push_str(by);
        self.copied = part.end;
    }

    /// The text as it is now; `None`: nothing was replaced.
    fn finish(mut self) -> Option<String> {
        if self.out.is_empty() {
            return None;
        }
        self.out.push_str(&self.text[self.copied..]);
        Some(self.out)
    }
}

#[cfg(test)]
mod tests;
