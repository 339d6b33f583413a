//! `tollgate secret`: Fernet keys, and secrets for the config file.

use std::io::Write;

use serde_json::json;

use super::{Output, SecretSource};
use crate::{
    args::SecretVerb,
    secrets::{FernetKeys, generate_key},
};

pub(super) fn run(
    verb: &SecretVerb,
    fernet: &FernetKeys,
    secret: SecretSource<'_>,
    out: &mut Output<'_>,
) -> anyhow::Result<()> {
    match verb {
        SecretVerb::Generate => generate(out.json, out.to),
        SecretVerb::Encrypt => {
            let text = format!("fernet:{}", fernet.encrypt(&secret.line("secret")?));
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
