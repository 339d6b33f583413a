//! `tollgate init`: the tables, the value that tells whether Fernet keys fit, the first admin token. Doing it again
//! changes nothing.

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use serde_json::json;
use tollgate_core::{key::KeyHash, secret::Secret};
use zeroize::Zeroizing;

use super::Output;
use crate::{args::InitArgs, secrets::FernetKeys, store::Store};

/// What every admin token begins with, so that it is not mistaken for a key.
const MARK: &str = "tgadmin-";

pub(super) async fn run(
    args: &InitArgs,
    store: &Store,
    fernet: &FernetKeys,
    actor: &str,
    out: &mut Output<'_>,
) -> anyhow::Result<()> {
    store.migrate().await?;
    fernet.check(store).await?;
    let is_first = store.admin_tokens().await?.is_empty();
    if !is_first && !args.new_admin_token {
        let message = "already initialised; `tollgate init --new-admin-token` makes another admin token";
        let object = json!({ "initialised": true, "created": false, "admin_token": null, "message": message });
        return Ok(out.done(&object, message)?);
    }
    let token = make_token()?;
    let name = if is_first { "first" } else { "another" };
    store.create_admin_token(name, KeyHash::of(token.expose().as_bytes()), actor).await?;
    let object = json!({ "initialised": true, "created": is_first, "admin_token": token.expose() });
    let what = if is_first { "initialised" } else { "made another admin token" };
    Ok(out.done(&object, &format!("{what}\nadmin token (shown only now): {}", token.expose()))?)
}

fn make_token() -> anyhow::Result<Secret> {
    let mut bytes = Zeroizing::new([0; 32]);
    getrandom::fill(&mut *bytes).map_err(|error| anyhow::anyhow!("the system gives no random numbers: {error}"))?;
    Ok(Secret::new(format!("{MARK}{}", BASE64_URL_SAFE_NO_PAD.encode(*bytes))))
}
