//! Finding one member in the bytes of a JSON document without parsing it.
//!
//! The stream meter looks at every chunk of every stream, so it searches (`memmem`) instead of parsing, and looks closer
//! only where something was found. Two facts about JSON make that exact for a complete document:
//!
//! - **A quoted name followed by a colon is a key.** Within a string every quote is escaped, so the bytes `"usage"` can
//!   only be a whole string or the end of one (`"a\"usage"`, told apart by the backslash before them), and of all strings
//!   only keys are followed by a colon.
//! - **Depth can be read from the end.** A key stands outside of strings, so brackets can be counted from there on. The
//!   key belongs to the outermost object exactly if the first bracket that closes more than was opened is also the last
//!   thing in the document.
//!
//! On anything else (garbage, half a document) the answer is "not found"; nothing here panics.

use std::ops::Range;

use memchr::{
    memchr2,
    memmem::{Finder, FinderRev},
};

/// Hits that are looked at before giving up. An honest document has one or two; the bound keeps a hostile one linear.
pub(super) const MAX_HITS: usize = 16;

/// Bytes that are looked at together where nothing is expected.
const BLOCK: usize = 32;

/// Bytes of a string that are looked at one by one.
const SHORT: usize = 16;

/// Members that [`early`] looks at.
const EARLY: usize = 32;

/// A member of an object.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Member {
    /// Where its name begins, at the quote.
    pub(super) start: usize,
    /// Its value.
    pub(super) value: Range<usize>,
}

/// The first member of the outermost object whose quoted name is the needle of `name`.
pub(super) fn top_level(json: &[u8], name: &Finder<'_>) -> Option<Member> {
    name.find_iter(json)
        .take(MAX_HITS)
        .filter_map(|hit| member_at(json, hit, name.needle().len()))
        .find(|member| closes_the_document(json, member.value.end, 1))
}

/// The members of the outermost object, as far as it can be followed.
#[derive(Debug)]
pub(super) struct Members<'a> {
    json: &'a [u8],
    at: usize,
    /// What must stand before the next member.
    before: u8,
}

/// Walks over the outermost object of `json`, whose values are passed over and not looked into.
pub(super) fn members(json: &[u8]) -> Members<'_> {
    Members { json, at: skip_space(json, 0), before: b'{' }
}

impl Members<'_> {
    /// Once there are no more: was that the end of the object, and of the document?
    pub(super) fn is_complete(&self) -> bool {
        let end = match self.before {
            b',' => self.at,
            _ if self.json.get(self.at) == Some(&b'{') => skip_space(self.json, self.at + 1),
            _ => return false,
        };
        self.json.get(end) == Some(&b'}') && skip_space(self.json, end + 1) == self.json.len()
    }
}

impl<'a> Iterator for Members<'a> {
    /// Name (with its quotes) and value.
    type Item = (&'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let json = self.json;
        if json.get(self.at) != Some(&self.before) {
            return None;
        }
        let start = skip_space(json, self.at + 1);
        let name_end = string_end(json, start).filter(|_| json[start] == b'"')?;
        let Member { value, .. } = member_at(json, start, name_end - start)?;
        (self.at, self.before) = (skip_space(json, value.end), b',');
        Some((&json[start..name_end], &json[value]))
    }
}

/// The value of the member of the outermost object with this quoted name, if it is among the first: found without looking at
/// what is behind.
pub(super) fn early<'a>(json: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    members(json).take(EARLY).find_map(|(found, value)| (found == name).then_some(value))
}

/// The member whose quoted name of `name_len` bytes was found at `hit`, at any depth; `None`: it is not a key.
pub(super) fn member_at(json: &[u8], hit: usize, name_len: usize) -> Option<Member> {
    if hit > 0 && json[hit - 1] == b'\\' {
        return None;
    }
    let colon = skip_space(json, hit + name_len);
    if json.get(colon) != Some(&b':') {
        return None;
    }
    let start = skip_space(json, colon + 1);
    Some(Member { start: hit, value: start..value_end(json, start)? })
}

/// The last string among the values of all members of that name, at any depth, without its quotes and still escaped.
pub(super) fn last_string<'a>(json: &'a [u8], name: &Finder<'_>) -> Option<&'a [u8]> {
    name.find_iter(json).take(MAX_HITS).filter_map(|hit| string_at(json, hit, name.needle().len())).last()
}

