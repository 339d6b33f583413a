//! Server-sent events: metering a stream while it goes by, and hiding the usage that only the gateway asked for.
//!
//! [`StreamMeter`] gets the chunks of a body as the network cut them, and guarantees:
//!
//! - **What is passed on depends on the bytes, not on how they were cut** into chunks.
//! - **Without hiding, every chunk is returned as it came**, at once and uncopied; only the last, incomplete line of a
//!   chunk is copied aside for the meter.
//! - **With hiding, the client sees what it would have seen had nobody asked for usage.** The extra event is taken out with
//!   its blank line, `"usage":null` is taken out of the others. A line is passed on as soon as it is complete and can be
//!   judged, so the time to the first token does not suffer.
//! - **Memory is bounded.** A line beyond [`MAX_LINE_BYTES`] is passed on unexamined, and metering goes on behind it.
//!
//! Lines end in `\n` or `\r\n`. A lone `\r`, which the standard also allows, is not seen as an end; no provider sends it.
//! Of an event with several `data:` lines, only the first can be cut.

use std::ops::Range;

use bytes::Bytes;
use memchr::memchr;

use super::{
    chunk::{Facts, Verdict},
    passed::Passed,
    served::Served,
};
use crate::{route::Dialect, usage::Usage};

pub use super::text::StreamedOutput;

/// Longest line that is examined, and most that is ever held back.
pub const MAX_LINE_BYTES: usize = 1 << 20;

/// Meters one stream.
#[derive(Debug)]
pub struct StreamMeter {
    facts: Facts,
    hides_usage: bool,
    events: u64,
    first_event_is_error: bool,
    saw_comment: bool,
    place: Place,
    /// Bytes from earlier chunks: the incomplete line and, when hiding, the undecided lines of its event before it.
    held: Vec<u8>,
    /// Where in `held` the incomplete line begins.
    line_start: usize,
    /// Is the line that is going by too long to be examined?
    skips_line: bool,
}

/// Where in an event the stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Before the first `data:` line of an event.
    Before,
    /// Behind it.
    Passing,
    /// Behind it, and the event is being taken out.
    Dropping,
}

/// What is done with a complete line, and with the undecided ones before it.
#[derive(Debug, PartialEq, Eq)]
enum Decision {
    /// Pass all.
    Pass,
    /// Pass all but this part of the line.
    PassWithout(Range<usize>),
    /// Drop all.
    Drop,
    /// The next line of the event will tell.
    Wait,
}

impl StreamMeter {
    /// A meter for one stream. `hide_usage`: the gateway asked for usage and the client did not.
    #[must_use]
    pub fn new(dialect: Dialect, hide_usage: bool) -> Self {
        Self {
            facts: Facts::new(dialect),
            hides_usage: hide_usage,
            events: 0,
            first_event_is_error: false,
            saw_comment: false,
            place: Place::Before,
            held: Vec::new(),
            line_start: 0,
            skips_line: false,
        }
    }

    /// Takes the next `chunk` of the body; returns what is to be passed on now.
    #[must_use]
    pub fn feed(&mut self, chunk: Bytes) -> Bytes {
        if self.hides_usage {
            return self.feed_hiding(&chunk);
        }
        self.feed_through(&chunk);
        chunk
    }

    /// Ends the body; returns what was held back of it and is to be passed on.
    #[must_use]
    pub fn finish(&mut self) -> Bytes {
        let mut held = std::mem::take(&mut self.held);
        let line_start = std::mem::take(&mut self.line_start);
        if line_start < held.len() {
            match self.judge(&held[line_start..], false) {
                Decision::Drop => held.clear(),
                Decision::PassWithout(part) => drop(held.drain(line_start + part.start..line_start + part.end)),
                Decision::Pass | Decision::Wait => {}
            }
        }
        if self.hides_usage { Bytes::from(held) } else { Bytes::new() }
    }

    /// The last believable usage that the stream reported.
    #[must_use]
    pub fn usage(&self) -> Option<Usage> {
        self.facts.usage
    }

    /// Why the model stopped, if the stream said so.
    #[must_use]
    pub fn finish_reason(&self) -> Option<&str> {
        self.facts.finish_reason.as_deref()
    }

