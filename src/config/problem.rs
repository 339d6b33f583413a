//! Problems of a configuration: where each one is, what is wrong, and the mend.
//!
//! A start that reports one mistake at a time costs its operator a restart per mistake, so problems are values that are
//! collected, never an early return. The same shape carries warnings.

use serde::Serialize;

/// One thing that is wrong, or doubtful, in a configuration.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Problem {
    /// File that it stands in, as it was named; `environment` for an environment variable.
    pub file: String,
    /// Line in that file, from 1; `None`: it concerns something that is not there.
    pub line: Option<usize>,
    /// Path of the setting: `upstream[2].weight`, `models."gpt-4o".input_usd_per_mtok`; empty: the file as a whole.
    pub setting: String,
    /// What is wrong and what to do about it.
    pub message: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.file)?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if !self.setting.is_empty() {
            write!(f, ": {}", self.setting)?;
        }
        write!(f, ": {}", self.message)
    }
}

/// Every problem of a configuration that cannot be used, in the order of the file. Displays one per line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
pub struct ConfigErrors {
    /// What must be mended; never empty.
    pub problems: Vec<Problem>,
    /// What is only doubtful.
    pub warnings: Vec<Problem>,
}
