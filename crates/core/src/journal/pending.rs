//! Beginnings that wait a moment before they are written.
//!
//! A beginning matters only if the process dies before the end. Most requests are over soon, so their beginnings are kept
//! here for some milliseconds, and an end that comes meanwhile takes its beginning back: such a request is written once.
//! Taking back is a look-up by number; nothing is allocated for a request.

/// Frames of beginnings, in their order.
#[derive(Debug, Default)]
pub struct Pending {
    /// Number of the first of them; numbers never come again.
    first: u64,
    frames: Vec<Frame>,
    bytes: Vec<u8>,
    left: usize,
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

    /// Takes out all frames that were not taken back: hands each to `write`.
    pub fn take(&mut self, mut write: impl FnMut(&[u8])) {
        let mut start = 0;
        for frame in &self.frames {
            if frame.is_wanted {
                write(&self.bytes[start..frame.end]);
            }
            start = frame.end;
        }
        self.clear();
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
        self.left = 0;
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
            1 => Just(Act::Take),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1_000) })]

        #[test]
        fn what_is_not_taken_back_is_written_once_and_in_order(acts in prop::collection::vec(act(), 0..60)) {
            let (mut pending, mut tickets) = (Pending::default(), Vec::new());
            // What should be there: the frame of each ticket, until it is written or taken back.
            let mut model: Vec<Option<Vec<u8>>> = Vec::new();
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
                        pending.take(|frame| written.push(frame.to_vec()));
                        let expected: Vec<_> = model.iter_mut().filter_map(Option::take).collect();
                        prop_assert_eq!(written, expected);
                        prop_assert_eq!(pending.bytes(), 0);
                    }
                }
            }
        }
    }
}
