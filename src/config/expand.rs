//! `${VAR}` in a string: the value of an environment variable.
//!
//! A variable that is not set is a mistake, not an empty text: a gateway that starts with an empty credential fails later
//! and elsewhere. `$${` stands for a literal `${`; every other `$` stands for itself. What a variable holds is not looked
//! at again, so a value with `${` in it cannot reach for other variables.
//!
//! What comes out may be a secret, so it is wiped from memory when it is dropped, and put together in a place that is large
//! enough from the start: a text that grows leaves copies of itself behind.

use zeroize::Zeroizing;

/// Looks up environment variables; an argument, so that nothing below `main` touches the process's environment.
pub type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Replaces every `${VAR}` of `text`.
///
/// # Errors
/// A sentence that names every variable that is missing, or the reference that is not one.
pub(super) fn expand(text: &str, env: Env<'_>) -> Result<Zeroizing<String>, String> {
    let parts = parts(text, env)?;
    let mut done = Zeroizing::new(String::with_capacity(parts.iter().map(|part| part.len()).sum()));
    parts.iter().for_each(|part| done.push_str(part));
    Ok(done)
}

/// A part of a text: as it is written, or from a variable.
enum Part<'t> {
    Written(&'t str),
    Variable(Zeroizing<String>),
}

impl std::ops::Deref for Part<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        match self {
            Self::Written(text) => text,
            Self::Variable(text) => text,
        }
    }
}

fn parts<'t>(text: &'t str, env: Env<'_>) -> Result<Vec<Part<'t>>, String> {
    let (mut done, mut rest, mut missing) = (Vec::new(), text, Vec::new());
    while let Some(at) = rest.find("${") {
        let (before, reference) = (&rest[..at], &rest[at + 2..]);
        if let Some(before) = before.strip_suffix('$') {
            done.extend([Part::Written(before), Part::Written("${")]);
            rest = reference;
            continue;
        }
        done.push(Part::Written(before));
        let (name, after) = split_name(reference)?;
        match env(name) {
            Some(value) => done.push(Part::Variable(Zeroizing::new(value))),
            None => missing.push(name),
        }
        rest = after;
    }
    done.push(Part::Written(rest));
    if missing.is_empty() { Ok(done) } else { Err(not_set(&missing)) }
}

fn split_name(reference: &str) -> Result<(&str, &str), String> {
    let name_like = |name: &str| {
        !name.starts_with(|c: char| c.is_ascii_digit())
            && !name.is_empty()
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    };
    reference
        .split_once('}')
        .filter(|(name, _)| name_like(name))
        .ok_or_else(|| "contains \"${\" that is not followed by a variable's name and \"}\": write ${NAME}, or $${ for a literal ${".to_owned())
}

fn not_set(names: &[&str]) -> String {
    match names {
        [name] => format!("the environment variable {name} is not set: set it, or write $${{ for a literal ${{"),
        _ => format!(
            "the environment variables {} are not set: set them, or write $${{ for a literal ${{",
            names.join(", ")
        ),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::expand;

    fn env(name: &str) -> Option<String> {
        match name {
            "KEY" => Some("sk-1".into()),
            "EMPTY" => Some(String::new()),
            "NESTED" => Some("${KEY}".into()),
            _ => None,
        }
    }

    #[test]
    fn variables_are_replaced() {
        let cases = [
            ("plain", "plain"),
            ("${KEY}", "sk-1"),
            ("a${KEY}b${KEY}", "ask-1bsk-1"),
            ("${EMPTY}", ""),
            ("${NESTED}", "${KEY}"),
            ("$${KEY}", "${KEY}"),
            ("$$${KEY}", "$${KEY}"),
            ("$5 $KEY }{", "$5 $KEY }{"),
        ];
        for (text, expected) in cases {
            assert_eq!(expand(text, &env).unwrap().as_str(), expected, "{text}");
        }
    }

    #[test]
    fn missing_variables_and_broken_references_are_named() {
        assert!(expand("${A} ${KEY} ${B}", &env).unwrap_err().contains("A, B are not set"));
        assert!(expand("x${NO_SUCH}", &env).unwrap_err().contains("NO_SUCH is not set"));
        for broken in ["${", "${}", "${KEY", "${1A}", "${a b}", "${KEY:-x}"] {
            assert!(expand(broken, &env).unwrap_err().contains("write ${NAME}"), "{broken}");
        }
    }

    proptest! {
        #[test]
        fn an_escaped_text_comes_back_as_it_was(text in "[a${}_ é]{0,24}") {
            let escaped = text.replace("${", "$${");
            let expanded = expand(&escaped, &env).unwrap();
            prop_assert_eq!(&*expanded, &text);
        }

        #[test]
        fn a_value_is_inserted_as_it_is(value in ".{0,24}", before in "[^$]{0,8}", after in "[^$]{0,8}") {
            let text = format!("{before}${{V}}{after}");
            let lookup = |name: &str| (name == "V").then(|| value.clone());
            let expanded = expand(&text, &lookup).unwrap();
            prop_assert_eq!(&*expanded, &format!("{before}{value}{after}"));
        }

        #[test]
        fn nothing_crashes(text in ".{0,40}") {
            drop(expand(&text, &env));
        }
    }
}
