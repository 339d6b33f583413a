//! From entries to rows: which become one, and which wait for another.
//!
//! A request has one row. Its end makes it; an end whose tokens are still being counted waits for its count, but not for
//! ever; a beginning becomes a row only if its process is gone and no end was found. Beginnings are known here as long as
//! their requests go on, so what is kept is bounded by the requests in flight.

use std::collections::{HashMap, VecDeque};

use uuid::Uuid;

use super::{
    Place,
    entry::{Count, Kind, peek},
};

/// Ends that wait for their counts. Beyond it the oldest goes without.
const MAX_HELD: usize = 1024;
/// Beginnings that are known: more than one process has requests in flight. Those beyond it are no longer marked as
/// interrupted if the process dies.
const MAX_OPEN: usize = 131_072;

/// What an entry means.
#[derive(Debug, PartialEq, Eq)]
pub enum Seen {
    /// Nothing yet, or nothing more.
    Nothing,
    /// It is an end that makes a row.
    Row,
    /// It is the count of an end that was seen before.
    Counted(Held, Count),
}

/// An end that waits for its count.
#[derive(Debug, PartialEq, Eq)]
pub struct Held {
    /// Where it stands.
    pub place: Place,
    /// The entry.
    pub payload: Box<[u8]>,
    request_id: Uuid,
    since_ms: u64,
}

/// A beginning without an end.
#[derive(Debug)]
struct Open {
    segment: u64,
    payload: Box<[u8]>,
}

/// What has been seen of requests that have no row yet.
#[derive(Debug, Default)]
pub struct Tracker {
    open: HashMap<Uuid, Open>,
    held: VecDeque<Held>,
}

impl Tracker {
    /// Takes in the next entry, which stands at `place`.
    pub fn see(&mut self, place: Place, payload: &[u8], now_ms: u64) -> Seen {
        match peek(payload) {
            Some((Kind::End, id)) => {
                self.open.remove(&id);
                Seen::Row
            }
            Some((Kind::UncountedEnd, request_id)) => {
                self.open.remove(&request_id);
                self.held.push_back(Held { place, payload: payload.into(), request_id, since_ms: now_ms });
                Seen::Nothing
            }
            Some((Kind::Count, id)) => self.counted(id, payload),
            Some((Kind::Begin, id)) => {
                self.begin(id, place.segment, payload);
                Seen::Nothing
            }
            None => Seen::Nothing,
        }
    }

    /// Takes in an entry whose row, if it makes one, is booked already.
    pub fn see_again(&mut self, segment: u64, payload: &[u8]) {
        match peek(payload) {
            Some((Kind::Begin, id)) => self.begin(id, segment, payload),
            Some((Kind::End | Kind::UncountedEnd, id)) => drop(self.open.remove(&id)),
            Some((Kind::Count, _)) | None => {}
        }
    }

    /// An end that has waited for its count since before `since_ms`, or for which there is no room. It goes with rough numbers.
    pub fn overdue(&mut self, since_ms: u64) -> Option<Held> {
        let is_over = self.held.len() > MAX_HELD || self.held.front().is_some_and(|held| held.since_ms < since_ms);
        if is_over { self.held.pop_front() } else { None }
    }

    /// Takes out every beginning: their processes are gone.
    pub fn take_open(&mut self) -> impl Iterator<Item = Box<[u8]>> {
        std::mem::take(&mut self.open).into_values().map(|open| open.payload)
    }

    /// Everything before this place is booked, once what was made rows so far is. `at` is how far was read.
    #[must_use]
    pub fn settled(&self, at: Place) -> Place {
        self.held.front().map_or(at, |held| held.place.min(at))
    }

    /// The beginnings that stand before a segment.
    pub fn open_before(&self, segment: u64) -> impl Iterator<Item = &[u8]> {
        self.open.values().filter(move |open| open.segment < segment).map(|open| &*open.payload)
    }

    fn begin(&mut self, id: Uuid, segment: u64, payload: &[u8]) {
        if self.open.len() < MAX_OPEN {
            self.open.insert(id, Open { segment, payload: payload.into() });
        }
    }

    fn counted(&mut self, id: Uuid, payload: &[u8]) -> Seen {
        let place = self.held.iter().position(|held| held.request_id == id);
        let held = place.and_then(|place| self.held.remove(place));
        match (held, Count::read(payload)) {
            (Some(held), Some(count)) => Seen::Counted(held, count),
            _ => Seen::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use chrono::DateTime;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        id::{KeyId, UserId},
        journal::entry::{Begin, End},
        usage::Usage,
    };

    fn begin(id: u128) -> Begin<'static> {
        Begin {
            request_id: Uuid::from_u128(id),
            started_at: DateTime::UNIX_EPOCH,
            user_id: UserId(1),
            key_id: KeyId(1),
            ip: None,
            route: "r",
            model: "m",
            stream: false,
            prompt_tokens: 1,
            output_tokens: 1,
            cost_nano_usd: 1,
        }
    }

