//! What goes, what stays, and that redacting does no harm.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn text(text: &str) -> String {
    Redactor::default().text(text).into_owned()
}

fn body(body: &str) -> String {
    String::from_utf8(Redactor::default().body(body.as_bytes())).unwrap()
}

/// Of each pair, the second is what the first must become.
fn becomes(cases: &[(&str, &str)]) {
    for (before, after) in cases {
        assert_eq!(&text(before), after);
        assert_eq!(&text(after), after, "twice is once");
        let inside = json!({ "messages": [{ "content": before }] }).to_string();
        assert_eq!(body(&inside), json!({ "messages": [{ "content": after }] }).to_string());
    }
}

/// All of them must stay as they are.
fn stay(cases: &[&str]) {
    for case in cases {
        assert!(matches!(Redactor::default().text(case), Cow::Borrowed(_)), "{case}: {}", text(case));
    }
}

#[test]
fn e_mail_addresses_go() {
    becomes(&[
        ("write to joe.doe+x@mail.example.co.uk, please", "write to [redacted:email], please"),
        ("<Joe@EXAMPLE.com>", "<[redacted:email]>"),
        ("jörg@münchen.de和mail@例子.中国。", "[redacted:email][redacted:email]。"),
        ("mailto:joe%40example.com?subject=x", "mailto:[redacted:email]?subject=x"),
        ("a@b.co b@c.xn--p1ai", "[redacted:email] [redacted:email]"),
        ("o'brien@example.ie", "[redacted:email]"),
    ]);
    stay(&[
        "@joe",
        "joe@",
        "joe@localhost",
        "npm i react@18.2.0",
        "git@10.0.0.1",
        "a @ b.com",
        "@app.route",
        "5 @ 3.50",
    ]);
}

#[test]
fn card_numbers_go() {
    becomes(&[
        ("4111 1111 1111 1111", "[redacted:card]"),
        ("card 4111-1111-1111-1111 exp 12/27", "card [redacted:card] exp 12/27"),
        ("4111111111111111.", "[redacted:card]."),
        ("amex 3782 822463 10005!", "amex [redacted:card]!"),
        ("12 4111 1111 1111 1111 99", "12 [redacted:card] 99"),
        ("卡号4111111111111111", "卡号[redacted:card]"),
        ("5555555555554444,4012888888881881", "[redacted:card],[redacted:card]"),
    ]);
    stay(&[
        "4111 1111 1111 1112",
        "order 4111111111111112",
        "x4111111111111111",
        "4111111111111111_1",
        "0000 0000 0000 0000",
        "1731234567890",
        "1731234567890123",
        "1731234567890123456",
        "4111 1111 1111",
    ]);
}

#[test]
fn phone_numbers_go() {
    becomes(&[
        ("call +49 30 1234567 now", "call [redacted:phone] now"),
        ("+1 (415) 555-2671", "[redacted:phone]"),
        ("+4915112345678", "[redacted:phone]"),
        ("(415) 555-2671 or 415-555-2671 or 415.555.2671", "[redacted:phone] or [redacted:phone] or [redacted:phone]"),
        ("1-415-555-2671", "[redacted:phone]"),
        ("030/1234567", "[redacted:phone]"),
        ("0171 234 56 78", "[redacted:phone]"),
        ("015112345678", "[redacted:phone]"),
        ("0049 171 2345678", "[redacted:phone]"),
        ("01 23 45 67 89", "[redacted:phone]"),
        ("手机13812345678", "手机[redacted:phone]"),
        ("138 1234 5678", "[redacted:phone]"),
        ("090-1234-5678", "[redacted:phone]"),
        ("tel:4155552671", "tel:[redacted:phone]"),
        ("Phone number: 4155552671", "Phone number: [redacted:phone]"),
        ("+49 (0)30 1234567", "[redacted:phone]"),
    ]);
    stay(&[
        "4155552671",
        "1731234567",
        "1731234567.123456",
        "2026-11-25 03:34:05",
        "2026-11-25T03:34:05.123456Z",
        "25.11.2026",
        "192.168.100.200",
        "127.0.0.1:8080",
        "3.14159265358979",
        "v1.22.333",
        "2,147,483,647",
        "1 000 000 000",
        "room 415",
        "+0200",
        "a+12345678",
        "hotel 12345678",
        "0x00000000",
        "ISBN 978-3-16-148410-0",
    ]);
}

