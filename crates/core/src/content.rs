//! Content: what a request asked and what it was answered, as far as it may be kept.
//!
//! Nothing is kept unless somebody says so. Who says it is clear without looking at three places at once: what a key says
//! goes before what its user says, and that before the configuration, whichever of them is the stricter.
//!
//! [`prompt_hash`] makes equal prompts recognisable to whoever has its key, and says nothing to everybody else. [`pack`]
//! and [`unpack`] are the form in which both bodies are compressed and encrypted as one.

mod hash;

use std::str::FromStr;

pub use self::hash::{HashKey, prompt_hash};

/// What is kept of the content of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ContentMode {
    /// Nothing at all.
    #[default]
    None,
    /// A keyed hash of the prompt: equal prompts can be found, and none can be read.
    Hash,
    /// Both bodies, after what is personal or secret was taken out: see [`redact`](crate::redact).
    Redacted,
    /// Both bodies as they are.
    Full,
}

impl ContentMode {
    /// Every mode, from the one that keeps least.
    pub const ALL: [Self; 4] = [Self::None, Self::Hash, Self::Redacted, Self::Full];

    /// The name, as the configuration, the command line and the database have it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Hash => "hash",
            Self::Redacted => "redacted",
            Self::Full => "full",
        }
    }

    /// The mode that holds for a request: the key's own, else that of its user, else the `default`.
    #[must_use]
    pub fn of_request(key: Option<Self>, user: Option<Self>, default: Self) -> Self {
        key.or(user).unwrap_or(default)
    }

    /// Are the bodies kept, in some form?
    #[must_use]
    pub fn keeps_bodies(self) -> bool {
        matches!(self, Self::Redacted | Self::Full)
    }
}

impl FromStr for ContentMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let choice = Self::ALL.into_iter().find(|mode| mode.as_str() == text);
        choice.ok_or_else(|| format!("{text:?} is not a choice: use \"none\", \"hash\", \"redacted\" or \"full\""))
    }
}

/// A request's body and its answer as one text, to be taken apart by [`unpack`].
#[must_use]
pub fn pack(request: &[u8], answer: &[u8]) -> Vec<u8> {
    let length = (request.len() as u64).to_le_bytes();
    [&length[..], request, answer].concat()
}

/// The request's body and its answer; `None`: this is not what [`pack`] made.
#[must_use]
pub fn unpack(packed: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, bodies) = packed.split_first_chunk::<8>()?;
    bodies.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)
}

/// The first `most` bytes of a text, or a little less: no character is cut in two.
#[must_use]
pub fn cut(body: &[u8], most: usize) -> &[u8] {
    if body.len() <= most {
        return body;
    }
    let is_inside = |at: &usize| body[*at] & 0b1100_0000 == 0b1000_0000;
    let back = (0..4).find(|back| *back <= most && !is_inside(&(most - back))).unwrap_or(0);
    &body[..most - back]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn modes_have_names() {
        for mode in ContentMode::ALL {
            assert_eq!(mode.as_str().parse(), Ok(mode));
        }
        assert!("Full".parse::<ContentMode>().unwrap_err().contains("\"redacted\" or \"full\""));
        assert_eq!(ContentMode::default(), ContentMode::None);
    }

    #[test]
    fn the_key_goes_before_the_user_and_the_user_before_the_default() {
        use ContentMode::{Full, Hash, None as Nothing, Redacted};
        for (key, user, default, expected) in [
            (None, None, Nothing, Nothing),
            (None, None, Full, Full),
            (None, Some(Nothing), Full, Nothing),
            (None, Some(Full), Nothing, Full),
            (Some(Nothing), Some(Full), Full, Nothing),
            (Some(Full), Some(Nothing), Nothing, Full),
            (Some(Hash), Some(Redacted), Full, Hash),
        ] {
            assert_eq!(ContentMode::of_request(key, user, default), expected, "{key:?} {user:?} {default:?}");
        }
    }

    #[test]
    fn a_cut_is_never_within_a_character() {
        let text = "aä€😀z";
        for most in 0..=text.len() + 1 {
            let kept = std::str::from_utf8(cut(text.as_bytes(), most)).unwrap();
            assert!(text.starts_with(kept) && kept.len() <= most && most.min(text.len()) - kept.len() < 4, "{most}");
        }
        assert_eq!(cut(&[0x80; 9], 5), [0x80; 5], "what is no text is cut where it is said");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_is_packed_is_unpacked(
            request in prop::collection::vec(any::<u8>(), 0..40),
            answer in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let packed = pack(&request, &answer);
            prop_assert_eq!(unpack(&packed), Some((&request[..], &answer[..])));
        }

        #[test]
        fn garbage_is_unpacked_or_not(garbage in prop::collection::vec(any::<u8>(), 0..24)) {
            if let Some((request, answer)) = unpack(&garbage) {
                prop_assert_eq!(pack(request, answer), garbage);
            }
        }
    }
}
