//! How an answer is made to go wrong: the directives, and how they are read.
//!
//! A directive is `name` or `name=value`, several are separated by `;`. They come from four places, later ones winning:
//! the flags of `tollgate mock`, the header `x-mock`, the field `user` of the body (`"mock:..."`), and the model's name
//! after an `@`. The latter two are for requests that pass a gateway, which drops headers it does not know. A directive
//! that cannot be read is a 400 that names it: a typo must not look like a fault that did not strike.

use std::{str::FromStr, time::Duration};

use axum::http::StatusCode;

/// What the directives are, as `--help` shows them.
pub(super) const DIRECTIVES: &str = "\
Directives, for one request: `name` or `name=value`, separated by `;`
  slow=MS            wait before the first byte
  chunk-delay=MS     wait between the chunks of a stream
  stall              never answer
  status=N           fail with this status, 400 to 599
  code=TEXT          error code of that answer, such as insufficient_quota
  retry-after=N      header of that answer, in seconds
  retry-after-ms=N   header of that answer, in milliseconds
  html               answer 200 with HTML
  tokens=N           length of the answer
  no-usage           leave the usage out
  break=N            cut the connection after N chunks; a whole answer is cut in half
  error-event=N      an error event after N chunks, then the end
  split-utf8         cut chunks inside characters and inside lines
  crlf               end the lines of a stream with CR LF

They are taken from the header `x-mock`, from the field `user` of the body after `mock:`, and from the name of the
model after an `@`:
  curl -H 'x-mock: status=429;retry-after=3' ...
  {\"model\": \"gpt-4o-mini\", \"user\": \"mock:slow=200;no-usage\", ...}
  {\"model\": \"gpt-4o-mini@status=500\", ...}
A request without a key, or with the key `invalid`, gets 401; a model whose name begins with `unknown` gets 404.";

/// Longest answer that may be asked for: an answer is made before it is sent.
pub(super) const MAX_TOKENS: u32 = 200_000;

/// Everything that is to go wrong with one answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Wait before the first byte.
    pub slow: Duration,
    /// Wait between the chunks of a stream.
    pub chunk_delay: Duration,
    /// Never answer.
    pub stall: bool,
    /// Fail with this status.
    pub status: Option<StatusCode>,
    /// Error code of that failure.
    pub code: Option<String>,
    /// `retry-after` of that failure, in seconds.
    pub retry_after: Option<u64>,
    /// `retry-after-ms` of that failure.
    pub retry_after_ms: Option<u64>,
    /// Answer with HTML.
    pub html: bool,
    /// Length of the answer.
    pub tokens: Option<u32>,
    /// Leave the usage out.
    pub no_usage: bool,
    /// Cut the connection after so many chunks.
    pub break_after: Option<usize>,
    /// Send an error event after so many chunks.
    pub error_event: Option<usize>,
    /// Cut chunks inside characters and lines.
    pub split_utf8: bool,
    /// End lines with CR LF.
    pub crlf: bool,
}

impl Faults {
    /// Adds `directives` to what is there; on error says which one cannot be read.
    pub(super) fn apply(&mut self, directives: &str) -> Result<(), String> {
        directives.split(';').map(str::trim).filter(|d| !d.is_empty()).try_for_each(|d| self.apply_one(d))
    }

    fn apply_one(&mut self, directive: &str) -> Result<(), String> {
        match directive.split_once('=') {
            None => self.switch(directive),
            Some((name, value)) => self.set(name.trim(), value.trim()),
        }
    }

    fn switch(&mut self, name: &str) -> Result<(), String> {
        let switch = match name {
            "stall" => &mut self.stall,
            "html" => &mut self.html,
            "no-usage" => &mut self.no_usage,
            "split-utf8" => &mut self.split_utf8,
            "crlf" => &mut self.crlf,
            _ => return Err(unreadable(name, "no such directive")),
        };
        *switch = true;
        Ok(())
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        match name {
            "slow" => self.slow = Duration::from_millis(number(name, value)?),
            "chunk-delay" => self.chunk_delay = Duration::from_millis(number(name, value)?),
            "status" => self.status = Some(parse_status(value).map_err(|why| unreadable(name, &why))?),
            "code" => self.code = Some(value.to_owned()),
            "retry-after" => self.retry_after = Some(number(name, value)?),
            "retry-after-ms" => self.retry_after_ms = Some(number(name, value)?),
            "tokens" => {
                let tokens = number(name, value)?;
                if tokens > MAX_TOKENS {
                    return Err(unreadable(name, &format!("at most {MAX_TOKENS}")));
                }
                self.tokens = Some(tokens);
            }
            "break" => self.break_after = Some(number(name, value)?),
            "error-event" => self.error_event = Some(number(name, value)?),
            _ => return Err(unreadable(name, "no such directive, or it takes no value")),
        }
        Ok(())
    }
}

/// Reads a status that is a failure.
pub(super) fn parse_status(text: &str) -> Result<StatusCode, String> {
    let status = text.parse::<StatusCode>().ok().filter(|status| (400..600).contains(&status.as_u16()));
    status.ok_or_else(|| format!("`{text}` is not a status from 400 to 599"))
}

fn number<T: FromStr>(name: &str, value: &str) -> Result<T, String> {
    value.parse().map_err(|_| unreadable(name, &format!("`{value}` is not a whole number, or too large")))
}

fn unreadable(name: &str, why: &str) -> String {
    format!("mock directive `{name}`: {why}; `tollgate mock --help` lists them")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(directives: &str) -> Result<Faults, String> {
        let mut faults = Faults::default();
        faults.apply(directives).map(|()| faults)
    }

    #[test]
    fn directives_are_read_and_later_ones_win() {
        let faults = parse("status=429; retry-after=3;retry-after-ms=2500;slow=5;slow=200;;no-usage").unwrap();
        assert_eq!(faults.status, Some(StatusCode::TOO_MANY_REQUESTS));
        assert_eq!((faults.retry_after, faults.retry_after_ms), (Some(3), Some(2500)));
        assert_eq!(faults.slow, Duration::from_millis(200));
        assert!(faults.no_usage && !faults.stall);
    }

    #[test]
    fn every_directive_of_the_help_can_be_read() {
        let listed = DIRECTIVES.lines().filter_map(|line| line.strip_prefix("  ")?.split_whitespace().next());
        let names: Vec<_> = listed.take_while(|word| *word != "curl").collect();
        assert_eq!(names.len(), 14);
        for name in names {
            let directive = name.replace("=MS", "=7").replace("status=N", "status=500").replace("=N", "=7");
            assert_ne!(parse(&directive), Ok(Faults::default()), "{directive}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        for bad in ["slwo=1", "slow", "stall=1", "status=200", "status=abc", "slow=-1", "tokens=999999999", "break=x"] {
            let error = parse(bad).unwrap_err();
            assert!(error.contains(bad.split('=').next().unwrap()), "{error}");
        }
    }
}