    /// The entries of one request, in their order.
    #[derive(Clone, Copy, Debug)]
    enum Story {
        Whole,
        WithoutBegin,
        Uncounted,
        NeverCounted,
        Interrupted,
    }

    fn entries(id: u128, story: Story) -> Vec<Vec<u8>> {
        let mut all = vec![Vec::new(), Vec::new(), Vec::new()];
        let is_uncounted = matches!(story, Story::Uncounted | Story::NeverCounted);
        begin(id).write(&mut all[0]);
        End { record: begin(id).interrupted(), is_uncounted, hold: None }.write(&mut all[1]);
        Count { request_id: Uuid::from_u128(id), usage: Usage::default(), cost_nano_usd: 9 }.write(&mut all[2]);
        match story {
            Story::Whole | Story::NeverCounted => all.truncate(2),
            Story::WithoutBegin => all = vec![all.swap_remove(1)],
            Story::Uncounted => {}
            Story::Interrupted => all.truncate(1),
        }
        all
    }

    fn id_of(payload: &[u8]) -> u128 {
        peek(payload).unwrap().1.as_u128()
    }

    /// Reads `log` from `from` on as a process does; rows go to `rows`, and it is told where everything before is booked.
    fn read(log: &[Vec<u8>], from: usize, until: usize, rows: &mut Vec<u128>) -> (Tracker, usize) {
        let (mut tracker, place) = (Tracker::default(), |offset| Place { segment: 0, offset });
        log[..from].iter().for_each(|payload| tracker.see_again(0, payload));
        for (at, payload) in log.iter().enumerate().take(until).skip(from) {
            match tracker.see(place(at as u64), payload, at as u64) {
                Seen::Nothing => {}
                Seen::Row => rows.push(id_of(payload)),
                Seen::Counted(held, count) => {
                    assert_eq!((id_of(&held.payload), count.cost_nano_usd), (count.request_id.as_u128(), 9));
                    rows.push(id_of(&held.payload));
                }
            }
            // An end waits for twenty entries.
            while let Some(held) = tracker.overdue((at as u64).saturating_sub(20)) {
                rows.push(id_of(&held.payload));
            }
        }
        let settled = tracker.settled(place(until as u64)).offset;
        (tracker, usize::try_from(settled).unwrap())
    }

    fn story() -> impl Strategy<Value = Story> {
        prop_oneof![
            3 => Just(Story::Whole),
            1 => Just(Story::WithoutBegin),
            2 => Just(Story::Uncounted),
            1 => Just(Story::NeverCounted),
            1 => Just(Story::Interrupted),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1_000) })]

        /// Requests interleave; a first process reads some of it and dies, a second one goes on from where that was booked.
        #[test]
        fn every_request_has_a_row_and_only_what_was_not_booked_comes_again(
            stories in prop::collection::vec(story(), 0..40),
            order in prop::collection::vec(any::<prop::sample::Index>(), 120),
            died_at in any::<prop::sample::Index>(),
        ) {
            let mut left: Vec<_> =
                stories.iter().enumerate().map(|(id, story)| VecDeque::from(entries(id as u128, *story))).collect();
            let mut log = Vec::new();
            for pick in order {
                left.retain(|entries| !entries.is_empty());
                if left.is_empty() { break }
                let which = pick.index(left.len());
                log.extend(left[which].pop_front());
            }
            let died_at = died_at.index(log.len() + 1);
            let mut rows = Vec::new();
            let (_, settled) = read(&log, 0, died_at, &mut rows);
            prop_assert!(settled <= died_at);
            let (mut tracker, _) = read(&log, settled, log.len(), &mut rows);
            while let Some(held) = tracker.overdue(u64::MAX) {
                rows.push(id_of(&held.payload));
            }
            rows.extend(tracker.take_open().map(|payload| id_of(&payload)));
            let mut times = BTreeMap::new();
            rows.into_iter().for_each(|id| *times.entry(id).or_insert(0) += 1);
            let ids: Vec<u128> = (0..stories.len() as u128).collect();
            prop_assert_eq!(times.keys().copied().collect::<Vec<_>>(), ids);
            // Twice only if the first process booked it behind one that still waited.
            prop_assert!(times.values().all(|n| *n <= 2));
            if settled == died_at {
                prop_assert!(times.values().all(|n| *n == 1));
            }
        }
    }

    #[test]
    fn what_is_known_of_is_bounded() {
        let mut tracker = Tracker::default();
        for id in 0..MAX_OPEN as u64 + 5 {
            let mut payload = Vec::new();
            begin(id.into()).write(&mut payload);
            tracker.see(Place { segment: id % 2, offset: 0 }, &payload, 0);
        }
        assert_eq!(tracker.open_before(2).count(), MAX_OPEN);
        assert_eq!(tracker.open_before(1).count(), MAX_OPEN / 2);
        let mut over = 0;
        for id in 0..MAX_HELD as u128 + 5 {
            let payload = entries(id, Story::NeverCounted).remove(1);
            tracker.see(Place::default(), &payload, 0);
            over += std::iter::from_fn(|| tracker.overdue(0)).count();
        }
        assert_eq!(over, 5);
    }
}
