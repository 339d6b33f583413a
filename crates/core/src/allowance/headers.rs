//! What the headers of an answer say of the limits of the account.
//!
//! Providers do not agree, and do not always mean it:
//!
//! * OpenAI sends limit, remaining and reset for requests and tokens; resets are durations as Go prints them (`6m0s`).
//! * Azure sends `remaining` alone, or all three with -1 and 0, which stand for nothing; its older deployments write
//!   `x-rate-limit-reset-tokens`, in plain seconds, in place of `retry-after`.
//! * `retry-after` may be seconds, with a fraction or not, or a date; `retry-after-ms` is finer and goes before it.
//!
//! What is negative, longer than a month or no number is as if it were not there, and so is a wait of nothing: OpenAI's own
//! clients take `retry-after: 0` for no advice, and an upstream that is asked again at once would say it again at once.
//! Durations are read in decimal, without floating point, and rounded up, so that "exactly" is exact.

use chrono::DateTime;
use http::HeaderMap;

/// The longest wait that is believed: the longest month, for limits per month exist.
const LONGEST_MS: u64 = 31 * 24 * 3600 * 1000;
const NS_PER_MS: u128 = 1_000_000;
const NS_PER_S: u128 = 1_000_000_000;

/// What an answer says of one kind of limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// How much there is per window.
    pub limit: Option<u64>,
    /// How much is left.
    pub remaining: Option<u64>,
    /// In how many milliseconds all of it is there again.
    pub reset_ms: Option<u64>,
}

/// What an answer says of the limits of the account.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Requests.
    pub requests: Said,
    /// Tokens.
    pub tokens: Said,
}

impl Report {
    /// Reads the `x-ratelimit-*` headers of an answer.
    #[must_use]
    pub fn parse(headers: &HeaderMap) -> Self {
        let said = |names: [&str; 4]| {
            let [limit, remaining, reset, old_reset] = names.map(|name| text(headers, name));
            // A limit of nothing or less is none: the answer it comes with is proof of that.
            if limit.is_some_and(|limit| limit.parse::<i64>().is_ok_and(|limit| limit <= 0)) {
                return Said::default();
            }
            Said {
                limit: limit.and_then(|text| text.parse().ok()),
                remaining: remaining.and_then(|text| text.parse().ok()),
                reset_ms: reset.or(old_reset).and_then(duration_ms),
            }
        };
        Self {
            requests: said([
                "x-ratelimit-limit-requests",
                "x-ratelimit-remaining-requests",
                "x-ratelimit-reset-requests",
                "x-rate-limit-reset-requests",
            ]),
            tokens: said([
                "x-ratelimit-limit-tokens",
                "x-ratelimit-remaining-tokens",
                "x-ratelimit-reset-tokens",
                "x-rate-limit-reset-tokens",
            ]),
        }
    }

    /// Does it say how much is left of anything?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.requests.remaining.is_none() && self.tokens.remaining.is_none()
    }
}

/// How long the upstream wants to be left alone after a 429, in milliseconds; `None`: it does not say.
///
/// `retry-after-ms`, else `retry-after`, else the reset of what is used up, the later one if both are. A kind of which
/// some is left is not what the request failed on; one of which nothing is said may be. `unix_ms` is the time of day,
/// which dates are held against.
#[must_use]
pub fn cooling_ms(headers: &HeaderMap, unix_ms: u64) -> Option<u64> {
    let exact = text(headers, "retry-after-ms").and_then(|text| in_ms(decimal(text, NS_PER_MS)?));
    let report = Report::parse(headers);
    let used_up = |said: Said| said.reset_ms.filter(|_| said.remaining.unwrap_or(0) == 0);
    exact
        .filter(|ms| *ms > 0)
        .or_else(|| retry_after_ms(text(headers, "retry-after")?, unix_ms).filter(|ms| *ms > 0))
        .or_else(|| used_up(report.requests).max(used_up(report.tokens)).filter(|ms| *ms > 0))
}

