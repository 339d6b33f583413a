//! What is left of a caller's windows, and the headers that say so.
//!
//! `x-ratelimit-*` as OpenAI documents them: the limit, what remains of it, and the time until it is whole again, for
//! requests and for tokens, each of the subject that has the least left.

use http::{HeaderName, HeaderValue};

static REQUESTS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-requests"),
    HeaderName::from_static("x-ratelimit-remaining-requests"),
    HeaderName::from_static("x-ratelimit-reset-requests"),
];
static TOKENS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-tokens"),
    HeaderName::from_static("x-ratelimit-remaining-tokens"),
    HeaderName::from_static("x-ratelimit-reset-tokens"),
];

/// What is left of the windows, for the headers of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Requests per minute, of the subject that has the fewest left.
    pub requests: Option<Left>,
    /// Tokens per minute, likewise.
    pub tokens: Option<Left>,
}

/// What is left of one window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Left {
    /// The limit.
    pub limit: u64,
    /// What is left of it.
    pub remaining: u64,
    /// When all of it will be back, in milliseconds.
    pub reset_ms: u64,
}

impl Standing {
    /// The headers of an answer, in the form that OpenAI gives them.
    pub fn headers(&self) -> impl Iterator<Item = (&'static HeaderName, HeaderValue)> {
        let of = |left: Option<Left>, names: &'static [HeaderName; 3]| {
            left.into_iter().flat_map(move |left| {
                let [limit, remaining, reset] = names;
                // Digits and letters: always a value that a header can have.
                let reset_in = HeaderValue::try_from(show_duration(left.reset_ms)).ok();
                [(limit, Some(left.limit.into())), (remaining, Some(left.remaining.into())), (reset, reset_in)]
            })
        };
        let all = of(self.requests, &REQUESTS).chain(of(self.tokens, &TOKENS));
        all.filter_map(|(name, value)| Some((name, value?)))
    }

    /// Takes `left` of the requests in if it is tighter.
    pub fn see_requests(&mut self, left: Left) {
        tighten(&mut self.requests, left);
    }

    /// Takes `left` of the tokens in if it is tighter.
    pub fn see_tokens(&mut self, left: Left) {
        tighten(&mut self.tokens, left);
    }
}

fn tighten(known: &mut Option<Left>, left: Left) {
    if known.is_none_or(|known| left.remaining < known.remaining) {
        *known = Some(left);
    }
}

/// A duration as OpenAI writes it: `0s`, `20ms`, `1.5s`, `6m0s`, `1h0m0s`.
#[must_use]
pub fn show_duration(ms: u64) -> String {
    let (hours, minutes, seconds, millis) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60, ms % 1000);
    let mut text = String::with_capacity(32);
    let mut number = itoa::Buffer::new();
    let mut put = |number_of: u64, unit: &str| {
        text.push_str(number.format(number_of));
        text.push_str(unit);
    };
    if let (0, 0, 1..1000) = (hours, minutes, ms) {
        put(ms, "ms");
        return text;
    }
    if hours > 0 {
        put(hours, "h");
    }
    if hours > 0 || minutes > 0 {
        put(minutes, "m");
    }
    put(seconds, "");
    if millis > 0 {
        // Three digits after the point: the leading one of a number of four gives its place to it.
        put(1000 + millis, "");
        let point = text.len() - 4;
        text.replace_range(point..=point, ".");
        text.truncate(text.trim_end_matches('0').len());
    }
    text.push('s');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_written_as_openai_writes_them() {
        let cases = [
            (0, "0s"),
            (6, "6ms"),
            (1000, "1s"),
            (1500, "1.5s"),
            (59_705, "59.705s"),
            (60_000, "1m0s"),
            (360_000, "6m0s"),
            (61_020, "1m1.02s"),
            (3_600_000, "1h0m0s"),
        ];
        for (ms, text) in cases {
            assert_eq!(show_duration(ms), text);
        }
    }

    #[test]
    fn the_tightest_subject_is_shown() {
        let left = |remaining| Left { limit: 10, remaining, reset_ms: 60_500 };
        let mut standing = Standing::default();
        for remaining in [7, 3, 9] {
            standing.see_requests(left(remaining));
        }
        let shown: Vec<_> =
            standing.headers().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
        assert_eq!(
            shown,
            [
                "x-ratelimit-limit-requests: 10",
                "x-ratelimit-remaining-requests: 3",
                "x-ratelimit-reset-requests: 1m0.5s"
            ]
        );
    }
}
