//! Errors on the wire: the envelope that OpenAI's clients expect, and providers' texts without what names the account.

use std::borrow::Cow;

use serde_json::json;

/// What stands where something was taken out.
const REDACTED: &[u8] = b"[redacted]";

/// Ends of host names that begin with the name of an Azure resource.
const AZURE_HOSTS: [&[u8]; 3] = [b".openai.azure.com", b".cognitiveservices.azure.com", b".services.ai.azure.com"];

/// OpenAI's error envelope.
///
/// The SDKs choose their exception class by the status, and take `code`, `type` and `param` from here.
#[must_use]
pub fn envelope(message: &str, kind: &str, param: Option<&str>, code: Option<&str>) -> Vec<u8> {
    let error = json!({ "error": { "message": message, "type": kind, "param": param, "code": code } });
    error.to_string().into_bytes()
}

/// Takes out of a provider's error what names the account behind the upstream: ids of organizations, projects and users,
/// secrets (masked ones too), and Azure resources. Every other byte stays; a body without any is not copied.
///
/// The body is cut into words, escapes of JSON strings being borders, and a word goes if it has the mark of an id *and*
/// the look of one. So `task-based` and `user-friendly` stay.
#[must_use]
pub fn scrub(body: &[u8]) -> Cow<'_, [u8]> {
    let mut out = Vec::new();
    let (mut at, mut copied) = (0, 0);
    while at < body.len() {
        let len = word_len(&body[at..]);
        if len == 0 {
            at += escape_len(&body[at..]).unwrap_or(1);
            continue;
        }
        for (start, end) in names_of_account(&body[at..at + len]) {
            out.extend_from_slice(&body[copied..at + start]);
            out.extend_from_slice(REDACTED);
            copied = at + end;
        }
        at += len;
    }
    if copied == 0 {
        return Cow::Borrowed(body);
    }
    out.extend_from_slice(&body[copied..]);
    Cow::Owned(out)
}

/// Length of the run of characters at the start of `text` that ids and host names are made of.
fn word_len(text: &[u8]) -> usize {
    let in_word = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'*' | b'.');
    text.iter().position(|byte| !in_word(byte)).unwrap_or(text.len())
}

/// Length of the JSON escape at the start of `text`, if its letters could be taken for the beginning of a word.
fn escape_len(text: &[u8]) -> Option<usize> {
    match text {
        [b'\\', b'b' | b'f' | b'n' | b'r' | b't', ..] => Some(2),
        [b'\\', b'u', hex @ ..] => hex.get(..4)?.iter().all(u8::is_ascii_hexdigit).then_some(6),
        _ => None,
    }
}

/// The parts of `word` that have to go, in order.
fn names_of_account(word: &[u8]) -> Vec<(usize, usize)> {
    let lower = word.to_ascii_lowercase();
    let host_end = AZURE_HOSTS.iter().find_map(|end| Some(memchr::memmem::find(&lower, end)? + end.len()));
    if let Some(end) = host_end.filter(|&end| !lower.starts_with(b".") && end > 0) {
        return vec![(0, end)];
    }
    let mut start = 0;
    let mut found = Vec::new();
    for part in word.split(|&byte| byte == b'.') {
        if is_id(part) {
            found.push((start, start + part.len()));
        }
        start += part.len() + 1;
    }
    found
}

