//! Splicing into a request body.
//!
//! The body is not parsed and written anew: that would change numbers, order, escapes and white space. The few bytes that
//! must differ are exchanged in a copy, at the places that [`RequestHead`] remembers, and all others stay as the client
//! sent them. A body that needs no change is not even copied.

use std::{borrow::Cow, ops::Range};

use bytes::Bytes;

use super::request::{RequestHead, StreamOptions};

/// What shall differ in the body.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Edits<'a> {
    /// The upstream's name of the model; `None`, or the client's own name: `model` stays as it is.
    pub model: Option<&'a str>,
    /// Ask for usage in the stream. Changes only what [`RequestHead::can_ask_usage`] says can be changed.
    pub ask_usage: bool,
}

/// Makes `edits` in `body`, whose head is `head`.
///
/// `head` must have been parsed from this `body`.
#[must_use]
pub fn rewrite(body: &Bytes, head: &RequestHead, edits: &Edits<'_>) -> Bytes {
    let model = edits.model.filter(|model| *model != head.model);
    let model = model.map(|model| Splice { at: head.model_at.clone(), text: Cow::Owned(quoted(model)) });
    let usage = if edits.ask_usage { ask_usage(head) } else { None };
    match (model, usage) {
        (None, None) => body.clone(),
        (Some(only), None) | (None, Some(only)) => spliced(body, &[only]),
        (Some(a), Some(b)) if a.at.start < b.at.start => spliced(body, &[a, b]),
        (Some(a), Some(b)) => spliced(body, &[b, a]),
    }
}

struct Splice {
    at: Range<usize>,
    text: Cow<'static, str>,
}

