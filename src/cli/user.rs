//! `tollgate user`

use serde_json::{Value, json};
use tollgate_core::{content::ContentMode, limit::Limits};

use super::{Output, WrongUse, output::time};
use crate::{
    args::{ContentSetting, LimitSettings, Setting, UserVerb},
    store::{Store, StoredUser, UserSpec},
};

const COLUMNS: [&str; 10] = [
    "id",
    "name",
    "disabled",
    "rpm",
    "tpm",
    "concurrency",
    "monthly_tokens",
    "monthly_nano_usd",
    "audit_content",
    "created_at",
];

pub(super) async fn run(verb: UserVerb, store: &Store, actor: &str, out: &mut Output<'_>) -> anyhow::Result<()> {
    match verb {
        UserVerb::Create { name, limits, content } => {
            let mut spec = UserSpec { name, ..UserSpec::default() };
            limits.apply(&mut spec.limits);
            content.apply(&mut spec.audit_content);
            let user = store.create_user(&spec, actor).await?;
            out.done(&view(&user), &format!("created user {} (id {})", user.spec.name, user.id))?;
        }
        UserVerb::List => {
            let rows: Vec<Value> = store.users().await?.iter().map(view).collect();
            out.list(&rows, &COLUMNS)?;
        }
        UserVerb::Show(which) => out.show(&view(&store.find_user(&which.user).await?))?,
        UserVerb::Update { user, name, limits, content } => {
            if name.is_none() && limits == LimitSettings::default() && content == ContentSetting::default() {
                return Err(WrongUse("say what to change: see `tollgate user update --help`".to_owned()).into());
            }
            let id = store.find_user(&user.user).await?.id;
            let edit = |spec: &mut UserSpec| {
                limits.apply(&mut spec.limits);
                content.apply(&mut spec.audit_content);
                spec.name = name.unwrap_or_else(|| std::mem::take(&mut spec.name));
            };
            let user = store.update_user(id, actor, edit).await?;
            out.done(&view(&user), &format!("updated user {} (id {id})", user.spec.name))?;
        }
        UserVerb::Disable(which) => set_disabled(&which.user, true, store, actor, out).await?,
        UserVerb::Enable(which) => set_disabled(&which.user, false, store, actor, out).await?,
    }
    Ok(())
}

async fn set_disabled(
    which: &str,
    disabled: bool,
    store: &Store,
    actor: &str,
    out: &mut Output<'_>,
) -> anyhow::Result<()> {
    let id = store.find_user(which).await?.id;
    let user = store.update_user(id, actor, |spec| spec.disabled = disabled).await?;
    let what = if disabled { "disabled" } else { "enabled" };
    Ok(out.done(&view(&user), &format!("{what} user {} (id {id})", user.spec.name))?)
}

impl LimitSettings {
    /// Changes the limits that are set.
    pub(super) fn apply(&self, limits: &mut Limits) {
        limits.rpm = self.rpm.map_or(limits.rpm, Setting::value);
        limits.tpm = self.tpm.map_or(limits.tpm, Setting::value);
        limits.concurrency = self.concurrency.map_or(limits.concurrency, Setting::value);
        limits.monthly_tokens = self.monthly_tokens.map_or(limits.monthly_tokens, Setting::value);
        limits.monthly_nano_usd = self.monthly_usd.map_or(limits.monthly_nano_usd, Setting::value);
    }
}

impl ContentSetting {
    /// Changes what is set.
    pub(super) fn apply(self, mode: &mut Option<ContentMode>) {
        *mode = self.audit_content.map_or(*mode, Setting::value);
    }
}

fn view(user: &StoredUser) -> Value {
    let spec = &user.spec;
    json!({
        "id": user.id, "name": spec.name, "disabled": spec.disabled, "rpm": spec.limits.rpm, "tpm": spec.limits.tpm,
        "concurrency": spec.limits.concurrency, "monthly_tokens": spec.limits.monthly_tokens,
        "monthly_nano_usd": spec.limits.monthly_nano_usd,
        "audit_content": spec.audit_content.map(ContentMode::as_str), "created_at": time(user.created_at),
        "disabled_at": time(user.disabled_at),
    })
}
