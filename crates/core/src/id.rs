//! Identifiers of rows. Distinct types, so that a user's id cannot be passed where a key's is meant.

use serde::{Deserialize, Serialize};

macro_rules! row_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub i64);

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

row_id!(
    /// A row of `users`.
    UserId
);
row_id!(
    /// A row of `api_keys`.
    KeyId
);
row_id!(
    /// A row of `upstreams`. Upstreams of the config file have none.
    UpstreamId
);

/// Checks a name that a human gives to a user, key or upstream.
///
/// 1 to 64 characters of `A-Z a-z 0-9 . _ @ + -` and space, not only digits (a number on the command line is an
/// id) and without space at the ends. The set is one that survives shells, CSV files and metric labels.
///
/// # Errors
/// A sentence that says what is wrong with `name`.
pub fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > 64 {
        return Err(format!("the name {name:?} must have 1 to 64 characters"));
    }
    if let Some(bad) = name.chars().find(|c| !c.is_ascii_alphanumeric() && !"._@+- ".contains(*c)) {
        return Err(format!(
            "the name {name:?} contains {bad:?}: use letters, digits, '.', '_', '@', '+', '-' and space"
        ));
    }
    if name.trim() != name {
        return Err(format!("the name {name:?} begins or ends with a space"));
    }
    if name.bytes().all(|b| b.is_ascii_digit()) {
        return Err(format!("the name {name:?} is a number, which would be taken for an id"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::check_name;

    #[test]
    fn names_that_survive_shells_and_labels_pass() {
        for name in ["alice", "team-a", "bob@example.com", "a", "gpt 4 pool", "0x"] {
            assert_eq!(check_name(name), Ok(()), "{name}");
        }
    }

    #[test]
    fn names_that_could_be_mistaken_for_something_else_do_not() {
        for name in ["", "42", " a", "a ", "a\nb", "a/b", "naïve", &"x".repeat(65)] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
    }
}
