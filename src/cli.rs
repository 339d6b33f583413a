//! The verbs that work on the database: users, keys, upstreams, usage, audit, secrets.
//!
//! They write what they did to the output they are given, as text for people or as JSON for programs, from the same
//! values. Every change goes through the store, which numbers it for the running gateway and logs it with its author.

use std::{
    io::{BufRead, ErrorKind, Read, Write},
    sync::Arc,
};

use anyhow::Context;
use tollgate_core::{secret::Secret, upstream::Upstream};

use crate::{
    args::{CREDENTIAL_VARIABLE, Verb},
    secrets::FernetKeys,
    store::Store,
};

mod audit;
mod init;
mod key;
mod output;
mod secret;
mod upstream;
mod usage;
mod user;

use output::Output;
pub use secret::generate as generate_secret;

/// Longest secret that is read, in bytes.
const MAX_SECRET: u64 = 16 * 1024;

/// What the verbs work with.
pub struct CliContext<'a> {
    /// The configured database.
    pub store: Store,
    /// Its Fernet keys.
    pub fernet: FernetKeys,
    /// The upstreams of the config file.
    pub file_upstreams: &'a [Arc<Upstream>],
    /// Who does it, for `admin_log`, such as `cli:alice`.
    pub actor: String,
    /// Where a credential comes from.
    pub secret: SecretSource<'a>,
    /// JSON, or text?
    pub json: bool,
    /// Where the result goes.
    pub out: &'a mut dyn Write,
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
    let CliContext { store, fernet, file_upstreams, actor, secret, json, out } = ctx;
    let mut out = Output { json, to: out };
    let done = match verb {
        Verb::Init(args) => init::run(&args, &store, &fernet, &actor, &mut out).await,
        Verb::User(verb) => user::run(verb, &store, &actor, &mut out).await,
        Verb::Key(verb) => key::run(verb, &store, &actor, &mut out).await,
        Verb::Upstream(verb) => {
            let ctx = upstream::Context { store: &store, fernet: &fernet, file_upstreams, actor: &actor };
            upstream::run(verb, ctx, secret, &mut out).await
        }
        Verb::Usage(args) => usage::run(&args, &store, &mut out).await,
        Verb::Audit(args) => audit::run(args, &store, &mut out).await,
        Verb::Secret(verb) => secret::run(&verb, &fernet, secret, &mut out),
    };
    match done {
        // Whoever read the output has seen enough: `tollgate audit | head`.
        Err(error) if error.downcast_ref().is_some_and(|e: &std::io::Error| e.kind() == ErrorKind::BrokenPipe) => {
            Ok(())
        }
        done => done,
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
        let mut line = zeroize::Zeroizing::new(String::new());
        self.input
            .take(MAX_SECRET)
            .read_line(&mut line)
            .with_context(|| format!("the {what} cannot be read from standard input"))?;
        check_credential(&Secret::new(std::mem::take(&mut *line)))
            .with_context(|| format!("the {what} on standard input"))
    }
}

/// Takes white space from the ends of a credential and makes sure that it can be sent in a header.
fn check_credential(secret: &Secret) -> anyhow::Result<Secret> {
    let text = secret.expose().trim();
    anyhow::ensure!(!text.is_empty(), "is empty: pipe it in, or set {CREDENTIAL_VARIABLE}");
    anyhow::ensure!(
        text.bytes().all(|byte| byte.is_ascii_graphic()),
        "contains white space or characters that cannot be sent in a header: was more than the secret copied?"
    );
    Ok(Secret::new(text.to_owned()))
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