fn ask_usage(head: &RequestHead) -> Option<Splice> {
    if !head.can_ask_usage() {
        return None;
    }
    let (at, text) = match &head.stream_options {
        StreamOptions::Absent => (head.insert_at..head.insert_at, r#""stream_options":{"include_usage":true},"#),
        StreamOptions::Null(at) => (at.clone(), r#"{"include_usage":true}"#),
        StreamOptions::Without { insert_at, empty: true } => (*insert_at..*insert_at, r#""include_usage":true"#),
        StreamOptions::Without { insert_at, empty: false } => (*insert_at..*insert_at, r#""include_usage":true,"#),
        StreamOptions::With(at) => (at.clone(), "true"),
        StreamOptions::Unusable => return None,
    };
    Some(Splice { at, text: Cow::Borrowed(text) })
}

/// `body` with `splices`, which are in order and do not overlap.
fn spliced(body: &[u8], splices: &[Splice]) -> Bytes {
    let added: usize = splices.iter().map(|splice| splice.text.len()).sum();
    let mut out = Vec::with_capacity(body.len() + added);
    let mut from = 0;
    for splice in splices {
        out.extend_from_slice(&body[from..splice.at.start]);
        out.extend_from_slice(splice.text.as_bytes());
        from = splice.at.end;
    }
    out.extend_from_slice(&body[from..]);
    Bytes::from(out)
}

/// `text` as a JSON string.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::openai::request::parse;

    fn edited(body: &str, model: Option<&str>, ask_usage: bool) -> String {
        let body = Bytes::copy_from_slice(body.as_bytes());
        let head = parse(&body).unwrap();
        String::from_utf8(rewrite(&body, &head, &Edits { model, ask_usage }).to_vec()).unwrap()
    }

    #[test]
    fn usage_is_asked_for_in_every_shape_of_stream_options() {
        let cases = [
            (
                r#"{ "model":"m","stream":true}"#,
                r#"{"stream_options":{"include_usage":true}, "model":"m","stream":true}"#,
            ),
            (
                r#"{"model":"m","stream":true,"stream_options": null }"#,
                r#"{"model":"m","stream":true,"stream_options": {"include_usage":true} }"#,
            ),
            (
                r#"{"stream_options":{ },"model":"m","stream":true}"#,
                r#"{"stream_options":{"include_usage":true },"model":"m","stream":true}"#,
            ),
            (
                r#"{"stream_options":{"include_obfuscation":false},"model":"m","stream":true}"#,
                r#"{"stream_options":{"include_usage":true,"include_obfuscation":false},"model":"m","stream":true}"#,
            ),
            (
                r#"{"stream_options":{"a":1,"include_usage" : false},"model":"m","stream":true}"#,
                r#"{"stream_options":{"a":1,"include_usage" : true},"model":"m","stream":true}"#,
            ),
            (
                r#"{"stream_options":{"include\u005fusage":null},"model":"m","stream":true}"#,
                r#"{"stream_options":{"include\u005fusage":true},"model":"m","stream":true}"#,
            ),
        ];
        for (body, expected) in cases {
            assert_eq!(edited(body, None, true), expected);
        }
    }

    #[test]
    fn what_needs_no_edit_is_the_same_bytes() {
        for body in [
            r#"{"model":"m"}"#,
            r#"{"model":"m","stream":false,"stream_options":{}}"#,
            r#"{"\u006dodel":"\u006d","stream":true,"stream_options":{"include_usage":true}}"#,
            r#"{"model":"m","stream":true,"stream_options":[1]}"#,
            r#"{"model":"m","stream":true,"stream_options":{"include_usage":"yes"}}"#,
        ] {
            let body = Bytes::copy_from_slice(body.as_bytes());
            let head = parse(&body).unwrap();
            let same = rewrite(&body, &head, &Edits { model: Some("m"), ask_usage: true });
            assert_eq!(same.as_ptr(), body.as_ptr(), "{body:?}");
        }
    }

    #[test]
    fn model_names_are_escaped() {
        assert_eq!(edited(r#"{"model" : "m" }"#, Some("a\"b\\c\u{1}é"), false), r#"{"model" : "a\"b\\c\u0001é" }"#);
    }

    /// A member of a generated body: its text before and after the edits.
    type Member = (String, String);

    fn members(model: &'static str) -> impl Strategy<Value = (Vec<Member>, bool)> {
        let same = |text: &str| (text.to_owned(), text.to_owned());
        let name = Just((r#""model": "old""#.to_owned(), format!(r#""model": {}"#, quoted(model))));
        let options = prop_oneof![
            Just((r#""stream_options" :null"#, r#""stream_options" :{"include_usage":true}"#)),
            Just((r#""stream_options":{ "a":[]}"#, r#""stream_options":{"include_usage":true, "a":[]}"#)),
            Just((r#""stream_options":{"include_usage": false }"#, r#""stream_options":{"include_usage": true }"#)),
            Just((r#""stream_options":{"include_usage":true}"#, r#""stream_options":{"include_usage":true}"#)),
        ];
        let options = proptest::option::of(options.prop_map(|(a, b)| (a.to_owned(), b.to_owned())));
        let others = prop::collection::vec(
            prop_oneof![
                Just(r#"1.00000000000000000000000001"#.to_owned()),
                Just(r#"{"model":"x","stream_options":null}"#.to_owned()),
                ".{0,12}".prop_map(|text| quoted(&text)),
            ],
            0..4,
        );
        (name, options, others).prop_flat_map(move |(name, options, others)| {
            let has_options = options.is_some();
            let mut all = vec![name, same(r#""stream":true"#)];
            all.extend(options);
            all.extend(others.iter().enumerate().map(|(i, value)| same(&format!("\"o{i}\" : {value}"))));
            (Just(all).prop_shuffle(), Just(has_options))
        })
    }

    fn object(members: &[&str], space: &str) -> String {
        format!("{space}{{{space}{}{space}}}{space}", members.join(&format!(",{space}")))
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_splice_changes_its_own_fields_and_nothing_else(
            (members, has_options) in members("new \"name\""),
            space in "[ \n\t\r]{0,2}",
        ) {
            let before: Vec<&str> = members.iter().map(|(before, _)| before.as_str()).collect();
            let after: Vec<&str> = members.iter().map(|(_, after)| after.as_str()).collect();
            let body = object(&before, &space);
            let mut expected = object(&after, &space);
            if !has_options {
                expected.insert_str(space.len() + 1, r#""stream_options":{"include_usage":true},"#);
            }
            let out = edited(&body, Some("new \"name\""), true);
            prop_assert_eq!(&out, &expected);
            let head = parse(out.as_bytes()).unwrap();
            prop_assert_eq!((head.model.as_str(), head.stream, head.include_usage), ("new \"name\"", true, true));
        }

        #[test]
        fn no_body_makes_it_panic(body in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(head) = parse(&body) {
                let out = rewrite(&Bytes::from(body), &head, &Edits { model: Some("x"), ask_usage: true });
                prop_assert_eq!(parse(&out).unwrap().model, "x");
            }
        }
    }
}