/// Parses `retry-after`: seconds, or a date.
fn retry_after_ms(text: &str, unix_ms: u64) -> Option<u64> {
    if let Some(ns) = decimal(text, NS_PER_S) {
        return in_ms(ns);
    }
    let date_ms = u64::try_from(DateTime::parse_from_rfc2822(text).ok()?.timestamp_millis()).ok()?;
    date_ms.checked_sub(unix_ms).filter(|ms| *ms <= LONGEST_MS)
}

/// Parses a duration as Go prints it (`1h2m3s`, `6m12.5s`, `6ms`), or plain seconds, into milliseconds.
fn duration_ms(text: &str) -> Option<u64> {
    if let Some(ns) = decimal(text, NS_PER_S) {
        return in_ms(ns);
    }
    let (mut rest, mut sum) = (text, 0_u128);
    while !rest.is_empty() {
        let number = leading(rest, |c| c.is_ascii_digit() || c == '.');
        let unit = leading(&rest[number.len()..], |c| !c.is_ascii_digit() && c != '.');
        rest = &rest[number.len() + unit.len()..];
        sum = sum.checked_add(decimal(number, unit_ns(unit)?)?)?;
    }
    in_ms(sum).filter(|_| !text.is_empty())
}

fn leading(text: &str, belongs: impl Fn(char) -> bool) -> &str {
    &text[..text.find(|c| !belongs(c)).unwrap_or(text.len())]
}

fn unit_ns(unit: &str) -> Option<u128> {
    Some(match unit {
        "d" => 86_400 * NS_PER_S,
        "h" => 3_600 * NS_PER_S,
        "m" => 60 * NS_PER_S,
        "s" => NS_PER_S,
        "ms" => NS_PER_MS,
        "us" => 1_000,
        "ns" => 1,
        _ => return None,
    })
}

/// Parses digits with or without a fraction, times `unit_ns`.
fn decimal(text: &str, unit_ns: u128) -> Option<u128> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let is_digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    if (whole.is_empty() && fraction.is_empty()) || !is_digits(whole) || !is_digits(fraction) {
        return None;
    }
    let number = |digits: &str| if digits.is_empty() { Some(0) } else { digits.parse::<u128>().ok() };
    // Nine digits of the longest unit are finer than a millisecond by far.
    let fraction = &fraction[..fraction.len().min(9)];
    let scale = fraction.bytes().fold(1_u128, |scale, _| scale * 10);
    number(whole)?.checked_mul(unit_ns)?.checked_add(number(fraction)? * unit_ns / scale)
}

