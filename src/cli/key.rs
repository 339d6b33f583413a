//! `tollgate key`: the only place where a key's secret is seen, once.

use chrono::{SubsecRound, Utc};
use serde_json::{Value, json};
use tollgate_core::{content::ContentMode, key::ApiKey, limit::ModelLimits};
use zeroize::Zeroizing;

use super::{Output, WrongUse, output::time};
use crate::{
    args::{Allowed, KeySettings, KeyVerb, Setting},
    store::{KeySpec, Store, StoredKey},
};

const COLUMNS: [&str; 14] = [
    "id",
    "user",
    "name",
    "prefix",
    "state",
    "models",
    "allow_ip",
    "rpm",
    "tpm",
    "concurrency",
    "monthly_tokens",
    "monthly_nano_usd",
    "audit_content",
    "expires_at",
];

pub(super) async fn run(verb: KeyVerb, store: &Store, actor: &str, out: &mut Output<'_>) -> anyhow::Result<()> {
    match verb {
        KeyVerb::Create { user, name, settings } => {
            let mut spec = KeySpec { name, ..KeySpec::default() };
            let settings = Resolved::try_new(settings)?;
            settings.apply(&mut spec);
            let (user, key) = (store.find_user(&user).await?, make_key()?);
            let stored = store.create_key(user.id, &spec, &key, actor).await?;
            show_secret(&stored, &key, "created", out)?;
        }
        KeyVerb::List { user } => {
            let user = match user {
                Some(user) => Some(store.find_user(&user).await?.id),
                None => None,
            };
            let rows: Vec<Value> = store.keys(user).await?.iter().map(view).collect();
            out.list(&rows, &COLUMNS)?;
        }
        KeyVerb::Show(which) => out.show(&view(&store.find_key(&which.key).await?))?,
        KeyVerb::Update { key, name, settings } => {
            if name.is_none() && settings == KeySettings::default() {
                return Err(WrongUse("say what to change: see `tollgate key update --help`".to_owned()).into());
            }
            let settings = Resolved::try_new(settings)?;
            let id = store.find_key(&key.key).await?.id;
            let edit = |spec: &mut KeySpec| {
                settings.apply(spec);
                spec.name = name.unwrap_or_else(|| std::mem::take(&mut spec.name));
            };
            let key = store.update_key(id, actor, edit).await?;
            out.done(&view(&key), &sentence("updated", &key))?;
        }
        KeyVerb::Revoke(which) => {
            let id = store.find_key(&which.key).await?.id;
            store.revoke_key(id, actor).await?;
            let key = store.find_key(&id.to_string()).await?;
            out.done(&view(&key), &sentence("revoked", &key))?;
        }
        KeyVerb::Rotate(which) => {
            let (id, key) = (store.find_key(&which.key).await?.id, make_key()?);
            let stored = store.rotate_key(id, &key, actor).await?;
            show_secret(&stored, &key, "rotated", out)?;
        }
    }
    Ok(())
}

fn make_key() -> anyhow::Result<ApiKey> {
    let mut bytes = Zeroizing::new([0; 32]);
    getrandom::fill(&mut *bytes).map_err(|error| anyhow::anyhow!("the system gives no random numbers: {error}"))?;
    Ok(ApiKey::from_random(&bytes))
}

fn show_secret(stored: &StoredKey, key: &ApiKey, done: &str, out: &mut Output<'_>) -> std::io::Result<()> {
    let mut object = json!({ "key": key.expose() });
    if let (Some(object), Value::Object(fields)) = (object.as_object_mut(), view(stored)) {
        object.extend(fields);
    }
    out.done(
        &object,
        &format!(
            "{}\n{}\nIt is shown only now: keep it where your application reads it.",
            sentence(done, stored),
            key.expose()
        ),
    )
}

fn sentence(done: &str, key: &StoredKey) -> String {
    format!("{done} key {} of user {} (id {}, {}...)", key.spec.name, key.user_name, key.id, key.prefix)
}

/// Settings with their times found out, and what takes back apart from what sets.
struct Resolved {
    settings: KeySettings,
    model_limits: Option<Vec<ModelLimits>>,
    /// `Some(None)`: never.
    expires_at: Option<Option<chrono::DateTime<Utc>>>,
}

impl Resolved {
    fn try_new(settings: KeySettings) -> Result<Self, WrongUse> {
        let now = Utc::now();
        let expires_at = settings.expires.map(|expires| expires.value().map(|when| when.after(now).trunc_subsecs(6)));
        if expires_at.flatten().is_some_and(|at| at <= now) {
            return Err(WrongUse("--expires is in the past; `tollgate key revoke` ends a key now".to_owned()));
        }
        let model_limits = settings.model_limits.clone().map(only_limits).transpose()?;
        Ok(Self { settings, model_limits, expires_at })
    }

    fn apply(&self, spec: &mut KeySpec) {
        let settings = &self.settings;
        settings.limits.apply(&mut spec.limits);
        settings.content.apply(&mut spec.audit_content);
        spec.model_limits = self.model_limits.clone().unwrap_or_else(|| std::mem::take(&mut spec.model_limits));
        spec.expires_at = self.expires_at.unwrap_or(spec.expires_at);
        if let Some(models) = &settings.models {
            spec.models = models.iter().map(|model| model.trim().to_owned()).collect();
        }
        if let Some(allow_ip) = &settings.allow_ip {
            let nets = allow_ip.iter().map(|allowed| match allowed {
                Allowed::Any => None,
                Allowed::Only(net) => Some(*net),
            });
            // `any` among networks allows everything, as the empty list does.
            spec.allow_ip = nets.collect::<Option<_>>().unwrap_or_default();
        }
    }
}

/// The limits that are meant: none of them, or all.
fn only_limits(settings: Vec<Setting<ModelLimits>>) -> Result<Vec<ModelLimits>, WrongUse> {
    if settings.len() > 1 && settings.contains(&Setting::Unset) {
        return Err(WrongUse("--model-limits none removes all limits of models, so it stands alone".to_owned()));
    }
    Ok(settings.into_iter().filter_map(Setting::value).collect())
}

fn view_of_model(entry: &ModelLimits) -> Value {
    let limits = &entry.limits;
    json!({
        "model": entry.model, "rpm": limits.rpm, "tpm": limits.tpm, "concurrency": limits.concurrency,
        "monthly_tokens": limits.monthly_tokens, "monthly_nano_usd": limits.monthly_nano_usd,
    })
}

fn view(key: &StoredKey) -> Value {
    let spec = &key.spec;
    let is_expired = spec.expires_at.is_some_and(|at| at <= Utc::now());
    let state = match key.revoked_at {
        Some(_) => "revoked",
        None if is_expired => "expired",
        None => "live",
    };
    json!({
        "id": key.id, "prefix": key.prefix, "name": spec.name, "user": key.user_name, "user_id": key.user_id,
        "state": state, "models": spec.models,
        "allow_ip": spec.allow_ip.iter().map(ToString::to_string).collect::<Vec<_>>(), "rpm": spec.limits.rpm,
        "tpm": spec.limits.tpm, "concurrency": spec.limits.concurrency, "monthly_tokens": spec.limits.monthly_tokens,
        "monthly_nano_usd": spec.limits.monthly_nano_usd,
        "model_limits": spec.model_limits.iter().map(view_of_model).collect::<Vec<_>>(),
        "audit_content": spec.audit_content.map(ContentMode::as_str),
        "created_at": time(key.created_at), "expires_at": time(spec.expires_at), "revoked_at": time(key.revoked_at),
    })
}
