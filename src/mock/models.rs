//! `/v1/models`: what the mock says it has. It answers for any other name too, unless it begins with `unknown`.

use serde_json::{Value, json};

use super::error::ApiError;

/// Name, snapshot that it stands for, release in seconds since 1970, owner.
const MODELS: &[(&str, &str, u64, &str)] = &[
    ("gpt-4o", "gpt-4o-2024-08-06", 1_715_367_049, "system"),
    ("gpt-4o-mini", "gpt-4o-mini-2024-07-18", 1_721_172_741, "system"),
    ("gpt-4.1", "gpt-4.1-2025-04-14", 1_744_316_542, "system"),
    ("gpt-4.1-mini", "gpt-4.1-mini-2025-04-14", 1_744_318_173, "system"),
    ("gpt-4", "gpt-4-0613", 1_687_882_411, "openai"),
    ("gpt-3.5-turbo", "gpt-3.5-turbo-0125", 1_677_610_602, "openai"),
    ("gpt-3.5-turbo-instruct", "gpt-3.5-turbo-instruct:20230824-v2", 1_692_901_427, "system"),
    ("text-embedding-3-small", "text-embedding-3-small", 1_705_948_997, "system"),
    ("text-embedding-3-large", "text-embedding-3-large", 1_705_953_180, "system"),
    ("text-embedding-ada-002", "text-embedding-ada-002-v2", 1_671_217_299, "openai-internal"),
];

/// Does the mock serve `model`?
pub(super) fn exists(model: &str) -> bool {
    !model.is_empty() && !model.starts_with("unknown")
}

/// The dated name behind `model`; a name that is not in the list stands for itself.
pub(super) fn snapshot(model: &str) -> &str {
    MODELS.iter().find(|(name, ..)| *name == model).map_or(model, |(_, snapshot, ..)| snapshot)
}

/// The list.
pub(super) fn list() -> Value {
    let data: Vec<_> = MODELS.iter().map(|&(name, _, created, owner)| entry(name, created, owner)).collect();
    json!({"object": "list", "data": data})
}

/// One model.
pub(super) fn show(name: &str) -> Result<Value, ApiError> {
    match MODELS.iter().find(|(listed, ..)| *listed == name) {
        Some(&(name, _, created, owner)) => Ok(entry(name, created, owner)),
        None if exists(name) => Ok(entry(name, 1_700_000_000, "system")),
        None => Err(ApiError::model_not_found(name)),
    }
}

fn entry(name: &str, created: u64, owner: &str) -> Value {
    json!({"id": name, "object": "model", "created": created, "owned_by": owner})
}