fn in_ms(ns: u128) -> Option<u64> {
    u64::try_from(ns.div_ceil(NS_PER_MS)).ok().filter(|ms| *ms <= LONGEST_MS)
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    Some(headers.get(name)?.to_str().ok()?.trim())
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderName, HeaderValue};
    use proptest::prelude::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &str)| {
            (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
        };
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn durations_are_read_as_go_prints_them() {
        for (text, ms) in [
            ("6ms", 6),
            ("1s", 1_000),
            ("1m0s", 60_000),
            ("6m12.5s", 372_500),
            ("1h2m3s", 3_723_000),
            ("17.162s", 17_162),
            ("1d", 86_400_000),
            ("55", 55_000),
            ("0.25", 250),
            ("0", 0),
            ("0s", 0),
            ("1.5us", 1),
            ("8.6400000000000001s", 8_640),
        ] {
            assert_eq!(duration_ms(text), Some(ms), "{text}");
        }
        for text in
            ["", "-1", "-1s", "s", "1x", "1 s", "m1", "1s2", "1..2s", ".", "inf", "NaN", "1e3", "1µs", "99999999h"]
        {
            assert_eq!(duration_ms(text), None, "{text}");
        }
    }

    #[test]
    fn openai_says_all_of_it() {
        let report = Report::parse(&headers(&[
            ("x-ratelimit-limit-requests", "10000"),
            ("x-ratelimit-remaining-requests", "9999"),
            ("x-ratelimit-reset-requests", "8.64s"),
            ("x-ratelimit-limit-tokens", "200000"),
            ("x-ratelimit-remaining-tokens", "199000"),
            ("x-ratelimit-reset-tokens", "6m0s"),
        ]));
        let said =
            |limit, remaining, reset| Said { limit: Some(limit), remaining: Some(remaining), reset_ms: Some(reset) };
        assert_eq!(report.requests, said(10_000, 9_999, 8_640));
        assert_eq!(report.tokens, said(200_000, 199_000, 360_000));
    }

    #[test]
    fn azure_says_little_or_nothing() {
        let report = Report::parse(&headers(&[
            ("x-ratelimit-remaining-requests", "79"),
            ("x-ratelimit-remaining-tokens", "-1"),
        ]));
        assert_eq!(report.requests, Said { remaining: Some(79), ..Said::default() });
        assert_eq!(report.tokens, Said::default());
        let nothing = Report::parse(&headers(&[
            ("x-ratelimit-limit-tokens", "-1"),
            ("x-ratelimit-remaining-tokens", "0"),
            ("x-ratelimit-reset-tokens", "0"),
        ]));
        assert!(nothing.is_empty());
    }

    #[test]
    fn the_finest_word_decides_how_long_it_cools() {
        const NOV_6: u64 = 784_111_777_000;
        let date = "Sun, 06 Nov 1994 08:49:37 GMT";
        for (pairs, ms) in [
            (&[("retry-after-ms", "1234.5"), ("retry-after", "9")][..], Some(1_235)),
            (&[("retry-after", "2")], Some(2_000)),
            (&[("retry-after", "0.75")], Some(750)),
            (&[("retry-after", "86400")], Some(86_400_000)),
            (&[("retry-after", date)], Some(7_000)),
            (&[("retry-after-ms", "0"), ("retry-after", "3")], Some(3_000)),
            (&[("retry-after-ms", "-5"), ("retry-after", "3")], Some(3_000)),
            (&[("retry-after", "0")], None),
            (&[("retry-after", "99999999999999999999999999")], None),
            (&[("retry-after", "9999999")], None),
            (&[("retry-after", "soon")], None),
            (&[("x-rate-limit-reset-tokens", "55"), ("x-ratelimit-remaining-requests", "9")], Some(55_000)),
            (&[("x-ratelimit-reset-tokens", "1s"), ("x-ratelimit-remaining-tokens", "9")], None),
            (&[("x-ratelimit-limit-tokens", "-1"), ("x-ratelimit-reset-tokens", "9")], None),
            (
                &[
                    ("retry-after", "later"),
                    ("x-ratelimit-remaining-requests", "0"),
                    ("x-ratelimit-reset-requests", "2s"),
                    ("x-ratelimit-remaining-tokens", "5"),
                    ("x-ratelimit-reset-tokens", "1m0s"),
                ],
                Some(2_000),
            ),
            (&[], None),
        ] {
            assert_eq!(cooling_ms(&headers(pairs), NOV_6 - 7_000), ms, "{pairs:?}");
        }
        assert_eq!(cooling_ms(&headers(&[("retry-after", date)]), NOV_6 + 1), None, "that time is over");
    }

    proptest! {
        #[test]
        fn what_go_prints_is_read_back(h in 0_u64..700, m in 0_u64..60, ms in 0_u64..60_000) {
            let text = format!("{h}h{m}m{}.{:03}s", ms / 1000, ms % 1000);
            prop_assert_eq!(duration_ms(&text), Some((h * 60 + m) * 60_000 + ms));
        }

        #[test]
        fn no_value_is_too_strange(text in "\\PC{0,40}", ascii in "[0-9.dhmsu+-]{0,40}", unix_ms: u64) {
            for text in [&text, &ascii] {
                for ms in [duration_ms(text), retry_after_ms(text, unix_ms)].into_iter().flatten() {
                    prop_assert!(ms <= LONGEST_MS);
                }
            }
        }
    }
}