#[test]
fn secrets_go() {
    let jwt = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U";
    let key = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAKC\n-----END RSA PRIVATE KEY-----";
    becomes(&[
        ("use sk-proj-AbCd1234_efGH-5678ijkl.", "use [redacted:secret]."),
        ("密钥sk-1234567890abcdef和", "密钥[redacted:secret]和"),
        (&format!("tg-{}", "aB3".repeat(15)), "[redacted:secret]"),
        ("ghp_0123456789abcdefghijABCDEFGHIJ456789", "[redacted:secret]"),
        ("AKIAIOSFODNNEXAMPLEX AKIAIOSFODNN7EXAMPLE", "[redacted:secret] [redacted:secret]"),
        ("xoxb-123456789012-abcdefghij", "[redacted:secret]"),
        ("AIzaSyA1234567890abcdefghijklmnopqrstuv", "[redacted:secret]"),
        ("sk_live_abcdefgh12345678", "[redacted:secret]"),
        (&format!("token {jwt} x"), "token [redacted:secret] x"),
        (&format!("a\n{key}\nb"), "a\n[redacted:secret]\nb"),
        ("a -----BEGIN PRIVATE KEY----- MIIE that does not end", "a [redacted:secret]"),
        ("Authorization: Bearer abcdef0123456789abcdef", "Authorization: Bearer [redacted:secret]"),
        ("password: hunter22", "password: [redacted:secret]"),
        ("API_KEY=abc123def456", "API_KEY=[redacted:secret]"),
        ("{\"api_key\": \"abc123def456\", x", "{\"api_key\": \"[redacted:secret]\", x"),
        ("postgres://admin:s3cret@db/x", "postgres://admin:[redacted:secret]@db/x"),
        ("postgres://admin:hunter@db.example.com/x", "postgres://admin:[redacted:secret]@db.example.com/x"),
    ]);
    stay(&[
        "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT resp_67ccd2bed1ec8190b14f964abc0542670bb6a6b452d3795b",
        "call_abc123def456ghi789 file-abc123def456 req_0123456789abcdef0123456789abcdef fp_44709d6fcb",
        "550e8400-e29b-41d4-a716-446655440000 12345678-1234-1234-1234-123456789012",
        "01a2064e-f64e-721c-b060-d10f884060a7",
        "sk-learn-model-selection disk-based-storage-layer",
        "the token is optional; password: required",
        "max_tokens: 1234567",
        "-----BEGIN CERTIFICATE-----",
        "basic understanding of bearer instruments",
        "http://localhost:8080/a@b",
        "eyJ",
    ]);
}

#[test]
fn files_become_their_size() {
    let data = "iVBORw0KGgo4".repeat(100);
    let picture = json!({ "image_url": { "url": format!("data:image/png;base64,{data}") } }).to_string();
    assert_eq!(body(&picture), json!({ "image_url": { "url": "[redacted:data image/png 900 bytes]" } }).to_string());
    let sound = json!({ "input_audio": { "data": data, "format": "wav" } }).to_string();
    assert_eq!(
        body(&sound),
        json!({ "input_audio": { "data": "[redacted:data base64 900 bytes]", "format": "wav" } }).to_string()
    );
    assert_eq!(
        text("see ![x](data:image/svg+xml,%3Csvg/%3E) there"),
        "see ![x]([redacted:data image/svg+xml 10 bytes]) there"
    );
    stay(&[&"-".repeat(2000), &"word ".repeat(400), &"a".repeat(2000), "data: none", "metadata:a/b,c"]);
}

