//! Card and phone numbers: groups of digits, told apart from all the other numbers by how they are grouped.
//!
//! A number is read as people write it: groups of digits with a separator or two between them. A group that touches a letter
//! belongs to an id, and so does everything in a UUID. Of the rest, a card has the first digits and the length of a card's
//! scheme and passes Luhn; a phone number has a `+`, the groups of a country that writes them so, or the word "phone" before
//! it.

use std::{ops::Range, sync::LazyLock};

use regex::Regex;

use super::{Cutter, marker};

/// Digits of a phone number, with its country (E.164).
const PHONE_DIGITS: Range<usize> = 8..16;
/// Digits of a card number.
const CARD_DIGITS: Range<usize> = 13..20;
/// Most groups of one number.
const MAX_GROUPS: usize = 8;

/// Digits that follow each other without anything between them.
#[derive(Clone, Debug)]
struct Group {
    at: Range<usize>,
    /// Does it touch a letter, or lie in a UUID?
    is_part: bool,
    /// Does it belong to the one before: are there only separators between them?
    follows: bool,
}

/// The text without card and phone numbers; `None`: there is none.
pub(super) fn take_out(text: &str) -> Option<String> {
    let groups = groups(text);
    let mut cutter = Cutter::new(text);
    let mut first = 0;
    while first < groups.len() {
        let run = run(&groups[first..]);
        // A + makes a phone number of what else could be a card.
        let is_international = run.first().is_some_and(|group| has_plus(text, group.at.start));
        let card = if is_international { None } else { card(text, run) };
        let found = card.map(|n| (n, "card")).or_else(|| phone(text, run, is_international).map(|n| (n, "phone")));
        match found {
            Some((count, kind)) => {
                let (start, end) = (groups[first].at.start, groups[first + count - 1].at.end);
                cutter.replace(with_lead(text, start, kind)..end, &marker(kind));
                first += count;
            }
            None => first += 1,
        }
    }
    cutter.finish()
}

/// Is this number of a JSON document that of a card?
pub(super) fn is_plain_card(number: &str) -> bool {
    number.bytes().all(|byte| byte.is_ascii_digit()) && is_card(number.as_bytes())
}

fn is_card(digits: &[u8]) -> bool {
    is_of_scheme(digits) && luhn(digits)
}

/// Cheap to refuse: most texts have no long numbers.
fn groups(text: &str) -> Vec<Group> {
    let bytes = text.as_bytes();
    let (mut groups, mut at) = (Vec::<Group>::new(), 0);
    let mut uuids = None;
    while let Some(start) = bytes[at..].iter().position(u8::is_ascii_digit).map(|next| at + next) {
        let end = bytes[start..].iter().position(|byte| !byte.is_ascii_digit()).map_or(bytes.len(), |len| start + len);
        let follows = groups.last().is_some_and(|last| separates(&text[last.at.end..start]));
        let uuids = uuids.get_or_insert_with(|| find_uuids(text));
        let place = uuids.partition_point(|uuid| uuid.end <= start);
        let in_uuid = uuids.get(place).is_some_and(|uuid| uuid.start <= start);
        groups.push(Group { at: start..end, is_part: in_uuid || touches_letter(text, start, end), follows });
        at = end;
    }
    groups
}

fn find_uuids(text: &str) -> Vec<Range<usize>> {
    static UUID: LazyLock<Option<Regex>> =
        LazyLock::new(|| Regex::new("(?i)[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}").ok());
    UUID.iter().flat_map(|uuid| uuid.find_iter(text)).map(|found| found.range()).collect()
}

/// May this stand between two groups of one number?
fn separates(between: &str) -> bool {
    matches!(
        between,
        " " | "-"
            | "."
            | "/"
            | "\u{a0}"
            | "\u{2011}"
            | "\u{202f}"
            | " - "
            | " / "
            | ") "
            | ")"
            | ")-"
            | " ("
            | "("
            | "-("
    )
}

fn touches_letter(text: &str, start: usize, end: usize) -> bool {
    let is_letter = |c: char| c == '_' || (c.is_alphanumeric() && c.is_ascii());
    text[..start].chars().next_back().is_some_and(is_letter) || text[end..].chars().next().is_some_and(is_letter)
}

/// The groups that could be one number together, from the first on.
fn run(groups: &[Group]) -> &[Group] {
    if groups[0].is_part {
        return &[];
    }
    let groups = &groups[..groups.len().min(MAX_GROUPS)];
    let end = groups.iter().skip(1).position(|group| !group.follows || group.is_part).map_or(groups.len(), |n| n + 1);
    &groups[..end]
}

fn digits(text: &str, groups: &[Group]) -> Vec<u8> {
    groups.iter().flat_map(|group| text[group.at.clone()].bytes()).collect()
}

fn lengths(groups: &[Group]) -> Vec<usize> {
    groups.iter().map(|group| group.at.len()).collect()
}

/// How many groups at the beginning of `run` are the number of a card.
fn card(text: &str, run: &[Group]) -> Option<usize> {
    let is_shape = |lengths: &[usize]| match lengths {
        [_] | [4, 6, 5 | 4] => true,
        [first @ .., 1..=4] => first.len() >= 3 && first.iter().all(|length| *length == 4),
        _ => false,
    };
    (1..=run.len().min(5)).rev().find(|&count| {
        let groups = &run[..count];
        let are_near = groups.iter().skip(1).all(|group| !text[..group.at.start].ends_with(['/', '(']));
        are_near && is_shape(&lengths(groups)) && is_card(&digits(text, groups))
    })
}

