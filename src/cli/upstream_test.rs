//! `tollgate upstream test`: a cheap real call, and all that its answer tells of the account.

use serde_json::{Value, json};
use tollgate_core::{
    allowance::{Report, Said},
    units::show_duration,
    upstream::{Handling, Upstream},
};

use super::{Output, upstream::Context};
use crate::provider::{self, Examined};

pub(super) async fn run(which: &str, ctx: Context<'_>, out: &mut Output<'_>) -> anyhow::Result<()> {
    let upstream = match ctx.in_file(which) {
        Some(upstream) => upstream.clone(),
        None => {
            let stored = ctx.store.find_upstream(which).await?;
            stored.to_upstream(ctx.fernet.decrypt(&stored.spec.credential)?, Handling::default())
        }
    };
    let examined = provider::examine(&upstream).await;
    let object = view(&upstream, &examined);
    match examined.models {
        Ok(models) => {
            let models = if models.is_empty() { "none".to_owned() } else { models.join(", ") };
            let (name, url, latency_ms) = (&upstream.name, &upstream.base_url, &object["latency_ms"]);
            let limits = in_words(&examined.limits);
            let text = format!("{name} at {url} answered in {latency_ms} ms; models: {models}\naccount: ok{limits}");
            Ok(out.done(&object, &text)?)
        }
        Err(error) => {
            if out.json {
                out.done(&object, "")?;
            }
            Err(error.into())
        }
    }
}

fn view(upstream: &Upstream, examined: &Examined) -> Value {
    let latency_ms = u64::try_from(examined.latency.as_millis()).unwrap_or(u64::MAX);
    let (models, error) = match &examined.models {
        Ok(models) => (Some(models), None),
        Err(error) => (None, Some(error.to_string())),
    };
    json!({
        "name": upstream.name, "ok": models.is_some(), "latency_ms": latency_ms, "models": models,
        "account": examined.account.map(provider::Standing::as_str), "limits": limits(&examined.limits),
        "error": error,
    })
}

fn limits(report: &Report) -> Value {
    let said = |said: Said| {
        let is_silent = said == Said::default();
        (!is_silent).then(|| json!({ "limit": said.limit, "remaining": said.remaining, "reset_ms": said.reset_ms }))
    };
    if *report == Report::default() {
        return Value::Null;
    }
    json!({ "requests": said(report.requests), "tokens": said(report.tokens) })
}

/// What is left of which limit, as far as it was said.
fn in_words(report: &Report) -> String {
    let mut text = String::new();
    for (kind, said) in [("requests", report.requests), ("tokens", report.tokens)] {
        let Some(remaining) = said.remaining else { continue };
        text += &format!("; {kind}: {remaining}");
        text += &said.limit.map(|limit| format!(" of {limit}")).unwrap_or_default();
        text += " left";
        let again = said.reset_ms.map(std::time::Duration::from_millis).map(show_duration);
        text += &again.map(|again| format!(", all again in {again}")).unwrap_or_default();
    }
    text
}
