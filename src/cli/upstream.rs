//! `tollgate upstream`: the members of the pool. Those of the config file are shown beside those of the database, but
//! changed in the file.

use std::{sync::Arc, time::Instant};

use anyhow::bail;
use serde_json::{Value, json};
use tollgate_core::{
    secret::Secret,
    upstream::{BaseUrl, Handling, Overrides, Upstream, UpstreamKind},
};

use super::{Output, SecretSource, WrongUse, output::time};
use crate::{
    args::{UpstreamSettings, UpstreamVerb},
    provider,
    secrets::FernetKeys,
    store::{Store, StoreError, StoredUpstream, UpstreamSpec},
};

/// Where OpenAI itself is.
const OPENAI: &str = "https://api.openai.com/v1";
const COLUMNS: [&str; 9] = ["id", "name", "source", "kind", "base_url", "models", "weight", "priority", "disabled"];

/// What these verbs work with.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    pub(super) store: &'a Store,
    pub(super) fernet: &'a FernetKeys,
    pub(super) file_upstreams: &'a [Arc<Upstream>],
    pub(super) actor: &'a str,
}

pub(super) async fn run(
    verb: UpstreamVerb,
    ctx: Context<'_>,
    secret: SecretSource<'_>,
    out: &mut Output<'_>,
) -> anyhow::Result<()> {
    match verb {
        UpstreamVerb::Add { name, settings } => {
            if ctx.in_file(&name).is_some() {
                bail!("the config file has an upstream named {name:?} already: choose another name");
            }
            let spec = new_spec(name, settings, |credential| ctx.fernet.encrypt(credential), secret)?;
            let added = ctx.store.create_upstream(&spec, ctx.actor).await?;
            out.done(&view(&added), &sentence("added", &added))?;
        }
        UpstreamVerb::List => {
            let mut rows: Vec<Value> = ctx.file_upstreams.iter().map(|upstream| view_of_file(upstream)).collect();
            rows.extend(ctx.store.upstreams().await?.iter().map(view));
            out.list(&rows, &COLUMNS)?;
        }
        UpstreamVerb::Show(which) => match ctx.in_file(&which.upstream) {
            Some(upstream) => out.show(&view_of_file(upstream))?,
            None => out.show(&view(&ctx.store.find_upstream(&which.upstream).await?))?,
        },
        UpstreamVerb::Update { upstream, name, new_credential, settings } => {
            if name.is_none() && !new_credential && settings == UpstreamSettings::default() {
                return Err(WrongUse("say what to change: see `tollgate upstream update --help`".to_owned()).into());
            }
            let id = ctx.stored(&upstream.upstream).await?.id;
            let credential = if new_credential { Some(ctx.fernet.encrypt(&secret.credential()?)) } else { None };
            let edit = |spec: &mut UpstreamSpec| {
                settings.apply(spec);
                spec.name = name.unwrap_or_else(|| std::mem::take(&mut spec.name));
                spec.credential = credential.unwrap_or_else(|| std::mem::take(&mut spec.credential));
            };
            let updated = ctx.store.update_upstream(id, ctx.actor, edit).await?;
            out.done(&view(&updated), &sentence("updated", &updated))?;
        }
        UpstreamVerb::Enable(which) => ctx.set_disabled(&which.upstream, false, out).await?,
        UpstreamVerb::Disable(which) => ctx.set_disabled(&which.upstream, true, out).await?,
        UpstreamVerb::Remove(which) => {
            let upstream = ctx.stored(&which.upstream).await?;
            ctx.store.remove_upstream(upstream.id, ctx.actor).await?;
            out.done(&view(&upstream), &sentence("removed", &upstream))?;
        }
        UpstreamVerb::Test(which) => ctx.test(&which.upstream, out).await?,
    }
    Ok(())
}

