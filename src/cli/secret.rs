//! `tollgate secret`: Fernet keys, and secrets for the config file.

use std::io::Write;

use serde_json::json;

use super::{Output, SecretSource, secret_rotate};
use crate::{
    args::SecretVerb,
    secrets::{FernetKeys, generate_key},
    store::Store,
};

/// What these verbs work with.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    pub(super) store: &'a Store,
    pub(super) fernet: &'a FernetKeys,
    /// The encrypted credentials of the config file, with the names of their upstreams.
    pub(super) in_file: &'a [(&'a str, &'a str)],
    pub(super) actor: &'a str,
}

pub(super) async fn run(
    verb: &SecretVerb,
    ctx: Context<'_>,
    secret: SecretSource<'_>,
    out: &mut Output<'_>,
) -> anyhow::Result<()> {
    match verb {
        SecretVerb::Generate => generate(out.json, out.to),
        SecretVerb::Rotate => secret_rotate::run(ctx, out).await,
        SecretVerb::Encrypt => {
            let text = format!("fernet:{}", ctx.fernet.encrypt(&secret.line("secret")?));
            Ok(out.done(&json!({ "encrypted": text }), &text)?)
        }
    }
}

/// Prints a new Fernet key. Needs no database and no config: it may be what they are waiting for.
///
/// # Errors
/// If `to` cannot be written to.
pub fn generate(json: bool, to: &mut dyn Write) -> anyhow::Result<()> {
    let key = generate_key();
    Ok(Output { json, to }.done(&json!({ "fernet_key": key.expose() }), key.expose())?)
}