    /// Who answers, as far as the stream said so.
    #[must_use]
    pub fn served(&self) -> &Served {
        &self.facts.served
    }

    /// Did the stream come to its proper end: `[DONE]`, or the final event of a response? A body that ends without it was
    /// cut short, and must not be ended cleanly towards the client.
    #[must_use]
    pub fn saw_end(&self) -> bool {
        self.facts.saw_end
    }

    /// Did the stream report an error?
    #[must_use]
    pub fn saw_error(&self) -> bool {
        self.facts.saw_error
    }

    /// Is the very first event an error? Then nothing of an answer has been seen yet.
    #[must_use]
    pub fn first_event_is_error(&self) -> bool {
        self.first_event_is_error
    }

    /// Was there a comment, by which an upstream says that it is still at work?
    #[must_use]
    pub fn saw_comment(&self) -> bool {
        self.saw_comment
    }

    /// Number of events with data so far, the end mark and hidden ones included.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.events
    }

    /// What the model has written, as far as it was collected: nothing, once [`usage`](Self::usage) is known.
    #[must_use]
    pub fn take_output(&mut self) -> StreamedOutput {
        std::mem::take(&mut self.facts.output)
    }

    fn feed_through(&mut self, chunk: &[u8]) {
        let mut rest = chunk;
        while let Some(newline) = memchr(b'\n', rest) {
            let (line, after) = rest.split_at(newline + 1);
            rest = after;
            if self.skips_line {
                self.end_skipped_line();
            } else if self.held.is_empty() {
                self.judge(line, false);
            } else {
                let mut held = std::mem::take(&mut self.held);
                held.extend_from_slice(line);
                self.judge(&held, false);
                held.clear();
                self.held = held;
            }
        }
        if self.skips_line {
            return;
        }
        self.held.extend_from_slice(rest);
        if self.held.len() >= MAX_LINE_BYTES {
            self.held = Vec::new();
            self.skips_line = true;
        }
    }

    fn feed_hiding(&mut self, chunk: &Bytes) -> Bytes {
        let mut out = Passed::new(chunk);
        let mut line_start = 0;
        while let Some(newline) = memchr(b'\n', &chunk[line_start..]) {
            let line = line_start..line_start + newline + 1;
            line_start = line.end;
            if self.skips_line {
                self.end_skipped_line();
                out.pass_until(line.end);
            } else if self.held.is_empty() {
                self.end_line(line, &mut out);
            } else {
                self.end_held_line(line, &mut out);
            }
        }
        self.hold(line_start, &mut out);
        out.finish()
    }

    /// Handles a line that lies wholly in the chunk, with all that is undecided before it.
    fn end_line(&mut self, line: Range<usize>, out: &mut Passed<'_>) {
        match self.judge(&out.chunk[line.clone()], out.undecided == line.start) {
            Decision::Pass => out.pass_until(line.end),
            Decision::PassWithout(part) => {
                out.pass_until(line.start + part.start);
                out.undecided = line.start + part.end;
                out.pass_until(line.end);
            }
            Decision::Drop => out.undecided = line.end,
            Decision::Wait => {}
        }
    }

    /// Handles a line while there are bytes held of earlier chunks: `line` is the rest of it, or a whole one.
    fn end_held_line(&mut self, line: Range<usize>, out: &mut Passed<'_>) {
        let mut held = std::mem::take(&mut self.held);
        let line_start = std::mem::take(&mut self.line_start);
        held.extend_from_slice(&out.chunk[line.clone()]);
        out.undecided = line.end;
        match self.judge(&held[line_start..], line_start == 0) {
            Decision::Pass => out.pass_held(held),
            Decision::PassWithout(part) => {
                held.drain(line_start + part.start..line_start + part.end);
                out.pass_held(held);
            }
            Decision::Drop => {}
            Decision::Wait => {
                self.line_start = held.len();
                self.held = held;
            }
        }
    }

    /// Keeps what is undecided at the end of a chunk, whose incomplete line begins at `line_start`.
    fn hold(&mut self, line_start: usize, out: &mut Passed<'_>) {
        if self.skips_line {
            out.pass_until(out.chunk.len());
            return;
        }
        let undecided_bytes = self.held.len() + out.chunk.len() - out.undecided;
        if undecided_bytes >= MAX_LINE_BYTES {
            self.skips_line = self.line_start < self.held.len() || line_start < out.chunk.len();
            self.place = Place::Passing;
            self.line_start = 0;
            if !self.held.is_empty() {
                out.pass_held(std::mem::take(&mut self.held));
            }
            out.pass_until(out.chunk.len());
            return;
        }
        if self.held.is_empty() {
            self.line_start = line_start - out.undecided;
        }
        self.held.extend_from_slice(&out.chunk[out.undecided..]);
    }

    fn end_skipped_line(&mut self) {
        self.skips_line = false;
        self.place = Place::Passing;
    }

    /// Reads a complete line, its end included, and decides what becomes of it. `is_first`: nothing of its event is undecided.
    fn judge(&mut self, line: &[u8], is_first: bool) -> Decision {
        let content = line.strip_suffix(b"\n").unwrap_or(line);
        let content = content.strip_suffix(b"\r").unwrap_or(content);
        let dropping = self.place == Place::Dropping;
        self.saw_comment |= content.starts_with(b":");
        if content.is_empty() {
            self.place = Place::Before;
        } else if line.len() > MAX_LINE_BYTES {
            self.place = Place::Passing;
        } else if let Some(data) = content.strip_prefix(b"data:") {
            let decision = self.judge_data(data);
            if self.hides_usage && !dropping {
                return decision;
            }
        } else if self.place == Place::Before && !(is_first && content.starts_with(b":")) {
            return Decision::Wait;
        }
        if dropping { Decision::Drop } else { Decision::Pass }
    }

    /// Reads the `data` of a line, from behind the colon.
    fn judge_data(&mut self, data: &[u8]) -> Decision {
        let is_first = self.place == Place::Before;
        let value_start = "data:".len() + usize::from(data.starts_with(b" "));
        let verdict = self.facts.read(data.strip_prefix(b" ").unwrap_or(data));
        if !is_first {
            return Decision::Pass;
        }
        self.events += 1;
        self.first_event_is_error |= self.events == 1 && self.facts.saw_error;
        self.place = if self.hides_usage && verdict == Verdict::Drop { Place::Dropping } else { Place::Passing };
        match verdict {
            Verdict::Keep => Decision::Pass,
            Verdict::Cut(part) => Decision::PassWithout(value_start + part.start..value_start + part.end),
            Verdict::Drop => Decision::Drop,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const USAGE: &str = r#"{"prompt_tokens":9,"completion_tokens":5,"total_tokens":14}"#;

    /// Everything a meter can be asked.
    #[derive(Debug, PartialEq, Eq)]
    struct Seen {
        usage: Option<Usage>,
        finish_reason: Option<String>,
        flags: (bool, bool, bool),
        events: u64,
        output: String,
    }

    fn metered<'a>(hide: bool, chunks: impl IntoIterator<Item = &'a [u8]>) -> (Vec<u8>, Seen) {
        let mut meter = StreamMeter::new(Dialect::Chat, hide);
        let mut out = Vec::new();
        for chunk in chunks {
            out.extend_from_slice(&meter.feed(Bytes::copy_from_slice(chunk)));
        }
        out.extend_from_slice(&meter.finish());
        assert!(meter.finish().is_empty());
        let seen = Seen {
            usage: meter.usage(),
            finish_reason: meter.finish_reason().map(str::to_owned),
            flags: (meter.saw_end(), meter.saw_error(), meter.first_event_is_error()),
            events: meter.events(),
            output: meter.take_output().text(),
        };
        (out, seen)
    }

    fn text(bytes: &[u8]) -> String {
        String::from_utf8_lossy(bytes).into_owned()
    }

    /// A stream with all its shapes: as it comes when usage was asked for, and as it comes when not.
    fn sample(newline: &str) -> (String, String) {
        let stream = |usage: &str, last: &str| {
            [
                ": hello\n\n",
                "data: {\"choices\":[],\"prompt_filter_results\":[{\"x\":1}]@}\n\n",
                "event: chunk\nid: 7\ndata:{\"choices\":[{\"delta\":{\"content\":\"ä😀 \\\"usage\\\":null\"}}]@}\n\n",
                ": ping\ndata: {\"choices\":[{\"delta\":{\"content\":\"b\"},\"finish_reason\":\"stop\"}]@}\n\n",
                last,
                "data: [DONE]\n\n",
            ]
            .concat()
            .replace('@', usage)
            .replace('\n', newline)
        };
        let last = format!("event: u\ndata: {{\"id\":\"x\",\"choices\":[],\"usage\":{USAGE}}}\n\n");
        (stream(",\"usage\":null", &last), stream("", ""))
    }

    #[test]
    fn every_split_gives_the_same_stream_and_the_same_facts() {
        for newline in ["\n", "\r\n"] {
            let (asked, unasked) = sample(newline);
            let (_, seen) = metered(false, [asked.as_bytes()]);
            assert_eq!(seen.usage.unwrap().total_tokens(), 14);
            assert_eq!(
                (seen.finish_reason.as_deref(), seen.flags, seen.events),
                (Some("stop"), (true, false, false), 5)
            );
            for at in 0..=asked.len() {
                let (head, tail) = asked.as_bytes().split_at(at);
                let through = metered(false, [head, tail]);
                assert_eq!((text(&through.0).as_str(), &through.1), (asked.as_str(), &seen), "{at}");
                let hidden = metered(true, [head, tail]);
                assert_eq!((text(&hidden.0).as_str(), &hidden.1), (unasked.as_str(), &seen), "{at}");
            }
            assert_eq!(text(&metered(true, asked.as_bytes().chunks(1)).0), unasked);
        }
    }

    #[test]
    fn without_usage_the_output_is_collected() {
        let (_, unasked) = sample("\n");
        let (_, seen) = metered(false, unasked.as_bytes().chunks(3));
        assert_eq!((seen.usage, seen.output.as_str()), (None, "ä😀 \"usage\":nullb"));
    }

    #[test]
    fn a_stream_may_end_without_its_last_blank_line() {
        let event = format!("data: {{\"choices\":[],\"usage\":{USAGE}}}");
        for end in ["", "\r", "\n", "\r\n", "\n\n"] {
            for chunk_len in [1, 1000] {
                let stream = format!("{event}{end}");
                let (out, seen) = metered(true, stream.as_bytes().chunks(chunk_len));
                assert_eq!((text(&out).as_str(), seen.usage.is_some()), ("", true), "{end:?}");
                let (out, seen) = metered(false, stream.as_bytes().chunks(chunk_len));
                assert_eq!((text(&out), seen.usage.is_some()), (stream, true), "{end:?}");
            }
        }
        let (out, _) = metered(true, [b"data: {\"choices\":[1],\"usage\":null}".as_slice()]);
        assert_eq!(text(&out), "data: {\"choices\":[1]}");
        let (out, seen) = metered(true, [b"event: x\ndata: [DONE]".as_slice()]);
        assert_eq!((text(&out).as_str(), seen.flags.0), ("event: x\ndata: [DONE]", true));
    }

    #[test]
    fn what_is_complete_is_never_held_back() {
        let mut meter = StreamMeter::new(Dialect::Chat, true);
        let mut feed = |chunk: &'static str| text(&meter.feed(Bytes::from_static(chunk.as_bytes())));
        assert_eq!(feed(": ping\n"), ": ping\n");
        assert_eq!(feed("data: {\"a\":1}\n\nda"), "data: {\"a\":1}\n\n");
        assert_eq!(feed("ta: {\"usage\":null}\n"), "data: {}\n");
        assert_eq!(feed("\nevent: e\n"), "\n");
        assert_eq!(feed("id: 1\nda"), "");
        assert_eq!(feed("ta: x\n\ndata: y\n\nd"), "event: e\nid: 1\ndata: x\n\ndata: y\n\n");
        assert_eq!(text(&meter.finish()), "d");
    }

    #[test]
    fn what_is_not_cut_is_not_copied() {
        let kept = "data: {\"choices\":[1]}\n\n";
        let hidden = format!("data: {{\"choices\":[],\"usage\":{USAGE}}}\n\n");
        for (hide, chunk, passed) in [
            (false, format!("{kept}{hidden}{kept}"), 0..2 * kept.len() + hidden.len()),
            (true, format!("{kept}{kept}{hidden}"), 0..2 * kept.len()),
            (true, format!("{hidden}{kept}da"), hidden.len()..hidden.len() + kept.len()),
        ] {
            let chunk = Bytes::from(chunk);
            let out = StreamMeter::new(Dialect::Chat, hide).feed(chunk.clone());
            assert_eq!((out.as_ptr(), out.len()), (chunk[passed.clone()].as_ptr(), passed.len()));
        }
    }

    #[test]
    fn a_line_that_is_too_long_goes_by_unexamined() {
        let long = format!("data: {{\"x\":\"{}\",\"usage\":null}}\r\n\r\n", "y".repeat(MAX_LINE_BYTES));
        let (asked, unasked) = sample("\n");
        let stream = format!("{unasked}{long}{asked}");
        for chunk_len in [1 << 16, 1 << 19, (1 << 20) - 7, stream.len()] {
            let through = metered(false, stream.as_bytes().chunks(chunk_len));
            assert!(through.0 == stream.as_bytes(), "{chunk_len}");
            assert!(through.1.usage.is_some());
            let hidden = metered(true, stream.as_bytes().chunks(chunk_len));
            assert!(hidden.0 == format!("{unasked}{long}{unasked}").as_bytes(), "{chunk_len}");
            assert_eq!(hidden.1, through.1);
        }
        for hide in [true, false] {
            let mut meter = StreamMeter::new(Dialect::Chat, hide);
            let passed: usize = (0..40).map(|_| meter.feed(Bytes::from(vec![b'x'; 1 << 16])).len()).sum();
            assert_eq!((passed, meter.held.capacity()), (40 << 16, 0));
        }
    }

    #[test]
    fn many_undecided_lines_are_not_held_for_ever() {
        let lines = "event: x\n".repeat(MAX_LINE_BYTES / 8);
        let mut meter = StreamMeter::new(Dialect::Chat, true);
        let passed: usize = lines.as_bytes().chunks(999).map(|c| meter.feed(Bytes::copy_from_slice(c)).len()).sum();
        assert!(lines.len() - passed < MAX_LINE_BYTES);
        assert_eq!(passed + meter.finish().len(), lines.len());

        let mut meter = StreamMeter::new(Dialect::Chat, true);
        assert_eq!(meter.feed(Bytes::from(lines.clone())).len(), lines.len());
        let _ = meter.feed(Bytes::from_static(b"data: [DONE]\n"));
        assert!(meter.saw_end(), "the next line is examined again");
    }

    #[test]
    fn errors_are_told_by_their_place() {
        let error = "event: error\ndata: {\"error\":{\"message\":\"x\"}}\n\n";
        assert_eq!(metered(false, [error.as_bytes()]).1.flags, (false, true, true));
        let late = format!("data: {{\"choices\":[]}}\n\n{error}");
        assert_eq!(metered(true, [late.as_bytes()]).1.flags, (false, true, false));
    }

    #[test]
    fn an_event_of_several_data_lines_is_cut_in_its_first_only() {
        let stream = "data: {\"a\":1,\"usage\":null}\ndata: {\"usage\":null}\n\n";
        assert_eq!(text(&metered(true, [stream.as_bytes()]).0), "data: {\"a\":1}\ndata: {\"usage\":null}\n\n");
        let commented = format!("event: u\n: note\ndata: {{\"choices\":[],\"usage\":{USAGE}}}\n\n");
        for chunk_len in [1, 1000] {
            assert_eq!(text(&metered(true, commented.as_bytes().chunks(chunk_len)).0), "");
        }
        let dropped = format!("data: {{\"choices\":[],\"usage\":{USAGE}}}\ndata: x\n: y\n\ndata: z\n\n");
        assert_eq!(text(&metered(true, [dropped.as_bytes()]).0), "data: z\n\n");
    }

    /// One event, as it comes with usage asked for and without.
    fn event() -> impl Strategy<Value = (String, String)> {
        let space = prop_oneof![Just(""), Just(" "), Just(" \t")];
        let chunk = (".{0,8}", space, 0..3_usize, any::<bool>()).prop_map(|(content, s, at, has_usage)| {
            let content = serde_json::Value::from(content);
            let mut members = vec![
                format!("\"id\":{s}\"usage\""),
                format!("\"choices\":{s}[{{\"usage\":{{}},\"delta\":{{\"content\":{content}}}}}]"),
            ];
            let unasked = members.join(&format!(",{s}"));
            members.insert(at, format!("\"usage\"{s}:{s}{}", if has_usage { USAGE } else { "null" }));
            let asked = members.join(&format!(",{s}"));
            (format!("data: {{{s}{asked}{s}}}\n\n"), format!("data: {{{s}{unasked}{s}}}\n\n"))
        });
        let same = prop_oneof![
            Just(": ping\n"),
            Just(": ping\n\n"),
            Just("\n"),
            Just("event: x\nid\nretry: 3\n\n"),
            Just("data\n\n"),
            Just("data:\n\n"),
            Just("data: {\"choices\":[],\"prompt_filter_results\":[]}\n\n"),
            Just("data: {\"a\":\ndata: 1}\n\n"),
            Just("data: {\"error\":{\"usage\":1}}\n\n"),
            Just("event: done\ndata: [DONE]\n\n"),
        ]
        .prop_map(|text| (text.to_owned(), text.to_owned()));
        let extra = prop_oneof![
            Just(format!("data: {{\"choices\":[],\"usage\":{USAGE}}}\n\n")),
            Just(format!("event: x\ndata:{{\"usage\": {USAGE},\"choices\": [ ], \"id\":1}}\nid: 4\n\n")),
        ]
        .prop_map(|asked| (asked, String::new()));
        prop_oneof![4 => chunk, 2 => same, 1 => extra]
    }

    fn rechunked<'a>(stream: &'a [u8], cuts: &[prop::sample::Index]) -> Vec<&'a [u8]> {
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
        cuts.extend([0, stream.len()]);
        cuts.sort_unstable();
        cuts.windows(2).map(|pair| &stream[pair[0]..pair[1]]).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

        #[test]
        fn rechunking_changes_nothing_and_hiding_hides_exactly_the_usage(
            events in prop::collection::vec(event(), 0..8),
            crlf in any::<bool>(),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let newline = if crlf { "\r\n" } else { "\n" };
            let asked: String = events.iter().map(|(asked, _)| asked.replace('\n', newline)).collect();
            let unasked: String = events.iter().map(|(_, unasked)| unasked.replace('\n', newline)).collect();
            let (_, seen) = metered(false, [asked.as_bytes()]);
            let through = metered(false, rechunked(asked.as_bytes(), &cuts));
            prop_assert_eq!(text(&through.0), asked.as_str());
            prop_assert_eq!(&through.1, &seen);
            let hidden = metered(true, rechunked(asked.as_bytes(), &cuts));
            prop_assert_eq!(text(&hidden.0), unasked);
            prop_assert_eq!(&hidden.1, &seen);
        }

        #[test]
        fn garbage_is_never_lost(
            garbage in prop::collection::vec(
                prop_oneof![
                    prop::sample::select(&b"\r\n:\"{}[], \\"[..]).prop_map(|byte| vec![byte]),
                    any::<u8>().prop_map(|byte| vec![byte]),
                    Just(b"data:".to_vec()),
                    Just(b"\"usage\"".to_vec()),
                    Just(b"\"choices\":[".to_vec()),
                    Just(b"\"delta\":{".to_vec()),
                    Just(b"\"finish_reason\":\"".to_vec()),
                ],
                0..64,
            ),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let garbage = garbage.concat();
            prop_assert_eq!(&metered(false, rechunked(&garbage, &cuts)).0, &garbage);
            let whole = metered(true, [garbage.as_slice()]);
            prop_assert_eq!(metered(true, rechunked(&garbage, &cuts)), whole);
        }
    }
}
