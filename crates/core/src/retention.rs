//! How long rows are kept, and which tables of a month there are: arithmetic of time and names.
//!
//! A table that grows without end is kept in parts, one for each calendar month (UTC), where the database can do so: old rows
//! then go as a whole table, which costs nothing, instead of one by one. The name of a part tells its month, so no list of
//! them is needed beside the database's own.

use chrono::{DateTime, TimeDelta, Utc};

use crate::limit::Month;

/// Months for which there is a part before they begin, so that a gateway that is away for weeks finds one all the same.
const AHEAD: i32 = 2;

/// A table that rows are taken out of when they are old.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Its name. Its rows carry their time as `started_at`.
    pub table: &'static str,
    /// How many days a row is kept at least; 0: for ever.
    pub days: u32,
    /// Must each row go when its time has come? Otherwise those of a month may wait for the last of them.
    pub is_exact: bool,
}

impl Kept {
    /// The first moment whose rows are kept; `None`: all are.
    #[must_use]
    pub fn since(&self, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let days = TimeDelta::try_days(i64::from(self.days)).filter(|days| !days.is_zero())?;
        now.checked_sub_signed(days)
    }

    /// The months for which there must be a part.
    pub fn wanted(now: DateTime<Utc>) -> impl Iterator<Item = Month> {
        let Month(this) = Month::of(now);
        (this..=this + AHEAD).map(Month)
    }

    /// The name of the part of a month.
    #[must_use]
    pub fn part(&self, month: Month) -> String {
        format!("{}_{}", self.table, month.start().format("%Y_%m"))
    }

    /// The month of a part, if that is what the name tells.
    #[must_use]
    pub fn month_of(&self, part: &str) -> Option<Month> {
        let (year, month) = part.strip_prefix(self.table)?.strip_prefix('_')?.split_once('_')?;
        let (year, month): (i32, i32) = (year.parse().ok()?, month.parse().ok()?);
        let month = Month(year.checked_mul(12)?.checked_add(month - 1)?);
        // What is written otherwise was named by somebody else.
        (self.part(month) == part).then_some(month)
    }

    /// Is everything in the part of this month old enough to go?
    #[must_use]
    pub fn is_over(&self, month: Month, now: DateTime<Utc>) -> bool {
        self.since(now).is_some_and(|since| month.next().start() <= since)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kept(days: u32) -> Kept {
        Kept { table: "request_log", days, is_exact: false }
    }

    fn at(time: &str) -> DateTime<Utc> {
        time.parse().unwrap()
    }

    #[test]
    fn there_is_a_part_for_this_month_and_the_next_two() {
        let parts = |now| Kept::wanted(at(now)).map(|month| kept(90).part(month)).collect::<Vec<_>>();
        assert_eq!(
            parts("2026-11-30T23:59:59Z"),
            ["request_log_2026_11", "request_log_2026_12", "request_log_2027_01"]
        );
        assert_eq!(parts("2026-12-01T00:00:00Z")[2], "request_log_2027_02");
    }

    #[test]
    fn a_part_goes_when_its_last_row_may() {
        let november = Month::of(at("2026-11-15T00:00:00Z"));
        assert!(!kept(90).is_over(november, at("2027-02-28T23:59:59Z")));
        assert!(kept(90).is_over(november, at("2027-03-01T00:00:00Z")));
        assert!(!kept(0).is_over(november, at("2127-03-01T00:00:00Z")), "0 is for ever");
        assert!(!kept(u32::MAX).is_over(november, at("2127-03-01T00:00:00Z")));
    }

    #[test]
    fn what_others_named_is_left_alone() {
        for name in [
            "request_log_default",
            "request_log",
            "request_log_2026",
            "request_log_2026_11_old",
            "request_log_2026_1",
            "request_log_2026_13",
            "request_log_2026_00",
            "request_log_+2026_11",
            "request_log_2147483647_11",
            "request_content_2026_11",
        ] {
            assert_eq!(kept(90).month_of(name), None, "{name}");
        }
    }

    proptest! {
        #[test]
        fn names_tell_their_month(year in 1970_i32..9999, month in 0_i32..12) {
            let month = Month(year * 12 + month);
            prop_assert_eq!(kept(1).month_of(&kept(1).part(month)), Some(month));
        }

        #[test]
        fn no_row_goes_before_its_time(seconds in 0_i64..4_000_000_000, days in 1_u32..5000, age_s in 0_i64..500_000_000) {
            let now = DateTime::from_timestamp(seconds + age_s, 0).unwrap();
            let row = DateTime::from_timestamp(seconds, 0).unwrap();
            let table = kept(days);
            if table.is_over(Month::of(row), now) {
                prop_assert!(row < table.since(now).unwrap());
                prop_assert!(now - row >= TimeDelta::days(i64::from(days)));
            }
            prop_assert!(Kept::wanted(now).all(|month| !table.is_over(month, now)), "what is made is not dropped");
        }
    }
}
