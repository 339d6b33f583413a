//! The verbs that work on the database: users, keys, upstreams, usage, audit, prices, secrets.
//!
//! They write what they did to the output they are given, as text for people or as JSON for programs, from the same
//! values. Every change goes through the store, which numbers it for the running gateway and logs it with its author.

use std::{
    collections::HashMap,
    io::{BufRead, ErrorKind, Read, Write},
    net::SocketAddr,
    sync::Arc,
};

use anyhow::{Context, bail};
use tollgate_core::{
    id::{KeyId, UserId},
    secret::{Secret, Unsendable, check_sendable},
    snapshot::ModelInfo,
    upstream::{Handling, Upstream},
};

use crate::{
    args::{AuditArgs, AuditVerb, CREDENTIAL_VARIABLE, Verb},
    secrets::FernetKeys,
    store::{Store, StoreError},
};

mod audit;
mod audit_show;
mod init;
mod key;
mod listing;
mod output;
mod prices;
mod prices_import;
mod progress;
mod running;
mod secret;
mod secret_rotate;
mod upstream;
mod upstream_drain;
mod upstream_test;
mod usage;
mod user;

use output::Output;
pub use secret::generate as generate_secret;

/// Longest line that is read for a secret, in bytes.
const LINE: usize = 16 * 1024;

/// What the verbs work with.
pub struct CliContext<'a> {
    /// The configured database.
    pub store: Store,
    /// Its Fernet keys.
    pub fernet: FernetKeys,
    /// The upstreams of the config file.
    pub file_upstreams: &'a [Arc<Upstream>],
    /// The encrypted credentials of the config file, with the names of their upstreams.
    pub encrypted_in_file: &'a [(&'a str, &'a str)],
    /// How upstreams are handled that do not say otherwise.
    pub handling: Handling,
    /// What the config file says of models.
    pub models: &'a HashMap<String, ModelInfo>,
    /// Where the running gateway tells of itself; `None`: nowhere.
    pub admin: Option<SocketAddr>,
    /// Who does it, for `admin_log`, such as `cli:alice`.
    pub actor: String,
    /// Where a credential comes from.
    pub secret: SecretSource<'a>,
    /// JSON, or text?
    pub json: bool,
    /// Where the result goes.
    pub out: &'a mut dyn Write,
    /// Has whoever read it gone?
    pub reader_is_gone: &'a dyn Fn() -> bool,
}

/// Where a secret comes from: never from an argument.
pub struct SecretSource<'a> {
    /// The value of [`CREDENTIAL_VARIABLE`], which comes first.
    pub environment: Option<Secret>,
    /// Standard input.
    pub input: &'a mut dyn BufRead,
    /// Is that a terminal, so that somebody must be told what to type?
    pub is_terminal: bool,
}

/// The command was put together wrongly, in a way that parsing could not see.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct WrongUse(String);

/// The exit code for `error`: 2 for wrong use, else 1.
#[must_use]
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<WrongUse>() { 2 } else { 1 }
}

