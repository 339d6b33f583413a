//! What the mock says and how long it is: one passage, and the tokenizers that OpenAI uses.
//!
//! The passage is cut where the tokenizer cuts first (its "pre-tokens": words, runs of punctuation). Tokens never span
//! such a cut, so the tokens of the pieces add up to the tokens of their concatenation, and an answer of exactly `n`
//! tokens can be put together without searching. A piece is whole UTF-8, as OpenAI's deltas are; the passage holds
//! characters of one to four bytes so that whoever cuts bytes elsewhere is found out.

use std::sync::LazyLock;

use bpe_openai::Tokenizer;

/// The passage. It ends in a line break and begins without a space, so that it can follow itself.
const PASSAGE: &str = "This is the tollgate mock, a stand-in for a model: café crème, naïve Zoë, 漢字と仮名, \
    Ελληνικά, 🚪🔑 and 👩‍🚀. It says the same words every time, and it counts them as the real one would.\n";

/// One token in both vocabularies after anything that the passage holds: fills what no piece fits into.
const FILLER: &str = " a";

/// Texts above this many bytes are counted by their beginning: exact counting of a 30 MB prompt takes seconds.
const COUNTED_BYTES: usize = 1 << 20;

/// A tokenizer of OpenAI's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Vocabulary {
    /// `cl100k_base`: gpt-4, gpt-3.5, the embedding models.
    Cl100k,
    /// `o200k_base`: gpt-4o and everything after it.
    O200k,
}

/// A pre-token of the passage and the number of its tokens.
struct Piece {
    text: &'static str,
    tokens: u32,
}

static CL100K_PIECES: LazyLock<Vec<Piece>> = LazyLock::new(|| Vocabulary::Cl100k.cut_passage());
static O200K_PIECES: LazyLock<Vec<Piece>> = LazyLock::new(|| Vocabulary::O200k.cut_passage());

impl Vocabulary {
    /// The one that `model` is counted with. Unknown names are taken for new models.
    pub(super) fn of(model: &str) -> Self {
        const OLD: [&str; 6] = ["gpt-3.5", "gpt-35", "text-embedding", "davinci", "babbage", "gpt-4"];
        const NEW: [&str; 3] = ["gpt-4o", "gpt-4.1", "gpt-4.5"];
        let name = model.strip_prefix("ft:").unwrap_or(model);
        let is_old = OLD.iter().any(|p| name.starts_with(p)) && !NEW.iter().any(|p| name.starts_with(p));
        if is_old { Self::Cl100k } else { Self::O200k }
    }

    /// Tokens of an answer whose length nobody asked for: the passage, once.
    pub(super) fn natural_tokens(self) -> u32 {
        self.pieces().iter().map(|piece| piece.tokens).sum()
    }

    /// Number of tokens of `text`; above a mebibyte its beginning is counted and the rest taken to be like it.
    pub(super) fn count(self, text: &str) -> u64 {
        if text.len() <= COUNTED_BYTES {
            return self.tokenizer().count(text) as u64;
        }
        let counted = &text[..text.floor_char_boundary(COUNTED_BYTES)];
        self.tokenizer().count(counted) as u64 * text.len() as u64 / counted.len() as u64
    }

    /// The pieces, in order, of a text of exactly `tokens` tokens.
    pub(super) fn compose(self, tokens: u32) -> Vec<&'static str> {
        let mut pieces = Vec::new();
        let mut left = tokens;
        for piece in self.pieces().iter().cycle() {
            if piece.tokens > left {
                break;
            }
            left -= piece.tokens;
            pieces.push(piece.text);
        }
        pieces.extend((0..left).map(|_| FILLER));
        pieces
    }

    /// Cuts `text` into the pieces in which it is streamed.
    pub(super) fn split(self, text: &str) -> Vec<&str> {
        self.tokenizer().split(text).collect()
    }

    fn tokenizer(self) -> &'static Tokenizer {
        match self {
            Self::Cl100k => bpe_openai::cl100k_base(),
            Self::O200k => bpe_openai::o200k_base(),
        }
    }

    fn pieces(self) -> &'static [Piece] {
        match self {
            Self::Cl100k => &CL100K_PIECES,
            Self::O200k => &O200K_PIECES,
        }
    }

    fn cut_passage(self) -> Vec<Piece> {
        let tokenizer = self.tokenizer();
        let tokens = |text: &str| u32::try_from(tokenizer.count(text)).unwrap_or(u32::MAX);
        tokenizer.split(PASSAGE).map(|text| Piece { text, tokens: tokens(text) }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_composed_text_has_exactly_the_tokens_asked_for() {
        for vocabulary in [Vocabulary::Cl100k, Vocabulary::O200k] {
            for tokens in 0..400 {
                let text = vocabulary.compose(tokens).concat();
                assert_eq!(vocabulary.count(&text), u64::from(tokens), "{vocabulary:?} {text:?}");
            }
        }
    }

    #[test]
    fn the_natural_answer_is_the_passage_with_characters_of_every_width() {
        for vocabulary in [Vocabulary::Cl100k, Vocabulary::O200k] {
            let text = vocabulary.compose(vocabulary.natural_tokens()).concat();
            assert_eq!(text, PASSAGE);
            let widths: std::collections::BTreeSet<_> = text.chars().map(char::len_utf8).collect();
            assert_eq!(widths.into_iter().collect::<Vec<_>>(), [1, 2, 3, 4], "{text}");
        }
    }

    #[test]
    fn models_are_counted_with_their_own_tokenizer() {
        for old in ["gpt-4", "gpt-4-turbo", "gpt-3.5-turbo-instruct", "gpt-35-turbo", "text-embedding-3-small"] {
            assert_eq!(Vocabulary::of(old), Vocabulary::Cl100k, "{old}");
        }
        for new in ["gpt-4o", "gpt-4o-mini", "ft:gpt-4o:acme", "gpt-4.1", "gpt-5", "o3", "my-deployment"] {
            assert_eq!(Vocabulary::of(new), Vocabulary::O200k, "{new}");
        }
    }

    #[test]
    fn a_long_text_is_counted_in_proportion() {
        let text = "tollgate ".repeat(400_000);
        let exact = Vocabulary::O200k.count(&text[..900_000]) * 4;
        let counted = Vocabulary::O200k.count(&text);
        assert!(counted.abs_diff(exact) < exact / 100, "{counted} {exact}");
    }
}
