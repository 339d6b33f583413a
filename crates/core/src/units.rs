//! Durations (`"60s"`) and sizes (`"64 MiB"`) as the configuration and the command line have them.
//!
//! A whole number and a unit, so that a reader never has to know what a bare number counts. Both directions are here:
//! messages show limits in the form in which they are written.

use std::{ops::RangeInclusive, time::Duration};

const DURATIONS: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];
const SIZES: [(&str, u64); 7] = [
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1000),
    ("B", 1),
];

/// Parses `500ms`, `60s`, `5m`, `2h` or `1d`.
///
/// # Errors
/// A sentence that says what is wrong with `text`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    parse(text, &DURATIONS).map(Duration::from_millis).ok_or_else(|| {
        format!("{text:?} is not a duration: write a whole number and ms, s, m, h or d, such as \"60s\"")
    })
}

/// Parses a duration that must be within `range`.
///
/// # Errors
/// A sentence that says what is wrong with `text`.
pub fn parse_duration_within(text: &str, range: RangeInclusive<Duration>) -> Result<Duration, String> {
    let duration = parse_duration(text)?;
    if range.contains(&duration) {
        return Ok(duration);
    }
    let (least, most) = (show_duration(*range.start()), show_duration(*range.end()));
    Err(format!("{} is not between {least} and {most}", show_duration(duration)))
}

/// Parses `64 MiB`, `512KiB`, `10 MB` or `100 B`: a number of bytes.
///
/// # Errors
/// A sentence that says what is wrong with `text`.
pub fn parse_size(text: &str) -> Result<u64, String> {
    parse(text, &SIZES).ok_or_else(|| {
        format!("{text:?} is not a size: write a whole number and B, KiB, MiB or GiB, such as \"64 MiB\"")
    })
}

/// `duration` in the largest unit that gives a whole number; parts of a millisecond are dropped.
#[must_use]
pub fn show_duration(duration: Duration) -> String {
    let ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    if ms == 0 { "0s".to_owned() } else { show(ms, &DURATIONS, "") }
}

/// `bytes` in the largest binary unit that gives a whole number.
#[must_use]
pub fn show_size(bytes: u64) -> String {
    if bytes == 0 { "0 B".to_owned() } else { show(bytes, &[SIZES[0], SIZES[1], SIZES[2], SIZES[6]], " ") }
}

fn parse(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit.trim_start())?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

fn show(amount: u64, units: &[(&str, u64)], gap: &str) -> String {
    let whole = units.iter().find(|(_, factor)| amount.is_multiple_of(*factor));
    let (unit, factor) = whole.copied().unwrap_or(("", 1));
    format!("{}{gap}{unit}", amount / factor)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn amounts_have_units() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("2 h"), Ok(Duration::from_secs(7200)));
        assert_eq!(parse_duration("0s"), Ok(Duration::ZERO));
        assert_eq!(parse_size("64 MiB"), Ok(64 << 20));
        assert_eq!(parse_size("10MB"), Ok(10_000_000));
        for bad in ["", "60", "s", "-1s", "1.5s", "1m30s", "60S", " 1s", "1s ", "99999999999999999999s", "1é"] {
            assert!(parse_duration(bad).is_err(), "{bad:?}");
        }
        for bad in ["", "64", "MiB", "64 mib", "1 TiB", "99999999999999 GiB", "1.5 GiB"] {
            assert!(parse_size(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn amounts_show_in_their_largest_unit() {
        let shown = [1500, 60_000, 90_000, 86_400_000, 0].map(|ms| show_duration(Duration::from_millis(ms)));
        assert_eq!(shown, ["1500ms", "1m", "90s", "1d", "0s"]);
        assert_eq!([1 << 30, 1536, 1023, 0].map(show_size), ["1 GiB", "1536 B", "1023 B", "0 B"]);
    }

    proptest! {
        #[test]
        fn what_is_shown_parses_to_the_same(amount in any::<u64>()) {
            prop_assert_eq!(parse_duration(&show_duration(Duration::from_millis(amount))), Ok(Duration::from_millis(amount)));
            prop_assert_eq!(parse_size(&show_size(amount)), Ok(amount));
        }

        #[test]
        fn a_unit_is_a_factor(number in 0_u64..1_000_000, unit in 0_usize..5, space in " {0,2}") {
            let (name, factor) = DURATIONS[unit];
            prop_assert_eq!(parse_duration(&format!("{number}{space}{name}")), Ok(Duration::from_millis(number * factor)));
            let (name, factor) = SIZES[unit];
            prop_assert_eq!(parse_size(&format!("{number}{space}{name}")), Ok(number * factor));
        }

        #[test]
        fn nothing_crashes(text in ".{0,24}") {
            drop((parse_duration(&text), parse_size(&text)));
        }
    }
}