#[test]
fn escapes_hide_nothing_and_json_stays_json() {
    let cases = [
        (r#"{"a":"joe\u0040example\u002ecom"}"#, r#"{"a":"[redacted:email]"}"#),
        (r#"{"a":"x\n\u0073k-1234567890abcdef\ty"}"#, r#"{"a":"x\n[redacted:secret]\ty"}"#),
        (
            r#"{"a":"é \ud83d\ude00 \ud83d joe@example.com"}"#,
            "{\"a\":\"é 😀 \u{fffd}\u{fffd}\u{fffd} [redacted:email]\"}",
        ),
        (r#"{"joe@example.com":1}"#, r#"{"[redacted:email]":1}"#),
        (r#"{"a":"\u00e9 \/ stays"}"#, r#"{"a":"\u00e9 \/ stays"}"#),
        (
            r#"{"n":4111111111111111,"m":-4111111111111111,"x":4111111111111111.5}"#,
            r#"{"n":"[redacted:card]","m":-4111111111111111,"x":4111111111111111.5}"#,
        ),
        (
            r#"{"created":1731234567,"seed":17312345678901234567890}"#,
            r#"{"created":1731234567,"seed":17312345678901234567890}"#,
        ),
        (r#"{"password":"no digits","max_tokens":5}"#, r#"{"password":"[redacted:secret]","max_tokens":5}"#),
        (r#"{"password":"","access_token":null,"token":"Hi"}"#, r#"{"password":"","access_token":null,"token":"Hi"}"#),
        (r#"{"input":[1,2,3],"size":[1,2,3]}"#, r#"{"input":["[redacted:numbers 3]"],"size":[1,2,3]}"#),
        (r#"{"data":[{"embedding":[0.1,-2e-5]}]}"#, r#"{"data":[{"embedding":["[redacted:numbers 2]"]}]}"#),
        (r#"{"x":[1,2,3,4,5,6,7,8]}"#, r#"{"x":["[redacted:numbers 8]"]}"#),
        (
            r#"{"logprobs":true,"a":{"logprobs":{"content":[{"token":"joe"}]},"b":1}}"#,
            r#"{"logprobs":true,"a":{"logprobs":"[redacted:logprobs]","b":1}}"#,
        ),
        (
            r#"{"arguments":"{\"to\":\"joe\\u0040example.com\",\"pwd\":\"x\"}"}"#,
            r#"{"arguments":"{\"to\":\"[redacted:email]\",\"pwd\":\"[redacted:secret]\"}"}"#,
        ),
    ];
    for (before, after) in cases {
        assert_eq!(body(before), after);
        assert_eq!(body(after), after, "twice is once");
        serde_json::from_str::<Value>(&body(before)).unwrap();
    }
}

#[test]
fn what_was_cut_off_is_redacted_too() {
    for (before, after) in [
        (r#"{"a":"joe\u0040example.com and so o"#, r#"{"a":"[redacted:email] and so o""#),
        (r#"{"a":"joe\u0040example.com and so o\u00"#, r#"{"a":"[redacted:email] and so o""#),
        (r#"{"a":"x","b":"joe@example.com"#, r#"{"a":"x","b":"[redacted:email]""#),
        (
            r#"{ my address is joe@example.com, "sk-1234567890abcdef" }"#,
            r#"{ my address is [redacted:email], "[redacted:secret]" }"#,
        ),
        ("no JSON: joe@example.com", "no JSON: [redacted:email]"),
        (r#"a "C:\path joe@example.com" b"#, r#"a "C:\path [redacted:email]" b"#),
    ] {
        assert_eq!(body(before), after);
        assert_eq!(body(after), after, "twice is once");
    }
    assert_eq!(Redactor::default().body(b"\xff joe@example.com"), "\u{fffd} [redacted:email]".as_bytes());
}

#[test]
fn patterns_of_the_configuration_go_first() {
    let redactor = Redactor::try_new([r"EMP-\d{6}", r"(?i)project \w+"]).unwrap();
    assert_eq!(redactor.text("EMP-123456 on Project Blue"), "[redacted:custom] on [redacted:custom]");
    let inside = redactor.body(br#"{"a":"EMP\u002d123456 joe@example.com"}"#);
    assert_eq!(String::from_utf8(inside).unwrap(), r#"{"a":"[redacted:custom] [redacted:email]"}"#);
}

#[test]
fn long_texts_of_what_is_hard_come_to_their_end() {
    // Hours, if the time were quadratic.
    let size = 200_000;
    for piece in [
        "-----BEGIN PRIVATE KEY-----",
        "1 ",
        "a@",
        "a.b@c.",
        "{\"",
        "\"password\":",
        "sk-",
        "[1,",
        "eyJ.",
        "0171-",
        "data:a/b,",
        "\\u0040",
    ] {
        let text = piece.repeat(size / piece.len());
        let once = body(&text);
        assert_eq!(body(&once), once, "{piece}");
    }
}

/// Texts made of what is looked for, whole and in pieces, so that they meet.
fn pieces() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        4 => prop::sample::select(vec![
            "joe@example.com", "@", "example.com", "4111 1111 1111 1111", "4111111111111111", "411111", "+49 30 1234567",
            "+49", "030/", "1234567", "(415) 555-2671", "415-555-2671", "sk-1234567890abcdef", "sk-", "password: x1y2z3a",
            "password=", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.x", "https://a:b1@", "-----BEGIN PRIVATE KEY-----",
            "-----END PRIVATE KEY-----", "[redacted:email]", "[redacted:card]", "[redacted:", "]", "Bearer ",
            "abcdef0123456789abcdef", "data:image/png;base64,AAAA", "data:", "logprobs", "phone", "13812345678",
            "550e8400-e29b-41d4-a716-446655440000",
        ]).prop_map(str::to_owned),
        2 => "[ -~é中\\n]{0,3}",
        1 => prop::sample::select(vec![" ", "-", ".", "\"", "\\", ":", ",", "[", "{", "}", "/", "(", "_", "0"]).prop_map(str::to_owned),
    ];
    prop::collection::vec(piece, 0..10).prop_map(|pieces| pieces.concat())
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        4 => pieces().prop_map(Value::from),
        1 => any::<u64>().prop_map(Value::from),
        1 => Just(json!(4_111_111_111_111_111_u64)),
        1 => Just(Value::Null),
        1 => prop::collection::vec(any::<i32>(), 0..12).prop_map(Value::from),
        1 => pieces().prop_map(|text| Value::from(json!({ "password": text, "x": [text] }).to_string())),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        let name = prop_oneof![
            pieces(),
            prop::sample::select(vec!["password", "logprobs", "input", "a"]).prop_map(str::to_owned)
        ];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((name, inner), 0..4).prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

/// The same document, with some characters of its strings as escapes.
fn escaped(json: &str, every: usize) -> String {
    let mut out = String::new();
    let mut in_escape = 0;
    for (n, c) in json.chars().enumerate() {
        let is_free = in_escape == 0;
        in_escape = match (in_escape, c) {
            (0, '\\') => 1,
            (1, 'u') => 4,
            (0, _) => 0,
            (left, _) => left - 1,
        };
        if is_free && c.is_alphanumeric() && n % every == 0 && within_string(json, n) {
            c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| out += &format!("\\u{unit:04x}"));
        } else {
            out.push(c);
        }
    }
    out
}

fn within_string(json: &str, at: usize) -> bool {
    let mut within = false;
    let mut chars = json.chars().take(at);
    while let Some(c) = chars.next() {
        match c {
            '"' => within = !within,
            '\\' => drop(chars.next()),
            _ => {}
        }
    }
    within
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

    #[test]
    fn redacting_twice_is_redacting_once(before in pieces()) {
        let once = text(&before);
        prop_assert_eq!(text(&once), once.as_str());
        let redactor = Redactor::try_new(["[0-9a-f]{3,}", "e+", "red"]).unwrap();
        let once = redactor.text(&before).into_owned();
        prop_assert_eq!(redactor.text(&once), once.as_str());
    }

    #[test]
    fn json_stays_json_and_is_redacted_once(value in value(), every in 1_usize..5) {
        let before = escaped(&value.to_string(), every);
        prop_assert!(serde_json::from_str::<Value>(&before).is_ok(), "{}", before);
        let once = body(&before);
        prop_assert!(serde_json::from_str::<Value>(&once).is_ok(), "{} became {}", before, once);
        prop_assert_eq!(body(&once), once.as_str());
    }

    #[test]
    fn how_strings_are_escaped_makes_no_difference(value in value(), every in 1_usize..4) {
        let plain: Value = serde_json::from_str(&body(&value.to_string())).unwrap();
        let written: Value = serde_json::from_str(&body(&escaped(&value.to_string(), every))).unwrap();
        prop_assert_eq!(written, plain);
    }

    #[test]
    fn garbage_does_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..80), text in pieces(), cut in any::<prop::sample::Index>()) {
        let redactor = Redactor::default();
        let once = redactor.body(&bytes);
        prop_assert!(std::str::from_utf8(&once).is_ok());
        let json = json!({ "a": text, "b": [text] }).to_string();
        let json = &json.as_bytes()[..cut.index(json.len() + 1)];
        let once = redactor.body(json);
        prop_assert_eq!(redactor.body(&once), once);
    }
}
