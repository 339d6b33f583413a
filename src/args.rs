//! The command line, as the contract words it.
//!
//! Values are parsed into their types here, so that a wrong one is told with the flag's name and exit code 2 before
//! anything is done. Secrets are no arguments: they would show in the list of processes and in the shell's history.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand};
use tollgate_core::{content::ContentMode, key::IpNet, limit::ModelLimits};

use crate::mock::MockArgs;

mod books;
mod upstream;
mod value;

pub use books::{AuditArgs, AuditVerb, Limit, Only, PricesVerb, UsageArgs, UsageBy};
pub use upstream::{DrainArgs, HandlingSettings, UpstreamRef, UpstreamSettings, UpstreamVerb};
pub use value::{Allowed, Moment, Setting};

/// The environment variable that `upstream add` takes the credential from, if it is set.
pub const CREDENTIAL_VARIABLE: &str = "TOLLGATE_UPSTREAM_CREDENTIAL";

/// A self-hosted gateway for the OpenAI API.
#[derive(Debug, Parser)]
#[command(name = "tollgate", version, propagate_version = true)]
pub struct Args {
    /// Config file [default: conf/tollgate.toml if it is there, else built-in defaults]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print JSON: one object for what was made, an array for a list
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the gateway
    Serve,
    /// Look for every problem of the config at once; exit code 2 if there are any
    Check,
    /// Stand in for OpenAI: to try the gateway without an account, and for tests
    Mock(MockArgs),
    /// One of the verbs that work on the database.
    #[command(flatten)]
    Verb(Verb),
}

/// The verbs that work on the configured database, beside a running gateway, which sees the change within a second.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Make the database and the first admin token, which is shown once
    Init(InitArgs),
    /// Users: who owns keys and a monthly quota
    #[command(subcommand)]
    User(UserVerb),
    /// Keys: the secrets that applications use
    #[command(subcommand)]
    Key(KeyVerb),
    /// Upstreams: the members of the pool
    #[command(subcommand)]
    Upstream(UpstreamVerb),
    /// What was used, and what it cost
    Usage(UsageArgs),
    /// The request log, newest first
    Audit(AuditArgs),
    /// What models cost, and since when
    #[command(subcommand)]
    Prices(PricesVerb),
    /// Encryption of credentials
    #[command(subcommand)]
    Secret(SecretVerb),
}

/// How to initialise.
#[derive(Clone, Debug, ClapArgs)]
pub struct InitArgs {
    /// Make another admin token, if the first one is lost
    #[arg(long)]
    pub new_admin_token: bool,
}

/// `tollgate user`
#[derive(Debug, Subcommand)]
pub enum UserVerb {
    /// Create a user
    Create {
        /// Unique name
        #[arg(long)]
        name: String,
        /// What is set.
        #[command(flatten)]
        limits: LimitSettings,
        /// What is kept of the content of their requests.
        #[command(flatten)]
        content: ContentSetting,
    },
    /// List all users
    List,
    /// Show one user
    Show(UserRef),
    /// Change a user
    Update {
        /// Which user.
        #[command(flatten)]
        user: UserRef,
        /// New name
        #[arg(long)]
        name: Option<String>,
        /// What is set.
        #[command(flatten)]
        limits: LimitSettings,
        /// What is kept of the content of their requests.
        #[command(flatten)]
        content: ContentSetting,
    },
    /// Refuse all keys of a user
    Disable(UserRef),
    /// Accept the keys of a disabled user again
    Enable(UserRef),
}

/// Which user.
#[derive(Clone, Debug, ClapArgs)]
pub struct UserRef {
    /// Id or name
    #[arg(value_name = "USER")]
    pub user: String,
}

