//! `tollgate audit show`: one request, with what is kept of its content.
//!
//! Content is the most private thing in the database, so it is noted in the log of changes who looked at it, before it is
//! shown.

use serde::Serialize;
use serde_json::{Value, value::RawValue};
use uuid::Uuid;

use super::Output;
use crate::{
    seal::{Opened, open},
    secrets::FernetKeys,
    store::{AuditRow, ContentRow, Store},
};

/// How many other requests with the same prompt are named.
const SAME_PROMPT: u32 = 20;

#[derive(Serialize)]
struct Shown<'r> {
    #[serde(flatten)]
    row: &'r AuditRow,
    content: Option<Content>,
}

#[derive(Serialize)]
struct Content {
    mode: &'static str,
    prompt_hash: String,
    /// Ids of other requests, newest first.
    same_prompt: Vec<String>,
    request_bytes: u64,
    answer_bytes: u64,
    truncated: bool,
    /// Are there bodies that no Fernet key decrypts?
    unreadable: bool,
    request: Option<Body>,
    answer: Option<Body>,
}

/// A body: as JSON if it is, else as text.
#[derive(Serialize)]
#[serde(untagged)]
enum Body {
    Json(Box<RawValue>),
    Text(String),
}

impl From<Vec<u8>> for Body {
    fn from(body: Vec<u8>) -> Self {
        let text =
            String::from_utf8(body).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned());
        match serde_json::from_str::<Box<RawValue>>(&text) {
            Ok(json) => Self::Json(json),
            Err(_) => Self::Text(text),
        }
    }
}

impl Body {
    /// What a terminal may be shown: a body must not move its cursor.
    fn printable(&self) -> String {
        let text = match self {
            Self::Json(json) => json.get(),
            Self::Text(text) => text,
        };
        let shown = |c: char| if c.is_control() && !matches!(c, '\n' | '\t') { char::REPLACEMENT_CHARACTER } else { c };
        text.chars().map(shown).collect()
    }
}

pub(super) async fn run(
    request: Uuid,
    store: &Store,
    fernet: &FernetKeys,
    actor: &str,
    out: &mut Output<'_>,
) -> anyhow::Result<()> {
    let row = store.find_request(request).await?;
    let content = match store.find_content(request).await? {
        Some(kept) => Some(content(kept, store, fernet, actor).await?),
        None => None,
    };
    let shown = Shown { row: &row, content };
    if out.json {
        return Ok(writeln!(out.to, "{}", serde_json::to_string(&shown)?)?);
    }
    print(&shown, out)
}

async fn content(kept: ContentRow, store: &Store, fernet: &FernetKeys, actor: &str) -> anyhow::Result<Content> {
    let opened = open(&kept, fernet);
    if matches!(opened, Ok(Some(_))) {
        store.note_content_read(kept.request_id, actor).await?;
    }
    let mut same_prompt = store.requests_of_prompt(&kept.prompt_hash, SAME_PROMPT + 1).await?;
    same_prompt.retain(|id| *id != kept.request_id.hyphenated().to_string());
    same_prompt.truncate(SAME_PROMPT as usize);
    let unreadable = opened.is_err();
    let (request, answer) = match opened.unwrap_or(None) {
        Some(Opened { request, answer }) => (Some(request.into()), Some(answer.into())),
        None => (None, None),
    };
    Ok(Content {
        mode: kept.mode.as_str(),
        prompt_hash: kept.prompt_hash.iter().map(|byte| format!("{byte:02x}")).collect(),
        same_prompt,
        request_bytes: kept.request_bytes,
        answer_bytes: kept.answer_bytes,
        truncated: kept.truncated,
        unreadable,
        request,
        answer,
    })
}

fn print(shown: &Shown<'_>, out: &mut Output<'_>) -> anyhow::Result<()> {
    let mut fields = serde_json::to_value(shown.row)?;
    let Some(content) = &shown.content else {
        fields["content"] = Value::from("none");
        return Ok(out.show(&fields)?);
    };
    fields["content"] = Value::from(content.mode);
    fields["prompt_hash"] = Value::from(&*content.prompt_hash);
    if !content.same_prompt.is_empty() {
        fields["same_prompt"] = Value::from(content.same_prompt.clone());
    }
    fields["request_bytes"] = content.request_bytes.into();
    fields["answer_bytes"] = content.answer_bytes.into();
    fields["truncated"] = content.truncated.into();
    out.show(&fields)?;
    if content.unreadable {
        let text =
            "bring back the Fernet key that it was encrypted with ([secrets] fernet_keys_file, TOLLGATE_FERNET_KEYS)";
        writeln!(out.to, "The content cannot be decrypted: {text}.")?;
    }
    for (name, body) in [("request", &content.request), ("answer", &content.answer)] {
        if let Some(body) = body {
            writeln!(out.to, "\n{name}:\n{}", body.printable())?;
        }
    }
    Ok(())
}
