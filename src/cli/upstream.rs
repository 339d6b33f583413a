//! `tollgate upstream`: the members of the pool. Those of the config file are shown beside those of the database, but
//! changed in the file.

use std::sync::Arc;

use anyhow::bail;
use serde_json::{Value, json};
use tollgate_core::{
    secret::Secret,
    upstream::{BaseUrl, Handling, Overrides, Upstream, UpstreamKind},
};

use super::{
    Output, SecretSource, WrongUse,
    output::time,
    running::{self, Running, Standings},
    upstream_drain, upstream_test,
};
use crate::{
    args::{HandlingSettings, Setting, UpstreamSettings, UpstreamVerb},
    secrets::FernetKeys,
    store::{Store, StoreError, StoredUpstream, UpstreamSpec},
};

/// Where OpenAI itself is.
const OPENAI: &str = "https://api.openai.com/v1";
const COLUMNS: [&str; 11] =
    ["id", "name", "source", "kind", "base_url", "models", "weight", "priority", "disabled", "state", "in_flight"];

/// What these verbs work with.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    pub(super) store: &'a Store,
    pub(super) fernet: &'a FernetKeys,
    pub(super) file_upstreams: &'a [Arc<Upstream>],
    /// How upstreams are handled that do not say otherwise.
    pub(super) handling: Handling,
    pub(super) running: Running,
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
            let spec = new_spec(name, *settings, |credential| ctx.fernet.encrypt(credential), secret)?;
            let added = ctx.store.create_upstream(&spec, ctx.actor).await?;
            out.done(&view(&added), &sentence("added", &added))?;
        }
        UpstreamVerb::List => ctx.list(out).await?,
        UpstreamVerb::Show(which) => ctx.show(&which.upstream, out).await?,
        UpstreamVerb::Update { upstream, name, new_credential, settings } => {
            if name.is_none() && !new_credential && *settings == UpstreamSettings::default() {
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
        UpstreamVerb::Drain(args) => upstream_drain::run(args, ctx, out).await?,
        UpstreamVerb::Remove(which) => {
            let upstream = ctx.stored(&which.upstream).await?;
            ctx.store.remove_upstream(upstream.id, ctx.actor).await?;
            out.done(&view(&upstream), &sentence("removed", &upstream))?;
        }
        UpstreamVerb::Test(which) => upstream_test::run(&which.upstream, ctx, out).await?,
    }
    Ok(())
}

impl Context<'_> {
    /// The upstream of that name in the config file.
    pub(super) fn in_file(&self, name: &str) -> Option<&Upstream> {
        self.file_upstreams.iter().find(|upstream| upstream.name == name).map(|upstream| &**upstream)
    }

    /// The upstream, if it is in the database, where it can be changed.
    pub(super) async fn stored(&self, which: &str) -> anyhow::Result<StoredUpstream> {
        match self.store.find_upstream(which).await {
            Err(StoreError::NotFound(_)) if self.in_file(which).is_some() => {
                bail!("the upstream {which:?} comes from the config file: change it there")
            }
            found => Ok(found?),
        }
    }

    async fn list(&self, out: &mut Output<'_>) -> anyhow::Result<()> {
        let stored = self.store.upstreams().await?;
        let standings = self.running.look().await;
        let in_file = self.file_upstreams.iter().map(|upstream| self.view_of_file(upstream));
        let mut rows: Vec<Value> = in_file.chain(stored.iter().map(view)).collect();
        rows.iter_mut().for_each(|row| self.add_standing(row, standings.as_ref()));
        Ok(out.list(&rows, &COLUMNS)?)
    }

    async fn show(&self, which: &str, out: &mut Output<'_>) -> anyhow::Result<()> {
        let mut object = match self.in_file(which) {
            Some(upstream) => self.view_of_file(upstream),
            None => view(&self.store.find_upstream(which).await?),
        };
        self.add_standing(&mut object, self.running.look().await.as_ref());
        Ok(out.show(&object)?)
    }

    /// Adds how the gateway sees the upstream of this row. Of two with the same name it uses the file's.
    fn add_standing(&self, row: &mut Value, standings: Option<&Standings>) {
        let name = row["name"].as_str().unwrap_or_default();
        let is_used = row["source"] == "file" || self.in_file(name).is_none();
        let standing = standings.filter(|_| is_used).and_then(|standings| standings.get(name));
        for (field, value) in running::fields(standing) {
            row[field] = value;
        }
    }

    async fn set_disabled(&self, which: &str, disabled: bool, out: &mut Output<'_>) -> anyhow::Result<()> {
        let id = self.stored(which).await?.id;
        let upstream = self.store.update_upstream(id, self.actor, |spec| spec.disabled = disabled).await?;
        let done = if disabled { "disabled" } else { "enabled" };
        Ok(out.done(&view(&upstream), &sentence(done, &upstream))?)
    }

    fn view_of_file(&self, upstream: &Upstream) -> Value {
        view_of(upstream, &Overrides::between(upstream.handling, self.handling))
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
        self.handling.apply(&mut spec.overrides);
    }
}

impl HandlingSettings {
    /// Changes what is set.
    fn apply(&self, overrides: &mut Overrides) {
        let ms = |setting: Option<Setting<std::time::Duration>>, stored: Option<u64>| {
            let to_ms = |span: std::time::Duration| u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
            setting.map_or(stored, |setting| setting.value().map(to_ms))
        };
        overrides.connect_timeout_ms = ms(self.connect_timeout, overrides.connect_timeout_ms);
        overrides.first_byte_timeout_ms = ms(self.first_byte_timeout, overrides.first_byte_timeout_ms);
        overrides.chunk_timeout_ms = ms(self.chunk_timeout, overrides.chunk_timeout_ms);
        overrides.total_timeout_ms = ms(self.total_timeout, overrides.total_timeout_ms);
        overrides.rpm = self.rpm.map_or(overrides.rpm, Setting::value);
        overrides.tpm = self.tpm.map_or(overrides.tpm, Setting::value);
        overrides.probe_interval_ms = ms(self.probe_interval, overrides.probe_interval_ms);
    }
}

/// What was done to which upstream.
pub(super) fn sentence(done: &str, upstream: &StoredUpstream) -> String {
    format!("{done} upstream {} (id {}, {})", upstream.spec.name, upstream.id, upstream.spec.base_url)
}

/// An upstream of the database as it is shown.
pub(super) fn view(upstream: &StoredUpstream) -> Value {
    let shown = upstream.to_upstream(Secret::default(), Handling::default());
    let mut object = view_of(&shown, &upstream.spec.overrides);
    object["source"] = "database".into();
    object["created_at"] = time(upstream.created_at);
    object["disabled_at"] = time(upstream.disabled_at);
    object
}

fn view_of(upstream: &Upstream, overrides: &Overrides) -> Value {
    json!({
        "id": upstream.id, "name": upstream.name, "source": "file", "kind": upstream.kind,
        "base_url": upstream.base_url.to_string(),
        "models": upstream.models.iter().map(ToString::to_string).collect::<Vec<_>>(), "weight": upstream.weight,
        "priority": upstream.priority, "api_version": upstream.api_version, "handling": overrides,
        "disabled": upstream.disabled,
    })
}
