//! Recognising equal prompts without being able to read any.
//!
//! The hash is keyed (HMAC-SHA256): a plain one of a short prompt could be found by trying. It is about what is asked, not
//! about the request: the model, its settings and how a client happens to write JSON (white space, `\u0041` for `A`) change
//! nothing.

use std::borrow::Cow;

use hmac::{Hmac, Mac};
use sha2::Sha256;
use zeroize::Zeroizing;

use crate::{
    openai::{prompt, text_of},
    route::Dialect,
};

/// The key of the hashes. Who has it can tell whether a prompt is one that he guesses.
#[derive(Clone)]
pub struct HashKey(Zeroizing<[u8; 32]>);

impl HashKey {
    /// A key of 32 random bytes.
    #[must_use]
    pub fn from_random(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }
}

impl std::fmt::Debug for HashKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HashKey(..)")
    }
}

/// The hash of what the request `body` asks.
#[must_use]
pub fn prompt_hash(key: &HashKey, dialect: Dialect, body: &[u8]) -> [u8; 32] {
    let mut hash = keyed(key);
    for (name, value) in prompt(dialect, std::str::from_utf8(body).unwrap_or_default()) {
        add_text(&mut hash, name);
        add_json(&mut hash, value);
    }
    hash.finalize().into_bytes().into()
}

/// HMAC by `key`, which is filled with zeros up to a block, as HMAC itself does with keys that are shorter.
fn keyed(key: &HashKey) -> Hmac<Sha256> {
    let mut block = hmac::digest::Key::<Hmac<Sha256>>::default();
    block[..32].copy_from_slice(&*key.0);
    Hmac::new(&block)
}

/// A text with its length before it, so that no two rows of texts look the same.
fn add_text(hash: &mut Hmac<Sha256>, text: &str) {
    hash.update(&(text.len() as u64).to_le_bytes());
    hash.update(text.as_bytes());
}

/// A value without the white space between its parts, and with its strings as the texts that they are.
fn add_json(hash: &mut Hmac<Sha256>, value: &str) {
    for piece in crate::openai::pieces(value) {
        if piece.starts_with('"') {
            hash.update(b"\"");
            add_text(hash, &text_of(piece).unwrap_or(Cow::Borrowed(piece)));
        } else {
            piece.split_ascii_whitespace().for_each(|part| hash.update(part.as_bytes()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(dialect: Dialect, body: &str) -> [u8; 32] {
        prompt_hash(&HashKey::from_random([7; 32]), dialect, body.as_bytes())
    }

    #[test]
    fn equal_prompts_are_equal_however_they_are_written() {
        let hello = hash(Dialect::Chat, r#"{"model":"a","messages":[{"role":"user","content":"Hi é"}]}"#);
        for same in [
            r#"{"messages": [ {"role":"user", "content":"Hi é"} ],"model":"b","temperature":0.5,"stream":true}"#,
            r#"{"messages":[{"role":"user","content":"\u0048i \u00e9"}],"user":"x"}"#,
        ] {
            assert_eq!(hash(Dialect::Chat, same), hello, "{same}");
        }
        for other in [
            r#"{"messages":[{"role":"user","content":"Hi é "}]}"#,
            r#"{"messages":[{"role":"system","content":"Hi é"}]}"#,
            r#"{"messages":[{"role":"user","content":"Hi é"},{"role":"user","content":""}]}"#,
            r#"{"messages":"[{role:user,content:Hi é}]"}"#,
            r#"{"messages":[]}"#,
            "",
        ] {
            assert_ne!(hash(Dialect::Chat, other), hello, "{other}");
        }
    }

    #[test]
    fn every_part_of_a_prompt_counts() {
        let both = hash(Dialect::Responses, r#"{"input":"a","instructions":"b"}"#);
        assert_eq!(hash(Dialect::Responses, r#"{"instructions":"b","input":"a"}"#), both, "in whatever order");
        assert_ne!(hash(Dialect::Responses, r#"{"input":"b","instructions":"a"}"#), both);
        assert_ne!(hash(Dialect::Responses, r#"{"input":"a"}"#), both);
        let tokens = hash(Dialect::Embeddings, r#"{"input":[1,23]}"#);
        assert_ne!(hash(Dialect::Embeddings, r#"{"input":[12,3]}"#), tokens);
        assert_eq!(hash(Dialect::Embeddings, "{\"input\":[ 1,\n23]}"), tokens);
        assert_ne!(
            hash(Dialect::Completions, r#"{"prompt":"a","suffix":"b"}"#),
            hash(Dialect::Completions, r#"{"prompt":"a"}"#)
        );
    }

    #[test]
    fn it_is_hmac_and_depends_on_the_key() {
        let body = br#"{"prompt":"a"}"#;
        let by = |key: u8| prompt_hash(&HashKey::from_random([key; 32]), Dialect::Completions, body);
        assert_ne!(by(1), by(2));
        let mut expected = Hmac::<Sha256>::new_from_slice(&[1; 32]).unwrap();
        expected.update(b"\x06\0\0\0\0\0\0\0prompt\"\x01\0\0\0\0\0\0\0a");
        assert_eq!(by(1), <[u8; 32]>::from(expected.finalize().into_bytes()));
        assert_eq!(format!("{:?}", HashKey::from_random([1; 32])), "HashKey(..)");
    }
}