/// The first digits and the length of a scheme: Visa, Mastercard, American Express, Diners, JCB, Discover, UnionPay, Maestro.
fn is_of_scheme(digits: &[u8]) -> bool {
    if !CARD_DIGITS.contains(&digits.len()) {
        return false;
    }
    let first = |n: usize| digits[..n].iter().fold(0_u32, |sum, digit| sum * 10 + u32::from(digit - b'0'));
    let length = digits.len();
    match first(2) {
        40..=49 => matches!(length, 13 | 16 | 19),
        51..=55 => length == 16,
        22..=27 => length == 16 && (2221..=2720).contains(&first(4)),
        34 | 37 => length == 15,
        30 | 36 | 38 | 39 => matches!(length, 14 | 16),
        35 | 50 | 56..=69 => length >= 16,
        _ => false,
    }
}

fn luhn(digits: &[u8]) -> bool {
    let sum = digits.iter().rev().enumerate().fold(0_u32, |sum, (place, digit)| {
        let digit = u32::from(digit - b'0');
        let doubled = if place % 2 == 1 { digit * 2 } else { digit };
        sum + if doubled > 9 { doubled - 9 } else { doubled }
    });
    // All zeros pass, and are no card.
    sum > 0 && sum.is_multiple_of(10)
}

/// How many groups at the beginning of `run` are a phone number.
fn phone(text: &str, run: &[Group], is_international: bool) -> Option<usize> {
    let is_named = names_phone(lead(text, run.first()?.at.start).0);
    (1..=run.len()).rev().find(|&count| {
        let digits = digits(text, &run[..count]);
        let lengths = lengths(&run[..count]);
        (is_international && PHONE_DIGITS.contains(&digits.len()) && digits[0] != b'0')
            || (is_named && (7..16).contains(&digits.len()))
            || is_national(&digits, &lengths)
    })
}

/// The ways in which countries write their numbers, as far as nothing else is written so.
fn is_national(digits: &[u8], lengths: &[usize]) -> bool {
    let starts = |mark: &[u8]| digits.starts_with(mark);
    let is_area = |at: usize| digits[at] >= b'2';
    match lengths {
        // Mobiles in China, Germany, Britain, France.
        [11] => (digits[0] == b'1' && digits[1] >= b'3') || starts(b"07") || is_german_mobile(digits),
        [12] => is_german_mobile(digits),
        [10] => starts(b"06") || starts(b"07"),
        [3, 4, 4] if digits[0] == b'1' => digits[1] >= b'3',
        // North America.
        [3, 3, 4] => (is_area(0) && is_area(3)) || is_trunk(digits),
        [1, 3, 3, 4] => digits[0] == b'1' && is_area(1) && is_area(4),
        // France.
        [2, 2, 2, 2, 2] => digits[0] == b'0' && digits[1] != b'0',
        [3..=5, _, ..] => is_trunk(digits),
        _ => false,
    }
}

/// An area code with its 0, or a country's with its 00.
fn is_trunk(digits: &[u8]) -> bool {
    match digits {
        [b'0', b'1'..=b'9', ..] => (9..=12).contains(&digits.len()),
        [b'0', b'0', b'1'..=b'9', ..] => (10..17).contains(&digits.len()),
        _ => false,
    }
}

fn is_german_mobile(digits: &[u8]) -> bool {
    digits.starts_with(b"01") && (b'5'..=b'7').contains(&digits[2])
}

/// Does a word for a phone end here?
fn names_phone(before: &str) -> bool {
    static WORDS: LazyLock<Option<Regex>> = LazyLock::new(|| {
        let words = "(?-u:\\b)(?:tel|phone|mobile|cell|fax|telefon|telephone|handy|whatsapp)|电话|手机";
        Regex::new(&format!("(?i)(?:{words})(?: ?(?:number|nummer|no|nr))?\\.?[\"']?[ :：=]{{0,3}}[\"']?\\+?$")).ok()
    });
    let mut from = before.len().saturating_sub(40);
    while !before.is_char_boundary(from) {
        from += 1;
    }
    WORDS.as_ref().is_some_and(|words| words.is_match(&before[from..]))
}

fn has_plus(text: &str, start: usize) -> bool {
    let (before, has_plus) = lead(text, start);
    has_plus && !before.chars().next_back().is_some_and(char::is_alphanumeric)
}

/// What is before a number that begins at `start` with a bracket and a `+`, if it has them, and whether it has a `+`.
fn lead(text: &str, start: usize) -> (&str, bool) {
    let before = &text[..start];
    let before = before.strip_suffix('(').unwrap_or(before);
    before.strip_suffix('+').map_or((before, false), |before| (before, true))
}

/// Where a number begins with its bracket and its `+`.
fn with_lead(text: &str, start: usize, kind: &str) -> usize {
    if kind == "phone" { lead(text, start).0.len() } else { start }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn luhn_finds_a_wrong_digit() {
        for good in ["4111111111111111", "378282246310005", "5555555555554444", "6011000990139424", "30569309025904"] {
            assert!(is_card(good.as_bytes()), "{good}");
            for at in 0..good.len() {
                let mut wrong = good.as_bytes().to_vec();
                wrong[at] = b'0' + (wrong[at] - b'0' + 1) % 10;
                assert!(!luhn(&wrong), "{good} at {at}");
            }
        }
        assert!(!is_card(b"0000000000000000") && !is_card(b"") && !is_card(b"1731234567890"));
    }
}
