//! The sliding window: the law by which requests and tokens per minute are held.
//!
//! Time is cut into cells of one second, and the window is the current cell and the [`CELLS`]` - 1` before it. Whatever
//! was admitted in any true 60 seconds lies in 61 neighbouring cells, and at the moment of the last admission among them
//! their sum was within the limit. Hence **no true 60 s ever hold more than the limit**, wherever they begin.
//!
//! The price: a cell counts whole until all of it is more than 60 s old, so what is admitted at once comes back after
//! up to 61 s. At steady load **at least 60/61 = 98.3 % of the limit is admitted**.
//!
//! Moving on costs as much as cells have passed, at most one round of the ring, whatever the limit. A counter per
//! request (a log of times) would be sharper by that one second and grow with the limit; two fixed windows weighed by
//! their overlap, as others use, admit more than the limit when load comes in bursts.
//!
//! A clock that jumps back does not empty the window: what is in it keeps its age relative to the newest cell, as if
//! time had stood still. `state.lua` is the same law for Redis, and both run the same tests.

/// Cells of the ring: the current second and the 60 before it.
pub const CELLS: usize = 61;
/// Length of a cell.
pub const CELL_MS: u64 = 1000;

/// A sliding window over one-second cells.
#[derive(Clone, Debug)]
pub struct Window {
    newest: u64,
    sum: u64,
    cells: [u64; CELLS],
}

impl Default for Window {
    fn default() -> Self {
        Self { newest: 0, sum: 0, cells: [0; CELLS] }
    }
}

impl Window {
    /// What the window holds at `now_ms`.
    pub fn used(&mut self, now_ms: u64) -> u64 {
        self.advance(now_ms / CELL_MS);
        self.sum
    }

    /// Adds `n` to the current cell, whose number it returns.
    pub fn add(&mut self, now_ms: u64, n: u64) -> u64 {
        let cell = now_ms / CELL_MS;
        self.advance(cell);
        self.cells[slot(cell)] = self.cells[slot(cell)].saturating_add(n);
        self.sum = self.sum.saturating_add(n);
        cell
    }

    /// Takes `n` out of a cell again, as far as it is there and still in the window.
    pub fn take_back(&mut self, cell: u64, n: u64) {
        if cell <= self.newest && cell + CELLS as u64 > self.newest {
            let taken = n.min(self.cells[slot(cell)]);
            self.cells[slot(cell)] -= taken;
            self.sum = self.sum.saturating_sub(taken);
        }
    }

    /// How long until `n` fits under `limit`, if nothing else is admitted meanwhile; `None`: it never will.
    pub fn wait_ms(&mut self, now_ms: u64, n: u64, limit: u64) -> Option<u64> {
        self.advance(now_ms / CELL_MS);
        if n > limit {
            return None;
        }
        let mut too_much = self.sum.saturating_add(n).saturating_sub(limit);
        let oldest = (self.newest + 1).saturating_sub(CELLS as u64);
        for cell in oldest..=self.newest {
            if too_much == 0 {
                break;
            }
            too_much = too_much.saturating_sub(self.cells[slot(cell)]);
            if too_much == 0 {
                return Some(gone_at(cell).saturating_sub(now_ms));
            }
        }
        Some(0)
    }

    /// How long until the window is empty, if nothing more is admitted.
    pub fn reset_ms(&mut self, now_ms: u64) -> u64 {
        self.advance(now_ms / CELL_MS);
        let oldest = (self.newest + 1).saturating_sub(CELLS as u64);
        let last = (oldest..=self.newest).rev().find(|cell| self.cells[slot(*cell)] > 0);
        last.map_or(0, |cell| gone_at(cell).saturating_sub(now_ms))
    }

    /// Puts `n` into the cell that is `age` cells older than the current one: how a copy of another window is made.
    pub fn put_aged(&mut self, now_ms: u64, age: usize, n: u64) {
        self.advance(now_ms / CELL_MS);
        if let Some(cell) = self.newest.checked_sub(age as u64).filter(|_| age < CELLS) {
            self.cells[slot(cell)] = self.cells[slot(cell)].saturating_add(n);
            self.sum = self.sum.saturating_add(n);
        }
    }

    /// Forgets what is older than the cell of `since_ms`.
    pub fn forget_before(&mut self, since_ms: u64) {
        let since = since_ms / CELL_MS;
        let oldest = (self.newest + 1).saturating_sub(CELLS as u64);
        for cell in oldest..since.min(self.newest + 1) {
            self.sum -= std::mem::take(&mut self.cells[slot(cell)]).min(self.sum);
        }
    }

    fn advance(&mut self, cell: u64) {
        if cell < self.newest {
            self.turn_back(cell);
        } else if cell - self.newest >= CELLS as u64 {
            (self.sum, self.cells) = (0, [0; CELLS]);
        } else {
            for passed in self.newest + 1..=cell {
                // A sum that stopped at the greatest number is corrected here at the latest.
                self.sum = self.sum.saturating_sub(std::mem::take(&mut self.cells[slot(passed)]));
            }
        }
        self.newest = cell;
    }

    /// The clock went back: every cell keeps its age relative to the newest.
    fn turn_back(&mut self, cell: u64) {
        let by = slot(self.newest - cell);
        self.cells.rotate_left(by);
    }
}

fn slot(cell: u64) -> usize {
    #[expect(clippy::cast_possible_truncation, reason = "less than 61")]
    let slot = (cell % CELLS as u64) as usize;
    slot
}

/// When a cell leaves the window.
fn gone_at(cell: u64) -> u64 {
    (cell + CELLS as u64) * CELL_MS
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_was_admitted_at_once_comes_back_after_the_minute() {
        let mut window = Window::default();
        let start = 1_000_500;
        window.add(start, 10);
        assert_eq!(window.wait_ms(start, 1, 10), Some(60_500));
        assert_eq!(window.used(start + 60_000), 10);
        assert_eq!(window.used(start + 60_499), 10);
        assert_eq!(window.used(start + 60_500), 0);
        assert_eq!(window.wait_ms(start + 60_500, 10, 10), Some(0));
        assert_eq!(window.wait_ms(start + 60_500, 11, 10), None, "more than the limit never fits");
    }

    #[test]
    fn a_clock_that_jumps_back_frees_nothing() {
        for jump in [1, 1000, 59_000, 61_000, 3_600_000] {
            let mut window = Window::default();
            let now = 10_000_000;
            window.add(now - 30_000, 4);
            window.add(now, 3);
            assert_eq!(window.used(now - jump), 7, "{jump}");
            assert_eq!(window.used(now - jump + 31_000), 3, "{jump}: the older part keeps its age");
            assert_eq!(window.used(now - jump + 61_000), 0, "{jump}");
        }
    }

    #[test]
    fn sums_stop_instead_of_overflowing() {
        let mut window = Window::default();
        window.add(0, u64::MAX);
        window.add(1000, u64::MAX);
        assert_eq!(window.used(1000), u64::MAX);
        assert_eq!(window.wait_ms(1000, 1, 5), Some(60_000));
        assert_eq!(window.used(62_000), 0);
    }

    proptest! {
        #[test]
        fn what_is_taken_back_was_never_there(steps in prop::collection::vec((0_u64..5000, 1_u64..100), 1..200)) {
            let (mut window, mut plain, mut now) = (Window::default(), Window::default(), 5_000_000);
            for (wait, n) in steps {
                now += wait;
                let cell = window.add(now, n);
                window.take_back(cell, n);
                prop_assert_eq!(window.used(now), plain.used(now));
            }
        }
    }
}
