//! Beginnings that wait a moment before they are written.
//!
//! A beginning matters only if the process dies before the end. Most requests are over soon, so their beginnings are kept
//! here for some milliseconds, and an end that comes meanwhile takes its beginning back: such a request is written once.
//! Taking back is a look-up by number; nothing is allocated for a request.
//!
//! Whoever writes comes at intervals, and takes what was there already when it came the last time: so each beginning has at
//! least one interval for its end to come, and under load most of those that are there at any moment are brand-new.

/// Frames of beginnings, in their order.
#[derive(Debug, Default)]
pub struct Pending {
    /// Number of the first of them; numbers never come again.
    first: u64,
    frames: Vec<Frame>,
    bytes: Vec<u8>,
    /// How many of them are wanted.
    left: usize,
    /// How many were there the last time.
    old: usize,
}

#[derive(Clone, Copy, Debug)]
struct Frame {
    end: usize,
    is_wanted: bool,
}

/// The number under which a beginning is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u64);

impl Pending {
    /// Adds the frame that `write` appends. The second: is it the only one?
    pub fn push(&mut self, write: impl FnOnce(&mut Vec<u8>)) -> (Ticket, bool) {
        let ticket = Ticket(self.first + self.frames.len() as u64);
        write(&mut self.bytes);
        self.frames.push(Frame { end: self.bytes.len(), is_wanted: true });
        self.left += 1;
        (ticket, self.left == 1)
    }

    /// Takes a frame back; `false`: it has been written.
    pub fn take_back(&mut self, ticket: Ticket) -> bool {
        let place = ticket.0.checked_sub(self.first).and_then(|place| usize::try_from(place).ok());
        let Some(frame) = place.and_then(|place| self.frames.get_mut(place)).filter(|frame| frame.is_wanted) else {
            return false;
        };
        frame.is_wanted = false;
        self.left -= 1;
        if self.left == 0 {
            self.clear();
        }
        true
    }

    /// Takes out the frames that were there the last time and were not taken back: hands each to `write`. `true`: some are
    /// left, for the next time.
    pub fn take(&mut self, mut write: impl FnMut(&[u8])) -> bool {
        let mut start = 0;
        for frame in self.frames.drain(..self.old) {
            if frame.is_wanted {
                write(&self.bytes[start..frame.end]);
                self.left -= 1;
            }
            start = frame.end;
        }
        self.first += self.old as u64;
        self.bytes.drain(..start);
        self.frames.iter_mut().for_each(|frame| frame.end -= start);
        self.old = self.frames.len();
        if self.left == 0 {
            self.clear();
        }
        self.left > 0
    }

    /// Bytes that wait, those taken back included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    fn clear(&mut self) {
        self.first += self.frames.len() as u64;
        self.frames.clear();
        self.bytes.clear();
        (self.left, self.old) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Act {
        Push(u8),
        TakeBack(prop::sample::Index),
        Take,
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            3 => any::<u8>().prop_map(Act::Push),
            3 => any::<prop::sample::Index>().prop_map(Act::TakeBack),
            2 => Just(Act::Take),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1_000) })]

        #[test]
        fn what_is_not_taken_back_is_written_once_and_in_order(acts in prop::collection::vec(act(), 0..60)) {
            let (mut pending, mut tickets) = (Pending::default(), Vec::new());
            // What should be there: the frame of each ticket, until it is written or taken back.
            let mut model: Vec<Option<Vec<u8>>> = Vec::new();
            // How many were pushed before the writer came the last time.
            let mut old = 0;
            for act in acts {
                match act {
                    Act::Push(length) => {
                        let frame = vec![length; usize::from(length) + 1];
                        let (ticket, is_only) = pending.push(|bytes| bytes.extend(&frame));
                        prop_assert_eq!(is_only, model.iter().all(Option::is_none));
                        tickets.push(ticket);
                        model.push(Some(frame));
                    }
                    Act::TakeBack(which) => {
                        if tickets.is_empty() { continue }
                        let which = which.index(tickets.len());
                        prop_assert_eq!(pending.take_back(tickets[which]), model[which].take().is_some());
                    }
                    Act::Take => {
                        let mut written = Vec::new();
                        let is_more = pending.take(|frame| written.push(frame.to_vec()));
                        let expected: Vec<_> = model[..old].iter_mut().filter_map(Option::take).collect();
                        prop_assert_eq!(written, expected);
                        prop_assert_eq!(is_more, model.iter().any(Option::is_some));
                        old = model.len();
                    }
                }
            }
        }
    }
}
