//! The text format of Prometheus, read: just enough to look at single series of our own `/metrics`.
//!
//! A line is a name, labels in braces, a value. Comments, other series and what cannot be read are passed over, so that a gateway
//! of another version is no reason to fail. Time stamps and exemplars, which we do not write, are ignored.

/// One line of a series.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    labels: Vec<(String, String)>,
    /// Its value.
    pub value: f64,
}

impl Sample {
    /// The value of the label `name`.
    #[must_use]
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels.iter().find(|(label, _)| label == name).map(|(_, value)| value.as_str())
    }
}

/// The lines of the series `name` in `text`.
pub fn samples<'t>(text: &'t str, name: &'t str) -> impl Iterator<Item = Sample> + 't {
    text.lines().filter_map(move |line| sample(line.strip_prefix(name)?))
}

/// Parses what follows the name. A name that only begins like the one that is wanted leaves neither brace nor space.
fn sample(rest: &str) -> Option<Sample> {
    let (labels, value) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => (Vec::new(), rest.strip_prefix(' ')?),
    };
    Some(Sample { labels, value: value.split_whitespace().next()?.parse().ok()? })
}

/// Parses `name="value",...}` and gives what follows it.
fn labels(mut rest: &str) -> Option<(Vec<(String, String)>, &str)> {
    let mut labels = Vec::new();
    loop {
        rest = rest.trim_start_matches([',', ' ']);
        if let Some(rest) = rest.strip_prefix('}') {
            return Some((labels, rest));
        }
        let (name, quoted) = rest.split_once("=\"")?;
        let (value, after) = unquote(quoted)?;
        labels.push((name.to_owned(), value));
        rest = after;
    }
}

/// The text up to the closing quote, with its escapes undone, and what follows.
fn unquote(text: &str) -> Option<(String, &str)> {
    let (mut value, mut chars) = (String::new(), text.char_indices());
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => match chars.next()?.1 {
                'n' => value.push('\n'),
                escaped => value.push(escaped),
            },
            _ => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TEXT: &str = "# HELP tollgate_upstream_state Where each upstream stands\n\
                        # TYPE tollgate_upstream_state gauge\n\
                        tollgate_upstream_state{state=\"closed\",upstream=\"main\"} 1\n\
                        tollgate_upstream_state{state=\"open\",upstream=\"main\",} 0 1700000000\n\
                        tollgate_upstream_state_total{upstream=\"main\"} 7\n\
                        tollgate_retries_total 3\n";

    #[test]
    fn one_series_is_read_among_others() {
        let states: Vec<_> = samples(TEXT, "tollgate_upstream_state").collect();
        let seen: Vec<_> = states.iter().map(|s| (s.label("state"), s.label("upstream"), s.value)).collect();
        assert_eq!(seen, [(Some("closed"), Some("main"), 1.0), (Some("open"), Some("main"), 0.0)]);
        assert_eq!(states[0].label("other"), None);
        assert_eq!(samples(TEXT, "tollgate_retries_total").map(|s| s.value).collect::<Vec<_>>(), [3.0]);
        assert_eq!(samples(TEXT, "tollgate_retries").count(), 0);
    }

    #[test]
    fn what_cannot_be_read_is_passed_over() {
        for line in ["m", "m{", "m{a=\"b", "m{a=\"b\\", "m{a}", "m{a=\"b\"}", "m{a=\"b\"} x", "m x", "<html>", ""] {
            assert_eq!(samples(line, "m").count(), 0, "{line}");
        }
    }

    proptest! {
        #[test]
        fn labels_come_back_as_they_were(a in "\\PC{0,12}", b in "[\\\\\"\n,}{= a]{0,12}", value in 0_u32..9) {
            let escape = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let line = format!("other 1\nm{{a=\"{}\",b=\"{}\"}} {value}\n", escape(&a), escape(&b));
            let read: Vec<_> = samples(&line, "m").collect();
            prop_assert_eq!(read.len(), 1);
            prop_assert_eq!((read[0].label("a"), read[0].label("b")), (Some(&*a), Some(&*b)));
            prop_assert_eq!(read[0].value, f64::from(value));
        }

        #[test]
        fn nothing_crashes(text in "m[{}a=\"\\\\,\n 1é]{0,40}") {
            samples(&text, "m").for_each(drop);
        }
    }
}
