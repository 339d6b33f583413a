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

#[cfg(test)]
mod tests {
    use super::Secret;

    #[test]
    fn a_secret_does_not_show_itself() {
        let secret = Secret::new("sk-very-secret".into());
        assert_eq!(format!("{secret:?} {:#?}", Some(&secret)), "[secret] Some(\n    [secret],\n)");
    }
}
