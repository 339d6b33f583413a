//! How an upstream is handled, as people write it: the same bounds in the configuration and at the command line.
//!
//! A duration of nothing stands for "none" where there can be none. A connection, or the first byte of an answer, that is
//! waited for without end would hold a client for ever, so those cannot be switched off.

use std::time::Duration;

use crate::units::{parse_duration_within, show_duration};

/// No provider allows more than this per minute, of requests or tokens.
pub const MOST_PER_MINUTE: u64 = 1_000_000_000_000;

const DAY: Duration = Duration::from_secs(86_400);
const HOUR: Duration = Duration::from_secs(3_600);
const MILLISECOND: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

/// How long a connection may take.
///
/// # Errors
/// A sentence that says what is wrong with `text`.
pub fn parse_connect_timeout(text: &str) -> Result<Duration, String> {
    parse_duration_within(text, MILLISECOND..=HOUR)
}

/// How long is waited for the first byte of an answer, or from one piece to the next.
///
/// # Errors
/// A sentence that says what is wrong with `text`.
pub fn parse_wait(text: &str) -> Result<Duration, String> {
    parse_duration_within(text, MILLISECOND..=DAY)
}

/// How long an attempt may take in all; nothing: as long as it takes.
///
/// # Errors
/// A sentence that says what is wrong with `text`.
pub fn parse_total_timeout(text: &str) -> Result<Duration, String> {
    parse_duration_within(text, Duration::ZERO..=DAY)
}

/// How often an upstream is probed; nothing: never.
///
/// # Errors
/// A sentence that says what is wrong with `text`.
pub fn parse_probe_interval(text: &str) -> Result<Duration, String> {
    let interval = parse_duration_within(text, Duration::ZERO..=DAY)?;
    if interval.is_zero() || interval >= SECOND {
        return Ok(interval);
    }
    let shown = show_duration(interval);
    Err(format!("{shown} is less than 1s: a provider takes that for an attack; 0s switches probes off"))
}

/// Requests or tokens per minute that an upstream is known to allow; 0: not known.
///
/// # Errors
/// A sentence that says what is wrong with `text`.
pub fn parse_per_minute(text: &str) -> Result<u64, String> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number {
        return Err(format!("{text:?} is not a whole number per minute; 0: not known"));
    }
    let number = text.parse().ok().filter(|number| *number <= MOST_PER_MINUTE);
    number.ok_or_else(|| format!("{text} is not between 0 and {MOST_PER_MINUTE}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::upstream::{Handling, Overrides, Timeouts};

    #[test]
    fn bounds_are_told() {
        type Parse = fn(&str) -> Result<Duration, String>;
        let cases: [(Parse, &str, &str); 8] = [
            (parse_connect_timeout, "0s", "0s is not between 1ms and 1h"),
            (parse_connect_timeout, "2h", "2h is not between 1ms and 1h"),
            (parse_connect_timeout, "-5s", "\"-5s\" is not a duration"),
            (parse_wait, "0ms", "0s is not between 1ms and 1d"),
            (parse_total_timeout, "25h", "25h is not between 0s and 1d"),
            (parse_probe_interval, "999ms", "999ms is less than 1s"),
            (parse_probe_interval, "2d", "2d is not between 0s and 1d"),
            (parse_probe_interval, "30", "\"30\" is not a duration"),
        ];
        for (parse, text, says) in cases {
            let message = parse(text).expect_err(text);
            assert!(message.starts_with(says), "{text}: {message}");
        }
        assert_eq!(parse_connect_timeout("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!((parse_total_timeout("0s"), parse_probe_interval("0s")), (Ok(Duration::ZERO), Ok(Duration::ZERO)));
        assert_eq!(parse_probe_interval("1s"), Ok(SECOND));
    }

    #[test]
    fn numbers_per_minute_are_whole_and_bounded() {
        assert_eq!((parse_per_minute("0"), parse_per_minute("1000000000000")), (Ok(0), Ok(MOST_PER_MINUTE)));
        for bad in ["", "-1", "+1", "1.5", "1e3", "1_000", " 1", "1000000000001", "99999999999999999999999"] {
            assert!(parse_per_minute(bad).is_err(), "{bad:?}");
        }
    }

    prop_compose! {
        fn handlings()(
            [connect, first_byte, chunk] in [0_u64..4, 0..4, 0..4],
            [total, probe_interval] in [prop::option::of(1_u64..4), prop::option::of(1_u64..4)],
            [rpm, tpm] in [0_u64..3, 0..3],
        ) -> Handling {
            let ms = Duration::from_millis;
            let timeouts = Timeouts {
                connect: ms(connect), first_byte: ms(first_byte), chunk: ms(chunk), total: total.map(ms),
            };
            Handling { timeouts, rpm, tpm, probe_interval: probe_interval.map(ms) }
        }
    }

    proptest! {
        #[test]
        fn what_differs_is_enough_to_get_there(handling in handlings(), default in handlings()) {
            let overrides = Overrides::between(handling, default);
            prop_assert_eq!(overrides.over(default), handling);
            prop_assert_eq!(Overrides::between(handling, handling), Overrides::default());
        }

        #[test]
        fn nothing_crashes(text in "\\PC{0,24}", number in "[0-9]{0,30}(ms|s|d)?") {
            for text in [&text, &number] {
                drop((parse_connect_timeout(text), parse_wait(text), parse_total_timeout(text)));
                drop((parse_probe_interval(text), parse_per_minute(text)));
            }
        }
    }
}
