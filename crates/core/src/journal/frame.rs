//! Frames: how an entry is delimited, and how it is found again.
//!
//! `mark | length | checksum | payload`, numbers in little endian. The mark consists of two bytes that no UTF-8 text
//! contains: where a frame is damaged, the next one is searched for by it, and no text that a client chose (and that stands
//! in a payload) can pass for a frame. The checksum then tells for sure.
//!
//! Reading never fails and never stops: [`step`] either finds a frame, or says how many bytes to leave out.

use memchr::memmem;

/// How every frame begins.
const MARK: [u8; 2] = [0xFD, 0xFE];
/// Bytes before a payload.
pub const HEAD: usize = 10;
/// Longest payload. A length beyond it is damage, and need not be believed to be waited for.
pub const MAX_PAYLOAD: usize = 32 * 1024;

/// Appends a frame to `out`, whose payload is what `write` appends. A payload that is too long is taken out again: `false`.
pub fn put(out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) -> bool {
    let start = out.len();
    out.extend_from_slice(&[0; HEAD]);
    write(out);
    let payload = &out[start + HEAD..];
    let Some(length) = u32::try_from(payload.len()).ok().filter(|_| payload.len() <= MAX_PAYLOAD) else {
        out.truncate(start);
        return false;
    };
    let checksum = crc32fast::hash(payload);
    out[start..start + 2].copy_from_slice(&MARK);
    out[start + 2..start + 6].copy_from_slice(&length.to_le_bytes());
    out[start + 6..start + HEAD].copy_from_slice(&checksum.to_le_bytes());
    true
}

/// What is at the beginning of some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// An intact frame of so many bytes; its payload are all but the first [`HEAD`].
    Frame(usize),
    /// So many bytes that belong to no intact frame.
    Skip(usize),
    /// What may be a frame, once there are more bytes.
    More,
}

/// Looks at the beginning of `bytes`. `is_all`: are no more to come?
#[must_use]
pub fn step(bytes: &[u8], is_all: bool) -> Step {
    if bytes.is_empty() {
        return Step::More;
    }
    let length = length_at(bytes);
    if let Some(length) = length.filter(|length| *length <= bytes.len() && is_intact(&bytes[..*length])) {
        return Step::Frame(length);
    }
    let may_be_whole_later = match length {
        Some(length) => length > bytes.len(),
        None => bytes.len() < HEAD && MARK.starts_with(&bytes[..bytes.len().min(2)]),
    };
    if may_be_whole_later && !is_all {
        return Step::More;
    }
    Step::Skip(next_mark(bytes, is_all))
}

/// The length that a frame at the beginning of `bytes` would have, by its head.
fn length_at(bytes: &[u8]) -> Option<usize> {
    let head = bytes.first_chunk::<HEAD>()?;
    let length = usize::try_from(u32::from_le_bytes([head[2], head[3], head[4], head[5]])).ok()?;
    // Nothing is no entry, and its checksum would be as good as zeros.
    (head[..2] == MARK && (1..=MAX_PAYLOAD).contains(&length)).then_some(HEAD + length)
}

fn is_intact(frame: &[u8]) -> bool {
    frame[6..HEAD] == crc32fast::hash(&frame[HEAD..]).to_le_bytes()
}

/// How many bytes are before the next mark, the first byte aside.
fn next_mark(bytes: &[u8], is_all: bool) -> usize {
    match memmem::find(&bytes[1..], &MARK) {
        Some(at) => at + 1,
        // The last byte may be half a mark.
        None if !is_all && bytes.len() > 1 && bytes.ends_with(&MARK[..1]) => bytes.len() - 1,
        None => bytes.len(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Every frame in `bytes`, which arrive in pieces, and how many bytes were left out.
    fn read(bytes: &[u8], piece: usize) -> (Vec<Vec<u8>>, usize) {
        let (mut frames, mut skipped, mut at, mut end) = (Vec::new(), 0, 0, 0);
        loop {
            match step(&bytes[at..end], end == bytes.len()) {
                Step::Frame(length) => {
                    frames.push(bytes[at + HEAD..at + length].to_vec());
                    at += length;
                }
                Step::Skip(length) => {
                    assert!(length > 0);
                    (at, skipped) = (at + length, skipped + length);
                }
                Step::More if end == bytes.len() => {
                    assert_eq!(at, end);
                    return (frames, skipped);
                }
                Step::More => end = (end + piece).min(bytes.len()),
            }
        }
    }

    fn framed(payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        assert!(put(&mut out, |out| out.extend_from_slice(payload)));
        out
    }

    #[test]
    fn a_payload_that_is_too_long_leaves_nothing() {
        let mut out = vec![7];
        assert!(!put(&mut out, |out| out.extend(vec![0; MAX_PAYLOAD + 1])));
        assert_eq!(out, [7]);
    }

    /// Frames, and what may come between them: anything, with many marks and heads in it.
    fn part() -> impl Strategy<Value = (Vec<u8>, bool)> {
        let payload = prop::collection::vec(prop_oneof![Just(0xFD), Just(0xFE), any::<u8>()], 1..60);
        let junk = prop_oneof![
            prop::collection::vec(any::<u8>(), 0..40),
            prop::collection::vec(Just(0), 0..200),
            prop::collection::vec(prop_oneof![Just(0xFD), Just(0xFE)], 0..9),
            (any::<u32>(), any::<u32>()).prop_map(|(a, b)| [&MARK[..], &a.to_le_bytes(), &b.to_le_bytes()].concat()),
            // The part that is missing is not what a mark begins with, and what comes next does not happen to be it.
            prop::collection::vec(0..0xFD_u8, 1..60).prop_flat_map(|payload| {
                let whole = framed(&payload);
                (1..whole.len()).prop_map(move |length| [&whole[..length], &[0xFF]].concat())
            }),
        ];
        prop_oneof![2 => payload.prop_map(|payload| (payload, true)), 1 => junk.prop_map(|junk| (junk, false))]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2_000) })]

        #[test]
        fn every_intact_frame_is_found_among_anything(
            parts in prop::collection::vec(part(), 0..12),
            piece in 1_usize..100,
        ) {
            let bytes: Vec<u8> =
                parts.iter().flat_map(|(part, is_frame)| if *is_frame { framed(part) } else { part.clone() }).collect();
            let written: Vec<&Vec<u8>> = parts.iter().filter(|(_, is_frame)| *is_frame).map(|(part, _)| part).collect();
            let (found, skipped) = read(&bytes, piece);
            prop_assert_eq!(found.iter().collect::<Vec<_>>(), written);
            let framed: usize = found.iter().map(|payload| payload.len() + HEAD).sum();
            prop_assert_eq!(framed + skipped, bytes.len());
        }

        #[test]
        fn a_flipped_bit_costs_one_frame(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..60), 1..6),
            at in any::<prop::sample::Index>(),
            bit in 0..8_u8,
        ) {
            let frames: Vec<Vec<u8>> = payloads.iter().map(|payload| framed(payload)).collect();
            let mut bytes = frames.concat();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            let mut end = 0;
            let hit = frames.iter().position(|frame| { end += frame.len(); at < end }).unwrap();
            let mut left = payloads.clone();
            left.remove(hit);
            prop_assert_eq!(read(&bytes, bytes.len()).0, left);
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..500), piece in 1_usize..50) {
            read(&bytes, piece);
        }
    }
}
