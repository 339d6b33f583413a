//! What may have been meant by a name that is not a setting.

use std::collections::{BTreeMap, BTreeSet};

/// The message for the unknown setting `name` of `section`, given every setting that exists.
pub(super) fn unknown(section: &str, name: &str, known: &BTreeMap<String, BTreeSet<String>>) -> String {
    let here = known.get(section);
    if let Some(meant) = here.and_then(|names| closest(name, names)) {
        return format!("unknown setting; did you mean `{meant}`?");
    }
    if let Some(home) = known.iter().find(|(_, names)| names.contains(name)).map(|(home, _)| header(home)) {
        return format!("unknown setting here; `{name}` belongs {home}");
    }
    let names: Vec<&str> = here.into_iter().flatten().map(String::as_str).collect();
    format!("unknown setting; what can stand here: {}", names.join(", "))
}

/// The name with the fewest edits, if they are few for its length.
fn closest<'n>(name: &str, names: &'n BTreeSet<String>) -> Option<&'n str> {
    let near = |candidate: &&String| strsim::osa_distance(name, candidate) <= 1 + candidate.len() / 4;
    names.iter().filter(near).min_by_key(|candidate| strsim::osa_distance(name, candidate)).map(String::as_str)
}

fn header(section: &str) -> String {
    match section.strip_suffix("[]") {
        Some(repeated) => format!("in [[{repeated}]]"),
        None if section.is_empty() => "at the top of the file".to_owned(),
        None => format!("in [{}]", section.replace('*', "\"a-name\"")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(section: &str, name: &str) -> String {
        let set = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        let known = BTreeMap::from([
            (String::new(), set(&["server", "upstream"])),
            ("server".to_owned(), set(&["listen", "tls_listen", "max_body"])),
            ("upstream[]".to_owned(), set(&["base_url", "weight"])),
            ("models.*".to_owned(), set(&["aliases"])),
        ]);
        unknown(section, name, &known)
    }

    #[test]
    fn a_typo_is_recognised() {
        assert_eq!(message("server", "lisen"), "unknown setting; did you mean `listen`?");
        assert_eq!(message("server", "tls-listen"), "unknown setting; did you mean `tls_listen`?");
        assert_eq!(message("upstream[]", "wieght"), "unknown setting; did you mean `weight`?");
        assert_eq!(message("", "upstreams"), "unknown setting; did you mean `upstream`?");
    }

    #[test]
    fn a_setting_in_the_wrong_section_is_sent_home() {
        assert_eq!(message("", "max_body"), "unknown setting here; `max_body` belongs in [server]");
        assert_eq!(message("server", "base_url"), "unknown setting here; `base_url` belongs in [[upstream]]");
        assert_eq!(message("server", "aliases"), "unknown setting here; `aliases` belongs in [models.\"a-name\"]");
    }

    #[test]
    fn anything_else_gets_the_list() {
        assert_eq!(message("server", "colour"), "unknown setting; what can stand here: listen, max_body, tls_listen");
    }
}
