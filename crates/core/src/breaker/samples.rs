//! What attempts of the recent past came to: the window of the failure share.
//!
//! A ring of ten cells. The current cell and the nine before it are the window, so it is between nine tenths and the
//! whole of its length, and forgets a tenth at a time. That is coarse, and enough for a share: unlike the window of a
//! limit, nobody is promised anything about its edges.

/// Cells of the ring.
const CELLS: usize = 10;

/// Successes and failures of the recent past.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Samples {
    newest: u64,
    cells: [Cell; CELLS],
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Cell {
    successes: u32,
    failures: u32,
}

impl Samples {
    /// Adds one attempt to a window of `window_s` seconds.
    pub fn add(&mut self, now_ms: u64, window_s: u32, is_failure: bool) {
        self.advance(now_ms, window_s);
        let cell = &mut self.cells[slot(self.newest)];
        let count = if is_failure { &mut cell.failures } else { &mut cell.successes };
        *count = count.saturating_add(1);
    }

    /// Attempts in the window, and the failures among them.
    pub fn sums(&mut self, now_ms: u64, window_s: u32) -> (u64, u64) {
        self.advance(now_ms, window_s);
        self.cells.iter().fold((0, 0), |(all, failures), cell| {
            (all + u64::from(cell.successes) + u64::from(cell.failures), failures + u64::from(cell.failures))
        })
    }

    /// Moves on to `now_ms`. A clock that went back by less than the window adds to the newest cell, as if it had stood
    /// still; one that went back further begins anew.
    fn advance(&mut self, now_ms: u64, window_s: u32) {
        let cell = now_ms / (u64::from(window_s.max(1)) * 1000 / CELLS as u64);
        if cell.abs_diff(self.newest) >= CELLS as u64 {
            *self = Self { newest: cell, cells: [Cell::default(); CELLS] };
        }
        for passed in self.newest + 1..=cell {
            self.cells[slot(passed)] = Cell::default();
        }
        self.newest = self.newest.max(cell);
    }
}

fn slot(cell: u64) -> usize {
    #[expect(clippy::cast_possible_truncation, reason = "less than 10")]
    let slot = (cell % CELLS as u64) as usize;
    slot
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_older_than_the_window_is_forgotten() {
        let mut samples = Samples::default();
        samples.add(30_000, 30, true);
        samples.add(40_000, 30, false);
        assert_eq!(samples.sums(56_999, 30), (2, 1));
        assert_eq!(samples.sums(60_000, 30), (1, 0));
        assert_eq!(samples.sums(70_000, 30), (0, 0));
    }

    proptest! {
        #[test]
        fn the_window_holds_what_is_recent(
            window_s in 1_u32..100,
            steps in prop::collection::vec((0_u64..20_000, any::<bool>()), 1..200),
        ) {
            let (mut samples, mut now, mut log) = (Samples::default(), 1_000_000, Vec::new());
            for (wait, is_failure) in steps {
                now += wait;
                samples.add(now, window_s, is_failure);
                log.push(now);
                let since = |ms| log.iter().filter(|at| **at + ms > now).count() as u64;
                let (all, failures) = samples.sums(now, window_s);
                let whole = u64::from(window_s) * 1000;
                prop_assert!(since(whole * 9 / 10) <= all && all <= since(whole));
                prop_assert!(failures <= all);
            }
        }

        #[test]
        fn any_clock_is_borne(times in prop::collection::vec(any::<u64>(), 1..50), window_s: u32) {
            let mut samples = Samples::default();
            for now in times {
                samples.add(now, window_s, true);
                prop_assert!(samples.sums(now, window_s).0 > 0);
            }
        }
    }
}
