//! Values of flags that have a form of their own: limits, points in time, settings that can go back to their default.

use std::{str::FromStr, time::Duration};

use chrono::{DateTime, Days, NaiveDate, NaiveTime, TimeDelta, Utc};
use tollgate_core::{
    content::ContentMode, key::IpNet, limit::written, units::parse_duration_within, upstream::written as handling,
};

/// A setting that can be taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setting<T> {
    /// As if it had never been set: `default`, `never` or `none`.
    Unset,
    /// This value.
    To(T),
}

impl<T> Setting<T> {
    /// The value to store.
    pub fn value(self) -> Option<T> {
        match self {
            Self::Unset => None,
            Self::To(value) => Some(value),
        }
    }
}

impl<T> Setting<T> {
    fn parse_with(text: &str, parse: impl FnOnce(&str) -> Result<T, String>) -> Result<Self, String> {
        match text {
            "default" | "never" | "none" => Ok(Self::Unset),
            _ => parse(text).map(Self::To),
        }
    }
}

impl<T: FromStr<Err: std::fmt::Display>> FromStr for Setting<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::parse_with(text, |text| text.parse().map_err(|error: T::Err| error.to_string()))
    }
}

pub(super) fn requests(text: &str) -> Result<Setting<u32>, String> {
    Setting::parse_with(text, |text| written::parse_requests(text).map_err(it))
}

pub(super) fn tokens(text: &str) -> Result<Setting<u64>, String> {
    Setting::parse_with(text, |text| written::parse_tokens(text).map_err(it))
}

/// Dollars, as nano-dollars.
pub(super) fn nano_usd(text: &str) -> Result<Setting<u64>, String> {
    Setting::parse_with(text, |text| written::parse_usd(text).map_err(it))
}

pub(super) fn connect_timeout(text: &str) -> Result<Setting<Duration>, String> {
    handled(text, handling::parse_connect_timeout)
}

/// To the first byte, or from one piece to the next.
pub(super) fn wait(text: &str) -> Result<Setting<Duration>, String> {
    handled(text, handling::parse_wait)
}

pub(super) fn total_timeout(text: &str) -> Result<Setting<Duration>, String> {
    handled(text, handling::parse_total_timeout)
}

pub(super) fn probe_interval(text: &str) -> Result<Setting<Duration>, String> {
    handled(text, handling::parse_probe_interval)
}

pub(super) fn per_minute(text: &str) -> Result<Setting<u64>, String> {
    handled(text, handling::parse_per_minute)
}

/// Here only `default` takes a setting back: `none` and `never` would rather mean that there is no such limit.
fn handled<T>(text: &str, parse: impl FnOnce(&str) -> Result<T, String>) -> Result<Setting<T>, String> {
    match text {
        "default" => Ok(Setting::Unset),
        "none" | "never" | "off" => {
            Err("write 0s for none (0 for a number), or default for what the config says".to_owned())
        }
        _ => parse(text).map(Setting::To),
    }
}

/// Here `none` is a value, so only `default` takes the setting back.
pub(super) fn content(text: &str) -> Result<Setting<ContentMode>, String> {
    if text == "default" {
        return Ok(Setting::Unset);
    }
    let wrong = |_| "write none, hash, redacted or full, or default to take the setting back".to_owned();
    text.parse().map(Setting::To).map_err(wrong)
}

/// How long somebody waits in front of a terminal.
pub(super) fn patience(text: &str) -> Result<Duration, String> {
    parse_duration_within(text, Duration::from_secs(1)..=Duration::from_secs(86_400))
}

/// The value itself is named before the message.
fn it(message: String) -> String {
    format!("it {message}")
}

/// What a list allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allowed<T> {
    /// Everything.
    Any,
    /// This.
    Only(T),
}

pub(super) fn allowed(text: &str) -> Result<Allowed<IpNet>, String> {
    if text == "any" { Ok(Allowed::Any) } else { IpNet::parse(text).map(Allowed::Only) }
}

pub(super) fn api_version(text: &str) -> Result<String, String> {
    let fits = !text.is_empty() && text.len() <= 64;
    if fits && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte)) {
        Ok(text.to_owned())
    } else {
        Err("write a version such as 2024-10-21 or preview".to_owned())
    }
}

/// A point in time, as people write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// `2026-11-23T10:00:00Z`
    Time(DateTime<Utc>),
    /// `2026-11-23`, UTC
    Day(NaiveDate),
    /// `30d`: before or after now, as the flag means it
    Span(TimeDelta),
}

