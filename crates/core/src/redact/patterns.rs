//! What is found by how it looks: files within texts, secrets, e-mail addresses.
//!
//! A pattern proposes, and where that is not enough a condition decides: a word of the right length with no digit in it is no
//! random token. Where only a part of a match goes, the group `s` is that part.
//!
//! Borders of words are ASCII's (`(?-u:\b)`), which the engine's fast paths know, and right here: a key in the middle of a
//! Chinese sentence begins where its first letter stands.

use std::sync::LazyLock;

use regex::{Captures, Regex};

use super::{Cutter, marker};

/// Most of a media type that is repeated in a marker, in bytes.
const MAX_MIME: usize = 64;

/// What is put in the place of a match; `None`: it stays.
type Judge = fn(&Captures<'_>) -> Option<String>;

struct Rule {
    pattern: Regex,
    judge: Judge,
}

/// In this order: what is in a file is not looked at again.
static RULES: LazyLock<Vec<Rule>> = LazyLock::new(|| {
    let rules: [(&str, Judge); 8] = [
        (DATA_URL, data_url),
        (BASE64, base64),
        (PRIVATE_KEY, |_| Some(marker("secret"))),
        (JWT, |_| Some(marker("secret"))),
        (MARKED, |found| random(&found[0]).then(|| marker("secret"))),
        (BEARER, |found| has_digit(&found["s"]).then(|| marker("secret"))),
        (NAMED, |found| has_digit(&found["s"]).then(|| marker("secret"))),
        (URL_PASSWORD, |_| Some(marker("secret"))),
    ];
    let email: (&str, Judge) = (EMAIL, |_| Some(marker("email")));
    // A pattern that did not compile would let secrets through, so a test counts them.
    let rule = |(pattern, judge)| Regex::new(pattern).ok().map(|pattern| Rule { pattern, judge });
    rules.into_iter().chain([email]).filter_map(rule).collect()
});

const DATA_URL: &str =
    r#"(?i)(?-u:\b)data:(?P<mime>[a-z0-9.+-]+/[a-z0-9.+-]+)(?:;[a-z0-9.+=_-]+)*,(?P<s>[^\s"'<>()\[\]\\]*)"#;

const BASE64: &str = r"[A-Za-z0-9+/_-]{512,}={0,2}";

/// One that does not end goes to the end of the text.
const PRIVATE_KEY: &str = r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----(?s:.*?)(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----|\z)";

const JWT: &str = r"(?-u:\b)eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{2,}(?:\.[A-Za-z0-9_-]*){1,3}";

/// Tokens that say whose they are: OpenAI and its like, our own, GitHub, GitLab, Slack, AWS, Google, Stripe, Hugging Face, npm,
/// PyPI, DigitalOcean, Shopify, SendGrid, Fernet, age.
const MARKED: &str = r"(?-u:\b)(?:(?:sk|xai|pplx)-[A-Za-z0-9_-]{16,}|(?:sk|pk|rk)_(?:live|test|prod)_[A-Za-z0-9_]{16,}|gsk_[A-Za-z0-9]{20,}|tg(?:admin)?-[A-Za-z0-9_-]{32,}|gh[opusr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}|xox[a-z]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{10,}|(?:A3T[A-Z0-9]|AKIA|ASIA|AGPA|AIDA|AROA)[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{30,}|ya29\.[A-Za-z0-9_-]{20,}|GOCSPX-[A-Za-z0-9_-]{20,}|whsec_[A-Za-z0-9+/]{16,}|hf_[A-Za-z0-9]{30,}|npm_[A-Za-z0-9]{30,}|pypi-[A-Za-z0-9_-]{32,}|do[op]_v1_[a-f0-9]{40,}|shp(?:at|ca|pa|ss)_[A-Fa-f0-9]{32}|SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}|gAAAA[A-Za-z0-9_-]{60,}={0,2}|AGE-SECRET-KEY-1[A-Z0-9]{50,})";

const BEARER: &str = r"(?i)(?-u:\b)(?:bearer|basic)[ \t]{1,4}(?P<s>[A-Za-z0-9._~+/-]{16,}={0,2})";

const NAMED: &str = r#"(?i)(?:api[_-]?key|secret(?:[_-]?(?:access[_-]?)?key)?|(?:access|private|account|shared)[_-]?key|token|passw(?:or)?d|passphrase|passwort|kennwort|pwd|密码|密钥)\\{0,4}["'`]?[ \t]{0,4}(?::=|=>|=|:|：| is )[ \t]{0,4}\\{0,4}["'`]?(?P<s>[^\s"'`\\,;<>()\[\]{}]{6,})"#;

const URL_PASSWORD: &str = r#"(?i)(?-u:\b)[a-z][a-z0-9+.-]{1,20}://[^\s/:@"'\[\]]{0,100}:(?P<s>[^\s/@"'\[\]]{1,200})@"#;

const EMAIL: &str = r"\w[\w.%+'-]*(?:@|%40)(?:[\w-]+\.)+(?:xn--[A-Za-z0-9-]+|[A-Za-z]{2,}|\p{L}{2,})";

fn data_url(found: &Captures<'_>) -> Option<String> {
    let mime = &found["mime"];
    let mime = &mime[..mime.len().min(MAX_MIME)];
    let data = found["s"].len();
    let is_base64 =
        found[0].len() > data + 8 && found[0][..found[0].len() - data].to_ascii_lowercase().ends_with(";base64,");
    Some(marker(&format!("data {mime} {} bytes", if is_base64 { data / 4 * 3 } else { data })))
}

/// Base64 of any length has both cases and digits, which a line of dashes or one long word has not.
fn base64(found: &Captures<'_>) -> Option<String> {
    let text = &found[0];
    let has = |what: fn(&u8) -> bool| text.as_bytes().iter().any(what);
    let is_data = has(u8::is_ascii_digit) && has(u8::is_ascii_uppercase) && has(u8::is_ascii_lowercase);
    is_data.then(|| marker(&format!("data base64 {} bytes", text.len() / 4 * 3)))
}

fn has_digit(text: &str) -> bool {
    text.bytes().any(|byte| byte.is_ascii_digit())
}

/// `sk-learn-model-selection` is none; what is drawn at random has a digit, or both cases.
fn random(token: &str) -> bool {
    if token.starts_with('A') {
        return true; // those of AWS, Google and age are of capitals only, and their marks are rare enough
    }
    let tail = token.split_once(['-', '_', '.']).map_or(token, |(_, tail)| tail);
    let has = |what: fn(&u8) -> bool| tail.as_bytes().iter().any(what);
    has(u8::is_ascii_digit) || (has(u8::is_ascii_uppercase) && has(u8::is_ascii_lowercase))
}

/// The text without what the rules find; `None`: they find nothing.
pub(super) fn take_out(text: &str) -> Option<String> {
    let mut left: Option<String> = None;
    for rule in &*RULES {
        if let Some(changed) = apply(rule, left.as_deref().unwrap_or(text)) {
            left = Some(changed);
        }
    }
    left
}

fn apply(rule: &Rule, text: &str) -> Option<String> {
    let mut cutter = Cutter::new(text);
    for found in rule.pattern.captures_iter(text) {
        let is_whole = found.name("mime").is_some() || found.name("s").is_none();
        let part = if is_whole { found.get(0) } else { found.name("s") };
        if let (Some(part), Some(by)) = (part, (rule.judge)(&found)) {
            cutter.replace(part.range(), &by);
        }
    }
    cutter.finish()
}

/// Is a member of this name a secret, whatever its value is?
pub(super) fn names_secret(name: &str) -> bool {
    static NAMES: LazyLock<Option<Regex>> = LazyLock::new(|| {
        let names = "api_?key|secret|(?:client|app)_?secret|secret_?(?:access_?)?key|(?:access|private|account)_?key\
                     |(?:access|auth|refresh|id|session|bearer|api)_?token|passw(?:or)?d|passphrase|pwd|authorization";
        Regex::new(&format!("(?i)^(?:[a-z0-9]{{1,40}}[_-])?(?:{names})$")).ok()
    });
    name.len() <= 80 && NAMES.as_ref().is_some_and(|names| names.is_match(&name.replace('-', "_")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pattern_compiles() {
        for pattern in [DATA_URL, BASE64, PRIVATE_KEY, JWT, MARKED, BEARER, NAMED, URL_PASSWORD, EMAIL] {
            Regex::new(pattern).unwrap_or_else(|error| panic!("{error}"));
        }
        assert_eq!(RULES.len(), 9);
        assert!(names_secret("password") && names_secret("x-api-key") && names_secret("DB_PASSWORD"));
        for name in ["token", "max_tokens", "secretary", "content", "", "api_key_id"] {
            assert!(!names_secret(name), "{name}");
        }
    }
}