impl Context<'_> {
    fn in_file(&self, name: &str) -> Option<&Upstream> {
        self.file_upstreams.iter().find(|upstream| upstream.name == name).map(|upstream| &**upstream)
    }

    /// The upstream, if it is in the database, where it can be changed.
    async fn stored(&self, which: &str) -> anyhow::Result<StoredUpstream> {
        match self.store.find_upstream(which).await {
            Err(StoreError::NotFound(_)) if self.in_file(which).is_some() => {
                bail!("the upstream {which:?} comes from the config file: change it there")
            }
            found => Ok(found?),
        }
    }

    async fn set_disabled(&self, which: &str, disabled: bool, out: &mut Output<'_>) -> anyhow::Result<()> {
        let id = self.stored(which).await?.id;
        let upstream = self.store.update_upstream(id, self.actor, |spec| spec.disabled = disabled).await?;
        let done = if disabled { "disabled" } else { "enabled" };
        Ok(out.done(&view(&upstream), &sentence(done, &upstream))?)
    }

    async fn test(&self, which: &str, out: &mut Output<'_>) -> anyhow::Result<()> {
        let upstream = match self.in_file(which) {
            Some(upstream) => upstream.clone(),
            None => {
                let stored = self.store.find_upstream(which).await?;
                stored.to_upstream(self.fernet.decrypt(&stored.spec.credential)?, Handling::default())
            }
        };
        let start = Instant::now();
        let models = provider::list_models(&upstream).await?;
        let latency_ms = start.elapsed().as_millis();
        let object = json!({ "name": upstream.name, "ok": true, "latency_ms": latency_ms, "models": models });
        let sentence = format!(
            "{} at {} answered in {latency_ms} ms; models: {}",
            upstream.name,
            upstream.base_url,
            if models.is_empty() { "none".to_owned() } else { models.join(", ") }
        );
        Ok(out.done(&object, &sentence)?)
    }
}

fn new_spec(
    name: String,
    settings: UpstreamSettings,
    encrypt: impl FnOnce(&Secret) -> String,
    secret: SecretSource<'_>,
) -> anyhow::Result<UpstreamSpec> {
    // Checked before the secret is asked for.
    tollgate_core::id::check_name(&name).map_err(StoreError::Invalid)?;
    if settings.kind == Some(UpstreamKind::Azure) && settings.base_url.is_none() {
        let example = "--base-url https://NAME.openai.azure.com";
        return Err(WrongUse(format!("an Azure upstream needs the address of its resource: {example}")).into());
    }
    let mut spec = UpstreamSpec {
        name,
        kind: UpstreamKind::OpenAi,
        base_url: BaseUrl::parse(OPENAI).map_err(anyhow::Error::msg)?,
        credential: String::new(),
        models: Vec::new(),
        weight: 1,
        priority: 0,
        api_version: None,
        overrides: Overrides::default(),
        disabled: false,
    };
    settings.apply(&mut spec);
    spec.credential = encrypt(&secret.credential()?);
    Ok(spec)
}

impl UpstreamSettings {
    fn apply(self, spec: &mut UpstreamSpec) {
        spec.kind = self.kind.unwrap_or(spec.kind);
        spec.base_url = self.base_url.unwrap_or_else(|| spec.base_url.clone());
        spec.models = self.models.unwrap_or_else(|| std::mem::take(&mut spec.models));
        spec.weight = self.weight.unwrap_or(spec.weight);
        spec.priority = self.priority.unwrap_or(spec.priority);
        spec.api_version = self.api_version.or_else(|| spec.api_version.take());
    }
}

fn sentence(done: &str, upstream: &StoredUpstream) -> String {
    format!("{done} upstream {} (id {}, {})", upstream.spec.name, upstream.id, upstream.spec.base_url)
}

fn view(upstream: &StoredUpstream) -> Value {
    let mut object = view_of_file(&upstream.to_upstream(Secret::default(), Handling::default()));
    object["source"] = "database".into();
    object["created_at"] = time(upstream.created_at);
    object["disabled_at"] = time(upstream.disabled_at);
    object
}

fn view_of_file(upstream: &Upstream) -> Value {
    json!({
        "id": upstream.id, "name": upstream.name, "source": "file", "kind": upstream.kind,
        "base_url": upstream.base_url.to_string(),
        "models": upstream.models.iter().map(ToString::to_string).collect::<Vec<_>>(), "weight": upstream.weight,
        "priority": upstream.priority, "api_version": upstream.api_version, "disabled": upstream.disabled,
    })
}