fn is_id(word: &[u8]) -> bool {
    if let Some(tail) = word.strip_prefix(b"sk-") {
        let has_digit = tail.iter().any(u8::is_ascii_digit);
        return tail.contains(&b'*') || tail.len() >= 12 || (tail.len() >= 6 && has_digit);
    }
    let marks: [&[u8]; 3] = [b"org-", b"proj_", b"user-"];
    let tail = marks.iter().find_map(|mark| word.strip_prefix(*mark));
    tail.is_some_and(|tail| {
        let plain = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'*';
        let tail = &tail[..tail.iter().position(|byte| !plain(byte)).unwrap_or(tail.len())];
        let has = |what: fn(&u8) -> bool| tail.iter().any(what);
        let has_digit = has(u8::is_ascii_digit);
        tail.contains(&b'*') || (tail.len() >= 8 && has_digit) || (tail.len() >= 20 && has(u8::is_ascii_uppercase))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn scrubbed(text: &str) -> String {
        String::from_utf8(scrub(text.as_bytes()).into_owned()).unwrap()
    }

    #[test]
    fn the_envelope_is_openais() {
        let full = envelope("No \"x\"\n\u{1}é", "invalid_request_error", Some("model"), Some("model_not_found"));
        assert_eq!(
            String::from_utf8(full).unwrap(),
            r#"{"error":{"message":"No \"x\"\n\u0001é","type":"invalid_request_error","param":"model","code":"model_not_found"}}"#
        );
        assert_eq!(
            envelope("m", "server_error", None, None),
            br#"{"error":{"message":"m","type":"server_error","param":null,"code":null}}"#
        );
    }

    #[test]
    fn what_names_the_account_is_taken_out() {
        let cases = [
            (
                "Rate limit reached for gpt-4o in organization org-AbCdEfGhIjKlMnOpQrStUvWx on tokens per min (TPM).",
                "Rate limit reached for gpt-4o in organization [redacted] on tokens per min (TPM).",
            ),
            ("Incorrect API key provided: sk-ab***xyz.", "Incorrect API key provided: [redacted]."),
            ("provided: sk-proj-********************wxyz. You", "provided: [redacted]. You"),
            ("key=sk-svcacct-a1B2_c3-d4", "key=[redacted]"),
            ("Project `proj_0a1B2c3D4e5F` is archived", "Project `[redacted]` is archived"),
            ("user-a1b2c3d4e5f6g7h8 org-12345678", "[redacted] [redacted]"),
            (r#"{"message":"a\nsk-abc123def\u201dorg-abc12345"}"#, r#"{"message":"a\n[redacted]\u201d[redacted]"}"#),
            (r#"{"m":"\u201csk-abc123def\u201d"}"#, r#"{"m":"\u201c[redacted]\u201d"}"#),
            ("at https://My-Res.openai.azure.com/openai/x", "at https://[redacted]/openai/x"),
            (r"at https:\/\/res.OpenAI.azure.com:443.", r"at https:\/\/[redacted]:443."),
            (r#"\nres.cognitiveservices.azure.com."#, r#"\n[redacted]."#),
            (r"C:\sk-abc123def", r"C:\[redacted]"),
        ];
        for (text, expected) in cases {
            assert_eq!(scrubbed(text), expected);
        }
    }

    #[test]
    fn ordinary_words_stay_and_nothing_is_copied() {
        for text in [
            "disk-based task-a1b2c3d4e5 user-friendly user-internationalization org-wide org-internal proj_name",
            "risk-12345678 asterisk-*** my-org-abc12345 superuser-a1b2c3d4 user-generated-content-2024",
            "sk-learn sk-based scikit-learn sk-",
            "https://openai.azure.com https://azure.com/x .openai.azure.com gpt-4o-2024-08-06",
            "",
        ] {
            assert!(matches!(scrub(text.as_bytes()), Cow::Borrowed(same) if same == text.as_bytes()), "{text}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn around_a_secret_every_byte_stays(before in "[^a-zA-Z0-9_.*\\\\-]{0,20}", after in "[^a-zA-Z0-9_.*-]{0,20}") {
            let body = format!("{before}sk-proj-a1b2c3d4{after}");
            prop_assert_eq!(scrubbed(&body), format!("{before}[redacted]{after}"));
        }

        #[test]
        fn json_stays_json(text in ".{0,20}(sk-abc123def|r.openai.azure.com|org-a1b2c3d4e5).{0,20}") {
            let body = serde_json::json!({ "error": { "message": text } }).to_string();
            prop_assert!(serde_json::from_slice::<serde_json::Value>(&scrub(body.as_bytes())).is_ok());
        }

        #[test]
        fn garbage_does_no_harm(body in prop::collection::vec(any::<u8>(), 0..64)) {
            let left = scrub(&body);
            prop_assert_eq!(matches!(left, Cow::Borrowed(_)), *left == *body);
        }
    }
}