/// The same where it is to be expected near the end: searched from there.
pub(super) fn last_string_from_end<'a>(json: &'a [u8], name: &FinderRev<'_>) -> Option<&'a [u8]> {
    name.rfind_iter(json).take(MAX_HITS).find_map(|hit| string_at(json, hit, name.needle().len()))
}

/// The value of the member whose quoted name of `name_len` bytes was found at `hit`, if it is a string.
fn string_at(json: &[u8], hit: usize, name_len: usize) -> Option<&[u8]> {
    let member = member_at(json, hit, name_len)?;
    json[member.value].strip_prefix(b"\"")?.strip_suffix(b"\"")
}

/// Does the document end where `depth` more brackets than were opened since `at` are closed?
///
/// `at` must stand outside of strings.
pub(super) fn closes_the_document(json: &[u8], mut at: usize, mut depth: usize) -> bool {
    while let Some(found) = next_mark(json, at) {
        at = found + 1;
        match json[found] {
            b'"' => match string_end(json, at - 1) {
                Some(end) => at = end,
                None => return false,
            },
            b'{' | b'[' => depth += 1,
            b'}' | b']' => {
                depth -= 1;
                if depth == 0 {
                    return skip_space(json, at) == json.len();
                }
            }
            _ => {}
        }
    }
    false
}

/// What has to go so that `member` of the object around it was never there: the member, one comma, and the space that
/// separated it from its neighbour.
pub(super) fn cut_of(json: &[u8], member: &Member) -> Range<usize> {
    let after = skip_space(json, member.value.end);
    if json.get(after) == Some(&b',') {
        return member.start..skip_space(json, after + 1);
    }
    let before = json[..member.start].trim_ascii_end();
    let start = if before.ends_with(b",") { before.len() - 1 } else { member.start };
    start..member.value.end
}

/// The first position from `at` on that is not white space.
pub(crate) fn skip_space(json: &[u8], at: usize) -> usize {
    let rest = json.get(at..).unwrap_or_default();
    rest.iter().position(|byte| !byte.is_ascii_whitespace()).map_or(json.len(), |space| at + space)
}

/// Where the value that begins at `start` ends; `None`: it does not end, or there is none.
fn value_end(json: &[u8], start: usize) -> Option<usize> {
    match json.get(start)? {
        b'"' => string_end(json, start),
        b'{' | b'[' => container_end(json, start),
        _ => {
            let ends = |byte: &u8| matches!(byte, b',' | b'}' | b']') || byte.is_ascii_whitespace();
            let len = json[start..].iter().position(ends).unwrap_or(json.len() - start);
            (len > 0).then_some(start + len)
        }
    }
}

/// Just behind the bracket that closes the one at `start`.
pub(crate) fn container_end(json: &[u8], start: usize) -> Option<usize> {
    let (mut at, mut depth) = (start, 0_usize);
    loop {
        at = next_mark(json, at)?;
        match json[at] {
            b'"' => {
                at = string_end(json, at)?;
                continue;
            }
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth -= 1,
            _ => {}
        }
        at += 1;
        if depth == 0 {
            return Some(at);
        }
    }
}

/// The next quote or bracket, or a byte that JSON does not have outside of strings.
fn next_mark(json: &[u8], at: usize) -> Option<usize> {
    // Bits that all four brackets have, and otherwise only Y, y, the underscore and DEL.
    const BRACKET: u8 = 0b0101_1001;
    let is_mark = |byte: &u8| *byte == b'"' || *byte & BRACKET == BRACKET;
    let has_none = |block: &&[u8]| !block.iter().fold(false, |found, byte| found | is_mark(byte));
    let rest = json.get(at..)?;
    let near = &rest[..rest.len().min(BLOCK)];
    if let Some(mark) = near.iter().position(is_mark) {
        return Some(at + mark);
    }
    // Long arrays of numbers are passed over in whole blocks.
    let passed = BLOCK * rest.chunks_exact(BLOCK).take_while(has_none).count();
    Some(at + passed + rest[passed..].iter().position(is_mark)?)
}