/// Does what `verb` says.
///
/// # Errors
/// A sentence for the person at the command line, which names the mend; [`exit_code`] says how the process should end.
pub async fn run(verb: Verb, ctx: CliContext<'_>) -> anyhow::Result<()> {
    let CliContext { store, fernet, file_upstreams, encrypted_in_file, handling, models, .. } = ctx;
    let CliContext { admin, actor, secret, json, out, reader_is_gone, .. } = ctx;
    let mut out = Output { json, to: out };
    let done = match verb {
        Verb::Init(args) => init::run(&args, &store, &fernet, &actor, &mut out).await,
        Verb::User(verb) => user::run(verb, &store, &actor, &mut out).await,
        Verb::Key(verb) => key::run(verb, &store, &actor, &mut out).await,
        Verb::Upstream(verb) => {
            let (running, actor) = (running::Running(admin), &actor);
            let ctx = upstream::Context { store: &store, fernet: &fernet, file_upstreams, handling, running, actor };
            upstream::run(verb, ctx, secret, &mut out).await
        }
        Verb::Usage(args) => usage::run(&args, &store, &mut out).await,
        Verb::Audit(AuditArgs { verb: Some(AuditVerb::Show { request }), .. }) => {
            audit_show::run(request, &store, &fernet, &actor, &mut out).await
        }
        Verb::Audit(args) => audit::run(args, &store, &mut out, reader_is_gone).await,
        Verb::Prices(verb) => {
            let ctx = prices::Context { store: &store, models, actor: &actor };
            prices::run(verb, ctx, secret.input, &mut out).await
        }
        Verb::Secret(verb) => {
            let ctx = secret::Context { store: &store, fernet: &fernet, in_file: encrypted_in_file, actor: &actor };
            secret::run(&verb, ctx, secret, &mut out).await
        }
    };
    match done {
        // Whoever read the output has seen enough: `tollgate audit | head`.
        Err(error) if error.downcast_ref().is_some_and(|e: &std::io::Error| e.kind() == ErrorKind::BrokenPipe) => {
            Ok(())
        }
        done => done,
    }
}

/// Is the output to be CSV?
fn one_form(csv: bool, json: bool) -> Result<bool, WrongUse> {
    if csv && json { Err(WrongUse("--csv and --json are two forms: choose one".to_owned())) } else { Ok(csv) }
}

async fn find_user(store: &Store, id_or_name: Option<&str>) -> Result<Option<UserId>, StoreError> {
    match id_or_name {
        Some(id_or_name) => Ok(Some(store.find_user(id_or_name).await?.id)),
        None => Ok(None),
    }
}

async fn find_key(store: &Store, id_or_name: Option<&str>) -> Result<Option<KeyId>, StoreError> {
    match id_or_name {
        Some(id_or_name) => Ok(Some(store.find_key(id_or_name).await?.id)),
        None => Ok(None),
    }
}

impl SecretSource<'_> {
    /// Reads a credential: from the environment, else the first line of standard input.
    fn credential(self) -> anyhow::Result<Secret> {
        match self.environment {
            Some(secret) => check_credential(&secret).with_context(|| format!("the variable {CREDENTIAL_VARIABLE}")),
            None => self.line("credential"),
        }
    }

    /// Reads a secret from the first line of standard input.
    fn line(self, what: &str) -> anyhow::Result<Secret> {
        if self.is_terminal {
            write!(std::io::stderr(), "{what} (it shows while you type), then Enter: ")?;
        }
        // Large enough from the start: a text that grows leaves copies behind.
        let mut line = zeroize::Zeroizing::new(String::with_capacity(LINE));
        self.input
            .take(LINE as u64)
            .read_line(&mut line)
            .with_context(|| format!("the {what} cannot be read from standard input"))?;
        check_credential(&Secret::new(std::mem::take(&mut *line)))
            .with_context(|| format!("the {what} on standard input"))
    }
}

/// Takes white space from the ends of a credential and makes sure that it can be sent in a header.
fn check_credential(secret: &Secret) -> anyhow::Result<Secret> {
    let text = secret.expose().trim();
    match check_sendable(text.as_bytes()) {
        Ok(()) => Ok(Secret::new(text.to_owned())),
        Err(Unsendable::Empty) => bail!("is empty: pipe it in, or set {CREDENTIAL_VARIABLE}"),
        Err(unsendable) => bail!("{unsendable}: was more than the secret copied?"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_credential_is_trimmed_and_must_fit_a_header() {
        let check = |text: &str| check_credential(&Secret::new(text.to_owned()));
        assert_eq!(check(" sk-1\r\n").unwrap().expose(), "sk-1");
        for bad in ["", " \n", "sk 1", "sk-\u{7}1", "sk-\u{e9}", "a\0"] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
    }
}
