//! How far a long verb is, on standard error: something that moves for whoever watches a terminal, a plain line otherwise.
//! Standard output is for the result alone.

use std::io::{IsTerminal, Write};

use indicatif::{ProgressBar, ProgressStyle};

/// What is shown while something goes on. Dropping it takes a moving one away.
pub(super) enum Progress {
    /// For a terminal.
    Moving(ProgressBar),
    /// For a file or a pipe.
    Lines,
}

impl Progress {
    /// Of something that has `total` parts.
    pub(super) fn of(total: usize, what: &str) -> Self {
        let bar = Self::if_watched(|| ProgressBar::new(u64::try_from(total).unwrap_or(u64::MAX)));
        if matches!(bar, Self::Lines) {
            bar.tell(&format!("{what}: {total}"));
        }
        bar.styled("{msg} [{bar:40}] {pos}/{len}", what)
    }

    /// Of something that takes as long as it takes.
    pub(super) fn waiting() -> Self {
        Self::if_watched(ProgressBar::new_spinner).styled("{spinner} {msg} ({elapsed})", "")
    }

    fn if_watched(bar: impl FnOnce() -> ProgressBar) -> Self {
        if std::io::stderr().is_terminal() { Self::Moving(bar()) } else { Self::Lines }
    }

    fn styled(self, template: &str, message: &str) -> Self {
        if let Self::Moving(bar) = &self {
            // A template that cannot be parsed is shown in the default style.
            bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_message(message.to_owned());
        }
        self
    }

    /// One part is done.
    pub(super) fn step(&self) {
        if let Self::Moving(bar) = self {
            bar.inc(1);
        }
    }

    /// Tells how it stands now.
    pub(super) fn tell(&self, text: &str) {
        match self {
            Self::Moving(bar) => {
                bar.set_message(text.to_owned());
                bar.tick();
            }
            // There is nowhere left to tell that standard error is closed.
            Self::Lines => drop(writeln!(std::io::stderr(), "{text}")),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Self::Moving(bar) = self {
            bar.finish_and_clear();
        }
    }
}