/// Just behind the closing quote of the string that opens at `open`.
pub(crate) fn string_end(json: &[u8], open: usize) -> Option<usize> {
    let mut at = open + 1;
    loop {
        at += next_quote(json.get(at..)?)?;
        if json[at] == b'"' {
            return Some(at + 1);
        }
        at += 2;
    }
}

/// The next quote or backslash. Most strings are names and words, too short to call a search for.
fn next_quote(rest: &[u8]) -> Option<usize> {
    let (near, far) = rest.split_at(rest.len().min(SHORT));
    let found = near.iter().position(|byte| matches!(byte, b'"' | b'\\'));
    found.or_else(|| Some(near.len() + memchr2(b'"', b'\\', far)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage_in(json: &str) -> Option<&str> {
        top_level(json.as_bytes(), &Finder::new("\"usage\"")).map(|member| &json[member.value])
    }

    #[test]
    fn only_a_key_of_the_outermost_object_is_found() {
        let cases = [
            (r#"{"usage":null}"#, Some("null")),
            (r#"{ "a" : [1,{"b":"}"}] , "usage" : {"x":[{}]} , "c":"]" } "#, Some(r#"{"x":[{}]}"#)),
            (r#"{"a":{"usage":1},"usage":2}"#, Some("2")),
            (r#"{"usage":2,"a":{"usage":1}}"#, Some("2")),
            (r#"{"a":{"usage":1}}"#, None),
            (r#"{"a":[{"usage":1}],"b":2}"#, None),
            (r#"{"a":"usage","b":1}"#, None),
            (r#"{"a":"\"usage\":1"}"#, None),
            (r#"{"a\"usage":1}"#, None),
            (r#"{"a":"x\\","usage":1}"#, Some("1")),
            (r#"{"usage":1"#, None),
            (r#"{"usage":1}}"#, None),
            (r#"{"usage":"#, None),
            (r#"{"usage":}"#, None),
            (r#"{"usage":"\"#, None),
        ];
        for (json, expected) in cases {
            assert_eq!(usage_in(json), expected, "{json}");
        }
    }

    #[test]
    fn what_stands_early_is_found_without_the_end() {
        let cases = [
            (r#"{"model":"m""#, Some("\"m\"")),
            (r#" { "a" : [1,{"model":2}] , "b":"}\"model\":3" , "model" : "m" , "z":"#, Some("\"m\"")),
            (r#"{"a":{"model":1}}"#, None),
            (r#"{"a":"model","b":1}"#, None),
            (r#"["model",1]"#, None),
            (r#"{"a":1 "model":2}"#, None),
            (r#"{"a":1,model:2}"#, None),
            (r#"{"model""#, None),
            (r#"{"a":"#, None),
            (r#"{"a"#, None),
            ("{", None),
            ("", None),
        ];
        for (json, expected) in cases {
            let found = early(json.as_bytes(), b"\"model\"");
            assert_eq!(found, expected.map(str::as_bytes), "{json}");
        }
        let late = format!("{{{}\"model\":1}}", "\"a\":0,".repeat(EARLY));
        assert!(early(late.as_bytes(), b"\"model\"").is_none(), "it gives up");
    }

    #[test]
    fn a_cut_leaves_what_would_have_stood_there() {
        let cases = [
            (r#"{"a":1,"usage":null}"#, r#"{"a":1}"#),
            (r#"{"a":1, "usage": null}"#, r#"{"a":1}"#),
            (r#"{"a":1, "usage": null, "b":2}"#, r#"{"a":1, "b":2}"#),
            (r#"{"usage":{"x":1},"b":2}"#, r#"{"b":2}"#),
            (r#"{"usage":null}"#, r#"{}"#),
        ];
        for (json, expected) in cases {
            let member = top_level(json.as_bytes(), &Finder::new("\"usage\"")).unwrap();
            let mut left = json.to_owned();
            left.replace_range(cut_of(json.as_bytes(), &member), "");
            assert_eq!(left, expected);
        }
    }

    #[test]
    fn many_false_hits_cost_linear_time() {
        let json = format!("{{\"a\":{{{}\"z\":0}}}}", "\"usage\":0,".repeat(1 << 16));
        let begun = std::time::Instant::now();
        assert_eq!(usage_in(&json), None);
        assert!(begun.elapsed().as_secs() < 5, "{:?}", begun.elapsed());
    }
}