/// Limits and quota: of a user over all keys, of a key over all models.
#[derive(Clone, Debug, Default, PartialEq, ClapArgs)]
pub struct LimitSettings {
    /// Requests per minute; 0: no limit; default: as the config says
    #[arg(long, value_name = "N", value_parser = value::requests)]
    pub rpm: Option<Setting<u32>>,
    /// Tokens per minute; 0: no limit; default: as the config says
    #[arg(long, value_name = "N", value_parser = value::tokens)]
    pub tpm: Option<Setting<u64>>,
    /// Requests at once; 0: no limit; default: as the config says
    #[arg(long, value_name = "N", value_parser = value::requests)]
    pub concurrency: Option<Setting<u32>>,
    /// Tokens per calendar month (UTC); 0: no quota; default: as the config says
    #[arg(long, value_name = "N", value_parser = value::tokens)]
    pub monthly_tokens: Option<Setting<u64>>,
    /// Dollars per calendar month (UTC), such as 12.50; 0: no quota; default: as the config says
    #[arg(long, value_name = "USD", value_parser = value::nano_usd)]
    pub monthly_usd: Option<Setting<u64>>,
}

/// What is kept of the content of requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, ClapArgs)]
pub struct ContentSetting {
    /// What is kept of what is asked and answered: none, hash (of the prompt), redacted, full; default: as the user says, else the
    /// config. What a key says goes before what its user says
    #[arg(long, value_name = "MODE", value_parser = value::content)]
    pub audit_content: Option<Setting<ContentMode>>,
}

/// `tollgate key`
#[derive(Debug, Subcommand)]
pub enum KeyVerb {
    /// Create a key and show it, once
    Create {
        /// Id or name of its user
        #[arg(long)]
        user: String,
        /// Its name, unique among the user's keys
        #[arg(long, default_value = "default")]
        name: String,
        /// What is set.
        #[command(flatten)]
        settings: KeySettings,
    },
    /// List keys
    List {
        /// Only those of this user (id or name)
        #[arg(long)]
        user: Option<String>,
    },
    /// Show one key (never its secret)
    Show(KeyRef),
    /// Change a key
    Update {
        /// Which key.
        #[command(flatten)]
        key: KeyRef,
        /// New name
        #[arg(long)]
        name: Option<String>,
        /// What is set.
        #[command(flatten)]
        settings: KeySettings,
    },
    /// Make a key stop working, for good
    Revoke(KeyRef),
    /// Give a key a new secret and show it, once; the old one stops working
    Rotate(KeyRef),
}

/// Which key.
#[derive(Clone, Debug, ClapArgs)]
pub struct KeyRef {
    /// Id, name, or user/name
    #[arg(value_name = "KEY")]
    pub key: String,
}

/// What can be set of a key.
#[derive(Clone, Debug, Default, PartialEq, ClapArgs)]
pub struct KeySettings {
    /// Models it may use, such as gpt-4o,o3*; '*': every model
    #[arg(long, value_name = "MODEL,...", value_delimiter = ',')]
    pub models: Option<Vec<String>>,
    /// Address or network it may be used from, such as 10.0.0.0/8; repeatable; any: from everywhere
    #[arg(long, value_name = "NET", value_delimiter = ',', value_parser = value::allowed)]
    pub allow_ip: Option<Vec<Allowed<IpNet>>>,
    /// When it ceases to work: a time, a date, or after a span such as 30d; never
    #[arg(long, value_name = "WHEN")]
    pub expires: Option<Setting<Moment>>,
    /// Limits over all models.
    #[command(flatten)]
    pub limits: LimitSettings,
    /// Limits of one model (a proper name, no alias) or of each that fits a pattern, such as
    /// gpt-4o*=rpm:10,tpm:1000,concurrency:2,monthly-tokens:50000,monthly-usd:1.50; repeatable; together they replace what
    /// was set; none: removes all
    #[arg(long, value_name = "MODEL=LIMIT:N,...")]
    pub model_limits: Option<Vec<Setting<ModelLimits>>>,
    /// What is kept of the content of its requests.
    #[command(flatten)]
    pub content: ContentSetting,
}

