//! Files of the journal: their names and heads, and the note of how far they are booked.

use super::Place;

/// The version that is written. Greater ones are not understood: a newer tollgate wrote them.
pub const VERSION: u32 = 1;
/// Bytes of a segment's head.
pub const HEAD: usize = 24;
/// Bytes of the note.
pub const NOTE: usize = 20;

const MAGIC: &[u8; 8] = b"tollgate";
const SUFFIX: &str = ".journal";
/// Ends that are not counted yet, because the segment is still written to.
const UNKNOWN: u32 = u32::MAX;

/// The head of a segment that is about to be written, or has been: with the number of its ends.
#[must_use]
pub fn head(ends: Option<u32>) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    head[..8].copy_from_slice(MAGIC);
    head[8..12].copy_from_slice(&VERSION.to_le_bytes());
    head[12..16].copy_from_slice(&ends.unwrap_or(UNKNOWN).to_le_bytes());
    let checksum = crc32fast::hash(&head[..HEAD - 4]);
    head[HEAD - 4..].copy_from_slice(&checksum.to_le_bytes());
    head
}

/// What stands at the beginning of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// A segment that can be read; how many ends it has, if it was closed properly.
    Known(Option<u32>),
    /// A segment of this greater version.
    Newer(u32),
    /// No head. What follows may still be frames.
    Damaged,
}

/// Reads the head at the beginning of `bytes`.
#[must_use]
pub fn read_head(bytes: &[u8]) -> Head {
    let Some(head) = bytes.first_chunk::<HEAD>() else { return Head::Damaged };
    let number = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    if head[..8] != *MAGIC || number(HEAD - 4) != crc32fast::hash(&head[..HEAD - 4]) {
        return Head::Damaged;
    }
    match number(8) {
        version if version > VERSION => Head::Newer(version),
        _ => Head::Known(Some(number(12)).filter(|ends| *ends != UNKNOWN)),
    }
}

/// The name of the file of a segment.
#[must_use]
pub fn name_of(number: u64) -> String {
    format!("{number:016x}{SUFFIX}")
}

/// The number of the segment that a file is, by its name.
#[must_use]
pub fn number_of(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(SUFFIX).filter(|digits| digits.len() == 16)?;
    u64::from_str_radix(digits, 16).ok().filter(|number| name_of(*number) == name)
}

/// The note that everything before `place` is booked.
#[must_use]
pub fn note(place: Place) -> [u8; NOTE] {
    let mut note = [0; NOTE];
    note[..8].copy_from_slice(&place.segment.to_le_bytes());
    note[8..16].copy_from_slice(&place.offset.to_le_bytes());
    let checksum = crc32fast::hash(&note[..16]);
    note[16..].copy_from_slice(&checksum.to_le_bytes());
    note
}

/// Reads a note; `None`: it is damaged.
#[must_use]
pub fn read_note(bytes: &[u8]) -> Option<Place> {
    let note = bytes.first_chunk::<NOTE>()?;
    let number = |at: usize| note[at..at + 8].iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte));
    let is_intact = note[16..] == crc32fast::hash(&note[..16]).to_le_bytes();
    is_intact.then(|| Place { segment: number(0), offset: number(8) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn heads_tell_their_version() {
        assert_eq!(read_head(&head(None)), Head::Known(None));
        assert_eq!(read_head(&head(Some(7))), Head::Known(Some(7)));
        assert_eq!(read_head(&head(None)[..HEAD - 1]), Head::Damaged);
        let mut newer = head(None);
        newer[8] = 2;
        assert_eq!(read_head(&newer), Head::Damaged, "a bit that flipped is no newer version");
        let checksum = crc32fast::hash(&newer[..HEAD - 4]);
        newer[HEAD - 4..].copy_from_slice(&checksum.to_le_bytes());
        assert_eq!(read_head(&newer), Head::Newer(2));
    }

    #[test]
    fn names_sort_as_numbers_do() {
        assert_eq!(name_of(255), "00000000000000ff.journal");
        assert_eq!(number_of("00000000000000ff.journal"), Some(255));
        for other in ["ff.journal", "00000000000000FF.journal", "00000000000000ff", "lock", "+0000000000000ff.journal"]
        {
            assert_eq!(number_of(other), None, "{other}");
        }
    }

    proptest! {
        #[test]
        fn a_note_is_read_as_it_was_written_or_not_at_all(segment: u64, offset: u64, at in 0..NOTE, flip in 1..=255_u8) {
            let place = Place { segment, offset };
            let mut bytes = note(place);
            prop_assert_eq!(read_note(&bytes), Some(place));
            bytes[at] ^= flip;
            prop_assert_eq!(read_note(&bytes), None);
        }
    }
}
