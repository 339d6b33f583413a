//! What is left of a caller's windows, and the headers that say so.
//!
//! `x-ratelimit-*` as OpenAI documents them: the limit, what remains of it, and the time until it is whole again, for
//! requests and for tokens, each of the subject that has the least left.

const REQUESTS: [&str; 3] =
    ["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"];
const TOKENS: [&str; 3] = ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"];

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
    pub fn headers(&self) -> impl Iterator<Item = (&'static str, String)> {
        let of = |left: Option<Left>, names: [&'static str; 3]| {
            left.into_iter().flat_map(move |left| {
                let [limit, remaining, reset] = names;
                let reset_in = show_duration(left.reset_ms);
                [(limit, left.limit.to_string()), (remaining, left.remaining.to_string()), (reset, reset_in)]
            })
        };
        of(self.requests, REQUESTS).chain(of(self.tokens, TOKENS))
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
    let (hours, minutes, rest) = (ms / 3_600_000, ms / 60_000 % 60, ms % 60_000);
    if (1..1000).contains(&ms) {
        return format!("{ms}ms");
    }
    let millis = format!("{:03}", rest % 1000);
    let fraction = millis.trim_end_matches('0');
    let point = if fraction.is_empty() { "" } else { "." };
    let seconds = format!("{}{point}{fraction}s", rest / 1000);
    match (hours, minutes) {
        (0, 0) => seconds,
        (0, _) => format!("{minutes}m{seconds}"),
        _ => format!("{hours}h{minutes}m{seconds}"),
    }
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
        let headers: Vec<_> = standing.headers().collect();
        assert_eq!(
            headers,
            [
                ("x-ratelimit-limit-requests", "10".to_owned()),
                ("x-ratelimit-remaining-requests", "3".to_owned()),
                ("x-ratelimit-reset-requests", "1m0.5s".to_owned()),
            ]
        );
    }
}
