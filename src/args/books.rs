//! What is asked of the books: usage, the request log, prices.

use std::{path::PathBuf, str::FromStr};

use clap::{Args as ClapArgs, Subcommand};
use uuid::Uuid;

use super::Moment;
use crate::store::GroupBy;

/// `tollgate usage`
#[derive(Clone, Debug, ClapArgs)]
pub struct UsageArgs {
    /// What a row is about; several with commas between them
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [UsageBy::Month])]
    pub by: Vec<UsageBy>,
    /// First day: a date, or so long ago, such as 7d
    #[arg(long, value_name = "WHEN")]
    pub since: Option<Moment>,
    /// Last day: a date, or so long ago
    #[arg(long, value_name = "WHEN")]
    pub until: Option<Moment>,
    /// Whose, of what, and where.
    #[command(flatten)]
    pub only: Only,
    /// Print CSV
    #[arg(long)]
    pub csv: bool,
}

/// What of the books is asked for.
#[derive(Clone, Debug, ClapArgs)]
pub struct Only {
    /// Only what this user (id or name) asked
    #[arg(long)]
    pub user: Option<String>,
    /// Only what was asked with this key (id, name, or user/name)
    #[arg(long)]
    pub key: Option<String>,
    /// Only what this model was asked
    #[arg(long)]
    pub model: Option<String>,
    /// Only what this upstream (its name) was the last to be asked
    #[arg(long)]
    pub upstream: Option<String>,
}

/// What a row of `tollgate usage` is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[expect(missing_docs, reason = "as in GroupBy")]
pub enum UsageBy {
    Day,
    Month,
    User,
    Key,
    Model,
    Upstream,
}

impl From<UsageBy> for GroupBy {
    fn from(by: UsageBy) -> Self {
        match by {
            UsageBy::Day => Self::Day,
            UsageBy::Month => Self::Month,
            UsageBy::User => Self::User,
            UsageBy::Key => Self::Key,
            UsageBy::Model => Self::Model,
            UsageBy::Upstream => Self::Upstream,
        }
    }
}

/// `tollgate audit`
#[derive(Clone, Debug, ClapArgs)]
#[command(args_conflicts_with_subcommands = true)]
pub struct AuditArgs {
    /// What else there is to see.
    #[command(subcommand)]
    pub verb: Option<AuditVerb>,
    /// From then on: a time, a date, or so long ago, such as 1h
    #[arg(long, value_name = "WHEN")]
    pub since: Option<Moment>,
    /// Up to then: a time, a date (which is included), or so long ago
    #[arg(long, value_name = "WHEN", conflicts_with = "follow")]
    pub until: Option<Moment>,
    /// Whose, of what, and where.
    #[command(flatten)]
    pub only: Only,
    /// Only requests that were answered with this status
    #[arg(long, value_name = "STATUS")]
    pub status: Option<u16>,
    /// Only requests that ended with this error code; ok: those without an error
    #[arg(long, value_name = "CODE")]
    pub code: Option<String>,
    /// At most so many rows, or all
    #[arg(long, value_name = "N", default_value = "50")]
    pub limit: Limit,
    /// Print CSV, with every column
    #[arg(long)]
    pub csv: bool,
    /// Go on printing rows as they are booked, after the newest ones; with --json one object per line
    #[arg(long)]
    pub follow: bool,
}

/// `tollgate audit ...`
#[derive(Clone, Debug, Subcommand)]
pub enum AuditVerb {
    /// Show one request, with what is kept of its content; whoever looks at content is noted in the log of changes
    Show {
        /// Its id, as `tollgate audit` lists it and x-request-id tells it
        #[arg(value_name = "REQUEST_ID")]
        request: Uuid,
    },
}

/// How many rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit(
    /// `None`: all.
    pub Option<u64>,
);

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "all" {
            return Ok(Self(None));
        }
        let number = text.parse().ok().filter(|number| *number > 0);
        number.map(|number| Self(Some(number))).ok_or_else(|| "write a number of rows, 1 at least, or all".to_owned())
    }
}

/// `tollgate prices`
#[derive(Debug, Subcommand)]
pub enum PricesVerb {
    /// Read prices from a file (TOML, in the form of conf/prices.toml), show what changes, and let the gateways know
    Import {
        /// The file; left out: standard input
        #[arg(value_name = "FILE")]
        file: Option<PathBuf>,
        /// From when the prices hold: a time, a date, or after a span such as 7d; left out: as the file says, else from now on
        #[arg(long, value_name = "WHEN")]
        effective: Option<Moment>,
        /// Only show what would change
        #[arg(long)]
        dry_run: bool,
    },
    /// List what models cost now, and what is known to come
    List {
        /// Only this model
        #[arg(long)]
        model: Option<String>,
        /// Show prices of the past too
        #[arg(long)]
        all: bool,
    },
}
