//! How a line of the log looks as text: time, level, target, message, `name=value`.
//!
//! It is what `tracing-subscriber` writes by default, without colours and spans. Every request writes a line, and the
//! general formatter takes longer for it than admission does; so numbers and plain texts are written directly, and the
//! calendar is asked once a second.

use std::{
    cell::RefCell,
    fmt::{self, Write},
    time::{SystemTime, UNIX_EPOCH},
};

use chrono::{DateTime, Utc};
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    registry::LookupSpan,
};

/// Formats events as lines of text.
pub(super) struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut line: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        // What the `log` crate told has its target among the fields.
        let log = tracing_log::NormalizeEvent::normalized_metadata(event);
        let metadata = log.as_ref().unwrap_or_else(|| event.metadata());
        write_time(&mut line, SystemTime::now())?;
        line.write_char(' ')?;
        line.write_str(level(*metadata.level()))?;
        line.write_char(' ')?;
        line.write_str(metadata.target())?;
        line.write_char(':')?;
        let mut fields = Fields { line, result: Ok(()) };
        event.record(&mut fields);
        fields.result?;
        fields.line.write_char('\n')
    }
}

fn level(level: tracing::Level) -> &'static str {
    match level {
        tracing::Level::ERROR => "ERROR",
        tracing::Level::WARN => " WARN",
        tracing::Level::INFO => " INFO",
        tracing::Level::DEBUG => "DEBUG",
        tracing::Level::TRACE => "TRACE",
    }
}

thread_local! {
    /// The second that was written last, and how it is written.
    static SECOND: RefCell<(u64, String)> = const { RefCell::new((u64::MAX, String::new())) };
}

/// `2026-11-23T06:41:58.123456Z`
pub(super) fn write_time(line: &mut impl Write, now: SystemTime) -> fmt::Result {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    SECOND.with_borrow_mut(|(second, text)| {
        if *second != since.as_secs() {
            *second = since.as_secs();
            *text = DateTime::<Utc>::from(now).format("%Y-%m-%dT%H:%M:%S.").to_string();
        }
        line.write_str(text)
    })?;
    let mut number = itoa::Buffer::new();
    let micros = number.format(since.subsec_micros());
    line.write_str(&"000000"[micros.len()..])?;
    line.write_str(micros)?;
    line.write_char('Z')
}

struct Fields<'w> {
    line: Writer<'w>,
    result: fmt::Result,
}

impl Fields<'_> {
    fn write(&mut self, field: &Field, value: impl FnOnce(&mut Writer<'_>) -> fmt::Result) {
        let name = field.name();
        if self.result.is_err() || name.starts_with("log.") {
            return;
        }
        let line = &mut self.line;
        let before = match name {
            "message" => line.write_char(' '),
            name => line.write_char(' ').and_then(|()| line.write_str(name)).and_then(|()| line.write_char('=')),
        };
        self.result = before.and_then(|()| value(line));
    }
}

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.write(field, |line| write!(OneLine(line), "{value:?}"));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.write(field, |line| line.write_str(itoa::Buffer::new().format(value)));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.write(field, |line| line.write_str(itoa::Buffer::new().format(value)));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.write(field, |line| match field.name() {
            "message" => OneLine(line).write_str(value),
            _ => write_quoted(line, value),
        });
    }
}

/// A text between quotes, on one line.
pub(super) fn write_quoted(line: &mut impl Write, value: &str) -> fmt::Result {
    // All of it, whatever was found: several bytes at once.
    let is_plain = value.bytes().fold(true, |plain, b| plain & b.is_ascii_graphic() & (b != b'"') & (b != b'\\'));
    if !is_plain {
        return write!(line, "{value:?}");
    }
    line.write_char('"')?;
    line.write_str(value)?;
    line.write_char('"')
}

/// Escapes what would begin a new, forged line, or speak to a terminal.
struct OneLine<'a, 'w>(&'a mut Writer<'w>);

impl Write for OneLine<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for piece in text.split_inclusive(char::is_control) {
            match piece.char_indices().next_back().filter(|(_, last)| last.is_control()) {
                Some((at, last)) => write!(self.0, "{}{}", &piece[..at], last.escape_debug())?,
                None => self.0.write_str(piece)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Arc, Mutex},
        time::Duration,
    };

    use tracing_subscriber::{fmt::layer, layer::SubscriberExt};

    use super::*;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(act: impl FnOnce()) -> String {
        let kept = Kept::default();
        let writer = kept.clone();
        let layer = layer().with_writer(move || writer.clone()).event_format(Line);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), act);
        String::from_utf8(kept.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn a_line_has_time_level_target_message_and_fields() {
        let line = logged(|| {
            tracing::warn!(target: "access", status = 200_u16, code = "ok", key = None::<&str>, n = -3, "done {}", 1);
        });
        let (time, rest) = line.split_once(' ').unwrap();
        assert!(DateTime::parse_from_rfc3339(time).is_ok(), "{time}");
        assert_eq!(time.len(), "2026-11-23T06:41:58.123456Z".len());
        assert_eq!(rest, " WARN access: done 1 status=200 code=\"ok\" n=-3\n");
    }

    #[test]
    fn nothing_that_is_logged_begins_a_line_of_its_own() {
        let line = logged(|| tracing::info!(model = "a\nb\"", "x\ny"));
        assert_eq!(line.matches('\n').count(), 1, "{line}");
        assert!(line.ends_with(concat!(r#": x\ny model="a\nb\"""#, "\n")), "{line}");
    }

    #[test]
    fn microseconds_are_filled_up() {
        let mut text = String::new();
        write_time(&mut text, UNIX_EPOCH + Duration::from_micros(1_000_042)).unwrap();
        assert_eq!(text, "1970-01-01T00:00:01.000042Z");
    }
}