/// `tollgate secret`
#[derive(Debug, Subcommand)]
pub enum SecretVerb {
    /// Print a new Fernet key
    Generate,
    /// Encrypt every credential, and all content of requests, in the database anew, with the first Fernet key; it may be broken off and repeated
    Rotate,
    /// Read a secret from standard input and print it encrypted, to be used in the config file
    Encrypt,
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, error::ErrorKind};

    use super::*;

    fn parse(line: &str) -> Result<Command, ErrorKind> {
        let words = line.split(' ').map(|word| word.trim_matches('\''));
        Args::try_parse_from(["tollgate"].into_iter().chain(words)).map(|args| args.command).map_err(|error| {
            assert_eq!(error.exit_code(), 2, "{line}");
            error.kind()
        })
    }

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn the_help_of_a_verb_is_its_own() {
        let mut command = Args::command();
        for (verb, about) in [(["user", "create"], "Create a user"), (["key", "update"], "Change a key")] {
            let found =
                command.find_subcommand_mut(verb[0]).and_then(|found| found.find_subcommand_mut(verb[1])).unwrap();
            assert!(found.render_help().to_string().starts_with(about), "{}", found.render_help());
        }
    }

    #[test]
    fn the_verbs_of_the_contract_are_understood() {
        for line in [
            "serve",
            "check --config conf/dev.toml",
            "init --json",
            "init --new-admin-token",
            "user create --name alice --monthly-tokens 1000 --monthly-usd 12.5 --rpm 60 --tpm 0 --concurrency default",
            "user list --json",
            "user show alice",
            "user update 1 --name bob",
            "user disable alice",
            "key create --user alice --name ci --models gpt-4o,o3* --expires 30d --allow-ip 10.0.0.0/8 --allow-ip ::1",
            "key list --user alice",
            "key show alice/ci",
            "key update ci --rpm 1 --expires never --allow-ip any --monthly-tokens 5",
            "key update ci --monthly-tokens default --monthly-usd 0 --model-limits none",
            "key create --user a --model-limits gpt-4o=rpm:10,tpm:1000 --model-limits o3*=monthly-usd:1.50",
            "key revoke ci",
            "key rotate 3 --json",
            "upstream add --name main --kind openai --base-url https://api.openai.com/v1 --models a,b=deployment",
            "upstream add --name az --kind azure --base-url https://x.openai.azure.com --weight 3 --priority 1",
            "upstream list",
            "upstream show main",
            "upstream update main --new-credential --api-version 2024-10-21",
            "upstream add --name a --connect-timeout 500ms --first-byte-timeout 2m --chunk-timeout 30s --total-timeout 0s",
            "upstream update main --rpm 500 --tpm 0 --probe-interval 30s",
            "upstream update main --connect-timeout default --rpm default --tpm default --probe-interval default",
            "upstream enable main",
            "upstream disable main",
            "upstream drain main",
            "upstream drain main --timeout 30s",
            "upstream remove main",
            "upstream test main",
            "usage --by day --since 2026-11-01 --until 2026-11-30",
            "audit --since 1h --user alice --key ci --model gpt-4o --status 429 --limit 5",
            "usage --by user,model --user alice --key alice/ci --model gpt-4o --upstream main --csv",
            "audit --follow",
            "audit --upstream main --code rate_limit_exceeded --limit all --csv",
            "prices list --json",
            "prices list --model gpt-4o --all",
            "prices import",
            "prices import prices.toml --effective 2026-12-01 --dry-run",
            "audit show 01a2064e-f64e-721c-b060-d10f884060a7 --json",
            "user create --name a --audit-content none",
            "user update a --audit-content default",
            "key create --user a --audit-content hash",
            "key update ci --audit-content full",
            "secret generate",
            "secret rotate --json",
            "secret encrypt",
            "mock --listen 127.0.0.1:0",
            "--json --config x.toml user list",
        ] {
            parse(line).unwrap_or_else(|kind| panic!("{line}: {kind}"));
        }
    }

    #[test]
    fn a_wrong_value_is_told_with_its_mend() {
        for (line, says) in [
            ("upstream add --name a --weight 1001", "1001 is not in 0..=1000"),
            ("upstream add --name a --weight -1", "-1 is not in 0..=1000"),
            ("upstream add --name a --connect-timeout -5s", "write a whole number and ms, s, m, h or d"),
            ("upstream add --name a --connect-timeout 0s", "0s is not between 1ms and 1h"),
            ("upstream update a --total-timeout none", "write 0s for none"),
            ("upstream update a --probe-interval 200ms", "is less than 1s: a provider takes that for an attack"),
            ("upstream update a --rpm unlimited", "is not a whole number per minute; 0: not known"),
            ("upstream drain a --timeout 2d", "2d is not between 1s and 1d"),
            ("user update a --audit-content off", "write none, hash, redacted or full, or default"),
        ] {
            let error = Args::try_parse_from(["tollgate"].into_iter().chain(line.split(' '))).expect_err(line);
            assert!(error.to_string().contains(says), "{line}: {error}");
        }
    }

    #[test]
    fn wrong_use_is_told_before_anything_is_done() {
        let cases = [
            ("user create", ErrorKind::MissingRequiredArgument),
            ("user create --name a --rpm many", ErrorKind::ValueValidation),
            ("user create --name a --monthly-usd -1", ErrorKind::UnknownArgument),
            ("user create --name a --monthly-usd 1.0000000001", ErrorKind::ValueValidation),
            ("user create --name a --monthly-usd 1000000.1", ErrorKind::ValueValidation),
            ("user create --name a --monthly-tokens 1000000000000001", ErrorKind::ValueValidation),
            ("user create --name a --tpm 1000000000000001", ErrorKind::ValueValidation),
            ("user create --name a --concurrency 4294967296", ErrorKind::ValueValidation),
            ("user create --name a --model-limits gpt-4o=rpm:1", ErrorKind::UnknownArgument),
            ("key create --user a --model-limits gpt-4o", ErrorKind::ValueValidation),
            ("key create --user a --model-limits gpt-4o=rpm:1,rpm:2", ErrorKind::ValueValidation),
            ("key create --name ci", ErrorKind::MissingRequiredArgument),
            ("key create --user a --expires soon", ErrorKind::ValueValidation),
            ("key create --user a --allow-ip 10.0.0.0/33", ErrorKind::ValueValidation),
            ("upstream add --name a --kind other", ErrorKind::ValueValidation),
            ("upstream add --name a --base-url api.openai.com", ErrorKind::ValueValidation),
            ("upstream add --name a --models a=b*", ErrorKind::ValueValidation),
            ("upstream add --name a --weight 1001", ErrorKind::ValueValidation),
            ("upstream add --name a --weight -1", ErrorKind::ValueValidation),
            ("upstream add --name a --priority 1001", ErrorKind::ValueValidation),
            ("upstream add --name a --credential sk-1", ErrorKind::UnknownArgument),
            ("upstream add --name a --connect-timeout 0s", ErrorKind::ValueValidation),
            ("upstream add --name a --connect-timeout -5s", ErrorKind::ValueValidation),
            ("upstream add --name a --first-byte-timeout 60", ErrorKind::ValueValidation),
            ("upstream add --name a --chunk-timeout 2d", ErrorKind::ValueValidation),
            ("upstream add --name a --total-timeout none", ErrorKind::ValueValidation),
            ("upstream add --name a --probe-interval 999ms", ErrorKind::ValueValidation),
            ("upstream add --name a --rpm -1", ErrorKind::ValueValidation),
            ("upstream add --name a --tpm many", ErrorKind::ValueValidation),
            ("upstream drain", ErrorKind::MissingRequiredArgument),
            ("upstream drain a --timeout 0s", ErrorKind::ValueValidation),
            ("usage --by week", ErrorKind::InvalidValue),
            ("usage --by day,week", ErrorKind::InvalidValue),
            ("audit --limit 0", ErrorKind::ValueValidation),
            ("audit --limit many", ErrorKind::ValueValidation),
            ("prices import --effective soon", ErrorKind::ValueValidation),
            ("prices", ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand),
            ("audit show", ErrorKind::MissingRequiredArgument),
            ("audit show nothing", ErrorKind::ValueValidation),
            ("user create --name a --audit-content some", ErrorKind::ValueValidation),
            ("key update a --audit-content never", ErrorKind::ValueValidation),
            ("audit --follow --until 2026-01-01", ErrorKind::ArgumentConflict),
            ("frobnicate", ErrorKind::InvalidSubcommand),
        ];
        for (line, expected) in cases {
            assert_eq!(parse(line).expect_err(line), expected, "{line}");
        }
    }
}