impl Moment {
    /// The moment that a span before `now` is, or a day begins.
    #[must_use]
    pub fn since(self, now: DateTime<Utc>) -> DateTime<Utc> {
        match self {
            Self::Time(time) => time,
            Self::Day(day) => day.and_time(NaiveTime::MIN).and_utc(),
            Self::Span(span) => now.checked_sub_signed(span).unwrap_or(DateTime::<Utc>::MIN_UTC),
        }
    }

    /// The moment that a span before `now` is, or a day is over.
    #[must_use]
    pub fn until(self, now: DateTime<Utc>) -> DateTime<Utc> {
        match self {
            Self::Day(day) => Self::Day(day.checked_add_days(Days::new(1)).unwrap_or(day)).since(now),
            _ => self.since(now),
        }
    }

    /// The moment that a span after `now` is, or a day begins.
    #[must_use]
    pub fn after(self, now: DateTime<Utc>) -> DateTime<Utc> {
        match self {
            Self::Span(span) => now + span,
            _ => self.since(now),
        }
    }
}

impl FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(time) = DateTime::parse_from_rfc3339(text) {
            return storable(time.to_utc()).map(Self::Time);
        }
        if let Ok(day) = NaiveDate::parse_from_str(text, "%Y-%m-%d") {
            return storable(day.and_time(NaiveTime::MIN).and_utc()).map(|_| Self::Day(day));
        }
        let wrong =
            || "write a time such as 2026-11-23T10:00:00Z, a date, or a span such as 90m, 12h, 30d, 2w".to_owned();
        let unit = text.chars().next_back().ok_or_else(wrong)?;
        let number: u32 = text[..text.len() - unit.len_utf8()].parse().map_err(|_| wrong())?;
        let minutes = match unit {
            'm' => 1,
            'h' => 60,
            'd' => 24 * 60,
            'w' => 7 * 24 * 60,
            _ => return Err(wrong()),
        };
        let span = TimeDelta::minutes(i64::from(number) * minutes);
        if span > TimeDelta::days(100 * 366) {
            Err("this is more than a hundred years".to_owned())
        } else {
            Ok(Self::Span(span))
        }
    }
}

/// Times sort as text in SQLite as long as their years have four digits.
fn storable(time: DateTime<Utc>) -> Result<DateTime<Utc>, String> {
    use chrono::Datelike;
    if (1970..=9998).contains(&time.year()) { Ok(time) } else { Err("the year must be 1970 to 9998".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_times_days_or_spans() {
        let now: DateTime<Utc> = "2026-11-23T10:30:00Z".parse().unwrap();
        let cases = [
            ("2026-11-23T12:00:00+02:00", "2026-11-23T10:00:00Z", "2026-11-23T10:00:00Z", "2026-11-23T10:00:00Z"),
            ("2026-11-30", "2026-11-30T00:00:00Z", "2026-12-01T00:00:00Z", "2026-11-30T00:00:00Z"),
            ("90m", "2026-11-23T09:00:00Z", "2026-11-23T09:00:00Z", "2026-11-23T12:00:00Z"),
            ("2d", "2026-11-21T10:30:00Z", "2026-11-21T10:30:00Z", "2026-11-25T10:30:00Z"),
            ("1w", "2026-11-16T10:30:00Z", "2026-11-16T10:30:00Z", "2026-11-30T10:30:00Z"),
        ];
        for (text, since, until, after) in cases {
            let moment: Moment = text.parse().unwrap();
            let times = [moment.since(now), moment.until(now), moment.after(now)];
            assert_eq!(
                times.map(|time| time.to_rfc3339_opts(chrono::SecondsFormat::Secs, true)),
                [since, until, after]
            );
        }
        for text in [
            "",
            "d",
            "5",
            "5y",
            "-5d",
            "5é",
            "2026-13-01",
            "2026-11-23 10:00",
            "99999999w",
            "9999-12-31",
            "+12026-01-01",
        ] {
            assert!(text.parse::<Moment>().is_err(), "{text}");
        }
    }

    #[test]
    fn settings_can_be_taken_back() {
        assert_eq!("default".parse(), Ok(Setting::<u32>::Unset));
        assert_eq!("0".parse(), Ok(Setting::To(0_u32)));
        assert!("x".parse::<Setting<u32>>().is_err());
    }
}
