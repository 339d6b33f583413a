//! `tollgate secret rotate`: every credential, and all content of requests, encrypted anew with the first Fernet key.
//!
//! Each credential is changed in a transaction of its own, content by the page, and what the first key decrypts already is left
//! alone. So it may be broken off at any time and repeated, beside running gateways, to which nothing changes. What cannot be
//! decrypted does not keep the others from being rotated. Last comes what the database itself needs, with the value that
//! tells whether keys fit it: from then on the first key does alone.
//!
//! What the config file holds encrypted can only be changed there, so those upstreams are named.

use anyhow::Context as _;
use serde_json::json;

use super::{Output, progress::Progress, secret::Context};
use crate::{
    secrets::SecretsError,
    store::{SealedContent, StoredCredential},
};

/// Rows of content that are changed at once.
const PAGE: u32 = 200;

/// What became of the credentials.
#[derive(Default)]
struct Count {
    rotated: usize,
    already: usize,
    failed: Vec<String>,
    content: ContentCount,
}

/// What became of the content of requests.
#[derive(Clone, Copy, Default)]
struct ContentCount {
    rotated: usize,
    already: usize,
    failed: usize,
}

pub(super) async fn run(ctx: Context<'_>, out: &mut Output<'_>) -> anyhow::Result<()> {
    let count = rotate_all(ctx).await.context("not all is done; repeating it goes on from here")?;
    let is_old = |(_, token): &&(&str, &str)| !ctx.fernet.is_current(token);
    let in_file: Vec<&str> = ctx.in_file.iter().filter(is_old).map(|(name, _)| *name).collect();
    let object = json!({
        "rotated": count.rotated, "already": count.already, "failed": count.failed.len(),
        "failed_upstreams": count.failed, "config_file": in_file,
        "content": {
            "rotated": count.content.rotated, "already": count.content.already, "failed": count.content.failed,
        },
    });
    let text =
        format!("{} encrypted with the first key; {} had been already", credentials(count.rotated), count.already);
    out.done(&object, &text)?;
    let ContentCount { rotated, already, failed } = count.content;
    if rotated + already + failed > 0 {
        out.note(&format!(
            "content of {rotated} requests encrypted with the first key; that of {already} had been already"
        ))?;
    }
    if !in_file.is_empty() {
        let names = in_file.join(", ");
        out.note(&format!(
            "The config file has credentials that need an older key: {names}. `tollgate secret encrypt` encrypts them anew."
        ))?;
    }
    anyhow::ensure!(
        count.failed.is_empty(),
        "no Fernet key decrypts the credential of {}: bring back the key that it was encrypted with, or give it a new \
         credential with `tollgate upstream update --new-credential`",
        count.failed.join(", ")
    );
    anyhow::ensure!(
        failed == 0,
        "no Fernet key decrypts the content of {failed} requests: bring back the key that it was encrypted with, and repeat \
         this; or leave it, and it goes with [audit] content_retention_days"
    );
    Ok(())
}

async fn rotate_all(ctx: Context<'_>) -> anyhow::Result<Count> {
    let all = ctx.store.credentials().await?;
    let progress = Progress::of(all.len(), "credentials to be encrypted with the first key");
    let mut count = Count::default();
    for credential in all {
        let name = credential.name.clone();
        match rotate(ctx, credential).await {
            Ok(true) => count.rotated += 1,
            Ok(false) => count.already += 1,
            Err(SecretsError::Undecryptable) => count.failed.push(name),
            Err(error) => return Err(error.into()),
        }
        progress.step();
    }
    count.content = rotate_contents(ctx).await?;
    ctx.fernet.rotate_check(ctx.store).await?;
    Ok(count)
}

/// Says whether there was something to do.
async fn rotate(ctx: Context<'_>, mut credential: StoredCredential) -> Result<bool, SecretsError> {
    loop {
        let Some(rotated) = ctx.fernet.rotate(&credential.ciphertext)? else { return Ok(false) };
        if ctx.store.replace_ciphertext(&credential, &rotated, ctx.actor).await? {
            return Ok(true);
        }
        // Somebody gave it a new credential, or removed it.
        let now = ctx.store.credentials().await?.into_iter().find(|now| now.id == credential.id);
        let Some(now) = now else { return Ok(false) };
        credential = now;
    }
}

/// Content that comes in meanwhile is encrypted with the first key of the gateway that writes it.
async fn rotate_contents(ctx: Context<'_>) -> anyhow::Result<ContentCount> {
    let (mut count, mut after) = (ContentCount::default(), None);
    loop {
        let page = ctx.store.contents_after(after.as_ref(), PAGE).await?;
        let Some(last) = page.last() else { return Ok(count) };
        after = Some((last.started_at, last.request_id.clone()));
        let mut anew: Vec<(SealedContent, Vec<u8>)> = Vec::new();
        for old in page {
            match ctx.fernet.reseal(&old.content) {
                Ok(Some(sealed)) => anew.push((old, sealed)),
                Ok(None) => count.already += 1,
                Err(_) => count.failed += 1,
            }
        }
        ctx.store.replace_contents(&anew).await?;
        count.rotated += anew.len();
    }
}

fn credentials(n: usize) -> String {
    if n == 1 { "1 credential".to_owned() } else { format!("{n} credentials") }
}
