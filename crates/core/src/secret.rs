//! Secrets: values that must not be printed.
//!
//! A [`Secret`] shows `[secret]` in every format, cannot be serialised, and is wiped from memory when it is dropped.
//! The only way to its content is [`Secret::expose`], so `grep expose` lists every place where a secret is used.

use zeroize::Zeroizing;

/// A text that must not reach a log, a message or a metric.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Wraps `text`.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    /// The content. Hand it on to what needs it; never format it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[secret]")
    }
}

/// Why a credential cannot be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsendable {
    /// There is none.
    #[error("is empty")]
    Empty,
    /// It has characters that no credential has.
    #[error("contains white space or characters that cannot be sent in a header")]
    NotPrintable,
}

/// A credential travels in a header; one that cannot would fail every request.
///
/// # Errors
/// Why it cannot be sent; the end of a sentence that begins with where it stands.
pub fn check_sendable(credential: &[u8]) -> Result<(), Unsendable> {
    match credential {
        [] => Err(Unsendable::Empty),
        _ if credential.iter().all(u8::is_ascii_graphic) => Ok(()),
        _ => Err(Unsendable::NotPrintable),
    }
}

#[cfg(test)]
mod tests {
    use super::{Secret, Unsendable, check_sendable};

    #[test]
    fn a_credential_is_printable() {
        assert_eq!(check_sendable(b"sk-proj_1.2/3+4="), Ok(()));
        assert_eq!(check_sendable(b""), Err(Unsendable::Empty));
        for bad in ["a b", "a\n", "a\0", "\u{e9}", "\u{7f}"] {
            assert_eq!(check_sendable(bad.as_bytes()), Err(Unsendable::NotPrintable), "{bad:?}");
        }
    }

    #[test]
    fn a_secret_does_not_show_itself() {
        let secret = Secret::new("sk-very-secret".into());
        assert_eq!(format!("{secret:?} {:#?}", Some(&secret)), "[secret] Some(\n    [secret],\n)");
    }
}
