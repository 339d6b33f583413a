//! The document as it was written: a reader of spanned TOML that goes on after a mistake.
//!
//! serde stops at the first value of a wrong type, and once values are structs their lines are gone. So sections are read
//! setting by setting: every look-up says what it expects and, if that is not there, notes a [`Problem`] with line and path
//! and answers `None`, so that the caller goes on with the default and the next mistake is found too. A name that nobody
//! asked for is unknown, which makes the code that reads the settings the only list of them.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
};

use toml::{Spanned, de::DeTable};

use super::{expand::Env, problem::Problem, table::Table};

/// Where something stands in the document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Line, from 1.
    pub line: Option<usize>,
    /// Path of the setting.
    pub setting: String,
}

/// One reading of one document: what was found wrong so far, and which settings exist.
pub(super) struct Reader<'d> {
    file: &'d str,
    text: &'d str,
    /// Where `${VAR}` is looked up.
    pub env: Env<'d>,
    findings: RefCell<Findings>,
}

/// What a reading brings to light besides values.
#[derive(Default)]
pub(super) struct Findings {
    /// What must be mended.
    pub problems: Vec<Problem>,
    /// What is doubtful.
    pub warnings: Vec<Problem>,
    /// Every setting that exists, by section; `upstream[]` and `models.*` stand for any entry.
    pub known: BTreeMap<String, BTreeSet<String>>,
    unknown: Vec<Unknown>,
}

struct Unknown {
    section: String,
    name: String,
    place: Place,
}

impl<'d> Reader<'d> {
    /// A reader of `text`, which `file` names in messages.
    pub(super) fn new(file: &'d str, text: &'d str, env: Env<'d>) -> Self {
        Self { file, text, env, findings: RefCell::default() }
    }

    /// Parses the document. What is not TOML at all is noted; the rest of it can still be read.
    pub(super) fn parse(&self) -> Spanned<DeTable<'d>> {
        let (root, errors) = DeTable::parse_recoverable(self.text);
        for error in errors {
            let line = error.span().map(|span| self.line_of(span.start));
            self.problem(&Place { line, setting: String::new() }, format!("not valid TOML: {}", error.message()));
        }
        root
    }

    /// The table of the whole document.
    pub(super) fn root(&'d self, root: &'d DeTable<'d>) -> Table<'d> {
        Table::new(self, Some(root), String::new(), Place { line: None, setting: String::new() })
    }

    /// Notes what must be mended.
    pub(super) fn problem(&self, place: &Place, message: String) {
        let problem = self.at(place, message);
        self.findings.borrow_mut().problems.push(problem);
    }

    /// Notes what is doubtful.
    pub(super) fn warning(&self, place: &Place, message: String) {
        let problem = self.at(place, message);
        self.findings.borrow_mut().warnings.push(problem);
    }

    /// Notes what is wrong with an environment variable that is a setting of its own.
    pub(super) fn variable_problem(&self, name: &str, message: String) {
        let problem = Problem { file: "environment".to_owned(), line: None, setting: name.to_owned(), message };
        self.findings.borrow_mut().problems.push(problem);
    }

    /// Notes which settings a section has, and which names in it are none.
    pub(super) fn close(&self, section: &str, known: &BTreeSet<&str>, unknown: Vec<(String, Place)>) {
        let mut findings = self.findings.borrow_mut();
        let names = known.iter().map(|&name| name.to_owned());
        findings.known.entry(section.to_owned()).or_default().extend(names);
        let unknown = unknown.into_iter().map(|(name, place)| Unknown { section: section.to_owned(), name, place });
        findings.unknown.extend(unknown);
    }

    /// The line of a byte offset.
    pub(super) fn line_of(&self, offset: usize) -> usize {
        self.text.bytes().take(offset).filter(|b| *b == b'\n').count() + 1
    }

    /// Ends the reading: unknown names become problems, now that all known ones are listed, and all are put in order.
    pub(super) fn finish(self) -> Findings {
        let mut findings = self.findings.into_inner();
        for unknown in std::mem::take(&mut findings.unknown) {
            let message = super::suggest::unknown(&unknown.section, &unknown.name, &findings.known);
            let (file, Place { line, setting }) = (self.file.to_owned(), unknown.place);
            findings.problems.push(Problem { file, line, setting, message });
        }
        findings.problems.sort();
        findings.problems.dedup();
        findings.warnings.sort();
        findings
    }

    fn at(&self, place: &Place, message: String) -> Problem {
        Problem { file: self.file.to_owned(), line: place.line, setting: place.setting.clone(), message }
    }
}
